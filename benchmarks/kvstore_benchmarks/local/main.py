"""`kvstore bench local`."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvstore.client.sync import Client
from kvstore_benchmarks.local.measure import measure
from kvstore_benchmarks.local.peers import Peers
from kvstore_benchmarks.local.report import as_json
from kvstore_benchmarks.local.samples import QUICK, Plan, Samples
from kvstore_benchmarks.local.tables import show
from kvstore_benchmarks.peers.peer import KINDS
from kvstore_benchmarks.present import present
from kvstore_benchmarks.progress import Progress
from kvstore_benchmarks.server import Server

DRAM = "768MiB"
NVME = "1GiB"
CLIENT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """`endpoint`: a server to measure, None to start one. `folder`: where its data may
    lie. `peers`: the folder of their environments, None to leave them out."""

    endpoint: str | None = None
    folder: Path | None = None
    nvme: bool = True
    peers: Path | None = None
    rounds: int | None = None
    quick: bool = False


def run(options: Options, *, as_object: bool, plots: Path | None) -> int:
    present(
        partial(_figures, options),
        lambda pictures, figures: pictures.local(figures),
        show,
        as_object=as_object,
        plots=plots,
    )
    return 0


def _figures(options: Options, step: Progress) -> dict[str, Any]:
    plan = QUICK if options.quick else Plan()
    if options.rounds is not None:
        plan = dataclasses.replace(plan, rounds=options.rounds)
    with ExitStack() as stack:
        own, nvme, endpoint = False, None, options.endpoint
        if endpoint is None:
            size = NVME if options.nvme else "0"
            server = stack.enter_context(Server(dram=DRAM, nvme=size, folder=options.folder))
            own, endpoint = True, server.endpoint
            nvme = server.home if options.nvme else None
        client = stack.enter_context(Client(endpoint, timeout_s=CLIENT_TIMEOUT_S))
        samples = Samples(local=client.is_local)
        peers = stack.enter_context(Peers(samples.peers, plan))
        if options.peers is not None:
            step("the peers start")
            peers.start(KINDS, options.peers)
        measure(client, peers, plan, samples, step, own=own, nvme=nvme)
        return as_json(samples)
