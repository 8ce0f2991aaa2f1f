"""The figures of `kvstore bench clients` as one object."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvstore_benchmarks.clients.crowd import Shift
from kvstore_benchmarks.figures import finite, jain, quantiles, ratio

KINDS = ("lookup", "get", "put")


def shift_figures(shifts: Iterable[Shift]) -> dict[str, Any]:
    """Of one or several shifts of the same clients. Throughput in 10^9 bytes a second,
    latencies in microseconds; `server_cpu` and `client_cpu` in cores; `jain` and
    `slowest_to_fastest` over the steps that each client completed."""
    shifts = list(shifts)
    seconds = sum(shift.seconds for shift in shifts)
    tallies = [tally for shift in shifts for tally in shift.tallies]
    steps = [
        sum(tally.steps for tally in of_client)
        for of_client in zip(*(shift.tallies for shift in shifts), strict=True)
    ]
    calls = {kind: [us for t in tallies for us in getattr(t, f"{kind}_us")] for kind in KINDS}
    errors: dict[str, int] = {}
    for tally in tallies:
        for name, count in tally.errors.items():
            errors[name] = errors.get(name, 0) + count
    figures: dict[str, Any] = {
        "gbps_in": finite(sum(tally.bytes_in for tally in tallies) / seconds / 1e9),
        "gbps_out": finite(sum(tally.bytes_out for tally in tallies) / seconds / 1e9),
        "steps_per_s": finite(sum(steps) / seconds, 1),
        "calls_per_s": finite(sum(map(len, calls.values())) / seconds, 1),
        "steps_by_client": steps,
        "jain": finite(jain(steps)),
        "slowest_to_fastest": finite(ratio(min(steps), max(steps)), 3),
        "server_cpu": finite(sum(shift.server_cpu for shift in shifts) / len(shifts), 3),
        "client_cpu": finite(sum(tally.cpu_s for tally in tallies) / seconds, 3),
    }
    for kind, taken in calls.items():
        longest = finite(max(taken), 1) if taken else None
        figures[f"{kind}_us"] = {**quantiles(taken), "max": longest}
    for name in ("denied", "missed", "wrong"):
        figures[f"{name}_blocks"] = sum(getattr(tally, name) for tally in tallies)
    figures["errors"] = errors
    return figures


def p99_ratios(figures: dict[str, Any], base: dict[str, Any]) -> dict[str, float | None]:
    """How many times longer calls take at p99 than in `base`."""
    ratios = {}
    for kind in KINDS:
        here, there = figures[f"{kind}_us"]["p99"], base[f"{kind}_us"]["p99"]
        ratios[kind] = finite(ratio(here, there), 2) if here and there else None
    return ratios


def faults(figures: dict[str, Any]) -> int:
    """Errors that clients met, and blocks that came back wrong: there must be none."""
    groups = (figures["clients"], figures["apart"], figures["rude"]["scenarios"])
    every = [one for group in groups for one in group.values()]
    return sum(one["wrong_blocks"] + sum(one["errors"].values()) for one in every)
