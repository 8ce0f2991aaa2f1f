"""A peer that keeps its blocks in a dictionary; how it fails is its only argument."""

from __future__ import annotations

import ctypes
import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from kvstore_benchmarks.peers.child import private_memory, serve

Keys = list[bytes]


class FakeStore:
    version = "1.0"
    way = "a dictionary"

    def __init__(self, fault: str) -> None:
        self._fault = fault
        self._blocks: dict[bytes, bytes] = {}

    def memory(self, nbytes: int) -> memoryview:
        return private_memory(nbytes)

    def prepare(self, nbytes: int) -> None:
        os.write(1, b"what a library has to say\n")

    def block(self, view: memoryview) -> memoryview:
        return view

    def new_chain(self, length: int) -> Keys:
        return [secrets.token_bytes(32) for _ in range(length)]

    def branch(self, chain: Keys, keep: int) -> Keys:
        return chain[:keep] + self.new_chain(len(chain) - keep)

    def put(self, chain: Keys, blocks: Sequence[memoryview]) -> int:
        if self._fault == "dies":
            os._exit(7)
        if self._fault == "raises":
            raise OSError("no such luck")
        if self._fault == "refuses":
            return len(chain)
        self._blocks |= dict(zip(chain, map(bytes, blocks), strict=True))
        return 0

    def get(self, chain: Keys, targets: Sequence[memoryview]) -> int:
        for key, target in zip(chain, targets, strict=True):
            if key in self._blocks:
                target[:] = self._blocks[key]
        if self._fault == "lies":
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(targets[0])), 7, 1)
        return sum(key not in self._blocks for key in chain)

    def lookup(self, chain: Keys) -> int:
        return 0 if self._fault == "lies" else sum(key in self._blocks for key in chain)

    def after_lookup(self) -> None:
        pass

    def clear(self) -> None:
        self._blocks.clear()


def opened(stack: ExitStack) -> FakeStore:
    fault = sys.argv[1]
    if fault == "unopenable":
        raise RuntimeError("no memory to be had")
    return FakeStore(fault)


if __name__ == "__main__":
    sys.exit(serve(opened))
