"""Only what is floats of attention may come back less exactly, and only where a user says so."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec

from kvstore.types import LayoutSpec
from kvstore_connectors.vllm.coding import coded
from kvstore_connectors.vllm.config import ConnectorConfig
from tests.unit.connectors.test_layout import LAYERS, cache, recurrent

SPEC = LayoutSpec("m", "bfloat16", 32, 12288)


def codecs(specs: list[LayoutSpec], config: Any) -> list[str]:
    return [spec.codec for spec in coded(specs, "fp8", config)]


def test_attention_in_floats_is_coded() -> None:
    assert codecs([SPEC, SPEC], cache()) == ["fp8", "fp8"]


def test_a_recurrent_state_stays_exact() -> None:
    assert codecs([SPEC], recurrent("align")) == [""]


def test_what_is_quantised_already_stays_exact() -> None:
    quantised = LayoutSpec("m", "fp8_e4m3", 32, 6144)
    assert codecs([quantised], cache()) == [""]
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=16, dtype=torch.uint8)
    group = KVCacheGroupSpec(list(LAYERS), spec)
    assert codecs([SPEC], cache(kv_cache_groups=[group])) == [""]


def test_blocks_of_broken_groups_stay_exact() -> None:
    odd = LayoutSpec("m", "bfloat16", 32, 12290)
    assert codecs([odd], cache()) == [""]


def test_nothing_is_coded_unless_it_is_asked_for() -> None:
    for extra in ({}, {"codec": "none"}):
        assert coded([SPEC], ConnectorConfig.parse(extra).codec, cache()) == [SPEC]
    assert ConnectorConfig.parse({"codec": "int4"}).codec == "int4"
