"""Copies are exact on both sides of the size where the method changes."""

from __future__ import annotations

import random

import pytest
import xxhash

from kvstore.local.copy import GIL_FREE_BYTES, checksum, checksum_many, copy_checked, copy_many


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, GIL_FREE_BYTES, GIL_FREE_BYTES + 1, 1 << 20])
def test_exactly_the_bytes_arrive_with_their_checksum(nbytes: int) -> None:
    source = random.Random(nbytes).randbytes(nbytes)
    destination = bytearray(b"\xaa" * (nbytes + 2))
    got = copy_checked(memoryview(destination)[1:-1], memoryview(source))
    assert destination == b"\xaa" + source + b"\xaa"
    assert got == checksum(source) == xxhash.xxh3_64_intdigest(source)


@pytest.mark.parametrize("nbytes", [100, GIL_FREE_BYTES * 2])
def test_a_length_that_does_not_fit_is_an_error_not_a_partial_copy(nbytes: int) -> None:
    destination = bytearray(nbytes - 1)
    with pytest.raises(ValueError):
        copy_checked(memoryview(destination), memoryview(b"x" * nbytes))
    assert not any(destination)


@pytest.mark.parametrize("nbytes", [1, 4097, GIL_FREE_BYTES, GIL_FREE_BYTES + 1, 700_001])
@pytest.mark.parametrize("count", [0, 1, 2, 31])
def test_of_many_blocks_each_arrives_in_its_place(nbytes: int, count: int) -> None:
    sources = [random.Random(index).randbytes(nbytes) for index in range(count)]
    room = bytearray(b"\xaa" * (2 + nbytes * count))
    views = [memoryview(room)[at : at + nbytes] for at in range(1, nbytes * count + 1, nbytes)]
    arrived = copy_many(views, [memoryview(source) for source in sources])
    assert room == b"\xaa" + b"".join(sources) + b"\xaa"
    assert arrived == [xxhash.xxh3_64_intdigest(source) for source in sources]
    assert checksum_many(views) == arrived


@pytest.mark.parametrize("nbytes", [100, GIL_FREE_BYTES * 2])
@pytest.mark.parametrize("bad", [0, 1, 29])
def test_one_wrong_length_among_many_is_an_error(nbytes: int, bad: int) -> None:
    targets = [memoryview(bytearray(nbytes + (index == bad))) for index in range(30)]
    with pytest.raises(ValueError):
        copy_many(targets, [memoryview(b"x" * nbytes)] * 30)
    assert not any(targets[bad])
    with pytest.raises(ValueError):
        copy_many(targets, [memoryview(b"x" * nbytes)] * 29)
