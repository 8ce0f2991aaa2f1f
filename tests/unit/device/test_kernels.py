"""The kernel compiles for the GPUs it is meant for, and its arithmetic is right: the latter
on the processor, thread after thread."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kvstore.device import kernels

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]

AROUND = """
struct uint4 { unsigned int x, y, z, w; };
struct place { unsigned int x; };
static place blockIdx, gridDim, threadIdx, blockDim;
#define __global__
%s
extern "C" void launch(const kvstore_run* runs, unsigned int count, unsigned int blocks,
                       unsigned int threads)
{
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            %s(runs, count);
}
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_compiles(architecture: str, tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text(kernels.SOURCE)
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        command = [nvcc, "-cubin", f"-arch={architecture}", "-std=c++17", "-Werror=all-warnings"]
        target = tmp_path / "kernel.cubin"
        subprocess.run([*command, "-o", str(target), str(source)], check=True, timeout=60)
        assert kernels.COPY_KERNEL.encode() in target.read_bytes()
        return
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="neither nvcc nor NVRTC is here")
    _, program = nvrtc.nvrtcCreateProgram(kernels.SOURCE.encode(), b"kernel.cu", 0, [], [])
    options = [f"--gpu-architecture={architecture}".encode(), b"-std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS


def test_it_copies_every_byte_and_no_other(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    source, library = tmp_path / "kernel.cpp", tmp_path / "kernel.so"
    source.write_text(AROUND % (kernels.SOURCE, kernels.COPY_KERNEL))
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True, timeout=60)
    launch = ctypes.CDLL(str(library)).launch
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
    launch(ctypes.c_void_p(table.ctypes.data), len(table), 4, 32)
    assert to.tobytes() == expected.tobytes()
