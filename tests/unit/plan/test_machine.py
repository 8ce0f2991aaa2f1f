"""The planner's machine: figures that are known from elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvstore.errors import BadRequest
from kvstore.parts import Model, find, find_device, find_model, load_parts
from kvstore.plan.machine import Engine

PARTS = load_parts()


def engine(model: str = "llama-3.1-8b", gpu: str = "h100", **other: float) -> Engine:
    return Engine(
        model=PARTS.model[model],
        gpu=PARTS.gpu[gpu],
        gpus=int(other.pop("gpus", 1)),
        ssd=PARTS.ssd[str(other.pop("ssd", "gen4"))],
        ssds=int(other.pop("ssds", 1)),
        **other,
    )


@pytest.mark.parametrize(
    ("model", "nbytes"),
    [
        ("llama-3.1-8b", 131_072),
        ("llama-3.1-70b", 327_680),
        ("qwen3-8b", 147_456),
        ("qwen3-32b", 262_144),
        ("deepseek-v3", 70_272),
    ],
)
def test_the_kv_of_a_token_is_what_the_models_keep(model: str, nbytes: int) -> None:
    assert engine(model).kv_bytes == nbytes


@pytest.mark.parametrize(
    ("gpu", "link_gbps", "kappa"),
    # Of Llama 3.1 8B at half of peak, links at 80 % of theirs.
    [("a100", 25.6, 20.1), ("h100", 51.2, 12.7), ("b200", 51.2, 5.6), ("b200", 7.0, 0.76)],
)
def test_load_or_recompute_is_as_published(gpu: str, link_gbps: float, kappa: float) -> None:
    assert engine(gpu=gpu).kappa(link_gbps) == pytest.approx(kappa, rel=0.03)


def test_a_slow_link_pays_only_deep_in_a_prompt() -> None:
    slow = engine(gpu="b200")
    depth = slow.pays_from_token(6.8)
    assert depth > 0
    assert slow.prefill.relative(depth) * slow.prefill.ms(1) == pytest.approx(
        slow.load_ms(1, 6.8), rel=1e-3
    )
    assert slow.pays_from_token(50) == 0


def test_what_does_not_fit_is_seen() -> None:
    assert engine("llama-3.1-70b").kv_space_gb < 0
    assert engine("llama-3.1-70b").kv_tokens == 0
    assert engine("llama-3.1-70b", gpus=4).kv_space_gb > 100


def test_decode_is_bound_by_memory_and_then_by_arithmetic() -> None:
    few, many = engine().decode_step_ms(1, 0), engine().decode_step_ms(5000, 0)
    assert few == pytest.approx(16.06 / (3350 * 0.8) * 1e3, rel=1e-3)
    assert many == pytest.approx(2 * 8.03e9 * 5000 / (0.5 * 989e12) * 1e3, rel=1e-3)


def test_a_model_is_read_from_its_config(tmp_path: Path) -> None:
    config = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = find_model(str(tmp_path), PARTS)
    assert model.kv_bytes(2) == 131_072
    assert model.parameters_billions == pytest.approx(8.03, rel=0.01)
    latent = config | {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 61}
    (tmp_path / "config.json").write_text(json.dumps(latent))
    assert find_model(str(tmp_path / "config.json"), PARTS, 671).kv_bytes(2) == 70_272


@pytest.mark.parametrize("text", ["", "[]", "{", '{"num_hidden_layers": "x"}', '{"n_layer": 2}'])
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadRequest, match=r"config\.json"):
        find_model(str(tmp_path), PARTS)


def test_unknown_parts_name_the_nearest() -> None:
    with pytest.raises(BadRequest, match="did you mean h100"):
        find("GPU", "h101", PARTS.gpu)


def test_every_ssd_can_be_modelled_with_every_gpu() -> None:
    for gpu in ("", *(f"{name}+" for name in PARTS.gpu)):
        for name, ssd in PARTS.ssd.items():
            assert find_device(f"modelled:{gpu}{name}-nvme").ssd is ssd
    device = find_device("modelled:h100+gen4-nvme")
    assert str(device) == "NVIDIA H100 80GB SXM and Micron 7450 PRO 3.84TB"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("h100+gen4-nvme", "does not begin with 'modelled:'"),
        ("modelled:", "no SSD ''"),
        ("modelled:h100", "no SSD 'h100'"),
        ("modelled:h100+gen4", "did you mean gen4-nvme"),
        ("modelled:h101+gen4-nvme", "did you mean h100"),
        ("modelled:h100+a100+gen4-nvme", "more than one GPU"),
    ],
)
def test_an_unknown_device_names_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(hint)):
        find_device(text)


def test_more_parts_come_from_a_file_and_wrong_ones_name_it(tmp_path: Path) -> None:
    path = tmp_path / "parts.toml"
    path.write_text(
        '[gpu.own]\nname = "x"\nmemory_gb = 1\nmemory_gbps = 1\nbf16_tflops = 1\nhost_gbps = 1\n'
    )
    assert {"own", "h100"} <= set(load_parts(path).gpu)
    path.write_text('[gpu.own]\nname = "x"\nmemory_gb = -1\n')
    with pytest.raises(BadRequest, match=r"parts\.toml.*memory_gb"):
        load_parts(path)
    path.write_text('[model.own]\nname = "x"\nparamters_billions = 1\n')
    with pytest.raises(BadRequest, match=r"parts\.toml"):
        load_parts(path)


def test_every_part_says_where_its_figures_are_from() -> None:
    parts: list[Model] = [*PARTS.model.values()]
    assert all(part.source for part in parts)
    assert all(part.source for part in (*PARTS.gpu.values(), *PARTS.ssd.values()))
