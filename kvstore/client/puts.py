"""The flow of a put: slots reserved ahead, bytes copied into them, then named.

On the server's host the bytes go straight from the caller's buffers into the server's
memory; elsewhere they go over a Write stream. Either way what is committed is the
checksum of the bytes that arrived in the slot. One piece is committed, and slots for the
one after next are reserved, while the next is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvstore.client import calls, wire
from kvstore.client.connecting import current_link
from kvstore.client.lease import Layout
from kvstore.client.link import Budget, Core, Link
from kvstore.client.pieces import blocks_a_piece, source_view
from kvstore.client.steps import Drop, Flow, Work, WritePiece, WriteStream
from kvstore.errors import BadRequest, Conflict, InternalError
from kvstore.local import copy
from kvstore.types import (
    NO_REUSE,
    CommitAnswer,
    CommitOutcome,
    PutOutcome,
    Reuse,
    Segment,
    SlotGrant,
    check_key,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

ASKED_AT_ONCE = 1024
"""Blocks of which one call asks whether they are there."""


def put_many(
    core: Core,
    layout: Layout,
    keys: Sequence[bytes],
    datas: Sequence[Buffer],
    parent: bytes,
    wait_ms: int,
    reuse: Reuse = NO_REUSE,
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
    put = _Put(core, layout, keys, sources, parent, wait_ms, reuse)
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
        reuse: Reuse,
    ) -> None:
        self._core = core
        self._layout = layout
        self._keys = keys
        self._sources = sources
        self._parent = parent
        self._wait_ms = wait_ms
        self._reuse = reuse
        self._piece = blocks_a_piece(layout.block_bytes)
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
            parts = _write_pieces(map(link.bare, slots), sources)
            yield WriteStream(parts, link.session, Budget(self._core.timeout_s).left())
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
        return Segment(parent, self._keys[first : last + 1], slots, checksums, self._reuse)


def _checksums(sources: Sequence[memoryview]) -> Work:
    return Work(lambda: copy.checksum_many(sources))


def _write_pieces(slots: Iterator[int], sources: Sequence[memoryview]) -> Iterator[WritePiece]:
    for slot, source in zip(slots, sources, strict=True):
        for start in range(0, source.nbytes, wire.PIECE_BYTES):
            yield WritePiece(slot, source[start : start + wire.PIECE_BYTES])
