"""Counts of names are theirs, whatever names look like."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import pytest

from kvstore.core.policies.frequency import Frequency

NAMES: dict[str, Callable[[int], bytes]] = {
    "numbers, the last byte first": lambda n: n.to_bytes(16, "little"),
    "numbers, the first byte first": lambda n: n.to_bytes(16, "big"),
    "in the middle": lambda n: n.to_bytes(8, "big") + bytes(8),
    "hashes": lambda n: blake2b(n.to_bytes(8), digest_size=16).digest(),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_are_told_apart(kind: str) -> None:
    name = NAMES[kind]
    frequency = Frequency()
    frequency.grow(4096)
    for number in range(2000):
        for _ in range(1 + 4 * (number % 10 == 0)):
            frequency.add(name(number))
    told = [frequency.of(name(number)) for number in range(2000)]
    assert all(count >= 5 for count in told[::10])
    wrong = sum(count > 1 for number, count in enumerate(told) if number % 10)
    assert wrong < 0.05 * 1800
    assert sum(frequency.of(name(number)) > 0 for number in range(2000, 4000)) < 0.2 * 2000
