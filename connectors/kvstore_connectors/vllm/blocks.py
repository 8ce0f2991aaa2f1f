"""Where the engine's KV cache lies: its device, and its blocks there.

vLLM hands a worker tensors, which are all views of one allocation. Here they are compared
with what the configuration says, and become blocks of opaque bytes of a `kvstore.device`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvstore.device.base import Coding, Memory, Piece
from kvstore.device.host import HostDevice
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.device.base import Blocks, Device


@dataclass(frozen=True, slots=True)
class Geometry:
    """How one rank's part of a KV cache group is cut into blocks."""

    pieces: tuple[Piece, ...]
    num_blocks: int
    block_tokens: int
    allocation_bytes: int
    coding: Coding | None = None
    """What the device makes of blocks in slots."""

    @property
    def block_bytes(self) -> int:
        """As the engine has it."""
        return sum(piece.nbytes for piece in self.pieces)


def device_of(kv_caches: dict[str, torch.Tensor]) -> Device:
    """The device of a KV cache, to be closed. Raises `ConfigError` where it is none that can
    be served, `DeviceError` where it cannot be used."""
    where = _one_of_them(kv_caches).device
    if where.type == "cpu":
        return HostDevice()
    if where.type != "cuda":
        raise ConfigError(f"the KV cache is on {where.type}")
    from kvstore.device.cuda import open_gpu

    return open_gpu(where.index, lambda: torch.cuda.current_stream(where).cuda_stream)


def blocks_of(device: Device, kv_caches: dict[str, torch.Tensor], geometry: Geometry) -> Blocks:
    """Keeps the tensors alive. Raises `ConfigError` where they are not what `geometry` says."""
    memory = _allocation(kv_caches, geometry)
    return device.blocks(memory, geometry.pieces, geometry.num_blocks, geometry.coding)


def _tensors(kv_caches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A layer's KV cache is one tensor, or one for each of its states."""
    tensors: list[torch.Tensor] = []
    for value in kv_caches.values():
        tensors += [value] if isinstance(value, torch.Tensor) else value
    return tensors


def _one_of_them(kv_caches: dict[str, torch.Tensor]) -> torch.Tensor:
    storages = {each.untyped_storage().data_ptr(): each for each in _tensors(kv_caches)}
    if len(storages) != 1:
        raise ConfigError("the KV cache is not one allocation")
    (tensor,) = storages.values()
    return tensor


def _allocation(kv_caches: dict[str, torch.Tensor], geometry: Geometry) -> Memory:
    """What all tensors are views of, checked against the geometry."""
    storage = _one_of_them(kv_caches).untyped_storage()
    if storage.nbytes() < geometry.allocation_bytes:
        raise ConfigError("the KV cache is smaller than its configuration says")
    starts = {each.storage_offset() * each.element_size() for each in _tensors(kv_caches)}
    last_block = geometry.num_blocks - 1
    for piece in geometry.pieces:
        if piece.offset + last_block * piece.stride + piece.nbytes > storage.nbytes():
            raise ConfigError("a KV cache block lies outside the allocation")
        if piece.offset not in starts:
            raise ConfigError("no KV cache tensor starts where the configuration says")
    return Memory(storage.data_ptr(), storage.nbytes(), kv_caches)
