"""Which of an engine's blocks may be kept less exactly, and who codes them.

Those of attention, in floats: a recurrent state is carried on from step to step, and what a
quantised KV cache holds is not floats; both stay exact.

A GPU codes blocks itself, on their way out, and brings them back on their way in
(`kvstore.device`): to the store they are so many opaque bytes, of layouts that say what they
are. An engine in host memory would be slowed down by that, so there the store codes what leaves
DRAM, if it ever does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import AttentionSpec

from kvstore.device.base import Coding
from kvstore.types import LayoutSpec, can_be_coded

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvstore_connectors.vllm.blocks import Geometry

logger = init_logger("vllm.kvstore")


def coded(
    specs: Sequence[LayoutSpec], codec: str, kv_cache_config: KVCacheConfig, *, by_gpu: bool
) -> list[LayoutSpec]:
    """The layouts, those with `codec` that can have it; "" is none."""
    codings = [_coding_of(spec, codec, kv_cache_config) for spec in specs]
    pairs = list(zip(specs, codings, strict=True))
    exact = sorted({spec.group for spec, coding in pairs if coding is None})
    if codec and exact:
        logger.warning("KV cache groups %s are kept exactly: %s is not for them.", exact, codec)
    return [
        spec if coding is None else _by_gpu(spec, coding) if by_gpu else replace(spec, codec=codec)
        for spec, coding in pairs
    ]


def coded_by_gpu(
    geometries: Sequence[Geometry],
    specs: Sequence[LayoutSpec],
    codec: str,
    kv_cache_config: KVCacheConfig,
) -> list[Geometry]:
    """The blocks of some layouts, none of them coded yet, of which a GPU codes those that can
    be."""
    return [
        replace(geometry, coding=_coding_of(spec, codec, kv_cache_config))
        for geometry, spec in zip(geometries, specs, strict=True)
    ]


def _coding_of(spec: LayoutSpec, codec: str, kv_cache_config: KVCacheConfig) -> Coding | None:
    kept = kv_cache_config.kv_cache_groups[spec.group].kv_cache_spec
    can_be = (
        bool(codec)
        and isinstance(kept, AttentionSpec)
        and str(kept.dtype).removeprefix("torch.") == spec.dtype
        and can_be_coded(spec.dtype, spec.block_bytes)
    )
    return Coding(codec, spec.dtype) if can_be else None


def _by_gpu(spec: LayoutSpec, coding: Coding) -> LayoutSpec:
    nbytes = coding.nbytes(spec.block_bytes)
    return replace(spec, kv_layout=f"{spec.kv_layout}/{coding.codec}", block_bytes=nbytes)
