"""One round is: a plain copy, a put, a get, and, on a server of our own, the way
to NVMe and back beside O_DIRECT on the same device. All of a round move the same
bytes, and rounds follow each other, so every figure meets the same machine.

Blocks go as chains, many to a call, as an engine's connector does it: a chain of
256 blocks at most is one reserve and one commit. What a call for a single block
takes is a figure of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from kvstore.client.lease import Layout
from kvstore.client.sync import Client
from kvstore.errors import KVStoreError, NoLowerTier
from kvstore.types import KEY_BYTES, LayoutSpec, PutOutcome
from kvstore_benchmarks.figures import gbps, timed
from kvstore_benchmarks.local.baselines import Blocks, DirectFile, aligned_blocks, memcpy_seconds

BLOCK_BYTES = (64 << 10, 1 << 20, 4 << 20)
CHAIN_LENGTHS = (1, 32, 256, 1024)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure. `round_bytes`: moved by each step of each round."""

    rounds: int = 7
    round_bytes: int = 128 << 20
    calls: int = 300
    """Of each kind of lookup and of single puts and gets."""


QUICK = Plan(rounds=2, round_bytes=16 << 20, calls=20)


@dataclass(slots=True)
class Bandwidth:
    """Samples in GB/s for one block size."""

    memcpy: list[float] = field(default_factory=list)
    put: list[float] = field(default_factory=list)
    get: list[float] = field(default_factory=list)
    direct_write: list[float] = field(default_factory=list)
    direct_read: list[float] = field(default_factory=list)
    nvme_write: list[float] = field(default_factory=list)
    nvme_get: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Latency:
    """Samples in microseconds. Lookups by the length of the chain."""

    hit: dict[int, list[float]] = field(default_factory=dict)
    miss: dict[int, list[float]] = field(default_factory=dict)
    rpc: list[float] = field(default_factory=list)
    """The smallest call over gRPC: the bound of every call that asks the server."""
    put_one: list[float] = field(default_factory=list)
    get_one: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Samples:
    """What was measured. `local`: whether bytes went through shared memory."""

    local: bool
    bandwidth: dict[int, Bandwidth] = field(default_factory=dict)
    latency: Latency = field(default_factory=Latency)


class Wrong(KVStoreError):
    """The store answered in a way that makes a figure meaningless."""


def measure(client: Client, plan: Plan, home: Path | None, progress: Progress) -> Samples:
    """Run everything against one server.

    `home`: a folder on the device of the server's data. None where the server is
    not our own: then nothing is cleared and nothing is sent to NVMe, because others
    use it.
    """
    samples = Samples(local=client.is_local)
    for nbytes in BLOCK_BYTES:
        samples.bandwidth[nbytes] = _Copies(client, plan, nbytes, home).run(progress)
    progress("lookups")
    _latencies(client, plan, samples.latency)
    return samples


class _Copies:
    """The rounds of one block size."""

    def __init__(self, client: Client, plan: Plan, nbytes: int, home: Path | None) -> None:
        self._client = client
        self._plan = plan
        self._home = home
        self._nbytes = nbytes
        self._layout = _layout(client, nbytes)
        count = max(plan.round_bytes // nbytes, 1)
        self._sources = aligned_blocks(count, nbytes)
        self._targets = aligned_blocks(count, nbytes)
        for block in self._sources:
            block[:32] = secrets.token_bytes(32)

    def run(self, progress: Progress) -> Bandwidth:
        bandwidth = Bandwidth()
        moved = len(self._sources) * self._nbytes
        # The round before the first touches every page, here and in the server.
        for index in range(-1, self._plan.rounds):
            progress(f"blocks of {self._nbytes >> 10} KiB, round {index + 1}")
            for name, seconds in self._round().items():
                if index >= 0:
                    getattr(bandwidth, name).append(gbps(moved, seconds))
        return bandwidth

    def _round(self) -> dict[str, float]:
        seconds = {"memcpy": memcpy_seconds(self._targets, self._sources)}
        keys = _keys(len(self._sources))
        with timed() as timer:
            outcomes = self._client.put_many(self._layout, keys, self._sources)
        if set(outcomes) != {PutOutcome.STORED}:
            raise Wrong(f"not every block was stored: {sorted({o.value for o in outcomes})}")
        seconds["put"] = timer.seconds
        seconds["get"] = self._get(keys)
        if self._home is not None:
            seconds |= self._nvme(keys, self._home)
            self._client.clear()
        return seconds

    def _get(self, keys: list[bytes]) -> float:
        _erase(self._targets)
        with timed() as timer:
            got = self._client.get_many(self._layout, keys, into=self._targets)
        if any(view is None for view in got) or not _equal(self._targets, self._sources):
            raise Wrong("a get returned other bytes than were put, or none")
        return timer.seconds

    def _nvme(self, keys: list[bytes], home: Path) -> dict[str, float]:
        try:
            with timed() as flush:
                self._client.flush(drop=True)
        except NoLowerTier:
            return {}
        seconds = {"nvme_write": flush.seconds, "nvme_get": self._get(keys)}
        with DirectFile(home) as file:
            seconds["direct_write"] = file.write_seconds(self._sources)
            seconds["direct_read"] = file.read_seconds(self._targets)
        return seconds


def _latencies(client: Client, plan: Plan, latency: Latency) -> None:
    layout = _layout(client, 64 << 10)
    block = aligned_blocks(1, layout.block_bytes)[0]
    held = _keys(max(CHAIN_LENGTHS))
    client.put_many(layout, held, [block] * len(held))
    kinds: list[tuple[list[float], Callable[[], object]]] = [(latency.rpc, client.server_info)]
    for length in CHAIN_LENGTHS:
        for taken, keys in ((latency.hit, held[:length]), (latency.miss, _keys(length))):
            kinds.append((taken.setdefault(length, []), partial(client.lookup, layout, keys)))
    kinds += [
        (latency.put_one, lambda: client.put(layout, secrets.token_bytes(KEY_BYTES), block)),
        (latency.get_one, lambda: client.get(layout, held[0], into=block)),
    ]
    for _, call in kinds:
        call()
    # One of each in turn, so that a slow moment falls on all alike.
    for samples, call in islice(cycle(kinds), plan.calls * len(kinds)):
        with timed() as timer:
            call()
        samples.append(timer.seconds * 1e6)
    for length in CHAIN_LENGTHS:
        if client.lookup(layout, held[:length]).held != length:
            raise Wrong(f"a chain of {length} blocks was put and is not held")


def _layout(client: Client, nbytes: int) -> Layout:
    return client.register_layout(
        LayoutSpec(model="kvstore-bench", dtype="uint8", block_tokens=32, block_bytes=nbytes)
    )


def _keys(count: int) -> list[bytes]:
    return [secrets.token_bytes(KEY_BYTES) for _ in range(count)]


def _erase(blocks: Blocks) -> None:
    for block in blocks:
        block[:32] = bytes(32)


def _equal(left: Blocks, right: Blocks) -> bool:
    """By the random bytes that each block begins with and one at its end."""
    return all(a[:32] == b[:32] and a[-1] == b[-1] for a, b in zip(left, right, strict=True))
