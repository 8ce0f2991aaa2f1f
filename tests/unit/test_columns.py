"""Columns say what was put into them, and refuse what is not one."""

from __future__ import annotations

import os

import pytest

from kvstore.errors import BadKey, BadRequest
from kvstore.wire.columns import pack_keys, pack_numbers, unpack_keys, unpack_numbers


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 127, 128, 1000])
def test_keys_come_back_as_they_were(count: int) -> None:
    keys = [os.urandom(32) for _ in range(count)]
    assert unpack_keys(pack_keys(keys)) == keys


@pytest.mark.parametrize("keys", [[b"x" * 31], [b"x" * 31, b"x" * 33], [b"x" * 64], [b""]])
def test_keys_whose_lengths_make_up_for_each_other_do_not_become_others(keys: list[bytes]) -> None:
    with pytest.raises(BadKey):
        pack_keys(keys)


@pytest.mark.parametrize("length", [1, 31, 33, 64 * 32 + 5])
def test_a_column_of_keys_that_is_cut_off_is_refused(length: int) -> None:
    with pytest.raises(BadKey):
        unpack_keys(bytes(length))


def test_numbers_come_back_as_they_were() -> None:
    numbers = [0, 1, 1 << 32, (1 << 64) - 1]
    assert unpack_numbers(pack_numbers(numbers)) == numbers
    assert pack_numbers([1]) == b"\x01" + bytes(7), "the order of bytes is part of the protocol"


@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_a_number_that_does_not_fit_is_refused(number: int) -> None:
    with pytest.raises(BadRequest):
        pack_numbers([number])


def test_a_column_of_numbers_that_is_cut_off_is_refused() -> None:
    with pytest.raises(BadRequest):
        unpack_numbers(bytes(9))
