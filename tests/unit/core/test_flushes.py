"""A flush beside a drive that does not answer."""

from __future__ import annotations

from kvstore.core.transfers import TransferClass
from tests.simulation.model import SLOT, Shell, chain, layout, make_planner


def stall(shell: Shell, *, stuck: bool) -> None:
    shell.now_ns += 100_000_000
    shell.planner.tick(shell.now_ns, stuck=stuck)
    shell.run()


def test_what_a_stall_calls_off_is_paid_for_once() -> None:
    bucket = 60
    shell = Shell(
        make_planner(dram_slots=128, nvme_slots=256, nvme_bytes_per_day=25 * bucket * SLOT)
    )
    client = shell.session(1)
    layout_id = shell.planner.register_layout("t", layout())
    shell.advance(1)
    for base in (90, 91):
        # Two writes that hang, which is all that goes beside demand.
        shell.put(client, layout_id, chain(base, 1))
        shell.planner.flush("t", drop=False)
        shell.run()
    shell.put(client, layout_id, chain(1, 20))
    flush = shell.planner.flush("t", drop=False)
    shell.run()
    endurance = shell.planner.residency.endurance
    for _ in range(6):
        stall(shell, stuck=True)
        assert shell.planner.residency.transfers.depth(TransferClass.WRITE_BACK) == 2
        stall(shell, stuck=False)
        assert endurance.written_bytes() == 22 * SLOT
        assert flush.answer is None
    while flush.answer is None:
        shell.settle()
        stall(shell, stuck=False)
    assert flush.answer == 22
    assert endurance.written_bytes() == 22 * SLOT
    assert endurance.left_bytes < (bucket - 22 + 1) * SLOT
    shell.planner.check_integrity()


def test_a_tier_that_fails_while_it_does_not_answer_is_not_waited_for() -> None:
    shell = Shell(make_planner(dram_slots=16, nvme_slots=64))
    client = shell.session(1)
    layout_id = shell.planner.register_layout("t", layout())
    shell.put(client, layout_id, chain(1, 4))
    shell.planner.flush("t", drop=True)
    shell.run()
    shell.settle()
    shell.acquire(client, [layout_id], chain(1, 4), wait=True)
    assert shell.copies, "reads that hang for good"
    stall(shell, stuck=True)
    shell.put(client, layout_id, chain(2, 4))
    flush = shell.planner.flush("t", drop=False)
    shell.run()
    assert flush.answer is None
    shell.planner.tier_failed(shell.now_ns)
    shell.run()
    assert flush.answer == 0
