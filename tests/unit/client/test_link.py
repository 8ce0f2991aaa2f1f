"""A session ends when nobody copies under it any more, and not before."""

from __future__ import annotations

import pytest

from kvstore.client.link import Link
from kvstore.errors import Unavailable
from tests.unit.client.fake import info


class Stream:
    def __init__(self) -> None:
        self.cancelled = 0

    def alive(self) -> bool:
        return not self.cancelled

    def cancel(self) -> None:
        self.cancelled += 1


def make(stream: Stream, number: int = 0) -> Link:
    return Link(
        number=number,
        session=b"",
        info=info(),
        attachment=None,
        lines=None,
        arena=None,
        presence=None,
        stream=stream,
    )


def test_a_retired_link_ends_with_its_last_holder() -> None:
    """The server gives a session's slots to others the moment it ends."""
    stream = Stream()
    link = make(stream)
    link.hold()
    link.hold()
    link.retire()
    link.retire()
    assert not link.alive()
    link.let_go()
    assert stream.cancelled == 0
    link.let_go()
    assert stream.cancelled == 1
    link.retire()
    assert stream.cancelled == 1


def test_a_retired_link_is_not_held_again() -> None:
    link = make(Stream())
    link.retire()
    with pytest.raises(Unavailable):
        link.hold()


def test_a_link_knows_its_own_numbers_even_the_largest() -> None:
    first, second = make(Stream(), 0), make(Stream(), 1)
    for number in (1, (1 << 64) - 1):
        assert first.owns(number + first.tag) and not second.owns(number + first.tag)
        assert second.owns(number + second.tag) and not first.owns(number + second.tag)
        assert second.bare(number + second.tag) == number
