"""`vllm-router` sends requests where the store has their beginning, and weighs its tiers.

Two servers of vLLM, each with a store of its own, behind routers that differ in what a block
in DRAM and one on NVMe are worth to them. Which replica answered shows in how many tokens it
had cached.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvstore_benchmarks.pipe import ChildFailed
from kvstore_benchmarks.serving.instance import HOST, Child, free_port
from tests.e2e.conftest import BLOCK, Server, engine_options, prompt, until
from tests.e2e.listener import Listener

ROUTER = Path(os.environ.get("KVSTORE_ROUTER", ".venv-router")) / "bin" / "vllm-router"
WHOLE = 37
TEXT = WHOLE * BLOCK + 5

pytestmark = [
    pytest.mark.skipif(not ROUTER.exists(), reason=f"no vllm-router in {ROUTER.parent.parent}"),
    pytest.mark.timeout(1500),
]


RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def own_port() -> int:
    """One that nobody listens on, and that whoever asks for any port is not given meanwhile."""
    first, end = 20_000, int(RANGE.read_text().split()[0])
    for _ in range(100 if first < end else 0):
        port = random.SystemRandom().randrange(first, end)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port
    return free_port()


class Replica:
    """A vLLM that speaks HTTP, its store, and what it publishes."""

    def __init__(self, number: int, directory: Path, model: Path) -> None:
        self.store = Server(directory)
        self.store.start()
        port = own_port()
        self.events = f"tcp://{HOST}:{port}"
        options = engine_options(model, {"endpoint": str(self.store.socket)})
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model), "--served-model-name", "m", "--dtype", "float32"]
        command += ["--host", HOST, "--port", str(free := own_port()), "--enforce-eager"]
        command += ["--block-size", str(BLOCK), "--max-model-len", "2048"]
        command += ["--num-gpu-blocks-override", "160", "--enable-prompt-tokens-details"]
        command += ["--kv-transfer-config", json.dumps(options["kv_transfer_config"])]
        publish = {"enable_kv_cache_events": True, "endpoint": f"tcp://*:{port}"}
        command += ["--kv-events-config", json.dumps(publish)]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str(number % (os.cpu_count() or 1)),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # For /reset_prefix_cache.
            "HF_HUB_OFFLINE": "1",
        }
        self.vllm = Child(f"vllm {number}", command, environment, free)
        self.heard = Listener(self.events)

    def close(self) -> None:
        self.heard.close()
        self.vllm.close()
        self.store.end()

    def has(self, medium: str, text: list[int]) -> int:
        """How many of the text's blocks it has announced to be there."""
        self.heard.listen(50)
        held = self.heard.held.get(medium, {}).values()
        return sum(text[at : at + BLOCK] in held for at in range(0, len(text) - BLOCK, BLOCK))

    def forget(self) -> None:
        """Empty vLLM's own cache, and have that announced, which takes a step."""
        until(self._reset, "its cache cannot be emptied")
        ask(self.vllm, prompt(time.monotonic_ns(), BLOCK))

    def _reset(self) -> bool:
        try:
            self.vllm.post("/reset_prefix_cache")
        except ChildFailed:  # Blocks are still being stored.
            return False
        return True

    def counted(self, name: str) -> float:
        lines = re.findall(rf"^vllm:{name} (\S+)$", self.vllm.get("/metrics"), re.MULTILINE)
        return sum(map(float, lines))


def ask(who: Child, text: list[int]) -> int:
    """How many tokens were cached where it was answered."""
    body = {"model": "m", "prompt": text, "max_tokens": 2, "temperature": 0}
    answer: dict[str, Any] = who.post("/v1/completions", body)
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"] or 0)


