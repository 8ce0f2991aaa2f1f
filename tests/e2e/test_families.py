"""Every kind of KV cache that vLLM's CPU build can run.

An engine stores what it computes, then answers from the store what it answered from its
own cache before, to the last bit and with as many cached tokens; so does the engine that
is started after it.
"""

from __future__ import annotations

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
    until,
)

LONG = 1100
PROMPTS = {
    "alone": prompt(1, LONG),
    "short": prompt(2, 300),
    "aligned": prompt(3, 960),
}


QUIET_LOOKS = 20
"""So often in a row nothing new is there when all stores are over."""


def quiet(server: Server) -> None:
    """Wait until nothing more arrives at the server: stores are asynchronous."""
    seen: list[int] = []

    def settled() -> bool:
        seen.append(server.stats().tenant_blocks)
        return len(seen) > QUIET_LOOKS and set(seen[-QUIET_LOOKS:]) == {seen[-1]} != {0}

    until(settled, "blocks keep coming")


def same(answers: list[Answer], right: list[Answer]) -> None:
    assert [each["cached"] for each in answers] == [each["cached"] for each in right]
    assert [difference(*both) for both in zip(answers, right, strict=True)] == [0] * len(right)


def one_by_one(engine: Engine, texts: list[list[int]]) -> list[Answer]:
    return [engine.generate(text)[0] for text in texts]


def multi(transfer: dict[str, Any]) -> dict[str, Any]:
    """The connector as one of several, which here is alone."""
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [transfer]},
    }


@pytest.fixture(scope="module")
def process(start_engine: StartEngine) -> Engine:
    return start_engine(family=None).wait_ready()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma3", {}),
        ("gpt_oss", {}),
        ("deepseek", {}),
        ("qwen3_next", {}),
        ("llama", {"kv_cache_dtype": "fp8", "inside_multi": True}),
    ],
    ids=["windows", "windows and sinks", "latent", "states", "fp8 inside MultiConnector"],
)
def test_warm_from_the_store_is_a_local_hit_to_the_last_bit(
    process: Engine,
    model_path: Callable[[str], Path],
    server: Server,
    family: str,
    changes: dict[str, Any],
) -> None:
    options = engine_options(model_path(family), {"endpoint": str(server.socket)}) | changes
    if options.pop("inside_multi", False):
        options["kv_transfer_config"] = multi(options["kv_transfer_config"])
    process.restart(options)
    texts = list(PROMPTS.values())
    cold = one_by_one(process, texts)
    for block in (0, 17, LONG // BLOCK - 1):
        wrong = list(texts[0])
        wrong[block * BLOCK : (block + 1) * BLOCK] = prompt(4, BLOCK)
        (other,) = process.generate(wrong)
        assert difference(other, cold[0]) > 0, "a wrong block would not be seen"
    assert [each["cached"] for each in cold] == [0] * len(texts)
    local = one_by_one(process, texts)
    assert local[0]["cached"] > LONG // 2
    # It waits for stores that read the blocks.
    process.reset()
    quiet(server)
    same(one_by_one(process, texts), local)
    process.restart(options)
    same(one_by_one(process, texts), local)
