"""The parent's handle on an engine in a child process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvstore.errors import KVStoreError
from kvstore_benchmarks.end_to_end.model import BLOCK_TOKENS

START_TIMEOUT_S = 180.0
CALL_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0

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

_LOG_TAIL_LINES = 12


class EngineFailed(KVStoreError):
    """The engine's process ended, or did not answer in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's: `logprobs` has the likeliest tokens of each answered position."""

    first_token_s: float
    cached_tokens: int
    logprobs: tuple[dict[str, float], ...]


class EngineChild:
    """vLLM in a process of its own. A context manager; leaving it ends the engine."""

    def __init__(self, model: Path, *, context: int, store: str | None = None) -> None:
        self._log = tempfile.NamedTemporaryFile("w+b", prefix="kvstore-engine-", suffix=".log")  # noqa: SIM115 - open as long as the engine runs
        command = [sys.executable, "-m", "kvstore_benchmarks.end_to_end.engine"]
        command += ["--model", str(model), "--block-tokens", str(BLOCK_TOKENS)]
        command += ["--context", str(context), *(("--store", store) if store else ())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
        self._answers: deque[str] = deque()
        self._arrived = threading.Semaphore(0)
        self._reader = threading.Thread(target=self._read, name="engine-answers", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_ready(self) -> Self:
        """Engines start at once and side by side; wait for this one."""
        self._next(START_TIMEOUT_S)
        return self

    def generate(self, tokens: list[int], answer_tokens: int = 4) -> Answer:
        answer = self._call(do="generate", tokens=tokens, answer_tokens=answer_tokens)
        return Answer(answer["first_token_s"], answer["cached_tokens"], tuple(answer["logprobs"]))

    def reset(self) -> None:
        """Empty vLLM's own prefix cache, waiting for stores that still read blocks."""
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while not self._call(do="reset")["done"]:
            if time.monotonic() > deadline:
                raise EngineFailed(f"blocks are held for ever: {self._log_tail()}")
            self.idle()

    def idle(self) -> None:
        """Let the engine take in what finished meanwhile."""
        self._call(do="idle")

    def stop(self) -> None:
        """Idempotent."""
        if self._process.poll() is None:
            try:
                self._send({"do": "stop"})
                self._process.wait(STOP_TIMEOUT_S)
            except (EngineFailed, subprocess.TimeoutExpired):
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._reader.join(STOP_TIMEOUT_S)
        self._log.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _call(self, **request: Any) -> Any:
        self._send(request)
        return self._next(CALL_TIMEOUT_S)

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise EngineFailed(f"the engine is gone: {self._log_tail()}") from error

    def _next(self, timeout_s: float) -> Any:
        if not self._arrived.acquire(timeout=timeout_s):
            raise EngineFailed(f"no answer in {timeout_s:.0f} s: {self._log_tail()}")
        if not self._answers:
            raise EngineFailed(f"the engine ended: {self._log_tail()}")
        return json.loads(self._answers.popleft())

    def _read(self) -> None:
        """A thread of its own, so that waiting for an answer can end."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.append(line)
            self._arrived.release()
        self._arrived.release()

    def _log_tail(self) -> str:
        text = Path(self._log.name).read_text(errors="replace")
        return "\n".join(text.splitlines()[-_LOG_TAIL_LINES:])
