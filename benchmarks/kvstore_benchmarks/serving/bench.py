"""`kvstore bench serve`: what the store costs and saves a server that many clients use.

Two servers on the same core take turns, one without the store and one with it, and get
the same requests. Which begins alternates, so that a slow moment of the machine does not
always fall on the same one. Before each turn vLLM's own cache is emptied.

At the end the one with the store says what the connector's hooks cost its engine's thread.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from kvstore_benchmarks.end_to_end.watch import Hits, Watch
from kvstore_benchmarks.figures import machine
from kvstore_benchmarks.progress import Progress, progress
from kvstore_benchmarks.server import Server
from kvstore_benchmarks.serving import hooks, sides
from kvstore_benchmarks.serving.instance import Instance, Shape
from kvstore_benchmarks.serving.load import Harness, Met
from kvstore_benchmarks.serving.model import served_model
from kvstore_benchmarks.serving.report import faults, figures_of, show
from kvstore_benchmarks.serving.workloads import CLIENTS, Workload, workloads

DRAM = "1GiB"
NVME = "2GiB"
CONTEXT = 4096
CACHE_BLOCKS = 160
"""5,120 tokens: what the clients have under way fits, what they come back to does not."""

HOOK_ROUNDS = 3

WARM_UP = -1
"""The round before the first: it touches every page, and is not kept."""


class Served(Protocol):
    """What is asked of a server beside the load."""

    @property
    def port(self) -> int: ...
    def get(self, path: str) -> str: ...
    def forget(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Options:
    rounds: int = 5
    folder: Path | None = None
    trace: Path | None = None
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One server's, in one round."""

    met: Met
    sources: sides.Sources
    hits: Hits


@dataclass(slots=True)
class Measured:
    """Of one workload; `without[i]` and `with_store[i]` are of the same round."""

    workload: Workload
    without: list[Turn] = field(default_factory=list)
    with_store: list[Turn] = field(default_factory=list)


def run(options: Options, *, as_object: bool) -> int:
    """Print the figures; 1 where a request failed or vLLM loaded more than the store handed out."""
    with progress() as step:
        figures = measure(options, step)
    if as_object:
        print(json.dumps(figures, indent=2))
    else:
        show(figures, Console())
    wrong = faults(figures)
    for line in wrong:
        Console(stderr=True).print(f"[red]{line}[/red]")
    return 1 if wrong else 0


def measure(options: Options, step: Progress) -> dict[str, Any]:
    step("building the model")
    model = served_model(options.folder)
    with ExitStack() as stack:
        server = stack.enter_context(Server(dram=DRAM, nvme=NVME, folder=options.folder))
        step("starting two servers and the clients")
        # The last core is for the clients and the store, where there is more than one.
        shape = Shape(cores="0", context=CONTEXT, cache_blocks=CACHE_BLOCKS)
        without = stack.enter_context(Instance("without", model, shape))
        times = stack.enter_context(hooks.HookTimes())
        store = stack.enter_context(Instance("store", model, shape, server.endpoint, times))
        harness = stack.enter_context(Harness(model))
        without.wait_ready()
        store.wait_ready()
        harness.wait_ready()
        watch = stack.enter_context(Watch(server.endpoint))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        every = workloads(options.trace, scratch, quick=options.quick)
        bench = Bench(without, store, watch, harness)
        measured = [bench.measure(one, options.rounds, step) for one in every]
        step(f"hooks: prompts of {hooks.TOKENS} tokens, first missed and then found")
        rounds = min(options.rounds, HOOK_ROUNDS)
        return {
            **machine(),
            "clients": CLIENTS,
            "cache_blocks": CACHE_BLOCKS,
            "workloads": {one.workload.name: figures_of(one) for one in measured},
            "hooks": hooks.measure(store, harness, times, rounds),
        }


@dataclass(frozen=True, slots=True)
class Bench:
    without: Served
    store: Served
    watch: Watch
    harness: Harness

    def measure(self, workload: Workload, rounds: int, step: Progress) -> Measured:
        measured = Measured(workload)
        for number in range(WARM_UP, rounds):
            step(f"{workload.name}: {workload.text}, round {number + 1} of {rounds}")
            arguments = workload.arguments(number)
            if number % 2 == 0:
                alone, beside = self.turn(self.without, arguments), self.turn(self.store, arguments)
            else:
                beside, alone = self.turn(self.store, arguments), self.turn(self.without, arguments)
            if number != WARM_UP:
                measured.without.append(alone)
                measured.with_store.append(beside)
        return measured

    def turn(self, server: Served, arguments: list[str]) -> Turn:
        server.forget()
        before = sides.sources(server.get("/metrics"))
        self.watch.mark()
        met = self.harness.run(server.port, arguments)
        after = sides.sources(server.get("/metrics"))
        return Turn(met, after.since(before), self.watch.hits())
