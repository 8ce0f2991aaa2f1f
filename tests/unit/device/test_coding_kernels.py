"""The codec's kernels compile for the GPUs they are meant for, and do what the reference does,
to the bit: on the processor, thread after thread."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.device import codec, coding_kernels
from kvstore.types import CODECS, GROUP, coded_bytes, element_bytes
from tests.unit.device.compiling import ARCHITECTURES, compile_for, on_processor

KERNELS = [coding_kernels.ENCODE_KERNEL, coding_kernels.DECODE_KERNEL]
KINDS = [(name, dtype) for name in CODECS for dtype in coding_kernels.DTYPES]
EVERY_PAIR = 1 << 16
"""Of scale and code, or of bits of a half."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("kernels")
    source = coding_kernels.SOURCE
    return on_processor(source, KERNELS, "kvstore_groups", folder, kinds=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_compile(architecture: str, tmp_path: Path) -> None:
    compile_for(architecture, coding_kernels.SOURCE, KERNELS, tmp_path)


def launch(library: ctypes.CDLL, kernel: str, runs: list[Any], name: str, dtype: str) -> None:
    table = np.array(runs, np.uint64)
    assert table.itemsize * table.shape[1] == coding_kernels.GROUPS_BYTES
    kind = coding_kernels.kind_of(name, dtype)
    function = getattr(library, f"launch_{kernel}")
    function(3, 2, 8, ctypes.c_void_p(table.ctypes.data), len(table), kind)


def elements(dtype: str) -> Any:
    """Raw elements, whole groups: every bit pattern of a half, or as many of a float; uneven
    groups; what is special, among others; odd numbers of groups."""
    random = np.random.default_rng(7)
    size = element_bytes(dtype)
    kind = np.uint16 if size == 2 else np.uint32
    top = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F80_0000}[dtype]
    sign = 1 << (8 * size - 1)
    special = np.array(
        [0, 1, 2, top - 1, top, top + 1, top >> 1, sign, sign | 1, sign | top, sign | (top - 1)],
        kind,
    )
    every = np.arange(EVERY_PAIR, dtype=kind)
    if size == 4:
        # Around what rounds either way, of each exponent.
        every = (every << 16) | random.choice([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], EVERY_PAIR)
        every = every.astype(kind)
    shift = random.integers(-30, 30, (1000, 1))
    normal = (random.normal(size=(1000, GROUP)) * np.exp2(shift)).astype(np.float32)
    bits = normal.view(np.uint32)
    if dtype == "bfloat16":
        some = (bits >> 16).astype(kind)
    else:
        with np.errstate(over="ignore"):
            some = bits if dtype == "float32" else normal.astype(np.float16).view(kind)
    parts = [
        every, random.permutation(every), some.ravel(), random.choice(special, 77 * GROUP),
        np.zeros(GROUP, kind), np.full(GROUP, top - 1, kind), np.full(GROUP, top, kind),
        np.ones(GROUP, kind),
    ]  # fmt: skip
    return np.concatenate(parts)


@pytest.mark.parametrize("skew", [0, 2])
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_blocks_are_coded_as_by_the_reference(
    library: ctypes.CDLL, name: str, dtype: str, skew: int
) -> None:
    """Blocks that begin at a boundary, and others, each in pieces of unequal size."""
    raw = elements(dtype).view(np.uint8)
    nbytes = coded_bytes(name, dtype, len(raw))
    expected, room = np.zeros(nbytes, np.uint8), np.full(nbytes + 64, 0xEE, np.uint8)
    codec.encode(name, dtype, memoryview(raw), memoryview(expected))
    begin = -room.ctypes.data % 16 + skew
    groups = len(raw) // (GROUP * element_bytes(dtype))
    scale, code = (1, GROUP) if name == "fp8" else (2, GROUP // 2)
    cuts = [0, 1, 6, groups // 3, groups]
    runs = [
        (
            raw.ctypes.data + start * GROUP * element_bytes(dtype),
            room.ctypes.data + begin + start * scale,
            room.ctypes.data + begin + groups * scale + start * code,
            stop - start,
        )
        for start, stop in pairwise(cuts)
    ]
    launch(library, coding_kernels.ENCODE_KERNEL, runs, name, dtype)
    assert room[begin : begin + nbytes].tobytes() == expected.tobytes()
    assert set(room[:begin]) | set(room[begin + nbytes :]) == {0xEE}
    back, decoded = np.zeros_like(raw), np.zeros_like(raw)
    codec.decode(name, dtype, memoryview(expected), memoryview(back))
    moved = [(decoded.ctypes.data + run[0] - raw.ctypes.data, *run[1:]) for run in runs]
    launch(library, coding_kernels.DECODE_KERNEL, moved, name, dtype)
    assert decoded.tobytes() == back.tobytes()


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_whatever_is_stored_is_brought_back_as_by_the_reference(
    library: ctypes.CDLL, name: str, dtype: str
) -> None:
    """Every scale with every code, those that no block is coded to too."""
    if name == "fp8":
        scales = np.repeat(np.arange(256, dtype=np.uint8), 256 // GROUP)
        codes = np.tile(np.arange(256, dtype=np.uint8), 256)
    else:
        scales = np.arange(4096, dtype="<u2").view(np.uint8)
        nibbles = np.tile(np.arange(16, dtype=np.uint8), 4096 * GROUP // 16)
        codes = nibbles[::2] | nibbles[1::2] << 4
    stored = np.concatenate([scales, codes])
    groups = len(scales) // (1 if name == "fp8" else 2)
    nbytes = groups * GROUP * element_bytes(dtype)
    expected, got = np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    codec.decode(name, dtype, memoryview(stored), memoryview(expected))
    start = stored.ctypes.data
    runs = [(got.ctypes.data, start, start + len(scales), groups)]
    launch(library, coding_kernels.DECODE_KERNEL, runs, name, dtype)
    kind = np.uint32 if dtype == "float32" else np.uint16
    same = expected.view(kind) == got.view(kind)
    # Of which sign an infinite scale's nothing is, a processor may choose.
    assert (same | (_no_number(expected, dtype) & _no_number(got, dtype))).all()


def _no_number(raw: Any, dtype: str) -> Any:
    if dtype == "bfloat16":
        return np.isnan((raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32))
    return np.isnan(raw.view(np.float16 if dtype == "float16" else np.float32))
