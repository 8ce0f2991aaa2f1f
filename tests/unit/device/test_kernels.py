"""The kernel compiles for the GPUs it is meant for, and its arithmetic is right: the latter
on the processor, thread after thread."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from kvstore.device import kernels
from tests.unit.device.compiling import ARCHITECTURES, compile_for, on_processor


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_compiles(architecture: str, tmp_path: Path) -> None:
    compile_for(architecture, kernels.SOURCE, [kernels.COPY_KERNEL], tmp_path)


def test_it_copies_every_byte_and_no_other(tmp_path: Path) -> None:
    library = on_processor(kernels.SOURCE, [kernels.COPY_KERNEL], "kvstore_run", tmp_path)
    random = np.random.default_rng(0)
    from_ = random.integers(0, 256, 1 << 16, np.uint8)
    to = np.zeros(1 << 16, np.uint8)
    expected = to.copy()
    runs = []
    at = 0
    for nbytes in [16, 4096, 1, 15, 17, 2080, 33, 1025]:
        for skew, source_skew in [(0, 0), (0, 3), (8, 8), (5, 0)]:
            begin, source_at = at + skew, int(random.integers(0, 2048)) * 16 + source_skew
            runs.append((to.ctypes.data + begin, from_.ctypes.data + source_at, nbytes))
            expected[begin : begin + nbytes] = from_[source_at : source_at + nbytes]
            at = (begin + nbytes + 16) // 16 * 16
    table = np.array(runs, np.uint64)
    assert table.itemsize * 3 == kernels.RUN_BYTES
    library.launch_kvstore_copy_runs(4, 1, 32, ctypes.c_void_p(table.ctypes.data), len(table))
    assert to.tobytes() == expected.tobytes()
