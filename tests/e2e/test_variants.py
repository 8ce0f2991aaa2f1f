"""The other ways to run: no server given, several ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvstore import Client
from tests.e2e.conftest import (
    BLOCK,
    WAIT_S,
    Engine,
    Server,
    StartEngine,
    difference,
    prompt,
    until,
)

LONG = 700
WHOLE = LONG // BLOCK * BLOCK


def blocks(socket: Path) -> int:
    with Client(str(socket), timeout_s=WAIT_S) as client:
        return client.stats().tenant_blocks


def warm_equals_local(engine: Engine, socket: Path, ranks: int = 1) -> None:
    text, before = prompt(1, LONG), blocks(socket)
    (cold,) = engine.generate(text)
    assert cold["cached"] == 0
    whole = ranks * WHOLE // BLOCK
    until(lambda: blocks(socket) >= before + whole, "the blocks were never stored")
    (local,) = engine.generate(text)
    engine.reset()
    (warm,) = engine.generate(text)
    assert (local["cached"], warm["cached"]) == (WHOLE, WHOLE)
    assert difference(local, warm) == 0
    assert engine.metrics()["kvstore_loaded_blocks"] == ranks * WHOLE // BLOCK


def test_without_an_endpoint_one_server_is_started_and_ends_when_idle(
    start_engine: StartEngine, tmp_path: Path
) -> None:
    """By name, with vLLM's usual processes: scheduler and worker both find the server."""
    arguments = ["--admin", "", "--dram-capacity", "256MiB", "--nvme-capacity", "0"]
    engine = start_engine(
        {"server_args": [*arguments, "--idle-exit-s", "1"]},
        by_name=True,
        processes=True,
        environment={"XDG_RUNTIME_DIR": str(tmp_path)},
    ).wait_ready()
    socket = tmp_path / "kvstore" / "kvstore.sock"
    warm_equals_local(engine, socket)
    server = json.loads((socket.parent / "kvstore.sock.json").read_text())["pid"]
    engine.close()
    until(lambda: not Path(f"/proc/{server}").exists(), "the idle server never ended")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"tensor_parallel_size": 2}, id="halves of the heads"),
        # Without a warm-up, which eager mode leaves out, vLLM's CPU build has no buffers
        # between stages and fails in its first step.
        pytest.param(
            {
                "pipeline_parallel_size": 2,
                "enforce_eager": False,
                "compilation_config": {"mode": 2, "backend": "eager"},
            },
            id="some of the layers",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_two_ranks_load_their_own_parts(
    start_engine: StartEngine, server: Server, sizes: dict[str, Any]
) -> None:
    """The second kind finds nothing of the first, whose parts are as many."""
    engine = start_engine(
        {"endpoint": str(server.socket)},
        processes=True,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        **sizes,
    ).wait_ready()
    warm_equals_local(engine, server.socket, ranks=2)
    engine.close()


@pytest.mark.soak
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two stages need two cores")
def test_stages_of_several_kv_cache_groups_tell_what_they_have(
    start_engine: StartEngine, server: Server
) -> None:
    """Windows and full attention by turns: both stages have layers of both groups."""
    engine = start_engine(
        {"endpoint": str(server.socket)},
        family="gpt_oss",
        processes=True,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        pipeline_parallel_size=2,
        enforce_eager=False,
        compilation_config={"mode": 2, "backend": "eager"},
    ).wait_ready()
    text, before = prompt(1, LONG), blocks(server.socket)
    engine.generate(text)
    # Of each stage all blocks of full attention, and the three of the window at the end.
    whole = 2 * (WHOLE // BLOCK + 3)
    until(lambda: blocks(server.socket) >= before + whole, "the blocks were never stored")
    (local,) = engine.generate(text)
    engine.reset()
    (warm,) = engine.generate(text)
    assert (local["cached"], warm["cached"]) == (WHOLE, WHOLE)
    assert difference(local, warm) == 0
    engine.close()
