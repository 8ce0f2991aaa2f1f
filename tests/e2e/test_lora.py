"""LoRA: what an adapter's requests find is what that adapter's weights computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import (
    BLOCK,
    Answer,
    Engine,
    Server,
    StartEngine,
    difference,
    engine_options,
    prompt,
)
from tests.e2e.models import write_adapter
from tests.e2e.test_families import quiet, same

LONG = 700
WHOLE = LONG // BLOCK * BLOCK
TEXT = prompt(1, LONG)
CLEAR = 1e-2
"""Other weights make at least this difference to a logprob; rounding, a hundredth of it."""


@pytest.fixture(scope="module")
def process(start_engine: StartEngine) -> Engine:
    return start_engine(family=None).wait_ready()


@pytest.fixture(scope="module")
def options(model_path: Callable[[str], Path], server: Server) -> dict[str, Any]:
    options = engine_options(model_path("llama"), {"endpoint": str(server.socket)})
    return options | {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}


def adapter(name: str, number: int, path: Path) -> dict[str, Any]:
    return {"lora_name": name, "lora_int_id": number, "lora_path": str(path)}


def rewrite(path: Path, seed: int) -> None:
    """Other weights in files of the same name, size and time."""
    before = [(each, os.stat(each).st_mtime_ns) for each in path.iterdir()]
    write_adapter(path, seed)
    for each, time_ns in before:
        os.utime(each, ns=(time_ns, time_ns))


def all_clear(answers: list[Answer]) -> None:
    for number, one in enumerate(answers):
        for other in answers[:number]:
            assert difference(one, other) > CLEAR


def test_blocks_of_an_adapter_are_for_its_weights_alone(
    process: Engine, options: dict[str, Any], server: Server, tmp_path: Path
) -> None:
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, seed)
    first, second = adapter("a", 1, tmp_path / "a"), adapter("b", 2, tmp_path / "b")
    process.restart(options)

    def ask(who: dict[str, Any] | None) -> Answer:
        return process.generate(TEXT, adapter=who)[0]

    everyone = [None, first, second]
    cold = [ask(who) for who in everyone]
    assert [each["cached"] for each in cold] == [0, 0, 0]
    all_clear(cold)
    local = [ask(who) for who in everyone]
    assert [each["cached"] for each in local] == [WHOLE] * 3
    process.reset()
    quiet(server)
    same([ask(who) for who in everyone], local)

    process.restart(options)
    for who in (first, second):
        process.load_adapter(who)
    same([ask(who) for who in everyone], local)

    rewrite(tmp_path / "b", 2)
    process.restart(options)
    for who in (first, second):
        process.load_adapter(who)
    third = ask(second)
    assert third["cached"] == 0, "its name and path are the second's"
    all_clear([*cold, third])
    same([ask(None), ask(first)], local[:2])
    assert process.metrics()["kvstore_failed_loads"] == 0


@pytest.mark.soak
def test_weights_that_change_under_a_running_engine_get_nothing_and_leave_nothing(
    process: Engine, options: dict[str, Any], server: Server, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "a", 10)
    who = adapter("a", 1, tmp_path / "a")
    process.restart(options)
    process.load_adapter(who)
    (old,) = process.generate(TEXT, adapter=who)
    quiet(server)
    rewrite(tmp_path / "a", 11)
    process.reset()
    (still_old,) = process.generate(TEXT, adapter=who)
    assert still_old["cached"] == WHOLE, "what is loaded stays what it is"
    assert difference(old, still_old) < CLEAR / 100
    process.load_adapter(who | {"load_inplace": True})
    before = server.stats().tenant_blocks
    for _ in range(2):
        process.reset()
        (new,) = process.generate(TEXT, adapter=who)
        assert new["cached"] == 0 and difference(old, new) > CLEAR
    assert server.stats().tenant_blocks == before
    assert "was loaded with other weights" in process.log()
    process.restart(options)
    process.load_adapter(who)
    (cold,) = process.generate(TEXT, adapter=who)
    assert cold["cached"] == 0 and difference(new, cold) < CLEAR / 100
