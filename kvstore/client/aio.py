"""The asynchronous client: the same flows as the synchronous one, on an event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

from kvstore.client import calls, connecting, gets, puts
from kvstore.client.gets import Got
from kvstore.client.lease import Layout, LeaseBase, as_layouts, chain_of
from kvstore.client.link import Budget, Counters, Link, VramGrant, new_core
from kvstore.client.rpc import parse_endpoint
from kvstore.client.steps import (
    Begin,
    Call,
    Connect,
    Drop,
    End,
    Flow,
    OpenSession,
    ReadStream,
    Work,
    WriteStream,
)
from kvstore.client.transport_aio import AsyncTransport
from kvstore.client.watch import Watch
from kvstore.client.wire import ServerInfo
from kvstore.errors import BadRequest, KVStoreError, LeaseExpired, Unavailable
from kvstore.types import (
    NO_HINTS,
    NO_REUSE,
    ChainPresence,
    ChainQuery,
    CommitAnswer,
    Hints,
    Landing,
    LayoutSpec,
    LeaseGrant,
    PutOutcome,
    Reuse,
    Segment,
    SessionState,
    SlotGrant,
    StoreStats,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")


class AsyncClient:
    """`Client` for asyncio: the same arguments, methods and errors.

    It connects on entry to `async with`, or at the first call, and belongs to the
    event loop that is running then. Copies run in the loop's default executor.
    A cancelled call first finishes the copy it is in, because the memory may
    belong to somebody else afterwards, and gives back what it holds.
    """

    def __init__(self, endpoint: str | None = None, *, timeout_s: float = 10.0) -> None:
        self._address = parse_endpoint(endpoint)
        self._core = new_core(self._address, timeout_s)
        self._pid = os.getpid()
        self._connecting = asyncio.Lock()
        self._transport: AsyncTransport | None = None
        # Each lasts at most two timeouts.
        self._undoing: set[asyncio.Task[None]] = set()

    async def connect(self) -> None:
        """Find the server now. Raises `Unavailable`; may be tried again."""
        await self._run(connecting.current_link(self._core, Budget(self._core.timeout_s)))

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the session. Leases and reservations go with it. Idempotent.

        A copy that another task has under way is finished first.
        """
        self._core.closed = True
        if self._core.link is not None:
            self._core.link.retire()
            self._core.link.hang_up()
        for undoing in self._undoing:
            undoing.cancel()
        if self._transport is not None:
            await self._transport.close()

    @property
    def is_local(self) -> bool:
        """Whether bytes go through shared memory."""
        return self._core.link is not None and self._core.link.arena is not None

    @property
    def epoch(self) -> bytes:
        """The server's, at the last (re)connect; it changes with every restart."""
        return b"" if self._core.link is None else self._core.link.epoch

    @property
    def counters(self) -> Counters:
        return self._core.counters

    async def server_info(self) -> ServerInfo:
        """Who the server is, and the limits it enforces."""
        return await self._run(calls.server_info(self._core))

    async def register_layout(self, spec: LayoutSpec) -> Layout:
        """Make a layout known. Idempotent; repeated by itself after a restart."""
        return Layout(await self._run(calls.register_layout(self._core, spec)), spec)

    async def put(
        self,
        layout: Layout,
        key: bytes,
        data: Buffer,
        *,
        parent: bytes = b"",
        wait_ms: int = 5000,
        reuse: Reuse = NO_REUSE,
    ) -> PutOutcome:
        """Store one block of exactly `layout.block_bytes` bytes.

        `parent`: key of the block before it in its chain. `wait_ms`: how long the
        server may make space. Raises `BadKey`, `BadSize`, and `Conflict` when other
        bytes are stored under this key.
        """
        return (
            await self.put_many(
                layout, (key,), (data,), parent=parent, wait_ms=wait_ms, reuse=reuse
            )
        )[0]

    async def put_many(
        self,
        layout: Layout,
        keys: Sequence[bytes],
        datas: Sequence[Buffer],
        *,
        parent: bytes = b"",
        wait_ms: int = 5000,
        reuse: Reuse = NO_REUSE,
    ) -> list[PutOutcome]:
        """Store consecutive positions of one chain; an outcome for each, in order."""
        return await self._run(
            puts.put_many(self._core, layout, keys, datas, parent, wait_ms, reuse)
        )

    async def get(
        self,
        layout: Layout,
        key: bytes,
        *,
        into: Buffer | None = None,
        reuse: Reuse = NO_REUSE,
    ) -> Got:
        """The block's bytes, or None for a miss.

        With `into`, a writable buffer of at least a block's size, the bytes are
        copied there and a view of that part is returned; after a miss its
        contents are undefined. `reuse`: what is known of the block's next use.
        """
        buffers = None if into is None else (into,)
        return (await self.get_many(layout, (key,), into=buffers, reuse=reuse))[0]

    async def get_many(
        self,
        layout: Layout,
        keys: Sequence[bytes],
        *,
        into: Sequence[Buffer] | None = None,
        reuse: Reuse = NO_REUSE,
    ) -> list[Got]:
        """Like `get` for each key, whether or not the positions before it are held."""
        return await self._run(gets.get_many(self._core, layout, keys, into, reuse))

    async def lookup(
        self, layouts: Layout | Sequence[Layout], keys: Sequence[bytes]
    ) -> ChainPresence:
        """How much of a chain is held: advice, not a promise.

        On the server's host this reads shared memory and costs no RPC, as long as
        the server shows signs of life.
        """
        chain = chain_of(layouts, keys)
        found = calls.lookup_at_hand(self._core, chain.layout_ids, keys)
        return (await self.lookup_many([chain]))[0] if found is None else found

    def peek(self, layout_ids: Sequence[bytes], keys: Sequence[bytes]) -> ChainPresence | None:
        """`lookup` by layout ids, for callers that must not wait: never an RPC, and
        None where only the server could tell."""
        return calls.lookup_at_hand(self._core, layout_ids, keys)

    def watch(self, layout_ids: Sequence[bytes]) -> Callable[[bytes], bool | None]:
        """`peek` for single blocks by key, as cheap as it can be; see `Watch.holds`. What is
        returned holds as long as the client does, whatever becomes of the server."""
        return Watch(self._core, layout_ids).holds

    async def lookup_many(self, chains: Sequence[ChainQuery]) -> list[ChainPresence]:
        return await self._run(calls.lookup(self._core, chains))

    async def acquire(
        self,
        layouts: Layout | Sequence[Layout],
        keys: Sequence[bytes],
        *,
        wait_ms: int = 1000,
        reuse: Reuse = NO_REUSE,
        reader: bytes = b"",
    ) -> AsyncLease:
        """Pin the longest held prefix of a chain in DRAM; see `AsyncLease`.

        `wait_ms`: how long blocks may take to come up from slower tiers. `reader`: who reads
        them, named as in `vram`; blocks may then be in that GPU's memory alone, which pins
        nothing: their addresses are `GPU_ONLY` or more.
        """
        chosen = as_layouts(layouts)

        def flow() -> Flow[AsyncLease]:
            chains = [chain_of(chosen, keys, reuse)]
            grants, link = yield from calls.acquire(
                self._core, Budget(self._core.timeout_s), chains, wait_ms, reader=reader
            )
            return AsyncLease(self, link, grants[0], chosen)

        return await self._run(flow())

    async def acquire_many(
        self,
        chains: Sequence[ChainQuery],
        wait_ms: int,
        hints: Hints = NO_HINTS,
        *,
        reader: bytes = b"",
    ) -> list[LeaseGrant]:
        """Low level: a grant for each chain, to be released by id. `reader`: see `acquire`."""

        def flow() -> Flow[list[LeaseGrant]]:
            budget = Budget(self._core.timeout_s)
            grants, _ = yield from calls.acquire(self._core, budget, chains, wait_ms, hints, reader)
            return grants

        return await self._run(flow())

    async def renew(self, lease_ids: Sequence[int]) -> int:
        """Extend leases; their new `expires_ns`. Raises `LeaseExpired`."""
        return await self._run(calls.renew(self._core, lease_ids))

    async def release(self, lease_ids: Sequence[int]) -> None:
        """End leases. Those that have ended already are not an error."""
        await self._run(calls.release(self._core, lease_ids, self._core.timeout_s))

    async def report_damage(self, addresses: Sequence[int]) -> None:
        """Low level: blocks copied from a lease's addresses were not what it said. The
        server looks at them, and drops from memory what is damaged; nobody waits for that.
        Whoever gets by `get` or `AsyncLease.read` need not do this."""
        await self._run(calls.report_damage(self._core, addresses))

    async def reserve(self, layout: Layout, count: int, wait_ms: int) -> SlotGrant:
        """Low level: slots for new blocks, to be written and committed. There may be
        fewer than `count`; `wait_ms` is for where there is none."""

        def flow() -> Flow[SlotGrant]:
            budget = Budget(self._core.timeout_s)
            return (yield from calls.reserve(self._core, budget, layout.id, count, wait_ms))[0]

        return await self._run(flow())

    async def land(
        self, layout: Layout, slots: Sequence[int], *, not_on: Collection[str] = ()
    ) -> list[Landing]:
        """Low level, local only: places for these open slots in the memory of each GPU where
        another session reads such blocks (`vram`), but for those in `not_on`. A place may be
        written until its slot is committed or given back.

        Raises `ReservationExpired`.
        """
        return await self._run(calls.land(self._core, layout.id, slots, not_on))

    async def commit(
        self,
        layout: Layout,
        segments: Sequence[Segment],
        *,
        ahead: int = 0,
        landed: Sequence[Landing] = (),
    ) -> CommitAnswer:
        """Low level: publish written blocks; their slots are closed. Reserves up to
        `ahead` slots for what comes next in the same call. `landed`: places of these slots
        that have been written too (`land`).

        Raises `ReservationExpired` when a slot is not open any more and its block is
        not there; nothing is published then.
        """
        budget = Budget(self._core.timeout_s)
        return await self._run(calls.commit(self._core, budget, layout.id, segments, ahead, landed))

    async def abort(self, slots: Sequence[int]) -> None:
        """Give slots back. They may not be written any more."""
        await self._run(calls.abort(self._core, slots, self._core.timeout_s))

    async def slot(self, address: int, nbytes: int, *, epoch: bytes | None = None) -> memoryview:
        """Low level, local only: the memory at an address of a lease, read-only.

        The first use of an extent maps it, which asks the server. Raises
        `LeaseExpired` when the session was lost since the last call. An address
        that another process was granted needs that process's `epoch` beside it:
        where that is not the epoch of the server there is now, `LeaseExpired`. One of
        `GPU_ONLY` or more is in no memory of this host: `BadRequest`.
        """
        view = connecting.slot_at_hand(self._core, address, nbytes, epoch)
        if view is not None:
            return view
        return await self._run(connecting.slot(self._core, address, nbytes, epoch))

    async def vram(
        self, gpu: str, layout_ids: Sequence[bytes], *, reader: bytes = b""
    ) -> VramGrant:
        """Low level, local only: see `Client.vram`."""
        return await self._run(connecting.vram(self._core, gpu, layout_ids, reader))

    async def write_slots(
        self,
        slots: Sequence[int],
        addresses: Sequence[int],
        nbytes: int,
        write: Callable[[list[memoryview]], T],
    ) -> T:
        """Low level, local only: call `write` with the memory of reserved slots,
        `nbytes` of each, and return what it returns.

        The session does not end meanwhile, so the slots are nobody else's until
        `write` returns; the views are not to be used after that. Raises
        `LeaseExpired` when the slots were reserved in an earlier session.
        """
        return await self._run(connecting.write_slots(self._core, slots, addresses, nbytes, write))

    async def prefetch(
        self,
        layouts: Layout | Sequence[Layout],
        keys: Sequence[bytes],
        *,
        within_ms: int = 0,
        reuse: Reuse = NO_REUSE,
    ) -> int:
        """Ask for a chain to be brought up into DRAM; how many blocks are on the way.

        `within_ms`: until then what there is no room for yet is tried again, and what has
        not begun by then does not; 0: it is not tried again.
        """
        return await self.prefetch_many([chain_of(layouts, keys, reuse)], within_ms)

    async def prefetch_many(self, chains: Sequence[ChainQuery], within_ms: int = 0) -> int:
        """`prefetch` for several chains in one call; how many blocks are on the way."""
        return await self._run(calls.prefetch(self._core, chains, within_ms))

    async def hint(
        self, session: bytes, state: SessionState, *, expected_ms: int | None = None
    ) -> None:
        """Say what a session of `Reuse` does once it is answered; `expected_ms`: in how
        long its next request is likely to come."""
        await self._run(calls.hint(self._core, session, state, expected_ms))

    async def stats(self) -> StoreStats:
        return await self._run(calls.stats(self._core))

    async def clear(self) -> int:
        """Forget all blocks of this tenant; how many."""
        return await self._run(calls.clear(self._core))

    async def flush(self, drop: bool = False, *, timeout_s: float = 600.0) -> int:
        """Write what is only in DRAM to the next tier; how many blocks.

        With `drop` they also leave DRAM. Takes as long as the disk does, so it has a
        timeout of its own. Raises `NoLowerTier`.
        """
        return await self._run(calls.flush(self._core, drop, timeout_s))

    async def _run(self, flow: Flow[T]) -> T:
        if os.getpid() != self._pid:
            raise BadRequest("this client was made before a fork; make another in the child")
        try:
            step = flow.send(None)
            while True:
                try:
                    result = await self._perform(step)
                except BaseException as error:  # noqa: BLE001 - it goes into the flow
                    # Cancellation too: the flow has things to give back.
                    step = flow.throw(error)
                else:
                    step = flow.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value

    async def _perform(self, step: Any) -> Any:
        if isinstance(step, Work):
            return await _work(step)
        if isinstance(step, Connect):
            return await self._connect(step)
        if isinstance(step, End):
            return await self._end(step.begun)
        if isinstance(step, Drop):
            return self._drop(step.begun)
        if self._transport is None:
            self._transport = AsyncTransport(self._address)
        self._core.counters.count_rpc()
        match step:
            case Begin(call):
                return _Begun(
                    self._transport, call, asyncio.create_task(self._transport.call(call))
                )
            case Call(undo=None):
                return await self._transport.call(step)
            case Call():
                return await self._call_that_grants(self._transport, step)
            case ReadStream():
                return await self._transport.read(step)
            case WriteStream():
                return await self._transport.write(step)
            case OpenSession():
                return await self._transport.open_session(step)
        raise AssertionError(f"no such step: {step!r}")

    async def _call_that_grants(self, transport: AsyncTransport, step: Call) -> Any:
        calling = asyncio.create_task(transport.call(step))
        return await self._end(_Begun(transport, step, calling))

    async def _end(self, begun: _Begun) -> Any:
        """The server may have granted what a cancelled caller no longer hears of."""
        try:
            return await asyncio.shield(begun.task)
        except asyncio.CancelledError:
            self._drop(begun)
            raise

    def _drop(self, begun: _Begun) -> None:
        undoing = asyncio.create_task(_undo(begun))
        self._undoing.add(undoing)
        undoing.add_done_callback(self._undoing.discard)

    async def _connect(self, step: Connect) -> Link:
        budget = Budget(step.timeout_s)
        try:
            await asyncio.wait_for(self._connecting.acquire(), step.timeout_s)
        except TimeoutError:
            raise Unavailable("another task is still looking for the server") from None
        try:
            return await self._run(connecting.connect(self._core, budget))
        finally:
            self._connecting.release()


