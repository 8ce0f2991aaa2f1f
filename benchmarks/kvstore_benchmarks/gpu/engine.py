"""What stands for an engine: its stream and its computing, by torch where there is one."""

from __future__ import annotations

from collections.abc import Callable

try:
    import torch

    HAS_TORCH = bool(torch.cuda.is_available())
except ImportError:
    HAS_TORCH = False

WIDTH = 8192
"""Of the square matrices, in bfloat16: 2 ms or so each on an H100."""


def engine_stream() -> int:
    """The handle of the stream that this thread launches into; 0 is CUDA's own."""
    return int(torch.cuda.current_stream().cuda_stream) if HAS_TORCH else 0


def matrix_product() -> Callable[[], None] | None:
    """Ten products of large matrices, to be waited for; None without torch."""
    if not HAS_TORCH:
        return None
    one, other = (torch.randn(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in "ab")

    def compute() -> None:
        for _ in range(10):
            torch.matmul(one, other)
        torch.cuda.current_stream().synchronize()

    return compute
