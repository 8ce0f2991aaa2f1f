"""The whole stack in virtual time: what it says a request took is what the model says."""

from __future__ import annotations

from functools import partial

import pytest

from kvstore.core.cost import Prefill
from kvstore.core.policies import POLICIES, SessionState
from kvstore.errors import BadRequest
from kvstore.sim.machine import Machine, Tiers, nvme_slot_bytes
from kvstore.sim.replay import Replay
from kvstore.sim.stack import Stack
from kvstore.sim.stacks import Run, sweep_stacks
from kvstore.sim.trace import Request, Trace
from kvstore.types import Tier
from tests.unit.sim.workloads import sessions

BLOCK = 4096
PREFILL = Prefill(1e9, 1, 1, 1, 2e9 * 1600)
"""A block of 16 tokens takes 10 ms."""
MACHINE = Machine(
    PREFILL,
    kv_bytes=BLOCK / 16,
    dram_bytes_per_s=BLOCK * 1e3,
    read_bytes_per_s=nvme_slot_bytes(BLOCK) * 1e4,
    write_bytes_per_s=nvme_slot_bytes(BLOCK) * 1e4,
    read_latency_s=0.0,
    write_latency_s=0.0,
)
"""A block takes a millisecond to a GPU, and a tenth of that from the drive and to it."""


def asked(*prompts: tuple[float, int, int], **more: object) -> Trace:
    """(when in ms, first block, last block but one)."""
    requests = [
        Request(at, 16 * (stop - first), 1, ((first, stop),), **more)  # type: ignore[arg-type]
        for at, first, stop in prompts
    ]
    return Trace(16, max(stop for _, _, stop in prompts), requests)


def tiers(dram: int, nvme: int = 0) -> Tiers:
    return Tiers(dram * BLOCK, nvme * nvme_slot_bytes(BLOCK))


def times(trace: Trace, sizes: Tiers, machine: Machine = MACHINE) -> list[float]:
    stack = Stack(trace, sizes, machine, "lru")
    seen = stack.run()
    stack.planner.check_integrity()
    return [time for each in seen.first_token_ms.values() for time in each]


def cost(tokens: int) -> float:
    return PREFILL.ms(tokens)


def test_a_first_token_takes_what_is_left_to_compute() -> None:
    first, again, longer = times(asked((0, 0, 10), (9e3, 0, 10), (2e4, 0, 14)), tiers(100))
    assert first == pytest.approx(cost(160), rel=1e-6)
    # Ten blocks are copied, and the last token is computed all the same.
    assert again == pytest.approx(10 + cost(160) - cost(159), rel=1e-6)
    assert longer == pytest.approx(10 + cost(224) - cost(160), rel=1e-6)


def pushed_out(*again: tuple[float, int, int]) -> Trace:
    """One of twenty blocks, ten of eight, and then others."""
    eights = ((2e3 * n + 2e3, 8 * n, 8 * n + 8) for n in range(10))
    return asked((0, 100, 120), *eights, *again)


def test_what_comes_from_the_drive_takes_its_time() -> None:
    trace = pushed_out((3e4, 0, 8), (4e4, 0, 8))
    stack = Stack(trace, tiers(64, 200), MACHINE, "lru")
    seen = stack.run()
    assert seen.blocks_from == {Tier.DRAM: 8, Tier.NVME: 8}
    assert stack.shell.moved_bytes[Tier.DRAM] == 8 * BLOCK
    *_, first, again = seen.first_token_ms[50]
    assert first == pytest.approx(0.8 + 8 + cost(128) - cost(127), rel=1e-3)
    assert again == pytest.approx(8 + cost(128) - cost(127), rel=1e-3)


def test_what_is_foreseen_comes_though_nothing_happened_meanwhile() -> None:
    """Time that passes is something that happens: blocks are brought up in it."""
    away = SessionState.WAITING
    first, back = (
        Request(at, 192, 1, ((100, 112),), 7, then=away, expected_ms=9e4) for at in (0.0, 9e4)
    )
    others = pushed_out().requests[1:]
    seen = Stack(Trace(16, 120, [first, *others, back]), tiers(64, 200), MACHINE, "lru").run()
    assert seen.blocks_from[Tier.DRAM] > 0


def test_what_is_computed_sooner_is_not_loaded() -> None:
    fast = MACHINE._replace(prefill=Prefill(1e9, 1, 1, 1, 2e9 * 1e6))
    stack = Stack(pushed_out((3e4, 0, 8)), tiers(64, 200), fast, "lru")
    seen = stack.run()
    assert sum(seen.blocks_from.values()) == 0
    assert seen.found.block_hits == 8 and seen.found.token_hits == 0


def test_engines_compute_one_prompt_at_a_time() -> None:
    trace = asked((0, 0, 10), (0, 10, 20), (0, 20, 30))
    assert times(trace, tiers(100)) == pytest.approx([cost(160), 2 * cost(160), 3 * cost(160)])
    two = times(trace, tiers(100), MACHINE._replace(engines=2))
    assert two == pytest.approx([cost(160), cost(160), 2 * cost(160)])