@dataclass(slots=True)
class _Begun:
    """A call under way."""

    transport: AsyncTransport
    step: Call
    task: asyncio.Task[Any]


async def _undo(begun: _Begun) -> None:
    undo = begun.step.undo
    try:
        response = await begun.task
    except KVStoreError:
        # Nothing was granted, or `undo` knows already that nobody heard of it.
        return
    if undo is None or (back := undo(response)) is None:
        return
    try:
        await begun.transport.call(back)
    except Unavailable:
        undo(None)
    except KVStoreError:
        # There is nothing to give back any more.
        return


async def _work(step: Work) -> Any:
    """Run work in a thread and see it through, even when cancelled meanwhile."""
    running = asyncio.get_running_loop().run_in_executor(None, step.run)
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        running.exception()  # Retrieved, so that asyncio does not complain of it.
        raise cancelled
    return running.result()


class AsyncLease(LeaseBase):
    """Blocks pinned in DRAM. An asynchronous context manager; leaving it releases.

    Not to be used by two tasks at once.
    """

    def __init__(
        self, client: AsyncClient, link: Link, grant: LeaseGrant, layouts: Sequence[Layout]
    ) -> None:
        super().__init__(client._core, link, grant, layouts)
        self._client = client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.release()

    async def view(self, index: int) -> memoryview:
        """Block `index` in place, read-only; local only.

        The bytes are the block's only until the lease ends: check `expired` after
        using them, and do not keep the view. Raises `LeaseExpired`, and `BadRequest` for a
        block that is in a GPU's memory alone.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self._view, index)

    async def read(self, index: int) -> bytes | None:
        """A checked copy of block `index`; None (and counted) if it is damaged, and of one that
        is in a GPU's memory alone.

        Raises `LeaseExpired`.
        """
        return await self._client._run(gets.read_lease(self._core, self, index))

    async def renew(self) -> None:
        """Extend by the server's lease time, from now. Raises `LeaseExpired`."""
        if self._released:
            raise LeaseExpired("the lease was released")
        if self.lease_id:
            self._renewed(await self._client.renew([self.lease_id]))

    async def release(self) -> None:
        """Idempotent."""
        if not self._released:
            self._released = True
            await self._client.release([self.lease_id])
