"""The small Llama of `kvstore bench vllm` with a tokenizer, for servers that speak text.

A word is a token: "t0 t1 t2". vLLM's benchmark makes its prompts as text and counts
their tokens, which must come out the same on both sides.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from kvstore_benchmarks.end_to_end.model import SHAPE, build

NAME = "small-llama"
"""What the servers call it."""


def served_model(folder: Path | None) -> Path:
    """The model's folder, made when it is not there yet."""
    weights = build(folder=folder)
    home = weights.with_name(f"{weights.name}-words")
    if not (home / "tokenizer_config.json").exists():
        home.mkdir(exist_ok=True)
        for file in weights.iterdir():
            if not (home / file.name).exists():
                (home / file.name).symlink_to(file)
        _write(home / "tokenizer.json", _tokenizer(SHAPE.vocabulary))
        _write(
            home / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"},
        )
    return home


def _tokenizer(vocabulary: int) -> dict[str, object]:
    """As the `tokenizers` library stores one that takes words for tokens."""
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {f"t{token}": token for token in range(vocabulary)},
            "unk_token": "t0",
        },
    }


def _write(path: Path, value: object) -> None:
    """Whole or not at all: two may be making it at once."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(value, file)
    os.replace(file.name, path)
