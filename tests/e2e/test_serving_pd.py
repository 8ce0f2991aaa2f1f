"""A prompt is computed by one vLLM and answered by another, through the store."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.e2e.conftest import BLOCK, Engine, Server, StartEngine, difference, prompt

FOR_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
}
PATIENCE_MS = 5000
"""Where it ends, a test has to wait for it; where it does not, a machine may stand still."""
PROMPT = 12 * BLOCK + 5
FOUND = "external_prefix_cache_hits"
GIVEN_UP = "kvstore_handover_timeouts"
LOADED = "kvstore_loaded_blocks"


def transfer(server: Server, role: str) -> dict[str, Any]:
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore_connectors.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {
            "endpoint": str(server.socket), "handover_timeout_ms": PATIENCE_MS,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def pair(server: Server, start_engine: StartEngine) -> tuple[Engine, Engine]:
    prefill = start_engine(kv_transfer_config=transfer(server, "kv_producer"))
    decode = start_engine(kv_transfer_config=transfer(server, "kv_consumer"))
    return prefill.wait_ready(), decode.wait_ready()


def test_decode_answers_as_if_it_had_computed_the_prompt(pair: tuple[Engine, Engine]) -> None:
    """Every time: prefill answers before its last blocks are stored."""
    prefill, decode = pair
    for number in range(4):
        tokens = prompt(100 + number, PROMPT)
        before = decode.metrics()
        (computed,) = prefill.generate(tokens, max_tokens=1, handover=FOR_DECODE)
        (handed,) = decode.generate(tokens, handover=computed["handover"])
        (own,) = decode.generate(tokens)
        assert own["cached"] == 12 * BLOCK
        assert difference(handed, own) == 0
        after = decode.metrics()
        assert after[FOUND] - before[FOUND] == 12 * BLOCK
        assert after.get(GIVEN_UP, 0) == before.get(GIVEN_UP, 0)


def test_a_prompt_that_nobody_stores_is_computed_after_the_wait(
    pair: tuple[Engine, Engine],
) -> None:
    _, decode = pair
    before = decode.metrics()
    started = time.monotonic()
    tokens = prompt(200, PROMPT)
    (answer,) = decode.generate(tokens, handover={"do_remote_prefill": True})
    assert time.monotonic() - started > PATIENCE_MS / 1000
    assert difference(answer, decode.generate(tokens)[0]) < 1e-3
    assert decode.metrics()[GIVEN_UP] == before.get(GIVEN_UP, 0) + 1


def test_what_came_of_a_prompt_counts_when_the_rest_does_not(pair: tuple[Engine, Engine]) -> None:
    """As when the prefill vLLM dies in the middle."""
    prefill, decode = pair
    tokens = prompt(250, PROMPT)
    prefill.generate(tokens[: 6 * BLOCK + 1], max_tokens=1)
    before = decode.metrics()
    (answer,) = decode.generate(tokens, handover={"do_remote_prefill": True})
    assert difference(answer, decode.generate(tokens)[0]) < 1e-3
    after = decode.metrics()
    assert after[LOADED] - before.get(LOADED, 0) == 6
    assert after[GIVEN_UP] == before.get(GIVEN_UP, 0) + 1


@pytest.mark.parametrize(
    "nonsense",
    [
        {"do_remote_prefill": "yes", "remote_block_ids": [[1, None]], "remote_port": {}},
        {"do_remote_decode": 1, "kvstore_tokens": "many"},
        {"do_remote_prefill": True, "kvstore_tokens": -7},
    ],
)
def test_what_a_proxy_says_wrongly_counts_as_not_said(
    pair: tuple[Engine, Engine], nonsense: dict[str, Any]
) -> None:
    for engine in pair:
        tokens = prompt(300, PROMPT)
        (answer,) = engine.generate(tokens, handover=nonsense)
        assert difference(answer, engine.generate(tokens)[0]) < 1e-3