class Fleet(NamedTuple):
    replicas: list[Replica]
    routers: dict[str, Child]

    def caught_up(self, name: str) -> Child:
        """The router of that name, once it has heard all that the replicas have said."""
        router = self.routers[name]
        for replica in self.replicas:
            in_a_row: list[bool] = []

            def knows(replica: Replica = replica, in_a_row: list[bool] = in_a_row) -> bool:
                """It may have guessed: what came last, again and again."""
                text = prompt(time.monotonic_ns(), 2 * BLOCK + 1)
                ask(replica.vllm, text)
                in_a_row.append(ask(router, text) == 2 * BLOCK)
                return len(in_a_row) >= 4 and all(in_a_row[-4:])

            until(knows, f"{name} does not follow {replica.vllm.name}")
        return router


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, model_path: Callable[[str], Path]
) -> Iterator[Fleet]:
    with ExitStack() as stack:
        replicas = []
        for number in range(2):
            replica = Replica(number, tmp_path_factory.mktemp("replica"), model_path("llama"))
            stack.callback(replica.close)
            replicas.append(replica)
        for replica in replicas:
            replica.vllm.wait_ready()
        routers = {}
        for name, flags in {
            "usual": [],
            "disk is nothing": ["--kv-penalty-disk", "0.1"],
            "host is little": ["--kv-penalty-host", "0.3"],
        }.items():
            command = [str(ROUTER), "--policy", "kv_aware", "--host", HOST, *flags]
            command += ["--port", str(port := own_port()), "--log-level", "warning"]
            command += ["--prometheus-port", str(own_port())]
            command += ["--kv-event-block-size", str(BLOCK), "--kv-event-model", "m"]
            command += ["--worker-urls", *(replica.vllm.url for replica in replicas)]
            for replica in replicas:
                command += ["--kv-event-source", f"{replica.vllm.url}={replica.events}"]
            routers[name] = stack.enter_context(Child(name, command, {}, port))
        for router in routers.values():
            router.wait_ready()
        fleet = Fleet(replicas, routers)
        for name in routers:
            # A subscription takes effect a moment after its connection.
            fleet.caught_up(name)
        yield fleet


@pytest.mark.parametrize("number", [0, 1])
def test_a_request_goes_where_only_the_store_has_its_beginning(fleet: Fleet, number: int) -> None:
    replica = fleet.replicas[number]
    text = prompt(2000 + number, TEXT)
    from_host = r"prompt_tokens_cached_by_source_total\{.*source=\"host\"\}"
    loaded = r"kvstore_loaded_blocks_total\{.*\}"
    ask(replica.vllm, text)
    until(lambda: replica.has("CPU", text) == WHOLE, "it never said what it stored")
    replica.forget()
    until(
        lambda: replica.has("GPU", text) == 0 and replica.has("CPU", text) == WHOLE,
        "it never said what it forgot",
    )
    assert ask(fleet.caught_up("usual"), text) == WHOLE * BLOCK
    # Both sides count what came of it, and alike.
    until(lambda: replica.counted(from_host) == WHOLE * BLOCK, "it was not counted")
    assert replica.counted(loaded) == replica.store.stats().acquired_hits == WHOLE


@pytest.mark.parametrize(
    ("seed", "router", "in_dram", "there"),
    [
        (3000, "usual", 10, "disk"),
        (3001, "disk is nothing", 10, "host"),
        (3002, "usual", 20, "host"),
        (3003, "host is little", 20, "disk"),
    ],
)
def test_tiers_are_weighed_as_the_router_was_told(
    fleet: Fleet, seed: int, router: str, in_dram: int, there: str
) -> None:
    """One replica has some blocks in DRAM, the other all of them on NVMe."""
    host, disk = fleet.replicas
    text = prompt(seed, TEXT)
    ask(disk.vllm, text)
    ask(host.vllm, text[: in_dram * BLOCK + 1])
    until(
        lambda: disk.has("CPU", text) == WHOLE and host.has("CPU", text) == in_dram,
        "they never said what they stored",
    )
    disk.store.end(signal.SIGTERM)
    disk.store.start()

    def announced() -> bool:
        host.forget()
        disk.forget()
        return disk.has("STORAGE", text) == WHOLE and host.has("CPU", text) == in_dram

    until(announced, "they never said where it is")
    assert disk.has("CPU", text) == disk.has("GPU", text) == host.has("GPU", text) == 0
    cached = ask(fleet.caught_up(router), text)
    expected = (WHOLE if there == "disk" else in_dram) * BLOCK
    assert cached == expected, [replica.store.stats() for replica in fleet.replicas]
