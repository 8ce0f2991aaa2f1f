"""Ages in buckets, two an octave."""

from __future__ import annotations

BUCKETS = 60


def bucket_of(age: int) -> int:
    if age < 2:
        return age
    length = age.bit_length()
    return min(2 * length - 2 + (age >> (length - 2) & 1), BUCKETS - 1)


AGES = [b if b < 2 else (2 + (b & 1)) << (b // 2 - 1) for b in range(BUCKETS + 1)]
"""The least age of each bucket."""
