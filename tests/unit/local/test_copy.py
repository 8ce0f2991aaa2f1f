"""Copies are exact on both sides of the size where the method changes."""

from __future__ import annotations

import random

import pytest
import xxhash

from kvstore.local.copy import GIL_FREE_BYTES, checksum, copy_checked


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
