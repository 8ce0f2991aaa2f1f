"""Kernels without a GPU: compiled for those they are meant for, or run on the processor."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]

_BEFORE = r"""
#include <cmath>
#include <cstring>
struct uint4 { unsigned int x, y, z, w; };
struct place { unsigned int x, y; };
static place blockIdx, gridDim, threadIdx, blockDim;
#define __global__
#define __device__
#define __forceinline__ inline
static inline unsigned int __float_as_uint(float from)
{
    unsigned int to;
    memcpy(&to, &from, 4);
    return to;
}
static inline float __uint_as_float(unsigned int from)
{
    float to;
    memcpy(&to, &from, 4);
    return to;
}
static inline float __fmul_rn(float one, float other) { return one * other; }
static inline float __fadd_rn(float one, float other) { return one + other; }
static inline float __fdiv_rn(float one, float other) { return one / other; }
static inline int __float2int_rn(float from) { return int(nearbyintf(from)); }
"""

_LAUNCH = r"""
extern "C" void launch_%(kernel)s(unsigned int blocks, unsigned int beside, unsigned int threads,
                                  const void* runs, unsigned int count%(more)s)
{
    gridDim.x = blocks;
    gridDim.y = beside;
    blockDim.x = threads;
    for (blockIdx.y = 0; blockIdx.y < beside; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
            for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
                %(kernel)s((const %(run)s*)runs, count%(pass_on)s);
}
"""


def compile_for(architecture: str, source: str, kernels: Sequence[str], folder: Path) -> None:
    """By nvcc or NVRTC; skips the test where neither is."""
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        written, target = folder / "kernel.cu", folder / "kernel.cubin"
        written.write_text(source)
        command = [nvcc, "-cubin", f"-arch={architecture}", "-std=c++17", "-Werror=all-warnings"]
        subprocess.run([*command, "-o", str(target), str(written)], check=True, timeout=60)
        assert all(kernel.encode() in target.read_bytes() for kernel in kernels)
        return
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="neither nvcc nor NVRTC is here")
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    options = [f"--gpu-architecture={architecture}".encode(), b"-std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS


def on_processor(
    source: str, kernels: Sequence[str], run: str, folder: Path, *, kinds: bool = False
) -> ctypes.CDLL:
    """A library with a `launch_KERNEL(blocks, beside, threads, runs, count)` each, which does
    one thread after the other. `kinds`: kernels are told a kind too. Skips the test where there
    is no compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    more, pass_on = (", unsigned int kind", ", kind") if kinds else ("", "")
    launches = [
        _LAUNCH % {"kernel": kernel, "run": run, "more": more, "pass_on": pass_on}
        for kernel in kernels
    ]
    written, library = folder / "kernel.cpp", folder / "kernel.so"
    written.write_text(_BEFORE + source + "".join(launches))
    # Each product, sum and quotient is rounded on its own, as on a GPU.
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(library), str(written)], check=True, timeout=60)
    return ctypes.CDLL(str(library))
