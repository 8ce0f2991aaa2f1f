"""`kvstore bench priorities`: what is left of the hits of what matters, while more and more
that does not is asked for beside it.

Two classes of requests share one tier, of priority 100 and of priority 0. Alone are those of
high priority; with a load of 10 there are ten times as many of low priority among them, in the
same time. Either class is made up, conversations that share no block, or is a trace and copies
of it under names of their own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore.core.policies import POLICIES
from kvstore.sim.processes import spread
from kvstore.sim.readers import read_traces
from kvstore.sim.replay import Progress, Replay
from kvstore.sim.stacks import policy_of_a_server
from kvstore.sim.sweep import cores
from kvstore.sim.trace import Request, Trace, merged, pieces_of
from kvstore_benchmarks.figures import finite, ratio
from kvstore_benchmarks.plots import figure_into
from kvstore_benchmarks.policies.priority_plots import draw
from kvstore_benchmarks.present import present
from kvstore_benchmarks.progress import Progress as Step

HIGH, LOW = 100, 0
SEED = 11
SESSIONS_PER_S = 0.02
"""Where a trace's sessions carry no common time."""


@dataclass(frozen=True, slots=True)
class Options:
    """`loads`: of low priority, as parts of the requests of high priority. `requests`: of high
    priority, made up, or the first ones of `trace`."""

    policies: tuple[str, ...] = ("worth", "priority-lru", "lru")
    capacities: tuple[int, ...] = (1500,)
    loads: tuple[int, ...] = (1, 3, 10)
    requests: int = 1200
    trace: Path | None = None


QUICK = Options(requests=200, capacities=(300,))


def conversations(count: int, seed: int, priority: int) -> Trace:
    """So many requests, evenly over a second: conversations of some turns that a person
    thinks between, some two hundred requests long."""
    draw = random.Random(seed)
    waiting: list[tuple[float, int, list[int], int]] = []
    fresh = opened = 0
    clock = 0.0
    requests: list[Request] = []
    while len(requests) < count:
        clock += 1
        if draw.random() < 0.25:
            opened += 1
            turns = 1 + min(int(draw.expovariate(1 / 6)), 40)
            heappush(waiting, (clock, opened, [], turns))
        while waiting and waiting[0][0] <= clock and len(requests) < count:
            _, number, prompt, turns = heappop(waiting)
            grown = 3 + int(draw.expovariate(1 / 5))
            prompt = [*prompt, *range(fresh, fresh + grown)]
            fresh += grown
            now = 1000 * len(requests) / count
            tokens = 512 * len(prompt)
            requests.append(Request(now, tokens, 1, pieces_of(prompt), priority=priority))
            if turns > 1:
                back = clock + draw.lognormvariate(5.3, 0.8)
                heappush(waiting, (back, number, prompt, turns - 1))
    return Trace(512, fresh, requests)


def begun_at(trace: Trace, part: float) -> Trace:
    """The same requests, the first `part` of them after all others: copies that begin at
    different places do not ask for the same at the same time."""
    cut = int(part * len(trace.requests))
    later, sooner = trace.requests[:cut], trace.requests[cut:]
    begin_ms, end_ms = trace.requests[0].time_ms, trace.requests[-1].time_ms
    moved = [
        *_delayed(sooner, begin_ms - sooner[0].time_ms),
        *_delayed(later, end_ms - sooner[0].time_ms),
    ]
    return Trace(trace.block_tokens, trace.blocks, moved)


def _delayed(requests: Iterable[Request], ms: float) -> Iterable[Request]:
    return (replace(request, time_ms=request.time_ms + ms) for request in requests)


def of_priority(trace: Trace, priority: int) -> Trace:
    requests = [replace(request, priority=priority) for request in trace.requests]
    return Trace(trace.block_tokens, trace.blocks, requests)


@dataclass(frozen=True, slots=True)
class Classes:
    """`given`: what the class of high priority asks for, where that is not made up."""

    requests: int
    given: Trace | None = None

    def mixed(self, load: int) -> Trace:
        """Both classes, with so many times as many requests of low priority."""
        if self.given is None:
            high = conversations(self.requests, SEED, HIGH)
            low = [conversations(load * self.requests, SEED + 1, LOW)] if load else []
        else:
            high = of_priority(self.given, HIGH)
            copy = of_priority(self.given, LOW)
            low = [begun_at(copy, number / (load + 1)) for number in range(1, load + 1)]
        return merged([high, *low])


