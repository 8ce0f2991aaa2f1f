"""Flows that move blocks: put, get, and reading under a lease.

On the server's host the bytes go straight between the caller's buffers and the
server's memory; elsewhere they go over Read and Write streams. Either way

  * what a put commits is the checksum of the bytes that arrived in the slot;
  * what a get returns has that checksum and was copied while its lease lasted,
    otherwise it is a miss and counted.

Many blocks go in pieces, so that a call of any size pins and reserves a bounded
amount, and calls are under way while bytes are copied: a put commits one piece and
reserves for the one after next while it copies the next, a get acquires the next
piece while it copies this one. The client's timeout bounds each piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvstore.client import calls, wire
from kvstore.client.connecting import current_link, local_arena
from kvstore.client.lease import Layout, LeaseBase
from kvstore.client.link import Budget, Core, Link
from kvstore.client.steps import Drop, Flow, ReadStream, Work, WritePiece, WriteStream
from kvstore.errors import (
    BadRequest,
    BadSize,
    Conflict,
    InternalError,
    LeaseExpired,
    NoSession,
)
from kvstore.local import copy
from kvstore.types import (
    ChainQuery,
    CommitAnswer,
    CommitOutcome,
    LeaseGrant,
    PutOutcome,
    Segment,
    SlotGrant,
    check_key,
)
from kvstore.wire.v1 import kvstore_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE_BYTES = 32 << 20
PIECE_BLOCKS = 512
ASKED_AT_ONCE = 4096
"""Blocks of which one call asks whether they are there."""
GET_WAIT_MS = 1000

Got = bytes | memoryview | None
"""A block got: new bytes, or the part of the caller's buffer it was put in, or a miss."""


def put_many(
    core: Core,
    layout: Layout,
    keys: Sequence[bytes],
    datas: Sequence[Buffer],
    parent: bytes,
    wait_ms: int,
) -> Flow[list[PutOutcome]]:
    """Consecutive positions of one chain, the first one after `parent`.

    A `Conflict` is raised when all the others are stored.
    """
    if len(keys) != len(datas):
        raise BadRequest(f"{len(keys)} keys but {len(datas)} blocks")
    sources = [source_view(data, layout.block_bytes) for data in datas]
    for key in (parent, *keys) if parent else keys:
        check_key(key)
    if not keys:
        return []
    put = _Put(core, layout, keys, sources, parent, wait_ms)
    return (yield from put.run())


