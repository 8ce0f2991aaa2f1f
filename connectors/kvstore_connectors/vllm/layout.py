"""What makes KV bytes interchangeable, and where they lie in the engine's memory.

Both are computed from vLLM's configuration alone. Where all layers are in one pipeline
stage it is the same in the scheduler and in every worker, and all of them name the same
layouts without talking to each other. A process of a pipeline knows one stage's layers only;
there the workers tell the scheduler (`WorkerLayouts`). A worker also checks the tensors it is
given against the configuration.

A *block* here is the KV of one manager block, all layers of one group and rank: a few
*pieces*, each contiguous, at a fixed stride from block to block. In the store the
pieces lie one after the other. Their content is opaque: some backends pack it. The
blocks of all groups are cut from the same memory; a block id belongs to one group at
a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.platforms import current_platform
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvstore.device.base import Piece
from kvstore.errors import ConfigError
from kvstore.types import LayoutSpec
from kvstore_connectors.vllm.blocks import Geometry
from kvstore_connectors.vllm.groups import rule_of, unsupported_spec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

_DRAFTERS_WITHOUT_KV = ("ngram", "suffix")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".model")


def unsupported_reason(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """Why this engine's KV cache cannot be kept in the store, None where it can."""
    parallel = vllm_config.parallel_config
    if not kv_cache_config.prefix_cacheable_group_ids:
        return "its KV cache cannot be cached by prefix"
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        if not group.kv_cache_spec.prefix_cacheable:
            continue
        reason = unsupported_spec(group.kv_cache_spec)
        if reason is not None:
            return reason
        if not group.layer_names:
            return f"a pipeline stage has no layer of KV cache group {number}"
    if kv_cache_config.hisparse_host_num_blocks is not None:
        return "part of the KV cache is managed by HiSparse"
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


def geometries(kv_cache_config: KVCacheConfig) -> list[Geometry]:
    """Where the blocks of each stored group lie, in the order of `Bands.groups`. Only for
    what `unsupported_reason` lets pass."""
    return [
        _geometry(kv_cache_config, kv_cache_config.kv_cache_groups[group])
        for group in kv_cache_config.prefix_cacheable_group_ids
    ]


def _geometry(kv_cache_config: KVCacheConfig, group: KVCacheGroupSpec) -> Geometry:
    layout = _kv_layout(kv_cache_config)
    layers = set(group.layer_names)
    pieces: set[Piece] = set()
    for tensor in kv_cache_config.kv_cache_tensors:
        if not layers.intersection(tensor.layers):
            continue
        stride = tensor.block_stride
        if layout.is_block_outermost:
            # All layers' pages of a block lie side by side: one piece. Groups lie over
            # each other, so a small one takes some bytes along that nobody reads.
            pieces.add(Piece(0, stride, stride))
            continue
        for index, layer in enumerate(tensor.layers):
            # Layers that share their KV with another name the same piece.
            if layer in layers:
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
    """Different pieces a position has: one for each pipeline stage and, of those, for each
    tensor-parallel rank; but ranks that hold the same KV share one."""
    parallel = vllm_config.parallel_config
    world: int = parallel.tensor_parallel_size
    stages: int = parallel.pipeline_parallel_size
    return stages * (world // _replicas(world, kv_cache_config))


def shard_of(
    rank: int, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> tuple[int, bool]:
    """(shard, whether this rank is the one that stores it) of a rank. vLLM numbers ranks
    stage by stage."""
    parallel = vllm_config.parallel_config
    world: int = parallel.tensor_parallel_size
    replicas = _replicas(world, kv_cache_config)
    stage = rank // world % parallel.pipeline_parallel_size
    shard = stage * (world // replicas) + rank % world // replicas
    return shard, rank % world % replicas == 0


def _replicas(world: int, kv_cache_config: KVCacheConfig) -> int:
    replicas: int = kv_cache_config.kv_tp_replicas
    return replicas if replicas > 0 and world % replicas == 0 else 1


def layout_specs(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, shards: Sequence[int]
) -> list[LayoutSpec]:
    """The layouts of the first group, one for each of the shards, then those of the next;
    equal wherever they are computed. The shards are of the stage whose layers the
    configuration names."""
    model = vllm_config.model_config
    cache_dtype = vllm_config.cache_config.cache_dtype
    dtype = model.dtype if cache_dtype == "auto" else cache_dtype
    revision, backend = model_digest(vllm_config), _backend(vllm_config)
    world, stages = shard_count(vllm_config, kv_cache_config), _stages(vllm_config)
    return [
        LayoutSpec(
            model=str(model.model)[-400:],
            revision=revision,
            dtype=str(dtype).removeprefix("torch."),
            kv_layout="/".join(
                (
                    _kv_layout(kv_cache_config).name,
                    *_layers(kv_cache_config, group),
                    *([f"stage {shard * stages // world} of {stages}"] if stages > 1 else []),
                )
            ),
            block_tokens=shape.block_tokens,
            block_bytes=shape.block_bytes,
            backend=backend,
            rank=shard,
            world=world,
            group=group,
        )
        for group, shape in zip(
            kv_cache_config.prefix_cacheable_group_ids, geometries(kv_cache_config), strict=True
        )
        for shard in shards
    ]


def merged(
    told: Iterable[Sequence[LayoutSpec]], groups: Sequence[int], shards: int
) -> list[LayoutSpec]:
    """All layouts, in the order of `layout_specs`, of what each worker tells of its own.
    Raises `ConfigError` where some are not told."""
    known = {(spec.group, spec.rank): spec for specs in told for spec in specs}
    places = [(group, shard) for group in groups for shard in range(shards)]
    if not known.keys() >= set(places):
        raise ConfigError("not every pipeline stage can keep its layers in the store")
    return [known[place] for place in places]


def salted(specs: Sequence[LayoutSpec], salt: str) -> list[LayoutSpec]:
    """Layouts like these that nobody else has. An engine that was told to forget its cache
    takes a salt; "" is none."""
    if not salt:
        return list(specs)
    return [replace(spec, revision=f"{spec.revision}/{salt}") for spec in specs]


def _layers(kv_cache_config: KVCacheConfig, group_id: int) -> tuple[str, ...]:
    """What is in a block of a group."""
    group = kv_cache_config.kv_cache_groups[group_id]
    digest = hashlib.sha256("\0".join(group.layer_names).encode()).hexdigest()[:16]
    groups, count = len(kv_cache_config.kv_cache_groups), len(group.layer_names)
    rule = rule_of(group.kv_cache_spec)
    return f"group {group_id} of {groups}", f"{count} layers {digest}", str(rule)


def _stages(vllm_config: VllmConfig) -> int:
    stages: int = vllm_config.parallel_config.pipeline_parallel_size
    return stages


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
    else:
        # Which kernels there are, and which of them is chosen, follows from the GPU.
        facts.append(str(current_platform.get_device_name()))
    return "/".join(facts)
