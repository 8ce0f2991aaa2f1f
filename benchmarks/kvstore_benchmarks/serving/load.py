"""Load on a server, and what its clients met: the parent's side of `harness`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kvstore_benchmarks.closing import Closing
from kvstore_benchmarks.figures import percentile, ratio
from kvstore_benchmarks.pipe import Pipe
from kvstore_benchmarks.serving.instance import HOST
from kvstore_benchmarks.serving.model import NAME

START_TIMEOUT_S = 600.0
LOAD_TIMEOUT_S = 600.0

# Prompts are drawn from Python's `hash` of a string, among others.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True)
class Met:
    """What the clients of one run met. Seconds; tokens are those answered."""

    failed: int
    seconds: float
    requests: int
    tokens: int
    first_token_s: tuple[float, ...]
    between_tokens_s: tuple[float, ...]

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def first_token(self, percent: float = 50) -> float:
        return percentile(self.first_token_s, percent)

    def between_tokens(self, percent: float = 50) -> float:
        return percentile(self.between_tokens_s, percent)

    @property
    def first_token_mean(self) -> float:
        return ratio(sum(self.first_token_s), len(self.first_token_s))


class Harness(Closing):
    """`vllm bench serve`, ready to run. A context manager; it starts at once."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-m", "kvstore_benchmarks.serving.harness"]
        self._pipe = Pipe(command, ENVIRONMENT)
        self._model = model
        self._ready = False

    def close(self) -> None:
        self._pipe.close()

    def wait_ready(self) -> Self:
        if not self._ready:
            self._pipe.receive(START_TIMEOUT_S)
            self._ready = True
        return self

    def run(self, port: int, arguments: Sequence[str]) -> Met:
        """Raises `ChildFailed`."""
        self.wait_ready()
        command = ["--backend", "vllm", "--host", HOST, "--port", str(port)]
        command += ["--model", NAME, "--tokenizer", str(self._model), "--temperature", "0"]
        command += ["--disable-tqdm", "--save-detailed", "--percentile-metrics", "ttft,itl"]
        self._pipe.send({"arguments": [*command, *arguments]})
        return met(self._pipe.receive(LOAD_TIMEOUT_S))


def met(answer: dict[str, Any]) -> Met:
    return Met(
        failed=answer["failed"],
        seconds=answer["duration"],
        requests=answer["completed"],
        tokens=answer["total_output_tokens"],
        first_token_s=tuple(answer["ttfts"]),
        between_tokens_s=tuple(gap for gaps in answer["itls"] for gap in gaps),
    )