class _Put:
    """One put under way. Blocks are known by their index among the keys."""

    def __init__(
        self,
        core: Core,
        layout: Layout,
        keys: Sequence[bytes],
        sources: Sequence[memoryview],
        parent: bytes,
        wait_ms: int,
    ) -> None:
        self._core = core
        self._layout = layout
        self._keys = keys
        self._sources = sources
        self._parent = parent
        self._wait_ms = wait_ms
        self._piece = _blocks_a_piece(layout.block_bytes)
        self._outcomes = [PutOutcome.DENIED] * len(keys)
        self._conflicts = 0
        self._todo: list[int] = []
        self._link: Link | None = None
        # Slots nothing has been written into yet, and all that are not known to be
        # closed: id -> address.
        self._free: list[int] = []
        self._open: dict[int, int] = {}
        # The commit under way, with its blocks and slots.
        self._begun: Any = None
        self._batch: list[int] = []
        self._batch_slots: list[int] = []

    def run(self) -> Flow[list[PutOutcome]]:
        try:
            yield from self._ask()
            while self._todo or self._begun is not None:
                if self._todo and self._free:
                    yield from self._write()
                elif self._begun is not None:
                    yield from self._settle()
                elif not (yield from self._reserve()):
                    break
        finally:
            if self._begun is not None:
                yield Drop(self._begun)
            if self._open:
                yield from calls.give_up(self._core, list(self._open))
        if self._conflicts:
            raise Conflict("a key is committed with other bytes")
        return self._outcomes

    def _ask(self) -> Flow[None]:
        """What is there already need not be written, only compared. Here the directory
        tells which that may be; elsewhere the server is asked, for a checksum is sent
        much faster than a block."""
        self._link = yield from current_link(self._core, Budget(self._core.timeout_s))
        count = len(self._keys)
        if self._link.arena is not None:
            seen = calls.lookup_at_hand(self._core, (self._layout.id,), self._keys)
            count = 0 if seen is None else seen.held
        for start in range(0, count, ASKED_AT_ONCE):
            asked = range(start, min(start + ASKED_AT_ONCE, count))
            checksums = yield _checksums([self._sources[i] for i in asked])
            segments = self._segments(asked, [0] * len(asked), checksums)
            remote = self._link.arena is None
            answer, link = yield from calls.ask(
                self._core,
                Budget(self._core.timeout_s),
                self._layout.id,
                segments,
                self._wanted(len(self._keys)) if remote and not start else 0,
            )
            self._follow(link)
            self._take(asked, answer)
            absent = CommitOutcome.ABSENT
            self._todo.extend(i for i, o in zip(asked, answer.outcomes, strict=True) if o is absent)
        self._todo.extend(range(count, len(self._keys)))

    def _wanted(self, left: int) -> int:
        """How many slots to have: for the piece being written and the one after it."""
        return min(left, 2 * self._piece)

    def _reserve(self) -> Flow[bool]:
        """Get slots when none is left and none is on its way. False: there is no room."""
        budget = Budget(self._core.timeout_s)
        grant, link = yield from calls.reserve(
            self._core, budget, self._layout.id, self._wanted(len(self._todo)), self._wait_ms
        )
        self._follow(link)
        self._add(grant)
        return bool(grant.addresses)

    def _follow(self, link: Link) -> None:
        """Go on under the link that a call went over."""
        if link is not self._link:
            # What was open went with its session.
            self._link = link
            self._free.clear()
            self._open.clear()

    def _add(self, grant: SlotGrant) -> None:
        slots = range(grant.first_slot, grant.first_slot + len(grant.addresses))
        self._free.extend(slots)
        self._open.update(zip(slots, grant.addresses, strict=True))

    def _write(self) -> Flow[None]:
        """Fill slots while the commit before is under way, then commit these."""
        count = min(len(self._todo), len(self._free), self._piece)
        batch, self._todo = self._todo[:count], self._todo[count:]
        slots, self._free = self._free[:count], self._free[count:]
        checksums = yield from self._fill(slots, [self._sources[i] for i in batch])
        if self._begun is not None:
            yield from self._settle()
        assert self._link is not None
        ahead = self._wanted(len(self._todo)) - len(self._free)
        segments = self._segments(batch, slots, checksums)
        self._begun = yield from calls.begin_commit(
            self._core,
            self._link,
            Budget(self._core.timeout_s),
            self._layout.id,
            segments,
            max(0, ahead),
        )
        self._batch, self._batch_slots = batch, slots

    def _fill(self, slots: list[int], sources: list[memoryview]) -> Flow[list[int]]:
        """Bring blocks' bytes into slots; the checksums of what arrived."""
        link = self._link
        assert link is not None
        checksums: list[int]
        if link.arena is None:
            checksums = yield _checksums(sources)
            pieces = _pieces(map(link.bare, slots), sources)
            yield WriteStream(pieces, link.session, Budget(self._core.timeout_s).left())
            return checksums
        arena = link.arena
        addresses = [self._open[slot] for slot in slots]

        def copy_in() -> list[int]:
            link.hold()
            try:
                views = arena.views(addresses, self._layout.block_bytes, writable=True)
                return copy.copy_many(views, sources)
            finally:
                link.let_go()

        checksums = yield Work(copy_in)
        return checksums

    def _settle(self) -> Flow[None]:
        """Hear what became of the commit under way."""
        assert self._link is not None
        begun, self._begun = self._begun, None
        answer = yield from calls.end_commit(self._link, begun)
        for slot in self._batch_slots:
            del self._open[slot]
        self._take(self._batch, answer)

    def _take(self, blocks: Sequence[int], answer: CommitAnswer) -> None:
        if len(answer.outcomes) != len(blocks):
            raise InternalError("the server answered for another number of blocks")
        for index, outcome in zip(blocks, answer.outcomes, strict=True):
            if outcome is CommitOutcome.STORED:
                self._outcomes[index] = PutOutcome.STORED
            elif outcome is CommitOutcome.PRESENT:
                self._outcomes[index] = PutOutcome.PRESENT
            elif outcome is CommitOutcome.CONFLICT:
                self._conflicts += 1
        self._add(answer.slots)

    def _segments(
        self, blocks: Sequence[int], slots: Sequence[int], checksums: Sequence[int]
    ) -> list[Segment]:
        """The blocks, given in rising order, as runs of consecutive positions."""
        if blocks and blocks[-1] - blocks[0] == len(blocks) - 1:
            return [self._segment(blocks, slots, checksums)]
        segments = []
        start = 0
        for stop in range(1, len(blocks) + 1):
            if stop == len(blocks) or blocks[stop] != blocks[stop - 1] + 1:
                run = slice(start, stop)
                segments.append(self._segment(blocks[run], slots[run], checksums[run]))
                start = stop
        return segments

    def _segment(
        self, run: Sequence[int], slots: Sequence[int], checksums: Sequence[int]
    ) -> Segment:
        first, last = run[0], run[-1]
        parent = self._keys[first - 1] if first else self._parent
        return Segment(parent, self._keys[first : last + 1], slots, checksums)


