"""Real engines and servers in processes of their own, and what both may answer."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvstore import Client
from kvstore.errors import KVStoreError
from kvstore.types import StoreStats
from tests.e2e import models

HERE = Path(__file__).parent
BLOCK = 32
READY_S = 500.0
ANSWER_S = 300.0
WAIT_S = 120.0
END_S = 150.0
DRAIN_S = 100.0
HANGS_S = 1500
"""Limits are those of a machine that hangs: a busy one may take very long. The last one is a
test's, with the engines that are started for it."""

Answer = dict[str, Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(HANGS_S))


def until(true: Callable[[], bool], otherwise: str | Callable[[], str]) -> None:
    """Wait for what takes a moment. `otherwise`: what is wrong where it never comes."""
    deadline = time.monotonic() + WAIT_S
    while not true():
        late = time.monotonic() > deadline
        assert not late, otherwise if isinstance(otherwise, str) else otherwise()
        time.sleep(0.03)


class Server:
    """A store's server on a socket of its own; survives being killed."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "kv.sock"
        self._data = directory / "data"
        self._log = directory / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *extra: str) -> None:
        command = [
            sys.executable, str(HERE / "server_main.py"), "--socket", str(self.socket),
            "--admin", "", "--dram-capacity", "512MiB", "--dram-extent", "16MiB",
            "--nvme-path", str(self._data), "--nvme-capacity", "1GiB",
            "--drain-s", str(DRAIN_S), *extra,
        ]  # fmt: skip
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._answers, lambda: self._log.read_text()[-2000:])

    def _answers(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()[-2000:]
        try:
            self.stats(5)
        except KVStoreError:
            return False
        return True

    def stats(self, timeout_s: float = WAIT_S) -> StoreStats:
        with Client(str(self.socket), timeout_s=timeout_s) as client:
            return client.stats()

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def damage(self) -> None:
        """Overwrite all blocks in its memory, behind its back."""
        assert self.process is not None
        descriptors = Path(f"/proc/{self.process.pid}/fd")
        for link in descriptors.iterdir():
            try:
                target = os.readlink(link)
                if "kvstore-extent" in target:
                    with link.open("r+b") as extent:
                        extent.write(os.urandom(os.fstat(extent.fileno()).st_size))
            except FileNotFoundError:  # It closes what it needs no more, at any time.
                continue

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise
            finally:
                self.process.wait()
                self.process = None


class Engine:
    """A vLLM engine, driven over pipes."""

    def __init__(
        self, log: Path, options: dict[str, Any] | None, environment: dict[str, str]
    ) -> None:
        self._log = log
        reader, writer = os.pipe()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "engine_main.py"), str(writer), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(writer,),
                env=environment,
            )
        os.close(writer)
        self._results = os.fdopen(reader, "rb", buffering=0)
        self._buffer = b""

    def wait_ready(self) -> Engine:
        assert self.result(READY_S) == {"ready": True}
        return self

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def result(self, timeout_s: float = ANSWER_S) -> Any:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            readable, _, _ = select.select([self._results], [], [], max(0.0, left))
            assert readable, f"no answer in time:\n{self.log()[-3000:]}"
            more = self._results.read(1 << 20)
            assert more, f"the engine ended:\n{self.log()[-3000:]}"
            self._buffer += more
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def generate(self, *prompts: list[int], max_tokens: int = 4, **options: Any) -> list[Answer]:
        """`options`: as of `generate` in engine_main."""
        self.tell(op="generate", prompts=prompts, max_tokens=max_tokens, **options)
        answers: list[Answer] = self.result()
        return answers

    def load_adapter(self, adapter: dict[str, Any]) -> None:
        self.tell(op="load_adapter", adapter=adapter)
        assert self.result() is True

    def sleep_and_wake(self, level: int) -> None:
        self.tell(op="sleep", level=level)
        assert self.result() is True

    def settle(self) -> None:
        """Until all it has to store is stored, and all events are on their way."""
        self.tell(op="settle")
        assert self.result() is True

    def reset(self, *, connector: bool = False) -> None:
        self.tell(op="reset", connector=connector)
        assert self.result() is True

    def restart(self, options: dict[str, Any]) -> None:
        self.tell(op="restart", **options)
        assert self.result(READY_S) == {"ready": True}

    def metrics(self) -> dict[str, float]:
        self.tell(op="metrics")
        values: dict[str, float] = self.result()
        return values

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._results.close()


def engine_options(
    model: Path, store: dict[str, Any] | None, *, by_name: bool = False
) -> dict[str, Any]:
    """For `vllm.LLM`: small, and with the connector if there is a `store`."""
    options: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32" if model.name == "llama" else "bfloat16",
        "block_size": BLOCK,
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": 160,
        "disable_log_stats": False,
    }
    if store is not None:
        # What is loaded must not depend on how fast the machine is just now.
        store = {"recompute": "never", "acquire_timeout_ms": 30_000} | store
        options["kv_transfer_config"] = {
            "kv_connector": "KVStoreConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": store,
        }
        if not by_name:
            path = "kvstore_connectors.vllm"
            options["kv_transfer_config"]["kv_connector_module_path"] = path
    return options


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("models")
    # In a process of its own: importing transformers warns about this and that.
    command = [sys.executable, str(Path(models.__file__)), str(directory)]
    subprocess.run(command, check=True, capture_output=True, timeout=READY_S)
    return lambda family: directory / family


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.end()


class StartEngine:
    """Starts engines, side by side until `Engine.wait_ready`."""

    def __init__(self, directory: Path, model_path: Callable[[str], Path]) -> None:
        self._directory = directory
        self._model_path = model_path
        self._engines: list[Engine] = []

    def __call__(
        self,
        store: dict[str, Any] | None = None,
        *,
        family: str | None = "llama",
        by_name: bool = False,
        processes: bool = False,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> Engine:
        """`store`: the connector's extra config, None for a plain vLLM. Without a `family`
        it is a process that waits for `Engine.restart`."""
        everything = None
        if family is not None:
            model = self._model_path(family)
            everything = engine_options(model, store, by_name=by_name) | options
        child = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if processes else "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        log = self._directory / f"engine{len(self._engines)}.log"
        engine = Engine(log, everything, child | (environment or {}))
        self._engines.append(engine)
        return engine

    def close(self) -> None:
        for engine in self._engines:
            engine.close()


@pytest.fixture(scope="module")
def start_engine(
    tmp_path_factory: pytest.TempPathFactory, model_path: Callable[[str], Path]
) -> Iterator[StartEngine]:
    """StartEngine that end with the module."""
    engines = StartEngine(tmp_path_factory.mktemp("engines"), model_path)
    yield engines
    engines.close()


class Pair(NamedTuple):
    """A plain vLLM, which says what is right, and one with a store, made with `options`,
    which publishes events at `events`."""

    plain: Engine
    stored: Engine
    server: Server
    events: str
    options: dict[str, Any]


@pytest.fixture(scope="session")
def engines(
    tmp_path_factory: pytest.TempPathFactory, model_path: Callable[[str], Path]
) -> Iterator[Pair]:
    """Shared by modules, for engines take long to start. Prompts must be a test's own."""
    directory = tmp_path_factory.mktemp("shared")
    server = Server(directory)
    start = StartEngine(directory, model_path)
    try:
        server.start()
        events = f"ipc://{directory}/events"
        publish = {"enable_kv_cache_events": True, "endpoint": events}
        options = engine_options(model_path("llama"), {"endpoint": str(server.socket)})
        options["kv_events_config"] = publish
        plain, stored = start(None), start(**options)
        yield Pair(plain.wait_ready(), stored.wait_ready(), server, events, options)
    finally:
        start.close()
        server.end()


def stored(server: Server, blocks: int) -> None:
    """Wait until the server holds as many blocks: stores are asynchronous."""
    until(lambda: server.stats().tenant_blocks >= blocks, "the blocks were never stored")


def attachments(engine: Engine) -> int:
    """Scheduler and worker each say it, every time."""
    return engine.log().count("The KV store is attached.")


def attached_again(engine: Engine, times: int) -> None:
    until(lambda: attachments(engine) >= times, "the engine never found the server again")


def prompt(seed: int, tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, models.VOCABULARY) for _ in range(tokens)]


def difference(one: Answer, other: Answer) -> float:
    """The largest difference of a logprob that both answers name, token by token.

    Infinite once different tokens were chosen where the choice was clear.
    """
    worst: float = 0.0
    for position, (left, right) in enumerate(zip(one["logprobs"], other["logprobs"], strict=True)):
        both = left.keys() & right.keys()
        if not both:
            return float("inf")
        worst = max(worst, *(abs(left[token] - right[token]) for token in both))
        if one["tokens"][position] != other["tokens"][position]:
            # A near tie may fall either way; what follows is another text.
            return worst
    return worst
