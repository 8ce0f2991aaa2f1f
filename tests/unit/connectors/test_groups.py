"""What each kind of layer needs of a prompt: the same as vLLM's own cache keeps and asks for."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_coordinator import replay_boundaries
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    MambaManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvstore_connectors.vllm.groups import Band, Rule, bands_of, rule_of
from tests.unit.connectors.fakes import bands_with

BLOCK = 16
_ATTENTION: dict[str, Any] = {
    "block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.bfloat16,
}  # fmt: skip


def window(tokens: int, **changes: Any) -> SlidingWindowSpec:
    return SlidingWindowSpec(**_ATTENTION | changes, sliding_window=tokens)


def chunk(tokens: int) -> ChunkedLocalAttentionSpec:
    return ChunkedLocalAttentionSpec(**_ATTENTION, attention_chunk_size=tokens)


def state(block_size: int = BLOCK) -> MambaSpec:
    return MambaSpec(
        block_size=block_size,
        shapes=((4,),),
        dtypes=(torch.bfloat16,),
        mamba_cache_mode="align",
    )


def full(block_size: int = BLOCK) -> FullAttentionSpec:
    return FullAttentionSpec(**_ATTENTION | {"block_size": block_size})


def config(*specs: Any, **changes: Any) -> KVCacheConfig:
    options: dict[str, Any] = {"hash_block_size": BLOCK} | changes
    groups = [KVCacheGroupSpec([f"layer {n}"], spec) for n, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=9, kv_cache_tensors=[], kv_cache_groups=groups, **options)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 18, 33, 96])
def test_a_window_spans_what_vllm_does_not_skip(tokens: int) -> None:
    self: Any = SimpleNamespace(sliding_window=tokens, extra_retained_tokens=0)
    band = Band(rule_of(window(tokens)), BLOCK, (0,))
    for position in range(BLOCK, 12 * BLOCK, BLOCK):
        skipped = SlidingWindowManager.get_num_skipped_tokens(self, position)
        assert band.span(position) == (min(skipped // BLOCK, position // BLOCK), position // BLOCK)


@pytest.mark.parametrize("tokens", [16, 48, 64])
def test_a_chunk_spans_what_vllm_does_not_skip(tokens: int) -> None:
    self: Any = SimpleNamespace(attention_chunk_size=tokens)
    band = Band(rule_of(chunk(tokens)), BLOCK, (0,))
    for position in range(BLOCK, 12 * BLOCK, BLOCK):
        skipped = ChunkedLocalAttentionManager.get_num_skipped_tokens(self, position)
        assert band.span(position) == (skipped // BLOCK, position // BLOCK)


def test_a_state_is_the_one_block_that_ends_at_the_position() -> None:
    band = Band(rule_of(state()), BLOCK, (0,))
    assert band.span(5 * BLOCK) == (4, 5)
    assert band.span(0) == (0, 0)


@pytest.mark.parametrize(
    ("spec", "manager"), [(window(40), SlidingWindowManager), (state(), MambaManager)]
)
@pytest.mark.parametrize(
    ("prompt", "retention", "junction"),
    list(itertools.product([95, 96, 97, 300], [None, 0, 4 * BLOCK], [0, 3 * BLOCK])),
)
def test_all_that_vllm_keeps_for_later_prompts_is_stored(
    spec: Any, manager: Any, prompt: int, retention: int | None, junction: int
) -> None:
    boundaries = [*replay_boundaries(prompt, BLOCK, use_eagle=False), junction]
    blocks = prompt // BLOCK
    kept = manager.reachable_block_mask(
        start_block=0,
        end_block=blocks,
        alignment_tokens=BLOCK,
        kv_cache_spec=spec,
        use_eagle=False,
        retention_interval=retention,
        reachable_boundaries=boundaries,
    )
    bands = bands_of(config(full(), spec, prefix_cache_retention_interval=retention))
    (band,) = bands.partial
    stored = band.wanted(0, blocks, bands.resume_points(prompt, [junction]))
    assert {n for n in range(blocks) if kept is None or kept[n]} <= set(stored)
    assert retention != 0 or len(stored) <= 3 * (1 + 40 // BLOCK + 1)


def test_groups_with_one_rule_are_one_band() -> None:
    bands = bands_of(config(window(40), window(40), full(), window(80), state()))
    assert [(str(band.rule), band.members) for band in bands.bands] == [
        ("window 40", (0, 1)), ("full", (2,)), ("window 80", (3,)), ("state", (4,)),
    ]  # fmt: skip
    assert [band.members for band in bands.full] == [(2,)]
    assert [band.members for band in bands.partial] == [(4,), (0, 1), (3,)]


def test_hits_end_where_blocks_of_all_groups_do() -> None:
    bands = bands_of(config(full(32), window(40, block_size=16), state(96)))
    assert bands.alignment == 96
    assert bands.aligned(200) == 192


def test_latent_attention_is_full_attention() -> None:
    assert rule_of(MLAAttentionSpec(**_ATTENTION)).is_full


def test_full_attention_is_wanted_whole_wherever_prompts_resume() -> None:
    (band,) = bands_with(Rule()).bands
    assert list(band.wanted(2, 5, set())) == [2, 3, 4]