def _checksums(sources: Sequence[memoryview]) -> Work:
    return Work(lambda: copy.checksum_many(sources))


def _pieces(slots: Iterator[int], sources: Sequence[memoryview]) -> Iterator[WritePiece]:
    for slot, source in zip(slots, sources, strict=True):
        for start in range(0, source.nbytes, wire.PIECE_BYTES):
            yield WritePiece(slot, source[start : start + wire.PIECE_BYTES])


def get_many(
    core: Core,
    layout: Layout,
    keys: Sequence[bytes],
    into: Sequence[Buffer] | None,
) -> Flow[list[Got]]:
    """Each key on its own, whatever is held of the prefix before it."""
    if into is not None and len(into) != len(keys):
        raise BadRequest(f"{len(keys)} keys but {len(into)} buffers")
    targets: list[memoryview | None] = [None] * len(keys)
    if into is not None:
        targets = [target_view(buffer, layout.block_bytes) for buffer in into]
    for key in keys:
        check_key(key)
    got: list[Got] = []
    get = _Get(core, layout)
    step = _blocks_a_piece(layout.block_bytes)
    pieces = [keys[start : start + step] for start in range(0, len(keys), step)]
    try:
        for number, piece in enumerate(pieces):
            # As one chain, which it usually is; what is beyond a hole comes after.
            (grant,), link = yield from get.next(piece)
            if number + 1 < len(pieces):
                yield from get.begin(pieces[number + 1])
            start = number * step
            got += yield from get.read(link, grant, targets[start : start + grant.held])
            rest = slice(grant.held, len(piece))
            yield from get.release([grant], link)
            got += yield from get.scattered(piece[rest], targets[start : start + len(piece)][rest])
    finally:
        yield from get.close()
    return got


