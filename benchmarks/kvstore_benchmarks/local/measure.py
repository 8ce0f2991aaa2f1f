"""Everything that `kvstore bench local` measures, in order."""

from __future__ import annotations

from pathlib import Path

from kvstore.client.sync import Client
from kvstore_benchmarks.local.copies import Copies
from kvstore_benchmarks.local.lookups import lookups
from kvstore_benchmarks.local.peers import Peers
from kvstore_benchmarks.local.samples import BLOCK_BYTES, Bandwidth, Plan, Samples
from kvstore_benchmarks.progress import Progress


def measure(
    client: Client,
    peers: Peers,
    plan: Plan,
    samples: Samples,
    step: Progress,
    *,
    own: bool,
    nvme: Path | None,
) -> None:
    """Run everything against one server, and the peers beside it.

    `own`: nobody else uses the server, so blocks may be cleared. `nvme`: a folder on
    the device of the server's data, or None not to send anything there.
    """
    for nbytes in BLOCK_BYTES:
        bandwidth = samples.bandwidth.setdefault(nbytes, Bandwidth())
        copies = Copies(client, peers, plan, nbytes, own=own, nvme=nvme)
        for index in range(-1, plan.rounds):
            step(f"blocks of {nbytes >> 10} KiB, round {index + 1} of {plan.rounds}")
            copies.round(index, bandwidth)
    step("lookups and calls")
    lookups(client, plan, samples.latency)
    if peers.running:
        step("lookups and calls of the peers")
        peers.calls()
