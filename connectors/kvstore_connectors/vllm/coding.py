"""Which of an engine's layouts may be kept less exactly: those of attention, in floats.

A recurrent state is carried on from step to step, and what a quantised KV cache holds is not
floats; both stay exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import AttentionSpec

from kvstore.types import LayoutSpec, can_be_coded

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.kvstore")


def coded(
    specs: Sequence[LayoutSpec], codec: str, kv_cache_config: KVCacheConfig
) -> list[LayoutSpec]:
    """The layouts, those with `codec` that can have it; "" is none."""
    if not codec:
        return list(specs)
    groups = {spec.group for spec in specs if _can_be(spec, kv_cache_config)}
    exact = sorted({spec.group for spec in specs} - groups)
    if exact:
        logger.warning("KV cache groups %s are kept exactly: %s is not for them.", exact, codec)
    return [replace(spec, codec=codec) if spec.group in groups else spec for spec in specs]


def _can_be(spec: LayoutSpec, kv_cache_config: KVCacheConfig) -> bool:
    kept = kv_cache_config.kv_cache_groups[spec.group].kv_cache_spec
    return (
        isinstance(kept, AttentionSpec)
        and str(kept.dtype).removeprefix("torch.") == spec.dtype
        and can_be_coded(spec.dtype, spec.block_bytes)
    )
