"""A real vLLM with a server that lives, stops, dies and comes back.

One plain engine says what is right. Computing a prompt in other pieces rounds
differently: answers are compared exactly where the same pieces were computed, and
within `ROUNDING` elsewhere. `DAMAGE` is what a wrong block does; a test makes sure
that it is far more.
"""

from __future__ import annotations

import signal
import time

import pytest

from kvstore.types import Tier
from tests.e2e.conftest import (
    BLOCK,
    Answer,
    Pair,
    Server,
    StartEngine,
    attached_again,
    attachments,
    difference,
    prompt,
    stored,
    until,
)

ROUNDING = 2e-3
DAMAGE = 0.05
LONG = 1200
WHOLE = LONG // BLOCK * BLOCK


@pytest.fixture(scope="module")
def server(engines: Pair) -> Server:
    # Whoever had the engine before may have told it to forget what was stored.
    engines.stored.restart(engines.options)
    return engines.server


def check(answers: list[Answer], right: list[Answer], tolerance: float = ROUNDING) -> None:
    worst = max(difference(*both) for both in zip(answers, right, strict=True))
    assert worst <= tolerance


def test_a_wrong_block_would_be_seen(engines: Pair) -> None:
    right = prompt(1, LONG)
    for block in (0, 17, WHOLE // BLOCK - 1):
        wrong = list(right)
        wrong[block * BLOCK : (block + 1) * BLOCK] = prompt(2, BLOCK)
        one, other = engines.plain.generate(right, wrong)
        assert difference(one, other) > DAMAGE


def test_a_warm_prompt_is_loaded_and_answered_as_by_plain_vllm(
    engines: Pair, server: Server
) -> None:
    """Chunked prefill stores it (512 tokens a step), one load brings it back."""
    text = prompt(10, LONG)
    (cold_right,) = engines.plain.generate(text)
    (local_right,) = engines.plain.generate(text)
    assert local_right["cached"] == WHOLE
    before = server.stats().tenant_blocks
    (cold,) = engines.stored.generate(text)
    assert cold["cached"] == 0
    check([cold], [cold_right], 0)
    stored(server, before + WHOLE // BLOCK)
    engines.stored.reset()
    (warm,) = engines.stored.generate(text)
    assert warm["cached"] == WHOLE
    check([warm], [local_right], 0)
    # Decoded tokens are not stored, and what is there is not stored again.
    assert server.stats().tenant_blocks == before + WHOLE // BLOCK


def test_a_shared_beginning_is_loaded_and_the_rest_is_computed(
    engines: Pair, server: Server
) -> None:
    stem = prompt(11, 20 * BLOCK)
    texts = [stem + prompt(12 + index, 77) for index in range(4)]
    before = server.stats().tenant_blocks
    engines.stored.generate(stem)
    stored(server, before + 20)
    engines.stored.reset()
    right = engines.plain.generate(*texts)
    answers = engines.stored.generate(*texts)
    assert answers[0]["cached"] == 20 * BLOCK
    check(answers, right)


def test_preemptions_store_and_load_nothing_wrong(engines: Pair, server: Server) -> None:
    """Ten requests want 2.5 times the KV cache, so they are preempted again and again."""
    texts = [prompt(100 + index, 900 + 10 * index) for index in range(10)]
    right = engines.plain.generate(*texts, max_tokens=64)
    for _ in range(2):
        engines.stored.reset()
        check(engines.stored.generate(*texts, max_tokens=64), right)
    assert engines.stored.metrics()["num_preemptions"] > 0
    until(lambda: not server.stats().leases, "leases were not given back")


def test_two_engines_share_what_either_computed(
    engines: Pair, server: Server, start_engine: StartEngine
) -> None:
    """The second one is also the first one restarted, as far as the store can tell."""
    text = prompt(10, LONG)
    other = start_engine({"endpoint": str(server.socket)}).wait_ready()
    (warm,) = other.generate(text)
    assert warm["cached"] == WHOLE
    engines.plain.generate(text)
    check([warm], engines.plain.generate(text), 0)
    theirs = prompt(20, LONG)
    before = server.stats().tenant_blocks
    other.generate(theirs)
    stored(server, before + WHOLE // BLOCK)
    (shared,) = engines.stored.generate(theirs)
    assert shared["cached"] == WHOLE
    other.close()


def test_a_reset_of_the_connector_forgets_what_was_stored(engines: Pair, server: Server) -> None:
    text = prompt(30, LONG)
    engines.stored.generate(text)
    seen = attachments(engines.stored)
    engines.stored.reset(connector=True)
    (again,) = engines.stored.generate(text)
    assert again["cached"] == 0
    attached_again(engines.stored, seen + 2)
    (local,) = engines.stored.generate(text)
    assert local["cached"] == WHOLE


def test_after_a_restart_of_the_server_blocks_come_from_nvme(engines: Pair, server: Server) -> None:
    text = prompt(31, LONG)
    before = server.stats().tenant_blocks
    engines.stored.generate(text)
    stored(server, before + WHOLE // BLOCK)
    seen = attachments(engines.stored)
    server.end(signal.SIGTERM)
    server.start()
    attached_again(engines.stored, seen + 2)
    engines.stored.reset()
    (warm,) = engines.stored.generate(text)
    assert warm["cached"] == WHOLE
    stats = server.stats()
    assert stats.acquired_hits - stats.acquired_hits_dram >= WHOLE // BLOCK
    assert next(t for t in stats.tiers if t.tier is Tier.NVME).bytes_out > 0
    engines.plain.generate(text)
    check([warm], engines.plain.generate(text), 0)


def test_a_salt_keeps_its_blocks_to_itself(engines: Pair, server: Server) -> None:
    text = prompt(40, LONG)
    before = server.stats().tenant_blocks
    engines.stored.generate(text, salt="ours")
    stored(server, before + WHOLE // BLOCK)
    engines.stored.reset()
    for salt, cached in (("theirs", 0), (None, 0), ("ours", WHOLE)):
        (answer,) = engines.stored.generate(text, salt=salt)
        assert answer["cached"] == cached


def test_a_stopped_server_costs_one_short_wait(engines: Pair, server: Server) -> None:
    # It must be there: of what the directory has not, nothing is asked.
    text, before = prompt(32, LONG), server.stats().tenant_blocks
    engines.stored.generate(text)
    stored(server, before + WHOLE // BLOCK)
    (right,) = engines.plain.generate(text)
    engines.stored.reset()
    seen = attachments(engines.stored)
    timeouts = "kvstore_acquire_timeouts"
    waited = engines.stored.metrics().get(timeouts, 0)
    server.send(signal.SIGSTOP)
    try:
        (first,) = engines.stored.generate(text)
        engines.stored.reset()
        (second,) = engines.stored.generate(text)
        assert (first["cached"], second["cached"]) == (0, 0)
        assert engines.stored.metrics().get(timeouts, 0) == waited + 1
        check([first, second], [right, right])
    finally:
        server.send(signal.SIGCONT)
    # The scheduler noticed; whether the worker did depends on who asked when.
    attached_again(engines.stored, seen + 1)

    def warm() -> bool:
        engines.stored.reset()
        return bool(engines.stored.generate(text)[0]["cached"] == WHOLE)

    until(warm, "nothing is loaded any more")


def test_a_killed_server_leaves_generation_right_and_is_found_again(
    engines: Pair, server: Server
) -> None:
    texts = [prompt(31, LONG), *(prompt(200 + index, 700) for index in range(6))]
    right = engines.plain.generate(*texts, max_tokens=24)
    for delay_s in (0.02, 0.2):
        engines.stored.reset()
        seen = attachments(engines.stored)
        engines.stored.tell(op="generate", prompts=texts, max_tokens=24)
        time.sleep(delay_s)
        server.end(signal.SIGKILL)
        check(engines.stored.result(), right)
        server.start()
        attached_again(engines.stored, seen + 2)
    engines.stored.reset()
    fresh, before = prompt(210, LONG), server.stats().tenant_blocks
    engines.stored.generate(fresh)
    stored(server, before + WHOLE // BLOCK)
    engines.stored.reset()
    assert engines.stored.generate(fresh)[0]["cached"] == WHOLE
