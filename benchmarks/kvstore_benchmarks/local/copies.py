"""One round of one block size: a plain copy, a put, a get, the same by each peer, and,
on a server of our own, the way to NVMe and back beside O_DIRECT on the same device.

All of a round move as many bytes, and rounds follow each other, so that every figure
meets the same machine. Blocks go as chains, many to a call, as an engine's connector
sends them; what a call for a single block takes is a figure of its own.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import numpy as np

from kvstore.client.lease import Layout
from kvstore.client.sync import Client
from kvstore.errors import NoLowerTier
from kvstore.types import KEY_BYTES, LayoutSpec, PutOutcome
from kvstore_benchmarks.figures import gbps, timed
from kvstore_benchmarks.local.baselines import Blocks, DirectFile, aligned_blocks, memcpy_seconds
from kvstore_benchmarks.local.peers import Peers
from kvstore_benchmarks.local.samples import Bandwidth, Plan, Wrong

NVME_PATIENCE_S = 120.0


class Copies:
    """`own`: whether the server is ours to clear. `nvme`: a folder on the device of its
    data, where that is to be measured."""

    def __init__(
        self, client: Client, peers: Peers, plan: Plan, nbytes: int, *, own: bool, nvme: Path | None
    ) -> None:
        self._client = client
        self._peers = peers
        self._own = own
        self._nvme_folder = nvme
        self._nbytes = nbytes
        self._layout = register(client, nbytes)
        self._count = max(plan.round_bytes // nbytes, 1)
        self._sources = aligned_blocks(self._count, nbytes)
        self._targets = aligned_blocks(self._count, nbytes)
        for block in self._sources:
            block[:32] = secrets.token_bytes(32)
        peers.prepare(nbytes, self._count)

    def round(self, index: int, bandwidth: Bandwidth) -> None:
        """The round before the first, -1, touches every page, and is not a sample."""
        # Who begins moves on with the round: what one leaves behind, warm caches or
        # bytes on their way to disk, does not always meet the same one.
        turns = ["", *self._peers.running]
        first = index % len(turns)
        for name in turns[first:] + turns[:first]:
            if name:
                self._peers.round(name, self._nbytes, self._count, count=index >= 0)
                continue
            for step, seconds in self._ours().items():
                if index >= 0:
                    moved = self._count * self._nbytes
                    getattr(bandwidth, step).append(gbps(moved, seconds))

    def _ours(self) -> dict[str, float]:
        seconds = {"memcpy": memcpy_seconds(self._targets, self._sources)}
        keys = new_keys(self._count)
        with timed() as timer:
            outcomes = self._client.put_many(self._layout, keys, self._sources)
        if set(outcomes) != {PutOutcome.STORED}:
            raise Wrong(f"not every block was stored: {sorted({o.value for o in outcomes})}")
        seconds["put"] = timer.seconds
        seconds["get"] = self._get(keys)
        if self._nvme_folder is not None:
            seconds |= self._nvme(keys, self._nvme_folder)
        if self._own:
            self._client.clear()
        return seconds

    def _get(self, keys: list[bytes], patience_s: float = 0.0) -> float:
        """What has not come when a get ends, as from a disk that is slow, is asked for again."""
        for block in self._targets:
            block[:] = bytes(len(block))
        wanted, into = keys, self._targets
        give_up = time.monotonic() + patience_s
        with timed() as timer:
            while missing := self._missing(wanted, into):
                if time.monotonic() > give_up:
                    raise Wrong("a get did not return every block")
                wanted, into = [wanted[i] for i in missing], [into[i] for i in missing]
        if not equal(self._targets, self._sources):
            raise Wrong("a get returned other bytes than were put")
        return timer.seconds

    def _missing(self, keys: list[bytes], into: Blocks) -> list[int]:
        """Which of them a get did not return."""
        got = self._client.get_many(self._layout, keys, into=into)
        return [number for number, view in enumerate(got) if view is None]

    def _nvme(self, keys: list[bytes], folder: Path) -> dict[str, float]:
        try:
            with timed() as flush:
                self._client.flush(drop=True)
        except NoLowerTier:
            return {}
        seconds = {"nvme_write": flush.seconds, "nvme_get": self._get(keys, NVME_PATIENCE_S)}
        with DirectFile(folder) as file:
            seconds["direct_write"] = file.write_seconds(self._sources)
            seconds["direct_read"] = file.read_seconds(self._targets)
        return seconds


def register(client: Client, nbytes: int) -> Layout:
    return client.register_layout(
        LayoutSpec(model="kvstore-bench", dtype="uint8", block_tokens=32, block_bytes=nbytes)
    )


def new_keys(count: int) -> list[bytes]:
    return [secrets.token_bytes(KEY_BYTES) for _ in range(count)]


def equal(left: Blocks, right: Blocks) -> bool:
    return all(
        np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8))
        for a, b in zip(left, right, strict=True)
    )
