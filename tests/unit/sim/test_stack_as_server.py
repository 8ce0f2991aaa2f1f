"""The simulator comes to what the server comes to: the same requests are put to a real
store on tiers in memory, and every lease, every counter and every block held are equal.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import xxhash

from kvstore.config import StoreConfig
from kvstore.core.actions import Copy
from kvstore.core.cost import Prefill
from kvstore.core.planner import Planner
from kvstore.sim.batches import Batches
from kvstore.sim.events import Events
from kvstore.sim.machine import Machine, Room, Tiers, nvme_slot_bytes, paces_of, room_in
from kvstore.sim.saving import RESERVE_WAIT_MS
from kvstore.sim.serving import METERED, METERED_TOKENS
from kvstore.sim.stack import TENANT, Stack
from kvstore.sim.trace import Request, Trace, pieces_of
from kvstore.store import MAX_RUNNING, Store
from kvstore.tiers import nvme_slot
from kvstore.tiers.memory import HeapMemory, HeapStorage
from kvstore.types import (
    KEY_BYTES,
    ChainQuery,
    Hints,
    LayoutSpec,
    Reuse,
    Segment,
    SessionState,
    Tier,
)
from tests.simulation.virtual import NoExecutor, VirtualLoop

BLOCK_TOKENS = 16
BLOCK = 4096
SLOW, FAST = 1600.0, 16e6
"""Tokens a second: a block is loaded much sooner than it is computed, or much later."""


def machine(tokens_per_s: float) -> Machine:
    prefill = Prefill(1e9, 1, 1, 1, 2e9 * tokens_per_s)
    return Machine(prefill, kv_bytes=BLOCK / BLOCK_TOKENS)


def trace(seed: int, count: int = 80) -> Trace:
    """Conversations that grow, of several priorities, so far apart that all that follows
    from a request is over when the next one comes, and never at the moment of a tick."""
    draw = random.Random(seed)
    prompts: list[list[int]] = []
    fresh, requests = 8, []
    states = [None, SessionState.WAITING, SessionState.IDLE, SessionState.ENDED]
    for number in range(count):
        if len(prompts) < 12:
            prompts.append(list(range(8)))
        session = draw.randrange(len(prompts))
        prompt = prompts[session]
        if draw.random() < 0.15:
            del prompt[draw.randrange(8, len(prompt) + 1) :]
        grown = draw.randrange(1, 25)
        prompt += range(fresh, fresh + grown)
        fresh += grown
        tokens = BLOCK_TOKENS * len(prompt)
        requests.append(
            Request(
                3_000.0 * number + 37, tokens, 1, pieces_of(prompt), session,
                draw.choice((10, 50, 90)), draw.choice(("", "chat")), draw.choice(states),
            )
        )  # fmt: skip
        if len(prompt) > 90:
            prompts[session] = list(range(8))
    return Trace(BLOCK_TOKENS, fresh, requests)


class Loop(VirtualLoop):
    """Threads copy as long as the simulator's drive does, and do all else in no time."""

    def __init__(self, engine: Machine) -> None:
        super().__init__(random.Random(0))
        self._drives = Events()
        self._drive = Batches(self._drives, paces_of(engine))

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        copies = func.args[0] if isinstance(func, partial) else None
        if isinstance(copies, list) and copies and isinstance(copies[0], Copy):
            self._drives.run(self.now_ns())
            self._drive.begin(
                copies[0].target.tier,
                len(copies),
                sum(nvme_slot_bytes(c.target.block.layout.block_bytes) for c in copies),
                lambda: self._finish(future, *self._outcome(func, args)),
            )
            self._look_again()
        else:
            self._finish(future, *self._outcome(func, args))
        return future

    def _look_again(self) -> None:
        next_ns = self._drives.next_ns
        if next_ns is not None:
            self.call_at(next_ns / 1e9, self._look, next_ns)

    def _look(self, now_ns: int) -> None:
        if now_ns > self._drives.now_ns:
            self._drives.run(now_ns)
            self._look_again()


