"""The parent's handle on an engine in a child process."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kvstore_benchmarks.closing import Closing
from kvstore_benchmarks.end_to_end.model import BLOCK_TOKENS
from kvstore_benchmarks.pipe import ChildFailed, Pipe

START_TIMEOUT_S = 180.0
CALL_TIMEOUT_S = 120.0

KV_CACHE_GIB = 1
"""vLLM's own cache, in each engine: more than three of the longest prompts."""

ENVIRONMENT = {
    # One process: nothing between the request and the engine.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's: `logprobs` has the likeliest tokens of each answered position,
    `handover` its `kv_transfer_params`."""

    first_token_s: float
    cached_tokens: int
    logprobs: tuple[dict[str, float], ...]
    handover: dict[str, Any] | None = None


class EngineChild(Closing):
    """vLLM in a process of its own. A context manager; leaving it ends the engine.

    The process starts at once; `wait_ready` returns when it can be asked, so that
    several can start side by side. Every method raises `ChildFailed`.
    """

    def __init__(
        self,
        model: Path,
        *,
        context: int,
        store: str | None = None,
        recompute: str = "when_sooner",
    ) -> None:
        """`context`: the most tokens of a prompt with its answer. `store`: a server's socket.
        `recompute`: as in the connector's configuration."""
        command = [sys.executable, "-m", "kvstore_benchmarks.end_to_end.engine"]
        command += ["--model", str(model), "--block-tokens", str(BLOCK_TOKENS)]
        command += ["--context", str(context), "--recompute", recompute]
        command += ["--store", store] if store else []
        self._pipe = Pipe(command, ENVIRONMENT)

    def close(self) -> None:
        self._pipe.close({"do": "stop"})

    @property
    def pid(self) -> int:
        return self._pipe.pid

    def wait_ready(self) -> Self:
        self._pipe.receive(START_TIMEOUT_S)
        return self

    def generate(
        self, tokens: list[int], answer_tokens: int = 4, handover: dict[str, Any] | None = None
    ) -> Answer:
        answer = self._call(
            do="generate", tokens=tokens, answer_tokens=answer_tokens, handover=handover
        )
        return Answer(
            answer["first_token_s"],
            answer["cached_tokens"],
            tuple(answer["logprobs"]),
            answer["handover"],
        )

    def reset(self) -> None:
        """Empty vLLM's own prefix cache, waiting for stores that still read blocks."""
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while not self._call(do="reset")["done"]:
            if time.monotonic() > deadline:
                raise ChildFailed("the engine holds blocks for ever")
            self.idle()

    def idle(self) -> None:
        """Let the engine take in what finished meanwhile."""
        self._call(do="idle")

    def _call(self, **request: Any) -> Any:
        self._pipe.send(request)
        return self._pipe.receive(CALL_TIMEOUT_S)
