"""Flows that move blocks: put, get, and reading under a lease.

On the server's host the bytes go straight between the caller's buffers and the
server's memory; elsewhere they go over Read and Write streams. Either way

  * what a put commits is the checksum of the bytes that arrived in the slot;
  * what a get returns has that checksum and was copied while its lease lasted,
    otherwise it is a miss and counted.

Many blocks go in rounds, so that a call of any size pins and reserves a bounded
amount. The client's timeout bounds each round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kvstore.client import calls, wire
from kvstore.client.connecting import local_arena
from kvstore.client.lease import Layout, LeaseBase
from kvstore.client.link import Budget, Core, Link
from kvstore.client.steps import Flow, ReadStream, Work, WritePiece, WriteStream
from kvstore.errors import BadRequest, BadSize, Conflict, InternalError, LeaseExpired, NoSession
from kvstore.local import copy
from kvstore.types import (
    ChainQuery,
    PutOutcome,
    ReservationGrant,
    ReserveOutcome,
    check_key,
)
from kvstore.wire.v1 import kvstore_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Buffer

ROUND_BYTES = 64 << 20
ROUND_BLOCKS = 256
GET_WAIT_MS = 1000

_OUTCOMES = {
    ReserveOutcome.GRANTED: PutOutcome.STORED,
    ReserveOutcome.PRESENT: PutOutcome.PRESENT,
    ReserveOutcome.PENDING: PutOutcome.PENDING,
    ReserveOutcome.DENIED: PutOutcome.DENIED,
}

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

    A `Conflict` leaves the rounds before its own stored, and nothing of its own.
    """
    if len(keys) != len(datas):
        raise BadRequest(f"{len(keys)} keys but {len(datas)} blocks")
    sources = [source_view(data, layout.block_bytes) for data in datas]
    parents = [parent, *map(check_key, keys)]
    outcomes: list[PutOutcome] = []
    for start, stop in _rounds(len(keys), layout.block_bytes):
        entries = list(zip(keys[start:stop], parents[start:stop], strict=True))
        outcomes += yield from _put_all(core, layout, entries, sources[start:stop], wait_ms)
    return outcomes


def _put_all(
    core: Core,
    layout: Layout,
    entries: Sequence[tuple[bytes, bytes]],
    sources: Sequence[memoryview],
    wait_ms: int,
) -> Flow[list[PutOutcome]]:
    """One round, and again for what was denied for as long as that gets on: the server
    grants what it has room for, and makes more once that is committed."""
    outcomes = yield from _put_round(core, layout, entries, sources, wait_ms)
    left = [i for i, outcome in enumerate(outcomes) if outcome is PutOutcome.DENIED]
    while left and len(left) < len(entries):
        again = yield from _put_round(
            core, layout, [entries[i] for i in left], [sources[i] for i in left], wait_ms
        )
        for i, outcome in zip(left, again, strict=True):
            outcomes[i] = outcome
        still = [i for i in left if outcomes[i] is PutOutcome.DENIED]
        if len(still) == len(left):
            break
        left = still
    return outcomes


def _put_round(
    core: Core,
    layout: Layout,
    entries: Sequence[tuple[bytes, bytes]],
    sources: Sequence[memoryview],
    wait_ms: int,
) -> Flow[list[PutOutcome]]:
    budget = Budget(core.timeout_s)
    grant, link = yield from calls.reserve(core, budget, layout.id, entries, wait_ms)
    try:
        if len(grant.results) != len(entries):
            raise InternalError("the server answered for another number of blocks")
        yield Work(lambda: _check_conflicts(grant, sources))
        granted = [
            index
            for index, result in enumerate(grant.results)
            if result.outcome is ReserveOutcome.GRANTED
        ]
        if granted:
            checksums = yield from _fill(budget, link, grant, granted, sources)
            yield from calls.commit(core, budget, grant.reservation_id, granted, checksums)
    except BaseException:
        yield from calls.give_up(core, budget, reservation_id=grant.reservation_id)
        raise
    return [_OUTCOMES[result.outcome] for result in grant.results]


def _check_conflicts(grant: ReservationGrant, sources: Sequence[memoryview]) -> None:
    for result, source in zip(grant.results, sources, strict=True):
        if result.outcome is ReserveOutcome.PRESENT and result.checksum != copy.checksum(source):
            raise Conflict("the key is committed with other bytes")


