"""What takes long is done in parts, and is right although everything goes on meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.core.chores import CHANGED, PART, SEEN, Chores
from kvstore.core.lifecycle import State
from kvstore.core.sessions import Session
from kvstore.core.tickets import AcquireTicket
from kvstore.types import ChainQuery, PutOutcome, Tier
from tests.simulation.model import Shell, chain, key, layout, make_planner


@pytest.fixture
def shell() -> Shell:
    """Parts of a single block, done by hand."""
    shell = Shell(make_planner(dram_slots=16, nvme_slots=32))
    shell.chores_by_hand = True
    shell.planner.chores.part = 1
    return shell


def stored(shell: Shell, length: int, tenant: str = "t") -> tuple[Session, bytes, list[bytes]]:
    client = shell.session(len(tenant), tenant)
    layout_id = shell.planner.register_layout(tenant, layout())
    keys = chain(1, length)
    assert shell.put(client, layout_id, keys) == [PutOutcome.STORED] * length
    return client, layout_id, keys


def acquire(shell: Shell, client: Session, layout_id: bytes, keys: list[bytes]) -> AcquireTicket:
    """One that is over at once, among chores that are not."""
    chores = shell.planner.chores
    part, chores.part = chores.part, PART
    ticket = shell.acquire(client, [layout_id], keys, wait=True)
    chores.part = part
    return ticket


def finish(shell: Shell) -> None:
    shell.chores_by_hand = False
    shell.run()


def test_a_part_ends_when_it_has_cost_enough() -> None:
    done: list[int] = []

    def chore(cost: int) -> Iterator[int]:
        for _ in range(100):
            done.append(cost)
            yield cost

    chores = Chores()
    chores.part = 10 * CHANGED
    chores.add(chore(CHANGED))
    assert len(done) == 10
    chores.add(chore(SEEN))
    assert len(done) == 10, "what is added in one turn is one part"
    chores.next_turn()
    chores.add(chore(SEEN))
    assert (len(done), len(chores)) == (110, 2)
    while chores:
        del done[:]
        chores.go_on()
        assert sum(done) <= 10 * CHANGED


def test_chores_take_turns() -> None:
    order: list[str] = []

    def chore(name: str) -> Iterator[int]:
        for _ in range(3):
            order.append(name)
            yield 1

    chores = Chores()
    chores.part = 1
    for name in "ab":
        chores.next_turn()
        chores.add(chore(name))
    while chores:
        chores.go_on()
    assert "".join(order) == "ababab"


def test_a_clear_lets_others_go_on_and_leaves_nothing(shell: Shell) -> None:
    client, layout_id, keys = stored(shell, 8)
    ticket = shell.planner.clear("t")
    seen = {shell.held(client, layout_id, keys)}
    while shell.planner.chores:
        assert ticket.answer is None
        shell.do_chores()
        seen.add(sum(shell.held(client, layout_id, [k]) for k in keys))
    assert ticket.answer == 8
    assert ticket in shell.answered
    assert seen >= set(range(7))
    assert shell.held(client, layout_id, keys) == 0
    shell.planner.check_integrity()


def test_a_clear_forgets_what_moves_between_tiers_meanwhile(shell: Shell) -> None:
    client, layout_id, keys = stored(shell, 8)
    flushed = shell.planner.flush("t", drop=True)
    finish(shell)
    shell.settle()
    assert flushed.answer == 8
    shell.chores_by_hand = True
    ticket = shell.planner.clear("t")
    while ticket.answer is None:
        for number in reversed(keys):
            acquire(shell, client, layout_id, [number])
        shell.settle()
        for _ in range(len(shell.planner.chores)):
            shell.do_chores()
    shell.settle()
    assert ticket.answer == 8
    assert all(shell.held(client, layout_id, [k]) == 0 for k in keys)
    shell.planner.check_integrity()


def test_a_clear_spares_other_tenants(shell: Shell) -> None:
    client, layout_id, keys = stored(shell, 4, "ours")
    stored(shell, 4, "their")
    ticket = shell.planner.clear("their")
    finish(shell)
    assert ticket.answer == 4
    assert shell.held(client, layout_id, keys) == 4


def test_a_clear_that_nobody_waits_for_goes_on(shell: Shell) -> None:
    client, layout_id, keys = stored(shell, 8)
    ticket = shell.planner.clear("t")
    shell.planner.give_up(ticket, shell.now_ns)
    assert ticket.answer == 1
    finish(shell)
    assert shell.held(client, layout_id, keys) == 0
    assert ticket not in shell.answered


def test_a_block_stored_again_during_a_clear_can_be_found(shell: Shell) -> None:
    """Once its old self is forgotten; it would be missed for no reason."""
    client, layout_id, keys = stored(shell, 8)
    ticket = shell.planner.clear("t")
    again = next(k for k in keys if not shell.held(client, layout_id, [k]))
    shell.put(client, layout_id, [again])
    assert shell.held(client, layout_id, [again]) == 1
    finish(shell)
    assert ticket.answer is not None
    shell.planner.check_integrity()


def test_a_flush_writes_everything_however_small_its_parts(shell: Shell) -> None:
    client, layout_id, keys = stored(shell, 12)
    ticket = shell.planner.flush("t", drop=False)
    while ticket.answer is None:
        shell.do_chores()
        if shell.copies:
            shell.end_copy()
        # Uses change the order of what is dirty, and a flush must not go by it.
        grants = acquire(shell, client, layout_id, keys).answer
        assert grants is not None
        shell.planner.release(client, [grants[0].lease_id])
    dram = shell.planner.residency.dram
    assert all(r.block.nvme is not None for r in dram.replicas())
    assert ticket.answer == 12


def test_a_flush_waits_for_what_is_being_written_already(shell: Shell) -> None:
    stored(shell, 14)
    assert shell.copies, "write-back has not begun"
    ticket = shell.planner.flush("t", drop=False)
    finish(shell)
    shell.settle()
    assert ticket.answer == 14


def test_a_flush_that_drops_is_answered_when_all_is_dropped(shell: Shell) -> None:
    client, layout_id, keys = stored(shell, 8)
    ticket = shell.planner.flush("t", drop=True)
    left = []
    while ticket.answer is None:
        shell.do_chores()
        if shell.copies:
            shell.end_copy()
        left.append(len(shell.planner.residency.dram))
    assert left[-1] == 0
    assert set(left) >= set(range(1, 8)), "all was dropped in one step"
    assert shell.held(client, layout_id, keys) == 8


def test_a_flush_given_up_while_it_drops_is_not_answered_again(shell: Shell) -> None:
    stored(shell, 8)
    ticket = shell.planner.flush("t", drop=True)
    while len(shell.planner.residency.dram) > 4:
        shell.do_chores()
        if shell.copies:
            shell.end_copy()
    shell.planner.give_up(ticket, shell.now_ns)
    finish(shell)
    assert ticket.answer == 8
    assert ticket not in shell.answered


def test_while_a_failed_tier_is_given_up_its_blocks_are_misses(shell: Shell) -> None:
    client, layout_id, keys = stored(shell, 8)
    shell.planner.flush("t", drop=True)
    finish(shell)
    shell.settle()
    shell.chores_by_hand = True
    shell.planner.tier_failed(shell.now_ns)
    assert shell.planner.chores, "all was given up in one step"
    while shell.planner.chores:
        ticket = acquire(shell, client, layout_id, keys)
        while shell.copies:
            shell.end_copy(fail=True)
        assert ticket.answer is not None
        assert ticket.answer[0].held == 0
        shell.do_chores()
    assert len(shell.planner.catalog) == 0
    nvme = shell.planner.residency.nvme
    assert nvme is not None
    assert {r.state for r in nvme.replicas()} == {State.DAMAGED}
    assert shell.put(client, layout_id, [key(99)]) == [PutOutcome.STORED]
    assert shell.memory[Tier.DRAM]
    shell.planner.check_integrity()


def test_a_long_acquire_pins_in_parts_and_is_answered_once(shell: Shell) -> None:
    client, layout_id, keys = stored(shell, 8)
    other = shell.session(7)
    ticket = shell.acquire(client, [layout_id], keys)
    turns = 0
    while ticket.answer is None:
        assert shell.held(other, layout_id, keys[:1]) == 1
        shell.do_chores()
        shell.planner.check_integrity()
        turns += 1
    assert turns >= len(keys)
    assert ticket.answer[0].held == len(keys)
    assert shell.answered == [ticket]
    order = [r.block.stored_key for r in shell.planner.residency.dram.candidates(
        shell.planner.catalog.layout("t", layout_id).dram_class)]  # fmt: skip
    name = shell.planner.catalog.layout("t", layout_id).name
    assert order == [name(each) for each in reversed(keys)], "the root is not the most recent"


def test_what_is_cleared_during_a_long_acquire_is_read_whole_or_not_at_all(shell: Shell) -> None:
    client, layout_id, keys = stored(shell, 8)
    for after in range(40):
        ticket = shell.acquire(client, [layout_id], keys)
        for _ in range(after):
            shell.do_chores()
        shell.planner.clear("t")
        finish(shell)
        shell.chores_by_hand = True
        assert ticket.answer is not None
        grant = ticket.answer[0]
        read = [shell.memory[Tier.DRAM][address] for address in grant.addresses]
        assert read == [("t", layout_id, each) for each in keys[: grant.held]]
        shell.planner.release(client, [grant.lease_id])
        finish(shell)
        shell.planner.check_integrity()
        assert shell.planner.residency.dram.space.used_bytes == 0
        assert shell.put(client, layout_id, keys) == [PutOutcome.STORED] * len(keys)
        shell.chores_by_hand = True


@pytest.mark.parametrize("after", [0, 3, 12])
@pytest.mark.parametrize("close", [True, False])
def test_a_caller_that_leaves_a_long_acquire_leaves_no_pin(
    shell: Shell, after: int, close: bool
) -> None:
    client, layout_id, keys = stored(shell, 8)
    shell.planner.flush("t", drop=True)
    finish(shell)
    shell.settle()
    shell.chores_by_hand = True
    for base in (2, 3):
        shell.put(client, layout_id, chain(base, 4))
    ticket = shell.acquire(client, [layout_id], keys, wait=True)
    for _ in range(after):
        shell.do_chores()
    if close:
        shell.planner.close_session(client)
    else:
        shell.planner.withdraw(ticket, shell.now_ns)
    finish(shell)
    shell.settle()
    assert ticket.answer == [(0, 0, [], [], 0, 0, None)]
    assert not any(r.pins for r in shell.planner.residency.dram.replicas())
    assert shell.planner.open_leases == 0
    shell.planner.check_integrity()


def test_patience_that_ends_early_still_tells_all_that_is_in_dram(shell: Shell) -> None:
    client, layout_id, keys = stored(shell, 8)
    ticket = shell.acquire(client, [layout_id], keys, wait=True)
    shell.planner.give_up(ticket, shell.now_ns)
    assert ticket.answer is None
    finish(shell)
    assert ticket.answer is not None
    assert ticket.answer[0].held == len(keys)


def test_what_a_session_held_is_given_back_in_parts(shell: Shell) -> None:
    client, layout_id, keys = stored(shell, 8)
    other = shell.session(7)
    assert acquire(shell, client, layout_id, keys).answer is not None
    shell.slots(client, layout_id, 4)
    shell.planner.close_session(client)
    pinned = set()
    while shell.planner.chores:
        pinned.add(sum(r.pins for r in shell.planner.residency.dram.replicas()))
        shell.planner.check_integrity()
        shell.do_chores()
    assert len(pinned) > 4
    assert not any(r.pins for r in shell.planner.residency.dram.replicas())
    assert shell.planner.open_reservations == 0
    assert shell.held(other, layout_id, keys) == len(keys)


def test_a_prefetch_goes_on_in_parts_and_ends_with_its_caller(shell: Shell) -> None:
    client, layout_id, keys = stored(shell, 4)
    shell.planner.flush("t", drop=True)
    finish(shell)
    shell.settle()
    shell.chores_by_hand = True
    hasty = shell.planner.prefetch("t", [ChainQuery([layout_id], keys)], now_ns=shell.now_ns)
    shell.planner.withdraw(hasty, shell.now_ns)
    finish(shell)
    assert hasty.answer == 0
    shell.chores_by_hand = True
    patient = shell.planner.prefetch("t", [ChainQuery([layout_id], keys)], now_ns=shell.now_ns)
    finish(shell)
    assert patient.answer == len(keys)
    shell.settle()
    assert shell.planner.lookup("t", ChainQuery([layout_id], keys)).in_dram == len(keys)
    assert shell.answered.count(patient) == 1
    assert client.leased == 0
