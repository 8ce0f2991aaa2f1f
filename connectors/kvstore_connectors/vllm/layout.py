"""What makes KV bytes interchangeable, and where they lie in the engine's memory.

Both are computed from vLLM's configuration alone, which is the same in the
scheduler and in every worker, so that all of them name the same layouts without
talking to each other. A worker then checks the tensors it is given against it.

A *block* here is the KV of one manager block, all layers of one rank: a few
*pieces*, each contiguous, at a fixed stride from block to block. In the store the
pieces lie one after the other. Their content is opaque: some backends pack it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvstore.types import LayoutSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_DRAFTERS_WITHOUT_KV = ("ngram", "suffix")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".model")


@dataclass(frozen=True, slots=True)
class Piece:
    """Block b's bytes are `nbytes` at `offset + b * stride` of the KV allocation."""

    offset: int
    stride: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """How one rank's KV cache is cut into blocks."""

    pieces: tuple[Piece, ...]
    num_blocks: int
    block_tokens: int
    allocation_bytes: int

    @property
    def block_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def unsupported_reason(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """Why this engine's KV cache cannot be kept in the store, None where it can."""
    parallel = vllm_config.parallel_config
    if len(kv_cache_config.kv_cache_groups) != 1:
        return (
            f"the model has {len(kv_cache_config.kv_cache_groups)} KV cache groups (sliding"
            " windows or recurrent layers beside full attention)"
        )
    (group,) = kv_cache_config.kv_cache_groups
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        specs = list(spec.kv_cache_specs.values())
    else:
        specs = [spec]
    if not all(isinstance(each, FullAttentionSpec) for each in specs):
        return f"its KV cache is a {type(specs[0]).__name__}, not full attention"
    if 0 not in kv_cache_config.prefix_cacheable_group_ids:
        return "its KV cache cannot be cached by prefix"
    if parallel.pipeline_parallel_size > 1:
        return "pipeline parallelism is in use"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism is in use"
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.method not in _DRAFTERS_WITHOUT_KV:
        return f"speculative decoding with {speculation.method} keeps KV of its own"
    layout = _kv_layout(kv_cache_config)
    if not layout.is_block_outermost and not layout.is_block_compact:
        return f"the KV cache layout {layout.name} scatters a block's heads"
    if any(tensor.host_resident for tensor in kv_cache_config.kv_cache_tensors):
        return "part of the KV cache is not on the device"
    return None


def geometry(kv_cache_config: KVCacheConfig) -> Geometry:
    """Where each block lies. Only for what `unsupported_reason` lets pass."""
    (group,) = kv_cache_config.kv_cache_groups
    pieces: set[Piece] = set()
    for tensor in kv_cache_config.kv_cache_tensors:
        stride = tensor.block_stride
        if _kv_layout(kv_cache_config).is_block_outermost:
            # All layers' pages of a block lie side by side: one piece.
            pieces.add(Piece(0, stride, stride))
        else:
            # Layers that share their KV with another name the same piece.
            for index in range(len(tensor.layers)):
                pieces.add(Piece(tensor.offset + index * tensor.layer_stride, stride, stride))
    return Geometry(
        pieces=tuple(sorted(pieces, key=lambda piece: piece.offset)),
        num_blocks=kv_cache_config.num_blocks,
        block_tokens=group.kv_cache_spec.block_size,
        allocation_bytes=max(tensor.size for tensor in kv_cache_config.kv_cache_tensors),
    )


def _kv_layout(kv_cache_config: KVCacheConfig) -> KVCacheLayout:
    return KVCacheLayout[kv_cache_config.kv_cache_layout or KVCacheLayout.LBHNC.name]


def shard_count(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Different pieces a position has: ranks that hold the same KV share one."""
    world: int = vllm_config.parallel_config.tensor_parallel_size
    return world // _replicas(world, kv_cache_config)


def shard_of(
    rank: int, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> tuple[int, bool]:
    """(shard, whether this rank is the one that stores it) of a tensor-parallel rank."""
    world: int = vllm_config.parallel_config.tensor_parallel_size
    replicas = _replicas(world, kv_cache_config)
    return rank % world // replicas, rank % world % replicas == 0


def _replicas(world: int, kv_cache_config: KVCacheConfig) -> int:
    replicas: int = kv_cache_config.kv_tp_replicas
    return replicas if replicas > 0 and world % replicas == 0 else 1


def layout_specs(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, salt: str = ""
) -> list[LayoutSpec]:
    """One layout for each shard, equal wherever it is computed.

    `salt` sets layouts apart that are otherwise equal: an engine that was told to
    forget its cache takes a new one.
    """
    shape = geometry(kv_cache_config)
    model = vllm_config.model_config
    revision = model_digest(vllm_config)
    cache_dtype = vllm_config.cache_config.cache_dtype
    dtype = model.dtype if cache_dtype == "auto" else cache_dtype
    world = shard_count(vllm_config, kv_cache_config)
    return [
        LayoutSpec(
            model=str(model.model)[-400:],
            revision=f"{revision}/{salt}" if salt else revision,
            dtype=str(dtype).removeprefix("torch."),
            kv_layout=f"{_kv_layout(kv_cache_config).name}/{len(shape.pieces)} pieces",
            block_tokens=shape.block_tokens,
            block_bytes=shape.block_bytes,
            backend=_backend(vllm_config),
            rank=rank,
            world=world,
        )
        for rank in range(world)
    ]


def model_digest(vllm_config: VllmConfig) -> str:
    """Identity of the weights and of everything that shapes what they compute.

    The name alone does not do: a directory's weights may be replaced, a branch
    may move on, and overrides change the computation under the same name.
    """
    model = vllm_config.model_config
    load_format = str(vllm_config.load_config.load_format)
    config: dict[str, Any] = model.hf_config.to_dict()
    for unrelated in ("transformers_version", "_name_or_path"):
        config.pop(unrelated, None)
    digest = hashlib.sha256()
    for fact in (
        json.dumps(config, sort_keys=True, default=str),
        str(model.dtype),
        str(model.quantization),
        str(model.revision),
        str(getattr(model.hf_config, "_commit_hash", None)),
        # Dummy weights are drawn from the seed.
        f"{load_format} {model.seed if load_format == 'dummy' else ''}",
        *_weight_files(str(model.model)),
    ):
        digest.update(fact.encode() + b"\0")
    return digest.hexdigest()[:32]


def _weight_files(path: str) -> list[str]:
    """Name, size and time of change of a local model's files; empty for a hub name."""
    if not os.path.isdir(path):
        return []
    facts = []
    for entry in os.scandir(path):
        if entry.name.endswith(_WEIGHT_SUFFIXES):
            status = entry.stat()
            facts.append(f"{entry.name} {status.st_size} {status.st_mtime_ns}")
    return sorted(facts)


def _backend(vllm_config: VllmConfig) -> str:
    """What wrote the bytes: they are opaque, and only this very build may read them."""
    device = vllm_config.device_config.device_type
    backend = getattr(vllm_config.attention_config, "backend", None)
    facts = [f"vllm {vllm.__version__}", device, getattr(backend, "name", "default")]
    if device == "cpu":
        # The CPU backend packs blocks for the instructions it finds.
        facts += [platform.machine(), torch.backends.cpu.get_cpu_capability()]
        facts.append("amx" if torch.cpu._is_amx_tile_supported() else "no amx")
    return "/".join(facts)
