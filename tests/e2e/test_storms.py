"""Everything at once: preemptions, aborts, resets, a server that is killed, a side that dies.

What is stored in a storm was computed in batches that no other engine had, and rounds as it
did. So answers are compared within `ROUNDING`, which a wrong block exceeds many times over
(`test_one_server.test_a_wrong_block_would_be_seen`). After each storm every prompt is asked
alone with vLLM's own cache emptied: what the store holds of it must be right, too. That the
bytes of a load are those of its store is the checksum's business, in each of these loads.
"""

from __future__ import annotations

import random
import signal
import time
from typing import Any

import pytest

from tests.e2e.conftest import (
    BLOCK,
    Answer,
    Engine,
    Pair,
    Server,
    StartEngine,
    difference,
    prompt,
    until,
)

ROUNDING = 2e-3
MOST_TOKENS = 40
STORM_S = 300.0


@pytest.fixture(scope="module")
def server(engines: Pair) -> Server:
    return engines.server


def prompts(seed: int, count: int) -> list[list[int]]:
    """Some begin alike, some are whole blocks, some are shorter than one."""
    rng = random.Random(seed)
    stems = [prompt(rng.randrange(1 << 30), BLOCK * rng.randrange(4, 16)) for _ in range(4)]
    lengths = [0, 3, BLOCK, *(rng.randrange(500) for _ in range(4))]
    made = []
    for _ in range(count):
        stem = rng.choice([*stems, []])
        made.append(stem + prompt(rng.randrange(1 << 30), rng.choice(lengths) or 1))
    return made


def agree(answer: Answer, right: Answer) -> bool:
    """The answer is the beginning of the right one."""
    length = len(answer["tokens"])
    front = {name: right[name][:length] for name in ("tokens", "logprobs")}
    return length > 0 and difference(answer, front) <= ROUNDING


class Storm:
    """Prompts, what plain vLLM answers to each, and what they do to the store's engine."""

    def __init__(self, engines: Pair, seed: int, count: int) -> None:
        self._stored = engines.stored
        self._seed = seed
        self._prompts = prompts(seed, count)
        self._right = engines.plain.generate(*self._prompts, max_tokens=MOST_TOKENS)

    def begin(self, **chances: float) -> None:
        self._stored.tell(
            op="storm",
            seed=self._seed,
            prompts=self._prompts,
            max_tokens=MOST_TOKENS,
            at_once=16,
            **chances,
        )

    def end(self) -> int:
        """How many were aborted; all others were answered rightly."""
        answers: list[Answer | None] = self._stored.result(STORM_S)
        for answer, right in zip(answers, self._right, strict=True):
            assert answer is None or agree(answer, right)
        return answers.count(None)

    def check_store(self) -> int:
        """Blocks that were loaded, for all prompts one after the other."""
        loaded = 0
        for tokens, right in zip(self._prompts, self._right, strict=True):
            self._stored.reset()
            (alone,) = self._stored.generate(tokens)
            assert agree(alone, right)
            loaded += alone["cached"] // BLOCK
        return loaded


def let_go(server: Server) -> None:
    until(lambda: not server.stats().leases, "leases were not given back")


def preempt_and_abort(engines: Pair, server: Server, seed: int, count: int) -> None:
    """Whether vLLM has to preempt is a matter of timing: until it had to."""
    for attempt in range(5):
        if storm_with_aborts(engines, server, seed + 10_000 * attempt, count):
            return
    raise AssertionError("nothing was preempted")


def storm_with_aborts(engines: Pair, server: Server, seed: int, count: int) -> bool:
    """Whether a request was preempted."""
    before = engines.stored.metrics()
    storm = Storm(engines, seed, count)
    storm.begin(aborts=0.05, resets=0.02)
    assert 0 < storm.end() < count
    assert storm.check_store() > count
    after = engines.stored.metrics()
    assert after["kvstore_loaded_blocks"] > before.get("kvstore_loaded_blocks", 0)
    assert after.get("kvstore_damaged_blocks", 0) == before.get("kvstore_damaged_blocks", 0)
    assert after.get("kvstore_thread_errors", 0) == 0
    let_go(server)
    return bool(after["num_preemptions"] > before["num_preemptions"])


def kill_and_restart(engines: Pair, server: Server, seed: int, count: int, lives: int) -> None:
    storm = Storm(engines, seed, count)
    storm.begin(aborts=0.02)
    rng = random.Random(seed)
    for _ in range(lives):
        time.sleep(rng.uniform(0.1, 1.0))
        server.end(signal.SIGKILL)
        time.sleep(rng.uniform(0.0, 0.5))
        server.start()
    storm.end()
    storm.check_store()
    assert engines.stored.metrics().get("kvstore_thread_errors", 0) == 0
    let_go(server)


def test_preemptions_and_aborts_store_and_load_nothing_wrong(engines: Pair, server: Server) -> None:
    preempt_and_abort(engines, server, seed=1, count=40)


def test_a_server_killed_in_the_middle_of_load_leaves_every_answer_right(
    engines: Pair, server: Server
) -> None:
    kill_and_restart(engines, server, seed=2, count=40, lives=3)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 110))
def test_long_storms(engines: Pair, server: Server, seed: int) -> None:
    preempt_and_abort(engines, server, seed, count=120)
    kill_and_restart(engines, server, seed + 1000, count=120, lives=8)


# -- prefill and decode apart ---------------------------------------------------------


def side(start_engine: StartEngine, server: Server, role: str) -> Engine:
    transfer: dict[str, Any] = {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore_connectors.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {"endpoint": str(server.socket), "handover_timeout_ms": 300},
    }
    return start_engine(kv_transfer_config=transfer)


def test_either_side_of_a_hand_over_may_be_killed(
    engines: Pair, server: Server, start_engine: StartEngine
) -> None:
    """Decode is asked while prefill computes, and prefill dies; then decode dies, waiting."""
    prefill = side(start_engine, server, "kv_producer")
    decode = side(start_engine, server, "kv_consumer")
    prefill.wait_ready()
    decode.wait_ready()
    coming = {"do_remote_prefill": True}
    texts = [prompt(900 + number, 1500) for number in range(4)]
    right = engines.plain.generate(*texts)
    prefill.tell(op="generate", prompts=texts, max_tokens=1, handover={"do_remote_decode": True})
    decode.tell(op="generate", prompts=texts, max_tokens=4, handover=coming)
    time.sleep(0.3)
    prefill.process.kill()
    for answer, expected in zip(decode.result(), right, strict=True):
        assert agree(answer, expected)
    decode.tell(op="generate", prompts=texts, max_tokens=200, handover=coming)
    decode.tell(op="generate", prompts=[prompt(950, 1500)], max_tokens=4, handover=coming)
    time.sleep(0.2)
    decode.process.kill()
    let_go(server)
    for text, expected in zip(texts, right, strict=True):
        (answer,) = engines.stored.generate(text)
        assert agree(answer, expected)
