"""Copies there and back on a driver that does what it is given late and in any order: the
scenarios in which a wait that lacks shows as wrong bytes."""

from __future__ import annotations

import ctypes
from contextlib import closing
from typing import Any

import numpy as np

from kvstore.device import codec
from kvstore.device.base import Blocks, Coding, Memory, Piece
from kvstore.device.gpu import GpuDevice
from tests.unit.device.fakes import FakeDriver

BLOCKS, PIECE, LAYERS = 12, 64, 3
BLOCK_BYTES = PIECE * LAYERS
PIECES = [Piece(layer * BLOCKS * PIECE, PIECE, PIECE) for layer in range(LAYERS)]


def kv_cache(
    driver: FakeDriver, device: GpuDevice, coding: Coding | None = None
) -> tuple[Any, Blocks]:
    """(its memory, its blocks)."""
    memory = driver.give_kv_cache(BLOCKS * BLOCK_BYTES)
    place = Memory(memory.ctypes.data, len(memory), memory)
    return memory, device.blocks(place, PIECES, BLOCKS, coding)


def by_block(memory: Any) -> list[bytes]:
    """The bytes of each block of a KV cache."""
    layers = memory.reshape(LAYERS, BLOCKS, PIECE)
    return [layers[:, block].tobytes() for block in range(BLOCKS)]


def coded(block: bytes, coding: Coding) -> bytes:
    into = bytearray(coding.nbytes(len(block)))
    codec.encode(*coding, memoryview(block), memoryview(into))
    return bytes(into)


def brought_back(memory: Any, coding: Coding) -> bytes:
    """What a KV cache is once all its blocks were coded."""
    back = bytearray(len(memory))
    layers = np.frombuffer(back, np.uint8).reshape(LAYERS, BLOCKS, PIECE)
    for number, block in enumerate(by_block(memory)):
        raw = bytearray(BLOCK_BYTES)
        codec.decode(*coding, memoryview(coded(block, coding)), memoryview(raw))
        layers[:, number] = np.frombuffer(raw, np.uint8).reshape(LAYERS, PIECE)
    return bytes(back)


def slots(nbytes: int = BLOCK_BYTES) -> list[memoryview]:
    mapping = memoryview((ctypes.c_ubyte * (BLOCKS * nbytes))()).cast("B")
    return [mapping[start : start + nbytes] for start in range(0, BLOCKS * nbytes, nbytes)]


def round_trip(
    driver: FakeDriver, device: GpuDevice, seed: int, coding: Coding | None = None
) -> bool:
    """Whether what an engine computes is saved, and loaded over what it computes then."""
    memory, blocks = kv_cache(driver, device, coding)
    content = np.random.default_rng(seed).integers(0, 256, len(memory), np.uint8)
    driver.launch(lambda: np.copyto(memory, content))
    expected, left = by_block(content), content.tobytes()
    if coding is not None:
        expected, left = [coded(each, coding) for each in expected], brought_back(content, coding)
    saved = slots(blocks.block_bytes)
    with closing(device.stream()) as out, closing(device.stream()) as into:
        out.wait_event(device.computed())
        out.save(blocks, range(BLOCKS), saved).finish()
        good = [bytes(slot) for slot in saved] == expected
        driver.launch(lambda: memory.fill(0xEE))
        into.wait_event(device.computed())
        into.load(blocks, range(BLOCKS), saved).finish()
        # As the engine's next step may.
        good &= memory.tobytes() == left
        driver.settle()
    return good and memory.tobytes() == left and not driver.wrong