class _Get:
    """One get under way: at most one acquire ahead, and a lease for what is read."""

    def __init__(self, core: Core, layout: Layout) -> None:
        self._core = core
        self._layout = layout
        self._begun: Any = None
        self._link: Link | None = None
        self._held: list[int] = []

    def begin(self, keys: Sequence[bytes]) -> Flow[None]:
        """Have the next piece acquired while this one is read."""
        link = self._core.link
        if link is None or not link.alive():
            return
        budget = Budget(self._core.timeout_s)
        self._begun = yield from calls.begin_acquire(
            self._core, link, budget, [self._chain(keys)], GET_WAIT_MS
        )
        self._link = link

    def next(self, keys: Sequence[bytes]) -> Flow[tuple[list[LeaseGrant], Link]]:
        """The grant of what was begun, or of the same, asked for now."""
        if self._begun is not None:
            begun, self._begun = self._begun, None
            assert self._link is not None
            grants = yield from calls.end_acquire(self._link, begun)
            if grants is not None:
                return self._checked(grants, 1), self._link
        return (yield from self.acquire([keys]))

    def acquire(self, pieces: Sequence[Sequence[bytes]]) -> Flow[tuple[list[LeaseGrant], Link]]:
        """A grant for each piece."""
        chains = [self._chain(keys) for keys in pieces]
        budget = Budget(self._core.timeout_s)
        grants, link = yield from calls.acquire(self._core, budget, chains, GET_WAIT_MS)
        return self._checked(grants, len(chains)), link

    def _checked(self, grants: list[LeaseGrant], count: int) -> list[LeaseGrant]:
        self._held += [grant.lease_id for grant in grants if grant.lease_id]
        if len(grants) != count:
            raise InternalError("the server answered for another number of chains")
        return grants

    def _chain(self, keys: Sequence[bytes]) -> ChainQuery:
        return ChainQuery((self._layout.id,), keys)

    def read(
        self, link: Link, grant: LeaseGrant, targets: Sequence[memoryview | None]
    ) -> Flow[list[Got]]:
        """The blocks of one grant."""
        if link.arena is None:
            return (yield from self._read_remote(link, grant, targets))
        got: list[Got] = yield Work(lambda: self._read_local(link, grant, targets))
        return got

    def _read_local(
        self, link: Link, grant: LeaseGrant, targets: Sequence[memoryview | None]
    ) -> list[Got]:
        core, nbytes = self._core, self._layout.block_bytes
        wanted = [target for target in targets if target is not None]
        got: Sequence[bytes | memoryview]
        link.hold()
        try:
            slots = local_arena(link).views(grant.addresses, nbytes, writable=False)
            if wanted:
                got = wanted
                arrived = copy.copy_many(wanted, slots)
            else:
                got = list(map(bytes, slots))
                arrived = copy.checksum_many(got)
        finally:
            link.let_go()
        if core.clock.now_ns() >= grant.expires_ns:
            core.counters.count_expired(len(got))
            return [None] * len(got)
        if arrived == grant.checksums:
            return list(got)
        right = [a == b for a, b in zip(arrived, grant.checksums, strict=True)]
        core.counters.count_corrupt(right.count(False))
        return [block if ok else None for block, ok in zip(got, right, strict=True)]

    def _read_remote(
        self, link: Link, grant: LeaseGrant, targets: Sequence[memoryview | None]
    ) -> Flow[list[Got]]:
        got: list[Got] = []
        for index, target in enumerate(targets):
            budget = Budget(self._core.timeout_s)
            nbytes, checksum = self._layout.block_bytes, grant.checksums[index]
            try:
                block = yield from read_remote(
                    self._core, budget, link, grant.lease_id, index, nbytes, checksum, target
                )
            except LeaseExpired:
                self._core.counters.count_expired()
                block = None
            got.append(block)
        return got

    def scattered(
        self, keys: Sequence[bytes], targets: Sequence[memoryview | None]
    ) -> Flow[list[Got]]:
        """Blocks that are no held prefix: the first is missing."""
        got: list[Got] = [None] * len(keys)
        runs = self._runs(keys)
        if not runs:
            return got
        grants, link = yield from self.acquire([keys[start:stop] for start, stop in runs])
        for (start, _), grant in zip(runs, grants, strict=True):
            stop = start + grant.held
            got[start:stop] = yield from self.read(link, grant, targets[start:stop])
        yield from self.release(grants, link)
        return got

    def _runs(self, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """Where to look: runs of keys that are held as far as can be seen, else each."""
        runs: list[tuple[int, int]] = []
        for index, key in enumerate(keys):
            seen = calls.lookup_at_hand(self._core, (self._layout.id,), (key,))
            if seen is None:
                if index:
                    runs.append((index, index + 1))
            elif seen.held:
                start = runs.pop()[0] if runs and runs[-1][1] == index else index
                runs.append((start, index + 1))
        return runs

    def release(self, grants: Sequence[LeaseGrant], link: Link) -> Flow[None]:
        """Nobody waits for it: at worst a lease ends by time."""
        ids = [grant.lease_id for grant in grants if grant.lease_id]
        yield from calls.release_soon(self._core, link, ids)
        for lease_id in ids:
            self._held.remove(lease_id)

    def close(self) -> Flow[None]:
        if self._begun is not None:
            yield Drop(self._begun)
        if self._core.link is not None:
            yield from calls.release_soon(self._core, self._core.link, self._held)


def read_lease(core: Core, lease: LeaseBase, index: int) -> Flow[bytes | None]:
    """A copy of one block of a lease; None when it arrived damaged."""
    nbytes = lease.block_bytes(index)
    lease._check_current()
    link = lease._link
    checksum = lease.checksums[index]
    if link.arena is None:
        got = yield from read_remote(
            core, Budget(core.timeout_s), link, lease.lease_id, index, nbytes, checksum, None
        )
    else:
        address = lease.addresses[index]

        def copy_out() -> Got:
            link.hold()
            try:
                got = bytes(local_arena(link).view(address, nbytes, writable=False))
            finally:
                link.let_go()
            # With the lease's end as it is now: it may be renewed meanwhile.
            lease._check_current()
            if copy.checksum(got) != checksum:
                core.counters.count_corrupt()
                return None
            return got

        got = yield Work(copy_out)
    if got is None:
        return None
    return bytes(got)


def read_remote(
    core: Core,
    budget: Budget,
    link: Link,
    lease_id: int,
    index: int,
    nbytes: int,
    checksum: int,
    target: memoryview | None,
) -> Flow[Got]:
    """Fetch one block of a lease. Raises `LeaseExpired`."""
    pieces: list[memoryview] = []
    request = pb.ReadRequest(lease_id=link.bare(lease_id), indices=[index])
    try:
        yield ReadStream(request, link.session, budget.left(), pieces.append)
    except NoSession as error:
        link.retire()
        raise LeaseExpired("the lease's session with the server has ended") from error

    def assemble() -> Got:
        got: bytes | memoryview
        if sum(piece.nbytes for piece in pieces) != nbytes:
            core.counters.count_corrupt()
            return None
        if target is None:
            got = b"".join(pieces)
        else:
            got, start = target, 0
            for piece in pieces:
                copy.copy_bytes(target[start : start + piece.nbytes], piece)
                start += piece.nbytes
        if copy.checksum(got) != checksum:
            core.counters.count_corrupt()
            return None
        return got

    result: Got = yield Work(assemble)
    return result


def source_view(data: Buffer, nbytes: int) -> memoryview:
    """A caller's block as flat bytes. Raises `BadSize` unless it has `nbytes`."""
    view = _flat(data)
    if view.nbytes != nbytes:
        raise BadSize(f"a block of this layout is {nbytes} bytes, not {view.nbytes}")
    return view


def target_view(buffer: Buffer, nbytes: int) -> memoryview:
    """The first `nbytes` of a caller's buffer. Raises `BadSize` if there are fewer."""
    view = _flat(buffer)
    if view.readonly:
        raise BadRequest("the buffer to get into is read-only")
    if view.nbytes < nbytes:
        raise BadSize(f"a block of this layout is {nbytes} bytes, the buffer {view.nbytes}")
    return view if view.nbytes == nbytes else view[:nbytes]


def _flat(data: Buffer) -> memoryview:
    try:
        return memoryview(data).cast("B")
    except TypeError as error:
        raise BadRequest(f"a block is a contiguous buffer of plain elements: {error}") from error


def _blocks_a_piece(block_bytes: int) -> int:
    return max(1, min(PIECE_BLOCKS, PIECE_BYTES // block_bytes))