def _fill(
    budget: Budget,
    link: Link,
    grant: ReservationGrant,
    granted: Sequence[int],
    sources: Sequence[memoryview],
) -> Flow[list[int]]:
    """Bring the granted blocks' bytes into their slots; their checksums."""
    checksums: list[int]
    if link.arena is not None:
        arena = link.arena

        def copy_in() -> list[int]:
            link.hold()
            try:
                return [
                    copy.copy_checked(
                        arena.view(grant.results[i].address, sources[i].nbytes, writable=True),
                        sources[i],
                    )
                    for i in granted
                ]
            finally:
                link.let_go()

        checksums = yield Work(copy_in)
        return checksums
    checksums = yield Work(lambda: [copy.checksum(sources[i]) for i in granted])
    pieces = _pieces(link.bare(grant.reservation_id), granted, sources)
    yield WriteStream(pieces, link.session, budget.left())
    return checksums


def _pieces(
    reservation_id: int, granted: Sequence[int], sources: Sequence[memoryview]
) -> Iterator[WritePiece]:
    for index in granted:
        source = sources[index]
        for start in range(0, source.nbytes, wire.PIECE_BYTES):
            yield WritePiece(reservation_id, index, source[start : start + wire.PIECE_BYTES])
            reservation_id = 0


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
    for start, stop in _rounds(len(keys), layout.block_bytes):
        got += yield from _get_round(core, layout, keys[start:stop], targets[start:stop])
    return got


def _get_round(
    core: Core,
    layout: Layout,
    keys: Sequence[bytes],
    targets: Sequence[memoryview | None],
) -> Flow[list[Got]]:
    budget = Budget(core.timeout_s)
    chains = [ChainQuery((layout.id,), (key,)) for key in keys]
    grants, link = yield from calls.acquire(core, budget, chains, GET_WAIT_MS)
    lease_ids = [grant.lease_id for grant in grants if grant.lease_id]
    if not lease_ids:
        return [None] * len(keys)
    try:
        if len(grants) != len(keys):
            raise InternalError("the server answered for another number of chains")
        if link.arena is not None:

            def copy_out() -> list[Got]:
                return [
                    read_local(
                        core,
                        link,
                        grant.addresses[0],
                        layout.block_bytes,
                        grant.checksums[0],
                        grant.expires_ns,
                        target,
                    )
                    if grant.held
                    else None
                    for grant, target in zip(grants, targets, strict=True)
                ]

            got: list[Got] = yield Work(copy_out)
            return got
        got = []
        for grant, target in zip(grants, targets, strict=True):
            block: Got = None
            if grant.held:
                block = yield from _get_remote(
                    core, budget, link, grant.lease_id, layout, grant.checksums[0], target
                )
            got.append(block)
        return got
    finally:
        yield from calls.give_back(core, budget, lease_ids=lease_ids)


def _get_remote(
    core: Core,
    budget: Budget,
    link: Link,
    lease_id: int,
    layout: Layout,
    checksum: int,
    target: memoryview | None,
) -> Flow[Got]:
    try:
        got = yield from read_remote(
            core, budget, link, lease_id, 0, layout.block_bytes, checksum, target
        )
    except LeaseExpired:
        core.counters.count_expired()
        return None
    return got


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
            # With the lease's end at the time of the check: it may be renewed meanwhile.
            got = read_local(core, link, address, nbytes, checksum, 0, None)
            lease._check_current()
            return got

        got = yield Work(copy_out)
    if got is None:
        return None
    return bytes(got)


def read_local(
    core: Core,
    link: Link,
    address: int,
    nbytes: int,
    checksum: int,
    expires_ns: int,
    target: memoryview | None,
) -> Got:
    """Copy a block out of the arena. An `expires_ns` of 0 leaves the check to the caller."""
    link.hold()
    try:
        slot = local_arena(link).view(address, nbytes, writable=False)
        got: bytes | memoryview
        if target is None:
            got = bytes(slot)
            actual = copy.checksum(got)
        else:
            got = target
            actual = copy.copy_checked(target, slot)
    finally:
        link.let_go()
    if expires_ns and core.clock.now_ns() >= expires_ns:
        core.counters.count_expired()
        return None
    if actual != checksum:
        core.counters.count_corrupt()
        return None
    return got


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
    return view[:nbytes]


def _flat(data: Buffer) -> memoryview:
    try:
        return memoryview(data).cast("B")
    except TypeError as error:
        raise BadRequest(f"a block is a contiguous buffer of plain elements: {error}") from error


def _rounds(count: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, min(ROUND_BLOCKS, ROUND_BYTES // block_bytes))
    for start in range(0, count, step):
        yield start, min(start + step, count)
