"""`kvstore bench local`."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from kvstore.client.sync import Client
from kvstore_benchmarks.local.measure import QUICK, Plan, Progress, Samples, measure
from kvstore_benchmarks.local.report import as_json, show
from kvstore_benchmarks.server import Server

DRAM = "768MiB"
NVME = "1GiB"
CLIENT_TIMEOUT_S = 60.0


def run(endpoint: str | None, folder: Path | None, *, quick: bool, as_object: bool) -> int:
    plan = QUICK if quick else Plan()
    console = Console(stderr=True)
    with console.status("starting") as status:

        def progress(step: str) -> None:
            status.update(f"measuring: {step}")

        if endpoint is None:
            with Server(dram=DRAM, nvme=NVME, folder=folder) as server:
                samples = _measured(server.endpoint, plan, server.home, progress)
        else:
            samples = _measured(endpoint, plan, None, progress)
    if as_object:
        print(json.dumps(as_json(samples), indent=2))
    else:
        show(samples, Console())
    return 0


def _measured(endpoint: str, plan: Plan, home: Path | None, progress: Progress) -> Samples:
    with Client(endpoint, timeout_s=CLIENT_TIMEOUT_S) as client:
        return measure(client, plan, home, progress)
