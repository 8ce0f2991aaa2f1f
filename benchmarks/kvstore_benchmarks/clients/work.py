"""What a polite client does, by its seed alone: prompts that share their beginnings.

A step is one prompt. It begins with a document that all clients know, drawn so that
the first documents come up far more often than the last, and ends in blocks of its
own. Documents come in two sizes of block, so that calls and bytes both count.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

STAMP_BYTES = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """Prompts with one size of block: `shared` blocks of a document, then `own`."""

    nbytes: int
    shared: int
    own: int
    documents: int


SHAPES = (
    Shape(nbytes=64 << 10, shared=32, own=8, documents=24),
    Shape(nbytes=1 << 20, shared=4, own=1, documents=24),
)


class Prompt(NamedTuple):
    shape: int
    keys: list[bytes]


class Work:
    """The prompts of one client. Equal seeds and numbers make equal prompts."""

    def __init__(self, seed: int, client: int) -> None:
        self._random = random.Random(f"{seed}/{client}")
        self.documents = [
            [document_keys(seed, index, number) for number in range(shape.documents)]
            for index, shape in enumerate(SHAPES)
        ]
        # The n-th document comes up with a weight of 1/n.
        self._weights = [
            list(accumulate(1 / rank for rank in range(1, shape.documents + 1))) for shape in SHAPES
        ]

    def prompt(self) -> Prompt:
        index = self._random.randrange(len(SHAPES))
        (document,) = self._random.choices(self.documents[index], cum_weights=self._weights[index])
        own = [self._random.randbytes(32) for _ in range(SHAPES[index].own)]
        return Prompt(index, document + own)


def document_keys(seed: int, shape: int, number: int) -> list[bytes]:
    return [
        hashlib.sha256(f"{seed}/{shape}/{number}/{position}".encode()).digest()
        for position in range(SHAPES[shape].shared)
    ]


def common_bytes(seed: int, nbytes: int) -> bytes:
    """What every block consists of, between its stamps."""
    return random.Random(seed).randbytes(nbytes)


def stamp(block: memoryview, key: bytes) -> None:
    """Make a block the one that belongs to `key`: at both ends, so that half of a copy
    is seen."""
    block[:STAMP_BYTES] = key
    block[-STAMP_BYTES:] = key


def stamped(block: memoryview, key: bytes) -> bool:
    return block[:STAMP_BYTES] == key and block[-STAMP_BYTES:] == key
