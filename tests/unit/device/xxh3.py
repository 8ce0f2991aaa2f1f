"""What the kernels of `checksum_kernel` do, of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.device.checksum_kernel import LAST_SECRET, SECRET, START

Words = np.ndarray[Any, Any]

_NEIGHBOUR = [1, 0, 3, 2, 5, 4, 7, 6]
_SECRET, _LAST = np.array(SECRET, np.uint64), np.array(LAST_SECRET, np.uint64)
_STRIPES = np.lib.stride_tricks.sliding_window_view(_SECRET, 8)[:16]
_LOWER, _HALF, _MOST = np.uint64(0xFFFF_FFFF), np.uint64(32), np.uint64(47)
_PRIME = np.uint64(0x9E3779B1)


def _added(words: Words, secret: Words) -> Words:
    keyed = words ^ secret
    return (keyed & _LOWER) * (keyed >> _HALF) + words[..., _NEIGHBOUR]


def rows(data: Words) -> Words:
    """uint64 [rounds + 1, 8] of bytes [n]."""
    rounds = (len(data) - 1) // 1024
    whole = data[: rounds * 1024].view(np.uint64).reshape(rounds, 16, 8)
    rest = data[rounds * 1024 :]
    stripes = (len(rest) - 1) // 64
    few = rest[: stripes * 64].view(np.uint64).reshape(stripes, 8)
    last = _added(few, _STRIPES[:stripes]).sum(axis=0, dtype=np.uint64)
    last = last + _added(np.frombuffer(data[-64:].tobytes(), np.uint64), _LAST)
    return np.vstack([_added(whole, _STRIPES).sum(axis=1, dtype=np.uint64), last[None]])


def chained(rows: Words) -> Words:
    words = np.array(START, np.uint64)
    for row in rows[:-1]:
        words = words + row
        words = (words ^ (words >> _MOST) ^ _SECRET[16:]) * _PRIME
    chained: Words = words + rows[-1]
    return chained
