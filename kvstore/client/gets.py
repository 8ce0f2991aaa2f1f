"""The flows that read blocks: get, and a copy of one block of a lease.

On the server's host the bytes go straight from the server's memory into the caller's
buffers; elsewhere they come over Read streams. Either way what is returned has the
lease's checksum and was copied while the lease lasted, otherwise it is a miss and
counted, and the server is told what was damaged. A get acquires the next piece while it
copies this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvstore.client import calls
from kvstore.client.connecting import local_arena
from kvstore.client.lease import Layout, LeaseBase
from kvstore.client.link import Budget, Core, Link
from kvstore.client.pieces import blocks_a_piece, target_view
from kvstore.client.steps import Drop, Flow, ReadStream, Work
from kvstore.errors import BadRequest, InternalError, LeaseExpired, NoSession
from kvstore.local import copy
from kvstore.types import GPU_ONLY, NO_REUSE, ChainQuery, LeaseGrant, Reuse, check_key
from kvstore.wire.v1 import kvstore_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Buffer

GET_WAIT_MS = 1000

Got = bytes | memoryview | None
"""A block got: new bytes, or the part of the caller's buffer it was put in, or a miss."""


def get_many(
    core: Core,
    layout: Layout,
    keys: Sequence[bytes],
    into: Sequence[Buffer] | None,
    reuse: Reuse = NO_REUSE,
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
    get = _Get(core, layout, reuse)
    step = blocks_a_piece(layout.block_bytes)
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

    def __init__(self, core: Core, layout: Layout, reuse: Reuse) -> None:
        self._core = core
        self._layout = layout
        self._reuse = reuse
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
        return ChainQuery((self._layout.id,), keys, self._reuse)

    def read(
        self, link: Link, grant: LeaseGrant, targets: Sequence[memoryview | None]
    ) -> Flow[list[Got]]:
        """The blocks of one grant."""
        if any(address >= GPU_ONLY for address in grant.addresses):
            # Nobody reads on a GPU here.
            return [None] * len(targets)
        if link.arena is None:
            return (yield from self._read_remote(link, grant, targets))
        got: list[Got]
        got, damaged = yield Work(lambda: self._read_local(link, grant, targets))
        yield from calls.report_damage_soon(self._core, link, damaged)
        return got

    def _read_local(
        self, link: Link, grant: LeaseGrant, targets: Sequence[memoryview | None]
    ) -> tuple[list[Got], list[int]]:
        """Also the addresses of those that arrived damaged."""
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
            return [None] * len(got), []
        if arrived == grant.checksums:
            return list(got), []
        right = [a == b for a, b in zip(arrived, grant.checksums, strict=True)]
        core.counters.count_corrupt(right.count(False))
        damaged = [address for address, ok in zip(grant.addresses, right, strict=True) if not ok]
        return [block if ok else None for block, ok in zip(got, right, strict=True)], damaged

    def _read_remote(
        self, link: Link, grant: LeaseGrant, targets: Sequence[memoryview | None]
    ) -> Flow[list[Got]]:
        got: list[Got] = []
        damaged = []
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
            else:
                if block is None:
                    damaged.append(grant.addresses[index])
            got.append(block)
        yield from calls.report_damage_soon(self._core, link, damaged)
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
    """A copy of one block of a lease; None when it arrived damaged, or is in a GPU's memory
    alone."""
    nbytes = lease.block_bytes(index)
    lease._check_current()
    link = lease._link
    address, checksum = lease.addresses[index], lease.checksums[index]
    if address >= GPU_ONLY:
        return None
    if link.arena is None:
        got = yield from read_remote(
            core, Budget(core.timeout_s), link, lease.lease_id, index, nbytes, checksum, None
        )
    else:

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
        yield from calls.report_damage_soon(core, link, [address])
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
