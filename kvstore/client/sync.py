"""The synchronous client."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Collection, Sequence
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
from kvstore.client.transport import SyncTransport
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


class Client:
    """A connection to a KV-cache store.

    `endpoint`: "unix:///path/kvstore.sock" or the path alone for a server on this
    host, "host:port" for another, None for this user's own server: then another
    user's raises `Untrusted`, an `Unavailable`. On the server's host bytes are copied
    through shared memory, elsewhere they go over gRPC; the methods are the same.

    Every method raises `Unavailable` rather than wait longer than `timeout_s` for
    a server that is gone or hangs; `put_many` and `get_many` allow it for each
    piece of at most 32 MiB. When the server was restarted the client finds it
    again by itself: leases and reservations of before raise `LeaseExpired` and
    `ReservationExpired`, everything else goes on.

    Safe to use from several threads. Not usable in a forked child, which raises
    `BadRequest`: make the child its own client.
    """

    def __init__(self, endpoint: str | None = None, *, timeout_s: float = 10.0) -> None:
        self._address = parse_endpoint(endpoint)
        self._core = new_core(self._address, timeout_s)
        self._pid = os.getpid()
        self._connecting = threading.Lock()
        self._transport = SyncTransport(self._address)
        try:
            self._run(connecting.current_link(self._core, Budget(timeout_s)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session. Leases and reservations go with it. Idempotent.

        A copy that another thread has under way is finished first, by that thread.
        """
        self._core.closed = True
        if self._core.link is not None:
            self._core.link.retire()
            self._core.link.hang_up()
        self._transport.close()

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

    def server_info(self) -> ServerInfo:
        """Who the server is, and the limits it enforces."""
        return self._run(calls.server_info(self._core))

    def register_layout(self, spec: LayoutSpec) -> Layout:
        """Make a layout known. Idempotent; repeated by itself after a restart."""
        return Layout(self._run(calls.register_layout(self._core, spec)), spec)

    def put(
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
        return self.put_many(layout, (key,), (data,), parent=parent, wait_ms=wait_ms, reuse=reuse)[
            0
        ]

    def put_many(
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
        return self._run(puts.put_many(self._core, layout, keys, datas, parent, wait_ms, reuse))

    def get(
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
        return self.get_many(layout, (key,), into=buffers, reuse=reuse)[0]

    def get_many(
        self,
        layout: Layout,
        keys: Sequence[bytes],
        *,
        into: Sequence[Buffer] | None = None,
        reuse: Reuse = NO_REUSE,
    ) -> list[Got]:
        """Like `get` for each key, whether or not the positions before it are held."""
        return self._run(gets.get_many(self._core, layout, keys, into, reuse))

    def lookup(self, layouts: Layout | Sequence[Layout], keys: Sequence[bytes]) -> ChainPresence:
        """How much of a chain is held: advice, not a promise.

        On the server's host this reads shared memory and costs no RPC, as long as
        the server shows signs of life.
        """
        ids = (layouts.id,) if isinstance(layouts, Layout) else [each.id for each in layouts]
        found = calls.lookup_at_hand(self._core, ids, keys)
        if found is not None:
            return found
        return self.lookup_many([chain_of(layouts, keys)])[0]

    def peek(self, layout_ids: Sequence[bytes], keys: Sequence[bytes]) -> ChainPresence | None:
        """`lookup` by layout ids, for callers that must not wait: never an RPC, and
        None where only the server could tell."""
        return calls.lookup_at_hand(self._core, layout_ids, keys)

    def watch(self, layout_ids: Sequence[bytes]) -> Callable[[bytes], bool | None]:
        """`peek` for single blocks by key, as cheap as it can be; see `Watch.holds`. What is
        returned holds as long as the client does, whatever becomes of the server."""
        return Watch(self._core, layout_ids).holds

    def lookup_many(self, chains: Sequence[ChainQuery]) -> list[ChainPresence]:
        return self._run(calls.lookup(self._core, chains))

    def acquire(
        self,
        layouts: Layout | Sequence[Layout],
        keys: Sequence[bytes],
        *,
        wait_ms: int = 1000,
        reuse: Reuse = NO_REUSE,
        reader: bytes = b"",
    ) -> Lease:
        """Pin the longest held prefix of a chain in DRAM; see `Lease`.

        `wait_ms`: how long blocks may take to come up from slower tiers. `reader`: who reads
        them, named as in `vram`; blocks may then be in that GPU's memory alone, which pins
        nothing: their addresses are `GPU_ONLY` or more.
        """
        chosen = as_layouts(layouts)

        def flow() -> Flow[Lease]:
            chains = [chain_of(chosen, keys, reuse)]
            grants, link = yield from calls.acquire(
                self._core, Budget(self._core.timeout_s), chains, wait_ms, reader=reader
            )
            return Lease(self, link, grants[0], chosen)

        return self._run(flow())

    def acquire_many(
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

        return self._run(flow())

    def renew(self, lease_ids: Sequence[int]) -> int:
        """Extend leases; their new `expires_ns`. Raises `LeaseExpired`."""
        return self._run(calls.renew(self._core, lease_ids))

    def release(self, lease_ids: Sequence[int]) -> None:
        """End leases. Those that have ended already are not an error."""
        self._run(calls.release(self._core, lease_ids, self._core.timeout_s))

    def report_damage(self, addresses: Sequence[int]) -> None:
        """Low level: blocks copied from a lease's addresses were not what it said. The
        server looks at them, and drops from memory what is damaged; nobody waits for that.
        Whoever gets by `get` or `Lease.read` need not do this."""
        self._run(calls.report_damage(self._core, addresses))

    def reserve(self, layout: Layout, count: int, wait_ms: int) -> SlotGrant:
        """Low level: slots for new blocks, to be written and committed. There may be
        fewer than `count`; `wait_ms` is for where there is none."""

        def flow() -> Flow[SlotGrant]:
            budget = Budget(self._core.timeout_s)
            return (yield from calls.reserve(self._core, budget, layout.id, count, wait_ms))[0]

        return self._run(flow())

    def land(
        self, layout: Layout, slots: Sequence[int], *, not_on: Collection[str] = ()
    ) -> list[Landing]:
        """Low level, local only: places for these open slots in the memory of each GPU where
        another session reads such blocks (`vram`), but for those in `not_on`. A place may be
        written until its slot is committed or given back.

        Raises `ReservationExpired`.
        """
        return self._run(calls.land(self._core, layout.id, slots, not_on))

    def commit(
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
        return self._run(calls.commit(self._core, budget, layout.id, segments, ahead, landed))

    def abort(self, slots: Sequence[int]) -> None:
        """Give slots back. They may not be written any more."""
        self._run(calls.abort(self._core, slots, self._core.timeout_s))

    def slot(self, address: int, nbytes: int, *, epoch: bytes | None = None) -> memoryview:
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
        return self._run(connecting.slot(self._core, address, nbytes, epoch))

    def vram(self, gpu: str, layout_ids: Sequence[bytes], *, reader: bytes = b"") -> VramGrant:
        """Low level, local only: what the store keeps in that GPU's memory
        (`kvstore.device.mirrors`) of the blocks of these layouts, which this process reads.
        `reader`: acquires that name the same may be granted what is there only.

        Raises `BadRequest` where the server has no memory there, `UnknownLayout`.
        """
        return self._run(connecting.vram(self._core, gpu, layout_ids, reader))

    def write_slots(
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
        return self._run(connecting.write_slots(self._core, slots, addresses, nbytes, write))

    def prefetch(
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
        return self.prefetch_many([chain_of(layouts, keys, reuse)], within_ms)

    def prefetch_many(self, chains: Sequence[ChainQuery], within_ms: int = 0) -> int:
        """`prefetch` for several chains in one call; how many blocks are on the way."""
        return self._run(calls.prefetch(self._core, chains, within_ms))

    def hint(self, session: bytes, state: SessionState, *, expected_ms: int | None = None) -> None:
        """Say what a session of `Reuse` does once it is answered; `expected_ms`: in how
        long its next request is likely to come."""
        self._run(calls.hint(self._core, session, state, expected_ms))

    def stats(self) -> StoreStats:
        return self._run(calls.stats(self._core))

    def clear(self) -> int:
        """Forget all blocks of this tenant; how many."""
        return self._run(calls.clear(self._core))

    def flush(self, drop: bool = False, *, timeout_s: float = 600.0) -> int:
        """Write what is only in DRAM to the next tier; how many blocks.

        With `drop` they also leave DRAM. Takes as long as the disk does, so it has a
        timeout of its own. Raises `NoLowerTier`.
        """
        return self._run(calls.flush(self._core, drop, timeout_s))

    def _run(self, flow: Flow[T]) -> T:
        if os.getpid() != self._pid:
            raise BadRequest("this client was made before a fork; make another in the child")
        resume: Callable[[Any], Any] = flow.send
        value: Any = None
        transport, step = self._transport, None
        while True:
            try:
                step = None
                step = resume(value)
                transport = self._transport
                value = self._perform(step)
                resume = flow.send
            except StopIteration as stop:
                result: T = stop.value
                return result
            except BaseException as error:
                if _is_interrupt(error, step):
                    self._start_over(transport)
                if inspect.getgeneratorstate(flow) == inspect.GEN_CLOSED:
                    raise
                # The flow has things to give back.
                value, resume = error, flow.throw

    def _start_over(self, transport: SyncTransport) -> None:
        """After an interrupt: go on with another session over another channel.

        An interrupt comes between any two instructions, ours or gRPC's. What is lost
        there is given back for certain with the session only, and a lock that is left
        taken there stays so: a call over the same channel might never end.
        """
        if self._core.closed or self._transport is not transport:
            return
        self._transport = SyncTransport(self._address)
        self._connecting = threading.Lock()
        link, self._core.link = self._core.link, None

        def let_go() -> None:
            if link is not None:
                link.retire()
                link.hang_up()
            transport.close()

        threading.Thread(target=let_go, name="kvstore-let-go", daemon=True).start()

    def _perform(self, step: Any) -> Any:
        if not isinstance(step, (Work, Connect, End, Drop)):
            self._core.counters.count_rpc()
        match step:
            case Call():
                return self._transport.call(step)
            case Work():
                return step.run()
            case Begin(call):
                return self._transport.begin(call)
            case End(begun):
                return begun.end()
            case Drop(begun):
                return begun.drop()
            case ReadStream():
                return self._transport.read(step)
            case WriteStream():
                return self._transport.write(step)
            case OpenSession():
                return self._transport.open_session(step)
            case Connect():
                return self._connect(step)
        raise AssertionError(f"no such step: {step!r}")

    def _connect(self, step: Connect) -> Link:
        budget = Budget(step.timeout_s)
        connecting_now = self._connecting
        if not connecting_now.acquire(timeout=step.timeout_s):
            raise Unavailable("another thread is still looking for the server")
        try:
            return self._run(connecting.connect(self._core, budget))
        finally:
            connecting_now.release()


def _is_interrupt(error: BaseException, step: Any) -> bool:
    """It was raised by a signal's handler. Whatever a step raises of itself is of the
    one tree of errors, but for work, which may be the caller's own."""
    if not isinstance(error, Exception):
        return True
    return not (step is None or isinstance(error, KVStoreError) or isinstance(step, Work))


class Lease(LeaseBase):
    """Blocks pinned in DRAM. A context manager; leaving it releases.

    Not to be used by two threads at once.
    """

    def __init__(
        self, client: Client, link: Link, grant: LeaseGrant, layouts: Sequence[Layout]
    ) -> None:
        super().__init__(client._core, link, grant, layouts)
        self._client = client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def view(self, index: int) -> memoryview:
        """Block `index` in place, read-only; local only.

        The bytes are the block's only until the lease ends: check `expired` after
        using them, and do not keep the view. Raises `LeaseExpired`, and `BadRequest` for a
        block that is in a GPU's memory alone.
        """
        return self._view(index)

    def read(self, index: int) -> bytes | None:
        """A checked copy of block `index`; None (and counted) if it is damaged, and of one that
        is in a GPU's memory alone.

        Raises `LeaseExpired`.
        """
        return self._client._run(gets.read_lease(self._core, self, index))

    def renew(self) -> None:
        """Extend by the server's lease time, from now. Raises `LeaseExpired`."""
        if self._released:
            raise LeaseExpired("the lease was released")
        if self.lease_id:
            self._renewed(self._client.renew([self.lease_id]))

    def release(self) -> None:
        """Idempotent."""
        if not self._released:
            self._released = True
            self._client.release([self.lease_id])
