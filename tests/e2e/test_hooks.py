"""What vLLM asks of a connector beside loads and stores: where hits came from, what a load
that fails costs, events, sleep."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.types import Tier
from tests.e2e.conftest import (
    BLOCK,
    Engine,
    Pair,
    Server,
    StartEngine,
    attached_again,
    attachments,
    difference,
    engine_options,
    prompt,
    stored,
    until,
)
from tests.e2e.listener import Listener

LONG = 1200
WHOLE = LONG // BLOCK
HOST = "prompt_tokens_cached_by_source/host"
DISK = "prompt_tokens_cached_by_source/disk"


@pytest.fixture(scope="module")
def server(engines: Pair) -> Server:
    return engines.server


@pytest.fixture(scope="module")
def engine(engines: Pair) -> Engine:
    return engines.stored


@pytest.fixture
def listener(engines: Pair, engine: Engine) -> Iterator[Listener]:
    listener = Listener(engines.events)
    numbers = itertools.count(5000)

    def heard() -> bool:
        engine.generate(prompt(next(numbers), BLOCK + 1))
        return bool(listener.listen(100))

    # A subscription takes effect a moment after its connection.
    until(heard, "the engine says nothing")
    yield listener
    listener.close()


def store(engine: Engine, server: Server, text: list[int]) -> None:
    """To the end: it is counted, and announced."""
    engine.settle()
    before = server.stats().tenant_blocks
    engine.generate(text)
    engine.settle()
    stored(server, before + len(text) // BLOCK)


def restart(engine: Engine, server: Server) -> None:
    """What was stored is behind DRAM alone afterwards."""
    before = attachments(engine)
    server.end(signal.SIGTERM)
    server.start()
    attached_again(engine, before + 2)


def gained(engine: Engine, before: dict[str, float], name: str) -> float:
    return engine.metrics().get(name, 0) - before.get(name, 0)


def test_hits_are_counted_by_the_tier_they_came_from_and_alike_on_both_sides(
    engine: Engine, server: Server
) -> None:
    text = prompt(1001, LONG)
    before, stats = engine.metrics(), server.stats()
    store(engine, server, text)
    assert gained(engine, before, "kvstore_stored_blocks") == WHOLE
    engine.reset()
    engine.generate(text)
    assert (gained(engine, before, HOST), gained(engine, before, DISK)) == (WHOLE * BLOCK, 0)
    now = server.stats()
    assert now.acquired_hits - stats.acquired_hits == WHOLE
    assert now.acquired_hits_dram - stats.acquired_hits_dram == WHOLE
    restart(engine, server)
    engine.reset()
    engine.generate(text)
    assert gained(engine, before, HOST) == gained(engine, before, DISK) == WHOLE * BLOCK
    now = server.stats()
    assert (now.acquired_hits, now.acquired_hits_dram) == (WHOLE, 0)
    nvme = next(tier for tier in now.tiers if tier.tier is Tier.NVME)
    assert nvme.bytes_out >= gained(engine, before, "kvstore_loaded_bytes") / 2
    assert gained(engine, before, "kvstore_found_blocks") == 2 * WHOLE
    assert gained(engine, before, "kvstore_loaded_blocks") == 2 * WHOLE
    assert gained(engine, before, "external_prefix_cache_hits") == 2 * WHOLE * BLOCK


def test_routers_are_told_what_the_store_holds(
    engine: Engine, server: Server, listener: Listener
) -> None:
    text = prompt(1002, LONG)
    whole = [text[at : at + BLOCK] for at in range(0, WHOLE * BLOCK, BLOCK)]

    def said(where: dict[str, list[list[int]]]) -> bool:
        """Of the text, by medium; once it says nothing more."""
        listener.listen()
        held = {medium: list(listener.held.get(medium, {}).values()) for medium in where}
        return where == {m: [each for each in whole if each in held[m]] for m in where}

    store(engine, server, text)
    until(lambda: said({"GPU": whole, "CPU": whole}), "it never said what is stored")
    own, stored = listener.held["GPU"], listener.held["CPU"]
    for name, tokens in stored.items():
        assert own.get(name, tokens) == tokens
    engine.reset()
    other = prompt(1003, 3 * BLOCK)
    engine.generate(other)
    until(lambda: said({"GPU": [], "CPU": whole}), "it never said what it forgot")
    restart(engine, server)

    def said_in_a_step(where: dict[str, list[list[int]]]) -> bool:
        engine.generate(other)
        return said(where)

    until(lambda: said_in_a_step({"STORAGE": whole, "CPU": []}), "it never said where it is")
    engine.reset(connector=True)
    engine.generate(prompt(1004, 3 * BLOCK))
    until(lambda: said_in_a_step({"STORAGE": []}), "it never said that nothing is there")


def test_a_load_that_fails_is_computed(engine: Engine, server: Server) -> None:
    text = prompt(1005, LONG)
    store(engine, server, text)
    (right,) = engine.generate(text)
    before = engine.metrics()
    engine.reset()
    server.damage()
    (answer,) = engine.generate(text)
    assert gained(engine, before, "kvstore_failed_loads") == 1
    assert gained(engine, before, "kvstore_damaged_blocks") > 0
    assert difference(answer, right) < 2e-3


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_slept_trusts_nothing_that_was_stored_before(
    engine: Engine, server: Server, level: int
) -> None:
    """Its weights may be others now."""
    text = prompt(1006 + level, LONG)
    store(engine, server, text)
    engine.reset()
    before = attachments(engine)
    engine.sleep_and_wake(level)
    (answer,) = engine.generate(text)
    assert answer["cached"] == 0
    attached_again(engine, before + 2)
    store(engine, server, prompt(1008 + level, LONG))
    engine.reset()
    assert engine.generate(prompt(1008 + level, LONG))[0]["cached"] == WHOLE * BLOCK


@pytest.fixture(scope="module")
def process(start_engine: StartEngine) -> Engine:
    return start_engine(family=None).wait_ready()


@pytest.mark.parametrize("inside_multi", [False, True], ids=["alone", "inside MultiConnector"])
def test_a_load_that_fails_ends_the_request_where_a_user_wants_that(
    server: Server, process: Engine, model_path: Any, inside_multi: bool
) -> None:
    choice = {} if inside_multi else {"load_failure": "fail"}
    options = engine_options(model_path("llama"), {"endpoint": str(server.socket)} | choice)
    if inside_multi:
        options["kv_transfer_config"] = {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"connectors": [options["kv_transfer_config"]]},
        }
    process.restart(options)
    text = prompt(1020 + inside_multi, LONG)
    store(process, server, text)
    process.reset()
    server.damage()
    (answer,) = process.generate(text)
    assert (answer["finish"], answer["tokens"]) == ("error", [])
    (other,) = process.generate(prompt(1030 + inside_multi, LONG))
    assert len(other["tokens"]) == 4


def test_an_engine_without_a_cache_of_its_own_has_the_stores(
    server: Server, process: Engine, model_path: Any
) -> None:
    options = engine_options(model_path("llama"), {"endpoint": str(server.socket)})
    process.restart(options | {"enable_prefix_caching": False})
    text = prompt(1040, LONG)
    store(process, server, text)
    answers = [process.generate(text)[0] for _ in range(2)]
    assert [each["cached"] for each in answers] == [WHOLE * BLOCK] * 2
    assert difference(*answers) == 0


def test_an_engine_with_other_blocks_keeps_to_itself(
    server: Server, process: Engine, model_path: Any
) -> None:
    """Twice the size, which does not divide the prompt: the hashes must not be mixed up."""
    options = engine_options(model_path("llama"), {"endpoint": str(server.socket)})
    process.restart(options)
    text = prompt(1041, WHOLE * BLOCK)
    store(process, server, text)
    (right,) = process.generate(text)
    process.restart(options | {"block_size": 2 * BLOCK})
    before = server.stats().tenant_blocks
    (cold,) = process.generate(text)
    assert cold["cached"] == 0
    stored(server, before + WHOLE // 2)
    process.reset()
    (warm,) = process.generate(text)
    assert warm["cached"] == WHOLE // 2 * 2 * BLOCK
    assert max(difference(cold, right), difference(warm, right)) < 2e-3
