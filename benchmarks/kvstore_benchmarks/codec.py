"""`python -m kvstore_benchmarks.codec`: what a processor takes to code blocks and to bring
them back, beside a plain copy of them, and how far off they then are.

Elements are normal, with one of 64 channels ten times as large, as keys have them.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kvstore.device import codec
from kvstore.types import CODECS, coded_bytes
from kvstore_benchmarks.figures import gbps, machine, median, timed

BLOCK_BYTES = 2 << 20
ROUNDS = 15
CHANNELS = 64
DTYPES = ("bfloat16", "float16", "float32")


def main() -> int:
    facts = machine()
    table = Table(title=f"Blocks of 2 MiB, one thread ({facts['cores']} cores, {facts['date']})")
    columns = ("", "bytes", "code, GB/s", "back, GB/s", "copy, GB/s", "error")
    for column in columns:
        table.add_column(column, justify="right")
    for dtype in DTYPES:
        for name in CODECS:
            table.add_row(f"{name} of {dtype}", *_measured(name, dtype))
    Console().print(table)
    print("bytes: of those it had; error: root mean square, of that of the elements")
    return 0


def _measured(name: str, dtype: str) -> list[str]:
    block = _block(dtype)
    back = np.zeros_like(block)
    coded = bytearray(coded_bytes(name, dtype, len(block)))
    taken: dict[str, list[float]] = {"code": [], "back": [], "copy": []}
    for _ in range(ROUNDS):
        with timed() as code:
            codec.encode(name, dtype, memoryview(block), memoryview(coded))
        with timed() as bring_back:
            codec.decode(name, dtype, memoryview(coded), memoryview(back))
        off = _error(block, back, dtype)
        with timed() as copy:
            np.copyto(back, block)
        for way, timer in (("code", code), ("back", bring_back), ("copy", copy)):
            taken[way].append(timer.seconds)
    speeds = [f"{gbps(len(block), median(taken[way])):.2f}" for way in ("code", "back", "copy")]
    return [f"{len(coded) / len(block):.3f}", *speeds, f"{off:.4f}"]


def _block(dtype: str) -> Any:
    """As bytes."""
    count = BLOCK_BYTES // (4 if dtype == "float32" else 2)
    values = np.random.default_rng(0).normal(size=(count // CHANNELS, CHANNELS)).astype(np.float32)
    values[:, 5] *= 10
    if dtype == "float16":
        return values.astype(np.float16).ravel().view(np.uint8)
    if dtype == "bfloat16":
        return (values.ravel().view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.ravel().view(np.uint8)


def _error(was: Any, now: Any, dtype: str) -> float:
    one, other = (_floats(each, dtype) for each in (was, now))
    return float(np.sqrt(np.mean((one - other) ** 2) / np.mean(one**2)))


def _floats(raw: Any, dtype: str) -> Any:
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float16 if dtype == "float16" else np.float32).astype(np.float32)


if __name__ == "__main__":
    sys.exit(main())
