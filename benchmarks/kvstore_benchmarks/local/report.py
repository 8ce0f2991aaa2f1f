"""The figures of `kvstore bench local` as one object."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvstore_benchmarks.figures import finite, machine, median, quantiles, ratio
from kvstore_benchmarks.local.samples import LOOKUP_KINDS, Bandwidth, Lookups, PeerSamples, Samples

BANDWIDTHS = ("memcpy", "put", "get", "direct_write", "direct_read", "nvme_write", "nvme_get")
RATIOS = {
    "put_to_memcpy": ("put", "memcpy"),
    "get_to_memcpy": ("get", "memcpy"),
    "nvme_write_to_direct": ("nvme_write", "direct_write"),
    "nvme_get_to_direct": ("nvme_get", "direct_read"),
}


def as_json(samples: Samples) -> dict[str, Any]:
    """One object. Bandwidths in 10^9 bytes a second by block size in bytes, latencies
    in microseconds; medians, of ratios those within a round. null: not measured."""
    bandwidth, latency = samples.bandwidth, samples.latency
    figures: dict[str, Any] = {"local": samples.local, **machine()}
    figures["rounds"] = max((len(taken.memcpy) for taken in bandwidth.values()), default=0)
    for name in BANDWIDTHS:
        figures[f"{name}_gbps"] = _medians(bandwidth, name)
    figures["ratios"] = {
        name: {
            str(size): _paired(getattr(taken, over), getattr(taken, under))
            for size, taken in bandwidth.items()
        }
        for name, (over, under) in RATIOS.items()
    }
    figures["lookup_us"] = _lookup_figures(latency.lookup)
    figures["lookup_samples"] = _least(latency.lookup)
    figures["lookup_rpcs"] = latency.lookup_rpcs
    figures["harness_us"] = quantiles(latency.harness, 2)
    figures["acquire_release_us"] = {
        str(length): quantiles(taken) for length, taken in latency.acquire_release.items()
    }
    for name in ("rpc", "put_one", "get_one"):
        figures[f"{name}_us"] = quantiles(getattr(latency, name))
    if samples.peers:
        figures["peers"] = {name: _peer(peer) for name, peer in samples.peers.items()}
        figures["ratios_to_peers"] = {
            name: _to_peer(samples, peer) for name, peer in samples.peers.items()
        }
    figures["aims"] = [
        {"figure": figure, "value": finite(value, 3), "aim": aim, "reached": reached}
        for figure, value, aim, reached in _aims(figures)
    ]
    return figures


def _peer(samples: PeerSamples) -> dict[str, Any]:
    """`failed_blocks` were not moved, `wrong_blocks` came back with other bytes."""
    figures: dict[str, Any] = {"available": samples.reason is None}
    if samples.reason is not None:
        figures["reason"] = samples.reason
    if not samples.version:
        return figures
    figures |= {"version": samples.version, "way": samples.way}
    figures |= {"failed_blocks": samples.failed, "wrong_blocks": samples.wrong}
    for name in ("put", "get"):
        figures[f"{name}_gbps"] = _medians(samples.bandwidth, name)
    figures["lookup_us"] = _lookup_figures(samples.lookup)
    figures["lookup_samples"] = _least(samples.lookup)
    for name in ("put_one", "get_one"):
        figures[f"{name}_us"] = quantiles(getattr(samples, name))
    return figures


def _to_peer(samples: Samples, peer: PeerSamples) -> dict[str, Any]:
    """How many times faster ours is: bandwidth within rounds, lookups by their p50."""
    ratios: dict[str, Any] = {
        name: {
            str(size): _paired(
                getattr(ours, name), getattr(peer.bandwidth.get(size, Bandwidth()), name)
            )
            for size, ours in samples.bandwidth.items()
        }
        for name in ("put", "get")
    }
    for kind, by_length in samples.latency.lookup.items():
        theirs = peer.lookup.get(kind, {})
        ratios[f"lookup_{kind}"] = {
            str(length): finite(ratio(median(theirs.get(length, [])), median(ours)), 1)
            for length, ours in by_length.items()
        }
    for name in ("put_one", "get_one"):
        ours = getattr(samples.latency, name)
        ratios[name] = finite(ratio(median(getattr(peer, name)), median(ours)), 2)
    return ratios


def _medians(bandwidth: dict[int, Bandwidth], name: str) -> dict[str, float | None]:
    return {str(size): finite(median(getattr(taken, name))) for size, taken in bandwidth.items()}


def _paired(values: list[float], bounds: list[float]) -> float | None:
    """The median of the ratios within each round, where both sides met the same
    machine; of the rounds that both took part in."""
    pairs = zip(values, bounds, strict=False)
    return finite(median([ratio(value, bound) for value, bound in pairs]), 3)


def _lookup_figures(lookup: Lookups) -> dict[str, Any]:
    return {
        kind: {str(length): quantiles(taken, 2) for length, taken in lookup[kind].items()}
        for kind in LOOKUP_KINDS
        if kind in lookup
    }


def _least(lookup: Lookups) -> int:
    return min((len(taken) for kind in lookup.values() for taken in kind.values()), default=0)


Aim = tuple[str, float, str, bool]


def _aims(figures: dict[str, Any]) -> Iterable[Aim]:
    """What the store is meant to reach, as ratios or on this machine's clock."""

    def least(name: str, value: float | None, bound: float) -> Iterable[Aim]:
        if value is not None:
            yield name, value, f">= {bound:g}", value >= bound

    def most(name: str, value: float | None, bound: float) -> Iterable[Aim]:
        if value is not None:
            yield name, value, f"<= {bound:g}", value <= bound

    for way in ("put", "get"):
        for size, bound in ((str(1 << 20), 0.8), (str(64 << 10), 0.5)):
            share = figures["ratios"][f"{way}_to_memcpy"].get(size)
            yield from least(f"{way} of {int(size) >> 10} KiB to a plain copy", share, bound)
    for kind, bound in (("hit", 5), ("partial", 15), ("miss", 3)):
        for length in ("256", "2000"):
            taken = figures["lookup_us"].get(kind, {}).get(length)
            if taken:
                name = f"lookup of {length}, {kind}"
                yield from most(f"{name}, p50 us", taken["p50"], bound)
                yield from most(f"{name}, p99 / p50", taken["p99"] / taken["p50"], 5)
    yield from most("calls to the server for all misses", figures["lookup_rpcs"].get("miss"), 0)
    taken = figures["acquire_release_us"].get("2000")
    yield from most("acquire and release of 2000, p50 us", taken and taken["p50"], 2000)
    beside = figures.get("ratios_to_peers", {}).get("mooncake")
    if beside:
        one_mib = str(1 << 20)
        yield from least("put of 1024 KiB to Mooncake's", beside["put"].get(one_mib), 20)
        yield from least("get of 1024 KiB to Mooncake's", beside["get"].get(one_mib), 6)
        hit = beside.get("lookup_hit", {}).get("256")
        yield from least("lookup of 256 to Mooncake's", hit, 20)
