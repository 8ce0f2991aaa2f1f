"""Tiny random models whose answers depend on every block of their prompt.

Weights are drawn wider than usual: with the default, attention hardly moves the
output, and damaged KV would go unnoticed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

VOCABULARY = 256
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "initializer_range": 0.12,
}


def build(family: str, path: Path) -> None:
    """Write a model of `family` ("llama" or "mla") to the directory `path`."""
    import torch
    import transformers

    torch.manual_seed(7)
    if family == "llama":
        config = transformers.LlamaConfig(**_COMMON, num_key_value_heads=2, head_dim=32)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.DeepseekV2Config(
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
        model = transformers.DeepseekV2ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path)


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