def test_a_prompt_is_loaded_while_another_is_computed() -> None:
    trace = asked((0, 0, 10), (9e3, 10, 20), (9e3, 0, 10))
    _, other, again = times(trace, tiers(100))
    assert again == pytest.approx(other + cost(160) - cost(159), rel=1e-6)


def test_without_a_drive_it_is_one_tier() -> None:
    """Where requests do not overlap, what is held is what the replay of one tier holds."""
    trace = sessions(10, seed=6)
    spaced = [
        Request(20_000.0 * number, r.tokens, 1, r.pieces, r.session)
        for number, r in enumerate(trace.requests)
    ]
    trace = Trace(16, trace.blocks, spaced)
    for size in (96, 160, 320):
        stack = Stack(trace, tiers(size), MACHINE, "lru")
        assert stack.room.dram_blocks == size
        replayed = Replay(POLICIES["lru"](), trace, size).run(by_chain=True)
        assert stack.run().found.token_hits == replayed.token_hits


def test_nothing_is_above_the_bound() -> None:
    trace = sessions(6, seed=7)
    runs = [Run(name, tiers(64, 128)) for name in ("worth", "lru", "fifo")]
    for row in sweep_stacks(trace, [*runs, Run("lru", tiers(64))], MACHINE, 1):
        assert all(below >= 0 for below in row["below_bound"].values())
        bounds = row["bounds"]
        for hits, most in bounds["everything"].items():
            assert row[hits] <= bounds["same_size"][hits] <= most


def test_priorities_are_apart_and_one_process_finds_what_two_do() -> None:
    requests = sessions(5, seed=8).requests
    trace = Trace(
        16,
        1 + max(stop for r in requests for _, stop in r.pieces),
        [
            Request(500.0 * n, r.tokens, 1, r.pieces, r.session, 90 if n % 3 else 10)
            for n, r in enumerate(requests)
        ],
    )
    runs = [Run(name, tiers(64, 128)) for name in ("worth", "lru")]
    found = [sweep_stacks(trace, runs, MACHINE, processes) for processes in (1, 2)]
    for rows in found:
        for row in rows:
            del row["seconds"]
    assert found[0] == found[1]
    apart = found[0][0]["first_token_ms_by_priority"]
    assert [each["requests"] for each in apart.values()] == [20, 40]
    assert apart["90"]["median"] <= apart["90"]["mean"] * 3 <= 3 * apart["90"]["p99"]


def _note(
    heard: list[tuple[bytes, SessionState]],
    tenant: str, session: bytes, state: SessionState, expected_ms: float | None,
) -> None:  # fmt: skip
    heard.append((session, state))


def test_sessions_reach_the_planner_unless_they_are_not_to() -> None:
    trace = asked((0, 0, 4), (9e3, 0, 8), session=7, then=SessionState.ENDED)
    for hints, told in ((True, [(b"7", SessionState.ENDED)] * 2), (False, [])):
        stack = Stack(trace, tiers(100), MACHINE, "lru", hints=hints)
        heard: list[tuple[bytes, SessionState]] = []
        note = partial(_note, heard)
        stack.planner.hint = note  # type: ignore[method-assign]
        stack.run()
        assert heard == told


def test_writes_are_counted_against_the_drive() -> None:
    trace = asked(*((9.6e6 * n, 8 * n, 8 * n + 8) for n in range(10)))
    (row,) = sweep_stacks(trace, [Run("lru", tiers(32, 100))], MACHINE, 1)
    written = row["nvme_written_bytes"]
    # A quarter of DRAM is kept free or saved: what is left is not saved yet.
    assert written == (80 - 24) * BLOCK
    per_day = written / (100 * nvme_slot_bytes(BLOCK))
    assert row["nvme_drive_writes_a_day"] == pytest.approx(per_day, abs=1e-4)


def test_no_more_is_written_than_the_drive_may_take() -> None:
    trace = asked(*((6e4 * n, 8 * n, 8 * n + 8) for n in range(30)))
    sizes = tiers(32, 100)
    limited = sizes._replace(nvme_bytes_per_day=40 * nvme_slot_bytes(BLOCK))
    free, spared = sweep_stacks(trace, [Run("lru", s) for s in (sizes, limited)], MACHINE, 1)
    assert spared["nvme_written_bytes"] <= 40 * nvme_slot_bytes(BLOCK) < free["nvme_written_bytes"]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (Tiers(BLOCK - 1), "dram: 4095 bytes hold no block"),
        (Tiers(64 * BLOCK, BLOCK), "nvme: 4096 bytes hold no block"),
        (Tiers(1 << 50), "a server holds 100000000 at most"),
    ],
)
def test_tiers_that_cannot_be_are_refused(sizes: Tiers, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        sweep_stacks(asked((0, 0, 4)), [Run("lru", sizes)], MACHINE, 1)


def test_a_bound_is_no_policy_of_a_server() -> None:
    with pytest.raises(BadRequest, match="knows the future"):
        sweep_stacks(asked((0, 0, 4)), [Run("belady", tiers(64))], MACHINE, 1)
