"""Tiny random models whose answers depend on every block of their prompt.

Weights are drawn wider than usual: with the default, attention hardly moves the
output, and damaged KV would go unnoticed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 256
WINDOW = 96
"""Tokens of a sliding window: three blocks, and a small part of the prompts."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "initializer_range": 0.12,
}

_TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {
        "type": "WordLevel",
        "vocab": {f"t{token}": token for token in range(VOCABULARY)},
        "unk_token": "t0",
    },
}
"""A word is a token: "t0 t1 t2". Only servers that speak text look at it."""

_TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"}


def build(family: str, path: Path) -> None:
    """Write a model of `family` to the directory `path`."""
    import torch

    torch.manual_seed(7)
    FAMILIES[family]().to(torch.bfloat16).save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps(_TOKENIZER))
    (path / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG))


def write_adapter(path: Path, seed: int) -> None:
    """Write a LoRA adapter for the Llama to the directory `path`. All have the same size."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    hidden, rank = _COMMON["hidden_size"], 8
    weights = {}
    for layer in range(_COMMON["num_hidden_layers"]):
        for module, outputs in {"q_proj": hidden, "k_proj": 64, "v_proj": 64}.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for part, shape in {"A": (rank, hidden), "B": (outputs, rank)}.items():
                drawn = rng.normal(0, 0.1, shape).astype(np.float32)
                weights[f"{name}.lora_{part}.weight"] = drawn
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "bias": "none",
    }
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, path / "adapter_model.safetensors")


def _llama() -> Any:
    """Full attention alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_COMMON, num_key_value_heads=2, head_dim=32))


def _gemma3() -> Any:
    """Three sliding windows to one full attention: four groups."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = Gemma3TextConfig(
        **_COMMON | {"num_hidden_layers": 4},
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=WINDOW,
        layer_types=kinds,
    )
    return Gemma3ForCausalLM(config)


def _gpt_oss() -> Any:
    """Sliding windows and full attention by turns, with attention sinks and experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **_COMMON | {"num_hidden_layers": 4},
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=WINDOW,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    return GptOssForCausalLM(config)


def _deepseek() -> Any:
    """Multi-head latent attention."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        **_COMMON,
        num_key_value_heads=4,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        q_lora_rank=None,
        head_dim=64,
        first_k_dense_replace=3,
        n_routed_experts=2,
    )
    return DeepseekV2ForCausalLM(config)


def _qwen3_next() -> Any:
    """Three layers of linear attention, whose state is kept, to one of full attention."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **_COMMON | {"num_hidden_layers": 4},
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=1,
    )
    return Qwen3NextForCausalLM(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "gemma3": _gemma3,
    "gpt_oss": _gpt_oss,
    "deepseek": _deepseek,
    "qwen3_next": _qwen3_next,
}

if __name__ == "__main__":
    for name in FAMILIES:
        build(name, Path(sys.argv[1]) / name)
