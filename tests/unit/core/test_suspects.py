"""Blocks that somebody says are damaged: nobody loses a good one, and nobody is given a bad
one again."""

from __future__ import annotations

import pytest

from kvstore.core.lifecycle import State
from kvstore.core.sessions import Session
from kvstore.types import Tier
from tests.simulation.model import SLOT, Shell, chain, layout, make_planner


@pytest.fixture
def shell() -> Shell:
    return Shell(make_planner(dram_slots=8, nvme_slots=32))


def stored(shell: Shell, session: Session, count: int = 3) -> tuple[bytes, list[bytes]]:
    layout_id = shell.planner.register_layout(session.tenant, layout())
    keys = chain(1, count)
    shell.put(session, layout_id, keys)
    return layout_id, keys


def addresses_of(shell: Shell, session: Session, layout_id: bytes, keys: list[bytes]) -> list[int]:
    answer = shell.acquire(session, [layout_id], keys).answer
    assert answer is not None
    shell.planner.release(session, [answer[0].lease_id])
    shell.run()
    return answer[0].addresses


def test_a_damaged_block_goes_when_its_last_reader_does(shell: Shell) -> None:
    session = shell.session(1)
    layout_id, keys = stored(shell, session)
    answer = shell.acquire(session, [layout_id], keys).answer
    assert answer is not None
    suspects = shell.planner.suspects("t", answer[0].addresses[1:2])
    assert [replica.address for replica in suspects] == answer[0].addresses[1:2]
    shell.planner.examined(suspects[0], damaged=True)
    shell.run()
    assert shell.held(session, layout_id, keys) == 1
    assert shell.planner.suspects("t", answer[0].addresses[1:2]) == [], "once is enough"
    assert suspects[0].state is State.DOOMED, "who has a lease reads on"
    shell.planner.release(session, [answer[0].lease_id])
    shell.run()
    assert suspects[0].state is State.GONE
    assert shell.planner.holdings.mismatched == 1
    shell.planner.check_integrity()


def test_what_lies_on_nvme_stays_and_is_brought_up_again(shell: Shell) -> None:
    session = shell.session(1)
    layout_id, keys = stored(shell, session)
    shell.planner.flush(None, drop=False)
    shell.run()
    shell.settle()
    for replica in shell.planner.suspects("t", addresses_of(shell, session, layout_id, keys)):
        shell.planner.examined(replica, damaged=True)
    shell.run()
    shell.planner.check_integrity()
    waiting = shell.acquire(session, [layout_id], keys, wait=True)
    shell.settle()
    assert waiting.answer is not None
    assert waiting.answer[0].held == 3


def test_a_whole_block_stays_whoever_says_what(shell: Shell) -> None:
    session = shell.session(1)
    layout_id, keys = stored(shell, session)
    for replica in shell.planner.suspects("t", addresses_of(shell, session, layout_id, keys)):
        shell.planner.examined(replica, damaged=False)
        assert not replica.pins
    assert shell.held(session, layout_id, keys) == 3
    shell.planner.check_integrity()


def test_only_ones_own_blocks_that_can_be_found_are_looked_at(shell: Shell) -> None:
    session = shell.session(1)
    layout_id, keys = stored(shell, session)
    addresses = addresses_of(shell, session, layout_id, keys)
    shell.reserve(session, layout_id, 1)
    everywhere = [SLOT * n for n in range(64)] + [addresses[0] + 1, (1 << 64) - 1]
    assert shell.planner.suspects("other", everywhere) == []
    suspects = shell.planner.suspects("t", everywhere * 2)
    assert [replica.address for replica in suspects] == sorted(addresses), "each once"
    for replica in suspects:
        shell.planner.examined(replica, damaged=False)


def test_a_block_that_is_cleared_while_it_is_looked_at_goes_once(shell: Shell) -> None:
    session = shell.session(1)
    layout_id, keys = stored(shell, session)
    suspects = shell.planner.suspects("t", addresses_of(shell, session, layout_id, keys))
    shell.planner.clear("t")
    shell.run()
    assert all(replica.state is State.DOOMED for replica in suspects), "its slot waits"
    for replica in suspects:
        shell.planner.examined(replica, damaged=True)
    shell.run()
    shell.settle()
    assert all(replica.state is State.GONE for replica in suspects)
    assert len(shell.planner.residency.dram) == 0
    shell.planner.check_integrity()


def test_a_block_found_damaged_while_it_is_written_to_nvme_leaves_nothing(shell: Shell) -> None:
    session = shell.session(1)
    layout_id, keys = stored(shell, session, 1)
    addresses = addresses_of(shell, session, layout_id, keys)
    shell.planner.flush(None, drop=False)
    shell.run()
    assert [copy.target.tier for copy in shell.copies] == [Tier.NVME]
    for replica in shell.planner.suspects("t", addresses):
        shell.planner.examined(replica, damaged=True)
    shell.run()
    shell.corrupt_copy()
    shell.settle()
    assert shell.held(session, layout_id, keys) == 0
    assert len(shell.planner.catalog) == len(shell.planner.residency.dram) == 0
    shell.planner.check_integrity()


def test_a_drive_that_fails_while_a_damaged_block_is_written_leaves_nothing(shell: Shell) -> None:
    session = shell.session(1)
    layout_id, keys = stored(shell, session, 1)
    addresses = addresses_of(shell, session, layout_id, keys)
    shell.planner.flush(None, drop=False)
    shell.run()
    for replica in shell.planner.suspects("t", addresses):
        shell.planner.examined(replica, damaged=True)
    shell.planner.tier_failed(shell.now_ns)
    shell.run()
    shell.planner.check_integrity()
    shell.settle()
    assert len(shell.planner.catalog) == len(shell.planner.residency.dram) == 0
    shell.planner.check_integrity()
