"""A segment's summary: one of its copies is whole whatever happens to the other."""

from __future__ import annotations

import pytest

from kvstore.errors import CorruptBlock
from kvstore.tiers.faulty import MemoryFile
from kvstore.tiers.nvme_segment import Geometry, Segment

GEOMETRY = Geometry(128 << 20)


def segment_of(number: int = 3) -> Segment:
    return Segment(number, MemoryFile(0), GEOMETRY)


def written() -> tuple[Segment, dict[int, bytes]]:
    """A segment, and its two copies by offset."""
    segment = segment_of()
    segment.begin(77, 1 << 20)
    copies = {}
    for slot in (5, 9):
        segment.strike(slot)
        segment.spoil(slot)
        summary, offset = segment.encode()
        copies[offset] = summary
    return segment, copies


def test_a_summary_comes_back_as_it_was() -> None:
    segment, copies = written()
    again = segment_of()
    again.load(list(copies.values()))
    assert (again.life, again.slot_bytes, again.slots) == (77, 1 << 20, 128)
    assert (again.dead, again.bad) == (segment.dead, segment.bad)
    assert [slot for slot in range(128) if again.is_dead(slot)] == [5, 9]


def test_the_copies_are_written_in_turn_and_one_alone_is_enough() -> None:
    _, copies = written()
    assert copies.keys() == {0, GEOMETRY.summary_bytes}
    for offset, copy in copies.items():
        other = next(c for o, c in copies.items() if o != offset)
        torn = copy[:512] + bytes(len(copy) - 512)
        again = segment_of()
        again.load([torn, other])
        assert again.is_dead(5)


def test_any_bit_changed_makes_a_copy_worthless() -> None:
    _, copies = written()
    copy = next(iter(copies.values()))
    for bit in [*range(8 * 64), *range(8 * 64, 8 * len(copy), 41)]:
        spoilt = bytearray(copy)
        spoilt[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(CorruptBlock):
            segment_of().load([bytes(spoilt)])


def test_a_summary_of_another_segment_is_not_taken() -> None:
    _, copies = written()
    with pytest.raises(CorruptBlock):
        segment_of(4).load(list(copies.values()))
