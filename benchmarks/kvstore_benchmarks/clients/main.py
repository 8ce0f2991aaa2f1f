"""`kvstore bench clients`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvstore_benchmarks.clients.crowd import Crowd, Shift
from kvstore_benchmarks.clients.report import faults, p99_ratios, shift_figures
from kvstore_benchmarks.clients.rude import WAYS
from kvstore_benchmarks.clients.tables import show
from kvstore_benchmarks.clients.work import SHAPES
from kvstore_benchmarks.figures import finite, gbps, machine, median
from kvstore_benchmarks.local.baselines import aligned_blocks, memcpy_seconds
from kvstore_benchmarks.present import present
from kvstore_benchmarks.progress import Progress
from kvstore_benchmarks.server import Server

DRAM = "1GiB"
SEED = 20261
COPY_BYTES = 64 << 20
COPIES = 7

ALONE = "nobody else"
ONE_MORE = "one more"


@dataclass(frozen=True, slots=True)
class Options:
    """`counts`: of clients, each measured for `seconds`. `crowd`: the polite clients that
    a rude one is set beside, `rounds` times for each way of being rude."""

    counts: tuple[int, ...] = (1, 4, 16, 64)
    seconds: float = 5.0
    crowd: int = 8
    rounds: int = 2
    folder: Path | None = None


QUICK = Options(counts=(1, 3), seconds=0.3, crowd=2, rounds=1)


def run(options: Options, *, as_object: bool, plots: Path | None) -> int:
    """0, or 1 where a client met an error or got other bytes than were put."""
    figures = present(
        partial(_figures, options),
        lambda pictures, figures: pictures.clients(figures),
        show,
        as_object=as_object,
        plots=plots,
    )
    return 1 if faults(figures) else 0


def _figures(options: Options, step: Progress) -> dict[str, Any]:
    figures: dict[str, Any] = {**machine(), "seconds": options.seconds, "seed": SEED}
    figures["dram"] = DRAM
    figures["shapes"] = [asdict(shape) for shape in SHAPES]
    figures["memcpy_gbps"] = finite(_memcpy_gbps())
    with ExitStack() as stack:
        server = stack.enter_context(Server(dram=DRAM, nvme="0", folder=options.folder))
        crowd = stack.enter_context(Crowd(server.endpoint, server.pid, SEED))
        step("documents")
        crowd.fill()
        figures["clients"], figures["apart"] = {}, {}
        for count in sorted(options.counts):
            step(f"{count} clients start")
            crowd.grow(count)
            # New clients have yet to map the server's memory and to touch its pages.
            step(f"{count} clients, warm-up")
            crowd.work(count, options.seconds / 2)
            for name, apart in (("clients", False), ("apart", True)):
                step(f"{count} clients{', apart from the server' if apart else ''}")
                crowd.apart(apart)
                shift = crowd.work(count, options.seconds)
                figures[name][str(count)] = shift_figures([shift])
        crowd.apart(True)
        figures["rude"] = _rude(crowd, options, step)
    return figures


def _rude(crowd: Crowd, options: Options, step: Progress) -> dict[str, Any]:
    """Every scenario once a round, so that a slow moment falls on all alike."""
    shifts: dict[str, list[Shift]] = {}
    for number in range(options.rounds):
        for name in (ALONE, ONE_MORE, *WAYS):
            step(f"{options.crowd} clients and {name}, round {number + 1} of {options.rounds}")
            if name in WAYS:
                shift = crowd.beside(options.crowd, options.seconds, name)
            else:
                shift = crowd.work(options.crowd + (name == ONE_MORE), options.seconds)
            shifts.setdefault(name, []).append(shift)
    scenarios = {name: shift_figures(of_name) for name, of_name in shifts.items()}
    for name, of_name in shifts.items():
        scenarios[name]["p99_to_one_more"] = p99_ratios(scenarios[name], scenarios[ONE_MORE])
        if name in WAYS:
            scenarios[name]["rude"] = [shift.rude for shift in of_name]
    return {"crowd": options.crowd, "scenarios": scenarios}


def _memcpy_gbps() -> float:
    """One thread, blocks of 1 MiB: for scale."""
    count = COPY_BYTES >> 20
    sources, targets = aligned_blocks(count, 1 << 20), aligned_blocks(count, 1 << 20)
    return median([gbps(COPY_BYTES, memcpy_seconds(targets, sources)) for _ in range(COPIES)])
