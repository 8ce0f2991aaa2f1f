"""One measurement, in a process of its own: a store that starts on a filled directory.

    python -m kvstore_benchmarks.scale.child DIRECTORY BLOCKS POLICY HELD

prints one JSON object. It is the store as the server runs it, without the server
around it: what is measured is what every call waits for.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import xxhash

from kvstore.clock import MonotonicClock
from kvstore.config import StoreConfig
from kvstore.local.directory import DirectoryReader
from kvstore.naming import namer
from kvstore.store import MAX_RUNNING, Session, Store
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier
from kvstore.types import ChainQuery, Segment
from kvstore_benchmarks.figures import quantiles as figures_quantiles
from kvstore_benchmarks.scale.fill import (
    BLOCK_BYTES,
    CHAIN,
    CLEARED,
    EXTENT_BYTES,
    KEPT,
    MAX_BLOCKS,
    SPEC,
    capacity_for,
    chain,
    cleared_blocks,
    tenant_key,
)
from kvstore_server.interpreter import prepare_interpreter, short_collections

DRAM_EXTENT_BYTES = 4 << 20
ROOM = 2
"""DRAM for so many times what it holds: nothing need be written back meanwhile."""
SAMPLES = 2000
_TICK_S = 0.001
_CHECKSUM = xxhash.xxh3_64_intdigest(bytes(BLOCK_BYTES))
"""Of a slot that nobody wrote: memory that is new."""

Figures = dict[str, object]


class Silent:
    """A StoreObserver."""

    def transfer_done(self, src: str, dst: str, kind: str, nbytes: int, seconds: float) -> None: ...
    def evicted(self, tier: str, reason: str, blocks: int) -> None: ...
    def io_error(self, op: str, errno_name: str) -> None: ...
    def corrupt(self, tier: str) -> None: ...
    def tier_off(self, tier: str) -> None: ...
    def coded(self, codec: str, src: str, dst: str) -> None: ...
    def straight_refused(self, gpu: str, reason: str) -> None: ...


class Stalls:
    """The longest that the event loop kept something waiting that was due."""

    def __init__(self) -> None:
        self._longest = 0.0

    async def watch(self) -> None:
        while True:
            due = time.perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self._longest = max(self._longest, time.perf_counter() - due)

    async def begin(self) -> None:
        await asyncio.sleep(2 * _TICK_S)
        self._longest = 0.0

    def longest_ms(self) -> float:
        return round(self._longest * 1e3, 1)


class Collections:
    """How long the interpreter's garbage collections took."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._began = 0.0
        gc.callbacks.append(self._note)

    def _note(self, phase: str, _: object) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._began = now
        else:
            self.longest_s = max(self.longest_s, now - self._began)


