"""What names the bytes: the same on both sides, different where bytes differ."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.kv_cache_interface import (
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
)

from kvstore.device.host import HostDevice
from kvstore.errors import ConfigError
from kvstore.types import LayoutSpec
from kvstore_connectors.vllm import layout
from kvstore_connectors.vllm.blocks import blocks_of

LAYERS = ["a", "b", "c"]
BLOCKS = 6


def cache(kv_layout: str = "LBHNC", spec_class: Any = FullAttentionSpec, **changes: Any) -> Any:
    options = {"sliding_window": 64} if spec_class is SlidingWindowSpec else {}
    spec = spec_class(block_size=32, num_kv_heads=2, head_size=16, dtype=torch.bfloat16, **options)
    page = spec.page_size_bytes
    outermost = kv_layout.startswith("B")
    tensor = KVCacheTensor(
        size=page * BLOCKS * len(LAYERS),
        layers=list(LAYERS),
        layer_stride=page if outermost else page * BLOCKS,
        block_stride=page * len(LAYERS) if outermost else page,
    )
    config = KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=[tensor],
        kv_cache_groups=[KVCacheGroupSpec(list(LAYERS), spec)],
        kv_cache_layout=kv_layout,
        hash_block_size=32,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def recurrent(mode: str) -> Any:
    spec = MambaSpec(
        block_size=32, shapes=((3, 8), (2, 4)), dtypes=(torch.bfloat16,) * 2, mamba_cache_mode=mode
    )
    return cache(kv_cache_groups=[KVCacheGroupSpec(list(LAYERS), spec)])


def hybrid() -> Any:
    """As vLLM lays out Gemma-3: the groups lie over each other in the same memory."""
    full = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=16, dtype=torch.bfloat16)
    window = SlidingWindowSpec(
        block_size=32, num_kv_heads=2, head_size=16, dtype=torch.bfloat16, sliding_window=64
    )
    groups = [(["a", "b"], window), (["c", "d"], window), (["e", "f"], full)]
    page = full.page_size_bytes
    return cache(
        kv_cache_groups=[KVCacheGroupSpec(layers, spec) for layers, spec in groups],
        kv_cache_tensors=[
            KVCacheTensor(
                size=2 * page * BLOCKS, layers=layers, layer_stride=page * BLOCKS, block_stride=page
            )
            for layers, _ in groups
        ],
    )


def host_blocks(tensors: Any, geometry: Any) -> Any:
    return blocks_of(HostDevice(), tensors, geometry)


def engine(path: str = "some/model", **changes: Any) -> Any:
    config = {"hidden_size": 8, "transformers_version": "1"}
    parts = {
        "model": path, "dtype": torch.bfloat16, "revision": None, "quantization": None,
        "seed": 0, "cache_dtype": "auto", "tp": 1, "rank": 0, "pp": 1, "dcp": 1,
        "load_format": "auto", "hf": config, "speculative": None,
    } | changes  # fmt: skip
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=parts["model"],
            dtype=parts["dtype"],
            revision=parts["revision"],
            quantization=parts["quantization"],
            seed=parts["seed"],
            hf_config=SimpleNamespace(to_dict=lambda: dict(parts["hf"])),
        ),
        cache_config=SimpleNamespace(cache_dtype=parts["cache_dtype"]),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=parts["tp"],
            pipeline_parallel_size=parts["pp"],
            decode_context_parallel_size=parts["dcp"],
            prefill_context_parallel_size=1,
            rank=parts["rank"],
        ),
        speculative_config=parts["speculative"],
        load_config=SimpleNamespace(load_format=parts["load_format"]),
        device_config=SimpleNamespace(device_type="cpu"),
        attention_config=SimpleNamespace(backend=None),
    )


def specs_of(vllm_config: Any, kv_config: Any) -> list[LayoutSpec]:
    """As the scheduler computes them."""
    shards = range(layout.shard_count(vllm_config, kv_config))
    return layout.layout_specs(vllm_config, kv_config, shards)


def ids(vllm_config: Any, kv_config: Any, salt: str = "") -> list[bytes]:
    specs = layout.salted(specs_of(vllm_config, kv_config), salt)
    return [spec.layout_id for spec in specs]


def test_every_rank_computes_what_the_scheduler_computes() -> None:
    scheduler = ids(engine(tp=4, rank=0), cache())
    assert len(set(scheduler)) == 4
    for rank in range(4):
        assert ids(engine(tp=4, rank=rank), cache()) == scheduler


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other/model"},
        {"revision": "other"},
        {"dtype": torch.float16},
        {"cache_dtype": "fp8_e4m3"},
        {"tp": 2},
        {"quantization": "awq"},
        {"load_format": "dummy"},
        {"hf": {"hidden_size": 8, "rope_theta": 7}},
    ],
)
def test_whatever_changes_the_bytes_changes_the_layout(changes: dict[str, Any]) -> None:
    assert not set(ids(engine(), cache())) & set(ids(engine(**changes), cache()))


def test_a_library_upgrade_alone_does_not_change_the_model() -> None:
    hf = {"hidden_size": 8, "transformers_version": "2"}
    assert ids(engine(), cache()) == ids(engine(hf=hf), cache())


def test_a_salt_sets_layouts_apart() -> None:
    assert ids(engine(), cache(), "x") != ids(engine(), cache())


def test_weights_replaced_under_one_path_are_another_model(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"old")
    before = ids(engine(str(tmp_path)), cache())
    assert ids(engine(str(tmp_path)), cache()) == before
    weights.write_bytes(b"new")
    os.utime(weights, ns=(1, 1))
    assert ids(engine(str(tmp_path)), cache()) != before


def test_ranks_with_equal_kv_share_a_shard_and_one_of_them_writes() -> None:
    config = cache(kv_tp_replicas=2)
    assert len(ids(engine(tp=4), config)) == 2
    shards = [layout.shard_of(rank, engine(tp=4), config) for rank in range(4)]
    assert shards == [(0, True), (0, False), (1, True), (1, False)]


def stage(first: int, end: int) -> Any:
    """The KV cache of a pipeline stage with the layers [first, end)."""
    names = [f"layer {number}" for number in range(first, end)]
    return staged([names])


def staged(layers_of_groups: list[list[str]]) -> Any:
    """The KV cache of a pipeline stage: its layers, group by group, in one memory."""
    full = cache().kv_cache_groups[0].kv_cache_spec
    window = cache(spec_class=SlidingWindowSpec).kv_cache_groups[0].kv_cache_spec
    page, most = full.page_size_bytes, max(map(len, layers_of_groups))
    tensors = [
        KVCacheTensor(
            size=page * BLOCKS * most, layers=names, layer_stride=page * BLOCKS, block_stride=page
        )
        for names in layers_of_groups
    ]
    groups = [
        KVCacheGroupSpec(names, full if number == 0 else window)
        for number, names in enumerate(layers_of_groups)
    ]
    return cache(kv_cache_tensors=tensors, kv_cache_groups=groups)


def told_by_workers(deal: Any, stages: list[Any], tp: int = 1) -> list[list[LayoutSpec]]:
    """What the worker of each rank says of its own."""
    told = []
    for rank in range(tp * len(stages)):
        config = stages[rank // tp]
        shard, _ = layout.shard_of(rank, deal, config)
        told.append(layout.layout_specs(deal, config, [shard]))
    return told


def test_the_scheduler_of_a_pipeline_has_every_stages_layouts_from_its_workers() -> None:
    """vLLM tells it of the first stage's layers only."""
    deal = engine(tp=2, pp=3)
    stages = [stage(0, 2), stage(2, 5), stage(5, 7)]
    assert layout.unsupported_reason(deal, stages[0]) is None
    told = told_by_workers(deal, stages, tp=2)
    specs = layout.merged(reversed(told), (0,), shards=6)
    assert [(spec.rank, spec.world) for spec in specs] == [(rank, 6) for rank in range(6)]
    assert len({spec.layout_id for spec in specs}) == 6
    for rank, spec in enumerate(specs):
        (geometry,) = layout.geometries(stages[rank // 2])
        assert spec.block_bytes == geometry.block_bytes


def test_a_pipeline_of_several_groups_has_a_layout_of_each_group_and_stage() -> None:
    deal = engine(pp=2)
    stages = [staged([["f0"], ["w0", "w1"]]), staged([["f1"], ["w2"]])]
    assert [layout.unsupported_reason(deal, each) for each in stages] == [None, None]
    specs = layout.merged(told_by_workers(deal, stages), (0, 1), shards=2)
    assert [(spec.group, spec.rank) for spec in specs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({spec.layout_id for spec in specs}) == 4
    assert specs[2].block_bytes == 2 * specs[3].block_bytes


def test_what_one_stage_cannot_keep_is_kept_by_none() -> None:
    deal = engine(pp=2)
    stages = [staged([["f0"], ["w0"]]), staged([["f1", "f2"], []])]
    assert layout.unsupported_reason(deal, stages[0]) is None
    assert "no layer of KV cache group 1" in (layout.unsupported_reason(deal, stages[1]) or "")
    told = told_by_workers(deal, stages[:1])
    with pytest.raises(ConfigError, match="stage"):
        layout.merged(told, (0, 1), shards=2)


def test_stages_and_ranks_are_not_taken_for_each_other() -> None:
    stages = [
        spec.layout_id
        for specs in told_by_workers(engine(pp=2), [stage(0, 2), stage(2, 4)])
        for spec in specs
    ]
    ranks = ids(engine(tp=2), stage(0, 2))
    whole = ids(engine(), stage(0, 4))
    assert len({*stages, *ranks, *whole}) == 5


def test_another_dealing_of_layers_is_another_layout() -> None:
    even, odd = (told_by_workers(engine(pp=2), [stage(0, cut), stage(cut, 4)]) for cut in (2, 1))
    assert not {s.layout_id for each in even for s in each} & {
        s.layout_id for each in odd for s in each
    }


def test_data_parallel_replicas_share_what_they_store() -> None:
    """Ranks are numbered replica by replica, then stage by stage."""
    deal = engine(tp=2, pp=2)
    shards = [layout.shard_of(rank, deal, stage(0, 2))[0] for rank in range(8)]
    assert shards == [0, 1, 2, 3, 0, 1, 2, 3]
    alone = [ids(engine(tp=2, pp=2, rank=rank), stage(0, 2)) for rank in (0, 4)]
    assert alone[0] == alone[1]


def test_stages_with_equal_kv_in_their_ranks_have_a_shard_each() -> None:
    config = stage(0, 2)
    config.kv_tp_replicas = 2
    deal = engine(tp=2, pp=2)
    shards = [layout.shard_of(rank, deal, config) for rank in range(4)]
    assert shards == [(0, True), (0, False), (1, True), (1, False)]


@pytest.mark.parametrize(
    ("vllm_config", "kv_config", "word"),
    [
        (engine(), cache(spec_class=EncoderOnlyAttentionSpec), "EncoderOnlyAttentionSpec"),
        (engine(), recurrent("none"), "state"),
        (engine(dcp=2), cache(), "context"),
        (engine(speculative=SimpleNamespace(method="eagle")), cache(), "eagle"),
        (engine(), cache("LHBNC"), "LHBNC"),
    ],
)
def test_what_cannot_be_served_says_why(vllm_config: Any, kv_config: Any, word: str) -> None:
    assert word in (layout.unsupported_reason(vllm_config, kv_config) or "")


@pytest.mark.parametrize("kv_layout", ["LBHNC", "LBNHC", "BLHNC", "BHLNC"])
def test_what_can_be_served_has_no_reason(kv_layout: str) -> None:
    assert layout.unsupported_reason(engine(), cache(kv_layout)) is None


@pytest.mark.parametrize(("kv_layout", "pieces"), [("LBHNC", 3), ("BLHNC", 1)])
def test_blocks_are_cut_where_vllm_puts_them(kv_layout: str, pieces: int) -> None:
    """Compared with vLLM's own views of the tensors, layer by layer."""
    config = cache(kv_layout)
    geometry = layout.geometries(config)[0]
    assert len(geometry.pieces) == pieces
    (tensor,) = config.kv_cache_tensors
    memory = torch.randint(-128, 127, (tensor.size,), dtype=torch.int8)
    page = config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
    views = {
        name: memory.as_strided(
            (BLOCKS, page), (tensor.block_stride, 1), index * tensor.layer_stride
        )
        for index, name in enumerate(LAYERS)
    }
    blocks = host_blocks(views, geometry)
    slot = bytearray(geometry.block_bytes)
    blocks.save(4, memoryview(slot))
    expected = b"".join(views[name][4].numpy().tobytes() for name in LAYERS)
    assert bytes(slot) == expected
    before = memory.clone()
    blocks.load(1, memoryview(slot).toreadonly())
    assert all(torch.equal(views[name][1], views[name][4]) for name in LAYERS)
    for name in LAYERS:
        views[name][1] = before.as_strided(
            (BLOCKS, page), (tensor.block_stride, 1), views[name].storage_offset()
        )[1]
    assert torch.equal(memory, before)


def test_every_group_has_layouts_of_its_own() -> None:
    specs = specs_of(engine(tp=2), hybrid())
    assert [(spec.group, spec.rank) for spec in specs] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    assert len({spec.layout_id for spec in specs}) == 6
    assert not {spec.layout_id for spec in specs} & set(ids(engine(tp=2), cache()))


def test_groups_that_share_memory_are_cut_alike() -> None:
    first, second, full = layout.geometries(hybrid())
    assert first.pieces == second.pieces == full.pieces
    assert len(first.pieces) == 2


def test_layers_that_share_their_kv_are_stored_once() -> None:
    """vLLM gives the second layer the first one's tensor and no place of its own."""
    config = cache()
    (tensor,) = config.kv_cache_tensors
    memory = torch.arange(tensor.size, dtype=torch.int32).to(torch.int8)
    page = config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
    views = {
        name: memory.as_strided((BLOCKS, page), (page, 1), index * tensor.layer_stride)
        for index, name in enumerate(LAYERS)
    }
    views["shares a"] = views["a"]
    blocks = host_blocks(views, layout.geometries(config)[0])
    assert blocks.block_bytes == len(LAYERS) * page


def test_a_managers_block_of_several_kernel_blocks_is_one_block() -> None:
    config = cache()
    (tensor,) = config.kv_cache_tensors
    memory = torch.arange(tensor.size, dtype=torch.int32).to(torch.int8)
    page = config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
    kernel = {
        name: memory.as_strided((4 * BLOCKS, page // 4), (page // 4, 1), index * BLOCKS * page)
        for index, name in enumerate(LAYERS)
    }
    blocks = host_blocks(kernel, layout.geometries(config)[0])
    slot = bytearray(blocks.block_bytes)
    blocks.save(2, memoryview(slot))
    assert bytes(slot) == b"".join(kernel[n][8:12].numpy().tobytes() for n in LAYERS)


def test_a_layer_with_several_states_is_one_page() -> None:
    config = recurrent("align")
    (tensor,) = config.kv_cache_tensors
    assert layout.unsupported_reason(engine(), config) is None
    memory = torch.zeros(tensor.size, dtype=torch.int8)
    stride = tensor.layer_stride
    states = {
        name: [memory[index * stride :], memory[index * stride + 48 :]]
        for index, name in enumerate(LAYERS)
    }
    (geometry,) = layout.geometries(config)
    assert host_blocks(states, geometry).block_bytes == geometry.block_bytes


def test_tensors_that_are_not_as_configured_are_refused() -> None:
    geometry = layout.geometries(cache())[0]
    whole = torch.zeros(geometry.allocation_bytes, dtype=torch.int8)
    with pytest.raises(ConfigError, match="not one allocation"):
        host_blocks({"a": whole, "b": torch.zeros(8)}, geometry)
    with pytest.raises(ConfigError, match="smaller"):
        host_blocks({"a": whole[:8].clone()}, geometry)
    with pytest.raises(ConfigError, match="starts where"):
        host_blocks({"a": whole}, geometry)


def resolved(device_type: str, supported: list[str]) -> Any:
    """The layout that vLLM settles on for this connector, of those that backends support."""
    vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_layout=None),
        device_config=SimpleNamespace(device_type=device_type),
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVStoreConnector",
            kv_role="kv_both",
            kv_connector_module_path="kvstore_connectors.vllm",
        ),
    )
    return resolve_kv_cache_layout(vllm_config, [supported])  # type: ignore[arg-type]


ANY_LAYOUT = ["LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC", "LHBNC"]


@pytest.mark.parametrize("supported", [ANY_LAYOUT, ["LBHNC", "BLHNC"]])
def test_a_gpus_blocks_are_asked_for_in_one_piece(supported: list[str]) -> None:
    """Where attention kernels take any layout, as FlashAttention's, and where they want heads
    before tokens, as FlashInfer's on Blackwell."""
    chosen = resolved("cuda", supported)
    assert chosen.is_block_outermost
    assert chosen.is_block_compact
    config = cache(chosen.name)
    assert layout.unsupported_reason(engine(), config) is None
    assert len(layout.geometries(config)[0].pieces) == 1


@pytest.mark.parametrize(("device", "supported"), [("cuda", ["LBHNC"]), ("cpu", ["LBHNC"])])
def test_what_a_backend_does_not_support_is_done_without(device: str, supported: list[str]) -> None:
    chosen = resolved(device, supported)
    assert chosen.name == "LBHNC"
    assert layout.unsupported_reason(engine(), cache(chosen.name)) is None
