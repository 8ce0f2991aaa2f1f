"""A small Llama with random weights: nothing is downloaded.

What matters is the shape of its KV, 32 KiB a token in bfloat16, and that its
answers depend on all of the prompt. Weights are drawn wider than a trained
model's, so that attention is far from uniform: then another prompt's KV, or a
damaged block, shows in the first token's log-probabilities.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from kvstore.config import default_data_path

DTYPE_BYTES = 2
BLOCK_TOKENS = 32
SEED = 20


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Of a Llama. `kv_bytes_a_token`: of all layers, keys and values."""

    layers: int = 8
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 512
    vocabulary: int = 4096
    positions: int = 16384

    @property
    def kv_bytes_a_token(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * DTYPE_BYTES


SHAPE = ModelShape()


def build(shape: ModelShape = SHAPE, folder: Path | None = None) -> Path:
    """The model's folder, made when it is not there yet."""
    text = json.dumps(asdict(shape) | {"seed": SEED, "format": 1}, sort_keys=True)
    name = f"llama-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    home = (folder or default_data_path().parent) / "kvstore-models"
    model = home / name
    if not (model / "config.json").exists():
        home.mkdir(parents=True, exist_ok=True)
        # Under a name of its own until it is whole: two may be building at once.
        unfinished = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=home))
        _write(shape, unfinished)
        try:
            unfinished.rename(model)
        except OSError:
            shutil.rmtree(unfinished)
            if not (model / "config.json").exists():
                raise
    return model


def _write(shape: ModelShape, folder: Path) -> None:
    # Imported here: it takes seconds, and only the first run needs it.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        initializer_range=0.06,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def prompt(number: int, tokens: int, shape: ModelShape = SHAPE) -> list[int]:
    """The token ids of one of many prompts that share nothing."""
    draw = random.Random(number)
    return [draw.randrange(shape.vocabulary) for _ in range(tokens)]