class Storage(HeapStorage):
    def slot_bytes(self, block_bytes: int) -> int:
        return nvme_slot.slot_bytes(block_bytes)


class Silent:
    """A StoreObserver that has nothing to hear of but moves."""

    def transfer_done(self, src: str, dst: str, kind: str, nbytes: int, seconds: float) -> None:
        return None

    def evicted(self, tier: str, reason: str, blocks: int) -> None:
        return None

    def io_error(self, op: str, errno_name: str) -> None:
        raise AssertionError(f"{op}: {errno_name}")

    def corrupt(self, tier: str) -> None:
        raise AssertionError(tier)

    def tier_off(self, tier: str) -> None:
        raise AssertionError(tier)

    def coded(self, codec: str, src: str, dst: str) -> None:
        raise AssertionError(codec)

    def straight_refused(self, gpu: str, reason: str) -> None:
        raise AssertionError(reason)


class Came(NamedTuple):
    """What came of all requests."""

    leased: list[tuple[int, int]]
    """Blocks of each request, and those of them from DRAM."""
    counters: object
    held: dict[Tier, set[bytes]]
    evictions: dict[Tier, int]


def came_of(planner: Planner, leased: list[tuple[int, int]]) -> Came:
    planner.check_integrity()
    pools = [pool for pool in (planner.residency.dram, planner.residency.nvme) if pool]
    return Came(
        leased,
        planner.counters,
        {pool.tier: {r.block.stored_key for r in pool.replicas()} for pool in pools},
        {pool.tier: pool.evictions for pool in pools},
    )


def simulated(asked: Trace, tiers: Tiers, engine: Machine, policy: str) -> Came:
    stack = Stack(asked, tiers, engine, policy)
    tickets = []
    acquire = stack.planner.acquire

    def noting(*args: Any, **kwargs: Any) -> Any:
        tickets.append(acquire(*args, **kwargs))
        return tickets[-1]

    stack.planner.acquire = noting  # type: ignore[method-assign]
    seen = stack.run()
    leased = [(t.answer[0].held, t.answer[0].from_dram) for t in tickets if t.answer]
    assert seen.blocks_from[Tier.DRAM] == sum(dram for _, dram in leased)
    assert sum(seen.blocks_from.values()) == sum(held for held, _ in leased)
    return came_of(stack.planner, leased)


def served(asked: Trace, tiers: Tiers, engine: Machine, policy: str) -> Came:
    loop = Loop(engine)
    asyncio.set_event_loop(loop)
    try:
        found = loop.run(serve(loop, asked, room_in(tiers, engine, BLOCK_TOKENS), engine, policy))
    finally:
        asyncio.set_event_loop(None)
        loop.abandon()
    assert isinstance(found, Came)
    return found


async def serve(loop: Loop, asked: Trace, room: Room, engine: Machine, policy: str) -> Came:
    nvme = None
    if room.nvme is not None:
        nvme = Storage(room.nvme.capacity_bytes, room.nvme.extent_bytes)
    store = Store(
        config=StoreConfig(dram_capacity_bytes=0, eviction=policy),
        clock=loop,
        dram=HeapMemory(room.dram.extent_bytes, room.dram.capacity_bytes),
        nvme=nvme,
        tenant_key=str.encode,
        executor=NoExecutor(),  # type: ignore[arg-type]
        observer=Silent(),
    )
    await store.start()
    session = store.open_session(TENANT, local=True)
    layout_id = store.register_layout(
        TENANT, LayoutSpec("simulated", "simulated", BLOCK_TOKENS, room.block_bytes)
    )
    leased: list[tuple[int, int]] = []
    speeds: list[float] = []
    begin_s, copy_s = loop.time(), room.block_bytes / engine.dram_bytes_per_s
    checksum = xxhash.xxh3_64_intdigest(bytes(room.block_bytes))
    for number, request in enumerate(asked.requests):
        await asyncio.sleep(begin_s + request.time_ms / 1e3 - loop.time())
        keys = [n.to_bytes(KEY_BYTES, "big") for f, s in request.pieces for n in range(f, s)]
        name = b"%d" % request.session if request.session is not None else b""
        reuse = Reuse(request.priority, (), name, request.category, b"%d" % number)
        hints = Hints(request.priority, statistics.median(speeds[-METERED:]) if speeds else 0.0)
        (grant,) = await store.acquire(
            session, [ChainQuery([layout_id], keys, reuse)], engine.acquire_timeout_ms, hints
        )
        leased.append((grant.held, grant.from_dram))
        await asyncio.sleep(grant.held * copy_s)
        if grant.lease_id:
            store.release(session, [grant.lease_id])
        had = min(grant.held * BLOCK_TOKENS, request.tokens - 1)
        taken_s = (engine.prefill.ms(request.tokens) - engine.prefill.ms(had)) / 1e3
        await asyncio.sleep(taken_s)
        if request.tokens - had >= METERED_TOKENS:
            speeds.append((request.tokens - had) / taken_s)
        await put(store, session, layout_id, keys, grant.held, reuse, checksum, copy_s)
        if request.then is not None:
            store.hint(TENANT, name, request.then, None)
    await asyncio.sleep(3)
    found = came_of(store._planner, leased)
    await store.close()
    return found