def token_hits(policy: str, trace: Trace, capacity: int, progress: Progress) -> dict[int, float]:
    """By priority, the part of the prompts' tokens up to the first block that is missing; in
    the order of references that the server has."""
    result = Replay(POLICIES[policy](), trace, capacity).run(by_chain=True, progress=progress)
    return {
        priority: ratio(found, tokens) for priority, (tokens, found) in result.by_priority.items()
    }


def measure(
    policies: Sequence[str], capacities: Sequence[int], loads: Sequence[int], classes: Classes,
    progress: Progress | None = None, processes: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each policy, size and load, a load of 0 being nothing of low priority."""
    points = [(p, c, load) for p in policies for c in capacities for load in (0, *loads)]
    # What takes longest is begun first.
    order = sorted(range(len(points)), key=lambda number: -points[number][2])

    def replay(number: int, tell: Progress) -> dict[str, Any]:
        policy, capacity, load = points[order[number]]
        started = perf_counter()
        hits = token_hits(policy, classes.mixed(load), capacity, tell)
        return {
            "policy": policy,
            "capacity_blocks": capacity,
            "load": load,
            "high": finite(hits[HIGH]),
            "low": finite(hits[LOW]) if load else None,
            "seconds": round(perf_counter() - started, 3),
        }

    found = spread(len(points), replay, processes, progress)
    rows = [row for _, row in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]
    alone: dict[tuple[str, int], float] = {}
    for row in rows:
        of = alone.setdefault((row["policy"], row["capacity_blocks"]), row["high"])
        row["kept"] = finite(ratio(row["high"], of))
    return rows


def run(options: Options, *, as_object: bool, plots: Path | None) -> int:
    """Raises `BadRequest` for a policy that a server has not, `TraceError`, `NoPlots`."""
    names = [policy_of_a_server(name) for name in options.policies]
    if plots is not None:
        figure_into(plots)
    figures = present(
        lambda step: _figures(options, names, step), lambda pictures, figures: None, _show,
        as_object=as_object, plots=None,
    )  # fmt: skip
    if plots is not None:
        draw(figures, plots)
    return 0


def _figures(options: Options, names: Sequence[str], step: Step) -> dict[str, Any]:
    given = None
    if options.trace is not None:
        step("reading")
        whole = read_traces([options.trace], session_rate=SESSIONS_PER_S, seed=1)
        given = Trace(whole.block_tokens, whole.blocks, whole.requests[: options.requests])
    told = -1

    def tell(part: float) -> None:
        nonlocal told
        if int(10 * part) > told:
            told = int(10 * part)
            step(f"replaying, {10 * told} % done")

    classes = Classes(options.requests, given)
    rows = measure(names, options.capacities, options.loads, classes, tell, cores())
    return {
        "of": "conversations" if options.trace is None else options.trace.name,
        "requests": options.requests if given is None else len(given.requests),
        "rows": rows,
    }


def _show(figures: dict[str, Any], console: Console) -> None:
    asked = f"{figures['requests']} requests ({figures['of']})"
    tables = {
        f"Token hits of {asked} of priority {HIGH}, and what that is of those alone": _high,
        f"Token hits of priority {LOW}": _low,
    }
    for title, text in tables.items():
        table = Table(title=title)
        table.add_column("policy")
        table.add_column("blocks", justify="right")
        rows = [row for row in figures["rows"] if text(row)]
        for load in dict.fromkeys(row["load"] for row in rows):
            table.add_column(f"low x{load}" if load else "alone", justify="right")
        cells: dict[tuple[str, int], list[str]] = {}
        for row in rows:
            cells.setdefault((row["policy"], row["capacity_blocks"]), []).append(text(row))
        for (policy, capacity), texts in cells.items():
            table.add_row(policy, str(capacity), *texts)
        console.print(table)


def _high(row: dict[str, Any]) -> str:
    kept = f" {row['kept']:.1%}" if row["load"] and row["kept"] is not None else ""
    return f"{row['high']:.4f}{kept}"


def _low(row: dict[str, Any]) -> str:
    return f"{row['low']:.4f}" if row["load"] else ""
