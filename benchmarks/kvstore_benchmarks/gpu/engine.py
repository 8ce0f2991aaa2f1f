"""What stands for an engine: its stream, its computing, its KV cache. By torch, where there
is one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

from kvstore.device.base import Piece
from kvstore.device.gpu import GpuDevice
from kvstore.device.gpu_driver import Driver
from kvstore_benchmarks.figures import finite, gbps, median, ratio, timed
from kvstore_benchmarks.gpu.measure import Options, in_chunks
from kvstore_benchmarks.gpu.rig import Rig

try:
    import torch

    HAS_TORCH = bool(torch.cuda.is_available())
except ImportError:
    HAS_TORCH = False

WIDTH = 8192
"""Of the square matrices, in bfloat16: 2 ms or so each on an H100."""

SHAPES: dict[str, tuple[int, int, bool]] = {
    "32 layers of 64 KiB": (32, 64 << 10, False),
    "32 layers of 64 KiB, blocks outermost": (32, 64 << 10, True),
    "61 layers of 72 KiB": (61, 72 << 10, False),
    "80 layers of 16 KiB": (80, 16 << 10, False),
}
"""Layers, bytes of a block in each, and whether a block's layers lie together: Llama-3-8B in
blocks of 16 tokens, DeepSeek-V3 in blocks of 64, Llama-3-70B over four ranks."""


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


def connector_figures(driver: Driver, options: Options) -> dict[str, Any] | None:
    """The connector's way, checksums included, with tensors as vLLM's; None without torch."""
    if not HAS_TORCH:
        return None
    return {name: _shape(driver, options, *shape) for name, shape in SHAPES.items()}


def _shape(
    driver: Driver, options: Options, layers: int, page: int, outermost: bool
) -> dict[str, Any]:
    from kvstore_connectors.vllm.blocks import Geometry, blocks_of

    count = options.nbytes // (layers * page)
    nbytes = count * layers * page
    memory = torch.randint(-128, 127, (nbytes,), dtype=torch.int8, device="cuda")
    stride, distance = (layers * page, page) if outermost else (page, count * page)
    pieces = [Piece(layer * distance, stride, page) for layer in range(layers)]
    if outermost:
        pieces = [Piece(0, stride, stride)]
    geometry = Geometry(tuple(pieces), count, 16, nbytes)
    views = {
        str(layer): memory.as_strided((count, page), (stride, 1), layer * distance)
        for layer in range(layers)
    }
    with (
        closing(Rig(driver, nbytes, options.extent_bytes)) as rig,
        closing(GpuDevice(driver)) as device,
    ):
        blocks = blocks_of(device, views, geometry)
        slots = rig.slots(count, blocks.block_bytes)
        pinned = rig.pin(device, slots)
        out, into = device.stream(), device.stream()
        taken: dict[str, list[tuple[float, float]]] = {"to_gpu": [], "to_host": []}
        wrong = 0
        for number in range(options.rounds + 1):
            before = memory.clone()
            out.wait_event(device.computed())
            with timed() as plain_out:
                rig.copy_plainly(to_gpu=False)
            with timed() as ours_out:
                saved = in_chunks(out.save, blocks, range(count), slots)
            memory.zero_()
            into.wait_event(device.computed())
            with timed() as plain_in:
                rig.copy_plainly(to_gpu=True)
            with timed() as ours_in:
                loaded = in_chunks(into.load, blocks, range(count), slots)
            wrong += int((memory != before).any()) + (saved != loaded)
            if number:
                taken["to_host"].append((ours_out.seconds, plain_out.seconds))
                taken["to_gpu"].append((ours_in.seconds, plain_in.seconds))
        out.close()
        into.close()
        del slots
    return {"pinned": pinned, "wrong": wrong} | {
        way: {
            "gbps": finite(gbps(nbytes, median([ours for ours, _ in pairs])), 2),
            "ratio": finite(median([ratio(plain, ours) for ours, plain in pairs]), 3),
        }
        for way, pairs in taken.items()
    }