async def put(
    store: Store, session: Any, layout_id: bytes, keys: list[bytes], begin: int, reuse: Reuse,
    checksum: int, copy_s: float,
) -> None:  # fmt: skip
    """As an engine's connector does: what is not there already, in one piece."""
    (there,) = await store.lookup(TENANT, [ChainQuery([layout_id], keys[begin:])])
    begin += there.held
    if begin == len(keys):
        return
    slots = await store.reserve(session, layout_id, len(keys) - begin, RESERVE_WAIT_MS)
    count = len(slots.addresses)
    await asyncio.sleep(count * copy_s)
    ids = range(slots.first_slot, slots.first_slot + count)
    for slot in ids:
        view = store.slot_view(session, slot)
        view[:] = bytes(len(view))
    parent = keys[begin - 1] if begin else b""
    segment = Segment(parent, keys[begin : begin + count], ids, [checksum] * count, reuse)
    if count:
        await store.commit(session, layout_id, [segment], 0)


@pytest.mark.parametrize(
    ("policy", "dram", "nvme"),
    [
        ("worth", 100, 300),
        ("worth", 200, 500),
        ("lru", 100, 300),
        ("lru", 200, 0),
        ("priority-lru", 100, 300),
    ],
)
def test_the_server_and_the_simulator_hold_the_same(policy: str, dram: int, nvme: int) -> None:
    """Where a prompt is nearly all of DRAM, too, and waits for its own blocks to be saved."""
    asked, engine = trace(seed=dram), machine(SLOW)
    tiers = Tiers(dram * BLOCK, nvme * nvme_slot_bytes(BLOCK))
    ours, theirs = simulated(asked, tiers, engine, policy), served(asked, tiers, engine, policy)
    assert ours == theirs
    # So that being equal says something.
    held, from_dram = (sum(each) for each in zip(*ours.leased, strict=True))
    assert from_dram > 100 and ours.evictions[Tier.DRAM] > 50
    if nvme:
        assert held > from_dram + 50 and ours.evictions[Tier.NVME] > 50


def test_both_compute_what_computing_beats() -> None:
    asked, engine = trace(seed=3), machine(FAST)
    tiers = Tiers(100 * BLOCK, 400 * nvme_slot_bytes(BLOCK))
    ours = simulated(asked, tiers, engine, "lru")
    assert ours == served(asked, tiers, engine, "lru")
    assert sum(ours.counters.refused.values()) > 20  # type: ignore[attr-defined]


def test_what_the_simulator_takes_from_the_server_is_still_so() -> None:
    assert Machine().batches == MAX_RUNNING
    for nbytes in (1, 4096, 5000, 1 << 21):
        assert nvme_slot_bytes(nbytes) == nvme_slot.slot_bytes(nbytes)
