"""Only what is floats of attention may come back less exactly, and only where a user says so."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec

from kvstore.device.base import Coding, Piece
from kvstore.types import LayoutSpec
from kvstore_connectors.vllm.blocks import Geometry
from kvstore_connectors.vllm.coding import coded, coded_by_gpu
from kvstore_connectors.vllm.config import ConnectorConfig
from tests.unit.connectors.test_layout import LAYERS, cache, recurrent

SPEC = LayoutSpec("m", "bfloat16", 32, 12288)
GEOMETRY = Geometry((Piece(0, 12288, 12288),), 4, 32, 4 * 12288)


def codecs(specs: list[LayoutSpec], config: Any) -> list[str]:
    return [spec.codec for spec in coded(specs, "fp8", config, by_gpu=False)]


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
        codec = ConnectorConfig.parse(extra).codec
        for by_gpu in (True, False):
            assert coded([SPEC], codec, cache(), by_gpu=by_gpu) == [SPEC]
        assert coded_by_gpu([GEOMETRY], [SPEC], codec, cache()) == [GEOMETRY]
    assert ConnectorConfig.parse({"codec": "int4"}).codec == "int4"


def test_what_a_gpu_codes_is_another_layout_of_so_many_bytes_to_the_store() -> None:
    """Exact ones to the store: it must not code them once more."""
    (spec,) = coded([SPEC], "int4", cache(), by_gpu=True)
    assert (spec.codec, spec.block_bytes) == ("", 12288 * 9 // 32)
    by_store = coded([SPEC], "int4", cache(), by_gpu=False)[0]
    fp8 = coded([SPEC], "fp8", cache(), by_gpu=True)[0]
    assert len({each.layout_id for each in (SPEC, spec, by_store, fp8)}) == 4


def test_a_gpu_is_told_to_code_what_its_layouts_say_is_coded() -> None:
    (geometry,) = coded_by_gpu([GEOMETRY], [SPEC], "fp8", cache())
    assert geometry.coding == Coding("fp8", "bfloat16")
    (spec,) = coded([SPEC], "fp8", cache(), by_gpu=True)
    assert geometry.coding.nbytes(geometry.block_bytes) == spec.block_bytes
    assert coded_by_gpu([GEOMETRY], [SPEC], "fp8", recurrent("align")) == [GEOMETRY]
    assert coded([SPEC], "fp8", recurrent("align"), by_gpu=True) == [SPEC]