def memory(kind: str) -> int:
    """Bytes of this process: RssAnon, or VmHWM, its largest resident size so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"the kernel does not tell {kind}")


def quantiles(seconds: list[float]) -> Figures:
    """Microseconds."""
    return dict(figures_quantiles([each * 1e6 for each in seconds], 2))


def sampled(work: Callable[[int], None], count: int = SAMPLES) -> list[float]:
    taken = []
    for number in range(count):
        began = time.perf_counter()
        work(number)
        taken.append(time.perf_counter() - began)
    return taken


@contextmanager
def timed(figures: Figures, name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    figures[name] = round(time.perf_counter() - began, 3)


async def measure(path: Path, blocks: int, policy: str, held: int) -> Figures:
    """`held`: blocks in DRAM."""
    chains = held // CHAIN
    figures: Figures = {
        "blocks": blocks // CHAIN * CHAIN,
        "dram_blocks": chains * CHAIN,
        "policy": policy,
    }
    stalls, collections = Stalls(), Collections()
    watching = asyncio.create_task(stalls.watch())
    anonymous = memory("RssAnon")
    prepare_interpreter()
    await stalls.begin()
    with timed(figures, "start_s"):
        store = await _started(path, blocks, policy, held)
    figures["start_blocks_per_s"] = round(blocks / float(str(figures["start_s"])))
    figures["start_stall_ms"] = stalls.longest_ms()
    collecting = asyncio.create_task(short_collections(lambda: False))
    await asyncio.sleep(0)
    figures["start_peak_mib"] = memory("VmHWM") >> 20
    figures["memory_bytes_per_block"] = round((memory("RssAnon") - anonymous) / blocks, 1)
    directory = os.fstat(store.directory_fd()).st_blocks * 512
    figures["directory_bytes_per_block"] = round(directory / blocks, 1)
    try:
        await _measure_lookups(figures, store, path, blocks)
        await _measure_leases(figures, store, chains)
        await _measure_clear(figures, store, stalls, blocks)
        figures["longest_collection_ms"] = round(collections.longest_s * 1e3, 1)
        gc.unfreeze()
        with timed(figures, "full_collection_s"):
            gc.collect()
    finally:
        for task in (watching, collecting):
            task.cancel()
        await store.close()
    return figures


async def _started(path: Path, blocks: int, policy: str, held: int) -> Store:
    extents = -(-ROOM * held * BLOCK_BYTES // DRAM_EXTENT_BYTES)
    dram_bytes = extents * DRAM_EXTENT_BYTES
    nvme = await asyncio.to_thread(
        NvmeTier.open, path, capacity_for(blocks, held), EXTENT_BYTES, MAX_BLOCKS
    )
    store = Store(
        config=StoreConfig(
            dram_capacity_bytes=dram_bytes,
            lease_ms=600_000,
            max_blocks=MAX_BLOCKS,
            eviction=policy,
        ),
        clock=MonotonicClock(),
        dram=DramTier(DRAM_EXTENT_BYTES, dram_bytes),
        nvme=nvme,
        tenant_key=partial(tenant_key, nvme.secret()),
        executor=ThreadPoolExecutor(MAX_RUNNING + 4),
        observer=Silent(),
    )
    await store.start()
    return store


async def _measure_lookups(figures: Figures, store: Store, path: Path, blocks: int) -> None:
    secret = tenant_key((path / "secret").read_bytes(), KEPT)
    names = [namer(secret, SPEC.layout_id)]
    reader = DirectoryReader(os.dup(store.directory_fd()))
    chosen = random.Random(1)
    first, last = cleared_blocks(blocks) // CHAIN, blocks // CHAIN
    chains = [chain(chosen.randrange(first, last)) for _ in range(SAMPLES)]
    absent = [chain(last + number) for number in range(SAMPLES)]
    for keys in chains:
        if reader.prefix(names, keys).held != CHAIN:
            raise AssertionError("a block that is stored is not in the directory")
    figures["lookup_hit_us"] = quantiles(sampled(lambda n: void(reader.prefix(names, chains[n]))))
    figures["lookup_miss_us"] = quantiles(sampled(lambda n: void(reader.prefix(names, absent[n]))))
    queries = [[ChainQuery([SPEC.layout_id], keys)] for keys in chains]
    asked = []
    for query in queries:
        began = time.perf_counter()
        await store.lookup(KEPT, query)
        asked.append(time.perf_counter() - began)
    figures["server_lookup_us"] = quantiles(asked)


def void(_: object) -> None:
    """Drop a result."""


async def _measure_leases(figures: Figures, store: Store, chains: int) -> None:
    session = store.open_session(KEPT, local=True)
    fresh = [chain((1 << 40) + number) for number in range(chains)]
    stored = []
    for keys in fresh:
        slots = (await store.reserve(session, SPEC.layout_id, CHAIN, 1000)).first_slot
        segment = Segment(b"", keys, range(slots, slots + CHAIN), [_CHECKSUM] * CHAIN)
        began = time.perf_counter()
        await store.commit(session, SPEC.layout_id, [segment], 0)
        stored.append(time.perf_counter() - began)
    figures["commit_us"] = quantiles(stored)
    chosen = random.Random(2)
    acquired, released = [], []
    for _ in range(SAMPLES):
        keys = chosen.choice(fresh)
        began = time.perf_counter()
        [grant] = await store.acquire(session, [ChainQuery([SPEC.layout_id], keys)], 1000)
        middle = time.perf_counter()
        store.release(session, [grant.lease_id])
        released.append(time.perf_counter() - middle)
        acquired.append(middle - began)
        if grant.held != CHAIN:
            raise AssertionError("a block that is in DRAM is not leased")
    figures["acquire_us"] = quantiles(acquired)
    figures["release_us"] = quantiles(released)
    store.close_session(session)


async def _measure_clear(figures: Figures, store: Store, stalls: Stalls, blocks: int) -> None:
    session = store.open_session(KEPT, local=True)
    keys = chain(1 << 40)
    await stalls.begin()
    clearing = asyncio.create_task(store.clear(CLEARED))
    began = time.perf_counter()
    waited = []
    while not clearing.done():
        waited.append(await _one_call(store, session, keys))
    figures["clear_s"] = round(time.perf_counter() - began, 3)
    figures["cleared_blocks"] = await clearing
    figures["clear_stall_ms"] = stalls.longest_ms()
    figures["acquire_while_clearing_us"] = quantiles(waited)
    if figures["cleared_blocks"] != cleared_blocks(blocks):
        raise AssertionError("a clear forgot another number of blocks than there were")
    await stalls.begin()
    with timed(figures, "flush_s"):
        figures["flushed_blocks"] = await store.flush(KEPT, True)
    figures["flush_stall_ms"] = stalls.longest_ms()


async def _one_call(store: Store, session: Session, keys: list[bytes]) -> float:
    """What a client waits that comes at any time: for its turn, and for the call."""
    began = time.perf_counter()
    await asyncio.sleep(0)
    [grant] = await store.acquire(session, [ChainQuery([SPEC.layout_id], keys)], 1000)
    store.release(session, [grant.lease_id])
    return time.perf_counter() - began


def main() -> int:
    figures = asyncio.run(
        measure(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    )
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
