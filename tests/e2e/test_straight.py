"""An engine whose blocks are read from a drive straight into (a stand-in for) its GPU's memory:
what it is given is exact, and what it is not given it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore import Client
from kvstore.device.vram_stand_in import PREFIX
from tests.e2e.conftest import (
    BLOCK,
    Answer,
    Engine,
    Server,
    StartEngine,
    difference,
    prompt,
    stored,
)
from tests.unit.device.gpus import StandInGpu

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

LONG = 700
WHOLE = LONG // BLOCK * BLOCK
TRIES = 20
"""The GPU's first memory is had after it was first asked for."""


@pytest.fixture
def gpu(tmp_path: Path) -> StandInGpu:
    return StandInGpu(tmp_path / "gpu.json", 1 << 29)


@pytest.fixture
def gpu_server(tmp_path: Path, gpu: StandInGpu) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start(
        "--vram-gpus", gpu.name, "--vram-capacity", "128MiB", "--vram-reserve", "16MiB",
        "--vram-gpudirect", "true",
    )  # fmt: skip
    yield server
    server.end()


def from_drive(engine: Engine, server: Server, text: list[int]) -> Answer:
    """The answer where vLLM has nothing and the store has all on its drive, or a GPU."""
    with Client(str(server.socket), timeout_s=60) as client:
        client.flush(drop=True)
    engine.reset()
    (answer,) = engine.generate(text)
    return answer


def until_counted(engine: Engine, name: str, again: Callable[[], Answer]) -> Answer:
    """The first answer that was counted so."""
    before = engine.metrics()[name]
    for _ in range(TRIES):
        answer = again()
        if engine.metrics()[name] > before:
            return answer
    raise AssertionError(engine.metrics())


@pytest.mark.parametrize("ranks", [1, 2])
def test_answers_are_exact_whether_blocks_are_there_yet_or_not(
    start_engine: StartEngine, gpu_server: Server, gpu: StandInGpu, ranks: int
) -> None:
    options: dict[str, object] = {}
    environment = {"KVSTORE_TEST_GPU": gpu.name.removeprefix(PREFIX)}
    if ranks == 2:
        options = {"tensor_parallel_size": 2}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    store = {"recompute": "never", "acquire_timeout_ms": 30_000, "endpoint": str(gpu_server.socket)}
    engine = start_engine(
        None,
        processes=True,
        environment=environment,
        kv_transfer_config={
            "kv_connector": "StraightConnector",
            "kv_connector_module_path": "straight_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": store,
        },
        **options,
    ).wait_ready()
    text = prompt(1, LONG)
    engine.generate(text)
    stored(gpu_server, ranks * WHOLE // BLOCK)
    (local,) = engine.generate(text)
    assert local["cached"] == WHOLE

    def again() -> Answer:
        answer = from_drive(engine, gpu_server, text)
        assert difference(local, answer) == 0
        return answer

    gpu.say(refuses=["open"])
    until_counted(engine, "kvstore_straight_misses", again)
    assert again()["cached"] == WHOLE, "by way of host memory"
    assert not engine.metrics()["kvstore_straight_blocks"]

    gpu.say(refuses=[])
    # Which has it attach anew, with nothing stored.
    engine.reset(connector=True)
    engine.generate(text)
    stored(gpu_server, 2 * ranks * WHOLE // BLOCK)
    assert until_counted(engine, "kvstore_straight_blocks", again)["cached"] == WHOLE
    counted = engine.metrics()
    assert (counted["kvstore_damaged_blocks"], counted["kvstore_thread_errors"]) == (0, 0)
    assert gpu_server.stats().corrupt_blocks == 0
    engine.close()
