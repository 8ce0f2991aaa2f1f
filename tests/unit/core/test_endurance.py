"""A drive's budget is kept whatever is asked, and spent on the blocks that are best."""

from __future__ import annotations

import random

import pytest

from kvstore.core.places.endurance import FEW, HOUR_NS, WEIGHED, Endurance, Weight
from kvstore.types import ChainQuery, Tier
from tests.simulation.model import SLOT, Shell, chain, layout, make_planner

DAY = 25_000_000
"""A budget, of which a million is for an hour."""
BLOCK = 1000


def bucket() -> Endurance:
    endurance = Endurance(DAY)
    endurance.pass_time(0)
    return endurance


def spend_all(endurance: Endurance) -> int:
    """Write whatever can be; how much that was."""
    spent = 0
    while endurance.affords(BLOCK):
        endurance.spend(BLOCK)
        spent += BLOCK
    return spent


def test_no_day_sees_more_than_the_budget() -> None:
    """Whoever saves up, then wants all at once, then all there is."""
    rng = random.Random(1)
    endurance, written = bucket(), []
    now_ns = 0
    for _ in range(60):
        now_ns += rng.choice([HOUR_NS // 10, HOUR_NS, 5 * HOUR_NS])
        endurance.pass_time(now_ns)
        written.append((now_ns, spend_all(endurance)))
    for end_ns, _ in written:
        last_day = sum(n for t, n in written if end_ns - 24 * HOUR_NS < t <= end_ns)
        assert last_day <= DAY


def test_what_is_left_outlives_a_restart_and_is_not_made_more_by_it() -> None:
    before, after = bucket(), bucket()
    spend_all(before)
    after.restore(before.state())
    assert not after.affords(BLOCK)
    after.restore({"left": 1e18})
    assert after.left_bytes == DAY / 25
    after.restore({"left": "much"})
    assert after.left_bytes == DAY / 25


def test_a_clock_that_goes_back_brings_nothing() -> None:
    endurance = bucket()
    endurance.pass_time(HOUR_NS)
    spend_all(endurance)
    for now_ns in (0, HOUR_NS // 2, HOUR_NS):
        endurance.pass_time(now_ns)
        assert not endurance.affords(BLOCK)
    endurance.pass_time(2 * HOUR_NS)
    assert endurance.affords(BLOCK)


def test_a_block_of_more_than_an_hour_is_written_when_nothing_else_is() -> None:
    endurance = Endurance(100)
    assert endurance.affords(BLOCK)
    endurance.spend(BLOCK)
    assert not endurance.affords(BLOCK)
    assert not endurance.affords(1)


def offered(endurance: Endurance, weights: list[Weight], seconds: float) -> dict[Weight, float]:
    """Which part of each is written, of as many blocks as would take twice the budget."""
    rng = random.Random(3)
    step_ns = int(HOUR_NS * BLOCK / (DAY / 25) / 2)
    seen = dict.fromkeys(weights, 0)
    taken = dict.fromkeys(weights, 0)
    now_ns = 0
    for _ in range(int(seconds * 1e9) // step_ns):
        now_ns += step_ns
        endurance.pass_time(now_ns)
        weight = rng.choice(weights)
        seen[weight] += 1
        if endurance.is_worth(weight, BLOCK):
            endurance.spend(BLOCK)
            taken[weight] += 1
    return {weight: taken[weight] / seen[weight] for weight in weights}


def test_the_budget_goes_to_what_is_best() -> None:
    weights = [Weight(0, 0.0), Weight(0, 1.0), Weight(1, 0.0), Weight(2, 0.5)]
    part = offered(bucket(), weights, 4 * 3600)
    assert part[weights[3]] > 0.95
    assert part[weights[2]] > 0.95
    assert part[weights[0]] < 0.3
    assert part[weights[0]] < part[weights[1]]


def test_what_was_never_asked_for_again_has_what_the_others_leave() -> None:
    weights = [Weight(0, 99.0)] * 9 + [Weight(1, 0.0)]
    part = offered(bucket(), weights, 4 * 3600)
    assert part[Weight(1, 0.0)] > 0.95
    assert part[Weight(0, 99.0)] > 0.1


def test_all_of_the_budget_is_spent_where_all_are_alike() -> None:
    endurance = bucket()
    [part] = offered(endurance, [Weight(0, 0.0)], 4 * 3600).values()
    # Half of twice the budget, and the bucket that was full.
    assert 0.5 <= part <= 0.7


def test_the_bar_follows_what_is_offered() -> None:
    """What was best yesterday may be common today."""
    endurance = bucket()
    for _ in range(WEIGHED):
        endurance.is_worth(Weight(1, 0.0), BLOCK)
    spend_all(endurance)
    endurance.pass_time(HOUR_NS // 10)
    assert not endurance.is_worth(Weight(0, 0.0), BLOCK)
    for _ in range(WEIGHED):
        endurance.is_worth(Weight(0, 0.0), BLOCK)
    assert endurance.is_worth(Weight(0, 0.0), BLOCK)


def test_few_say_nothing_of_which_are_best() -> None:
    endurance = bucket()
    for number in range(FEW - 1):
        assert endurance.is_worth(Weight(0, -number), BLOCK)


# In the planner


class Budgeted(Shell):
    def __init__(self, blocks_an_hour: int, eviction: str = "lru") -> None:
        planner = make_planner(
            16, 256, eviction=eviction, nvme_bytes_per_day=25 * blocks_an_hour * SLOT
        )
        super().__init__(planner)
        self.client = self.session(1)
        self.layout_id = planner.register_layout("t", layout())
        self.advance(1)

    def store(self, keys: list[bytes]) -> None:
        """All of a chain, however long there is no room."""
        parent = b""
        while keys:
            ticket = self.reserve(self.client, self.layout_id, len(keys), wait=True)
            for _ in range(20):
                self.settle()
                if ticket.answer is not None:
                    break
                self.advance(1)
            assert ticket.answer is not None, "a put waits for ever"
            first, count = ticket.answer.first_slot, len(ticket.answer.addresses)
            slots = list(range(first, first + count))
            for address, key in zip(ticket.answer.addresses, keys, strict=False):
                self.memory[Tier.DRAM][address] = key
            self.commit(self.client, self.layout_id, keys[:count], slots, parent=parent)
            parent, keys = keys[count - 1], keys[count:]
        self.settle()

    def ask(self, keys: list[bytes]) -> int:
        ticket = self.acquire(self.client, [self.layout_id], keys, wait=True)
        self.settle()
        assert ticket.answer is not None
        [grant] = ticket.answer
        self.planner.release(self.client, [grant.lease_id])
        return grant.held

    def on_nvme(self, keys: list[bytes]) -> int:
        catalog = self.planner.catalog
        found = (catalog.find(catalog.layout("t", self.layout_id), key) for key in keys)
        return sum(block is not None and block.nvme is not None for block in found)


@pytest.mark.parametrize("eviction", ["lru", "worth"])
def test_nvme_takes_no_more_than_the_budget_and_dram_goes_on(eviction: str) -> None:
    shell = Budgeted(blocks_an_hour=20, eviction=eviction)
    for number in range(60):
        shell.store(chain(number, 4))
        shell.planner.check_integrity()
    nvme = shell.planner.residency.nvme
    assert nvme is not None
    assert 10 <= len(nvme) <= 20
    endurance = shell.planner.residency.endurance
    assert endurance.written_bytes() == len(nvme) * SLOT
    assert endurance.refused_blocks >= 60 * 4 - 16 - 20


def test_what_is_asked_for_again_is_written_sooner_than_what_is_not() -> None:
    shell = Budgeted(blocks_an_hour=40)
    hot = [chain(number, 4) for number in range(3)]
    for keys in hot:
        shell.store(keys)
    for number in range(3, 60):
        shell.store(chain(number, 4))
        shell.ask(hot[number % 3])
        shell.advance(1000)
    # Others have pushed them out of DRAM by now.
    assert sum(shell.on_nvme(keys) for keys in hot) == 12
    seldom = sum(shell.on_nvme(chain(number, 4)) for number in range(3, 60))
    assert seldom <= 40


def test_what_was_spared_is_weighed_again_when_somebody_asks_for_it() -> None:
    shell = Budgeted(blocks_an_hour=1)
    chains = [chain(number, 4) for number in range(4)]
    for keys in chains:
        shell.store(keys)
    holdings = shell.planner.holdings
    replicas = [r for r in holdings.dram.replicas() if r.block.nvme is None]
    spared = [replica for replica in replicas if holdings.is_spared(replica)]
    assert len(spared) == 3
    [first] = [keys for keys in chains if shell.on_nvme(keys)]
    shell.now_ns += HOUR_NS
    shell.advance(1)
    assert shell.ask(first) == 4
    assert [replica for replica in spared if not holdings.is_spared(replica)]
    shell.planner.check_integrity()


def test_a_flush_ends_where_the_budget_does() -> None:
    shell = Budgeted(blocks_an_hour=6)
    shell.store(chain(1, 4))
    shell.store(chain(2, 4))
    ticket = shell.planner.flush("t", drop=False)
    shell.run()
    shell.settle()
    assert ticket.answer is not None
    assert shell.on_nvme(chain(1, 4)) + shell.on_nvme(chain(2, 4)) == 6
    shell.planner.check_integrity()


def test_what_the_drive_writes_by_itself_is_paid_for_too() -> None:
    shell = Budgeted(blocks_an_hour=6)
    shell.planner.worn(6 * SLOT)
    shell.store(chain(1, 4))
    ticket = shell.planner.flush("t", drop=False)
    shell.run()
    assert ticket.answer == 0


def test_what_is_not_worth_a_second_write_is_dropped_children_first() -> None:
    shell = Budgeted(blocks_an_hour=64)
    cold, hot = chain(1, 4), chain(2, 4)
    for keys in (cold, hot):
        shell.store(keys)
    assert shell.ask(hot) == 4
    ticket = shell.planner.flush("t", drop=True)
    shell.run()
    shell.settle()
    assert ticket.answer == 8
    nvme = shell.planner.residency.nvme
    assert nvme is not None
    # Many were weighed that were asked for, and little is left.
    for _ in range(100):
        shell.planner.residency.endurance.is_worth(Weight(1, 0.0), 1)
    shell.planner.worn(50 * SLOT)
    addresses = [replica.address for replica in nvme.replicas()]
    dropped = shell.planner.not_worth_moving(addresses)
    shell.run()
    shell.settle()
    assert len(dropped) == 4
    query = [ChainQuery([shell.layout_id], keys) for keys in (cold, hot)]
    assert [shell.planner.lookup("t", each).held for each in query] == [0, 4]
    # It was asked for once, and is worth no third write for that.
    shell.planner.not_worth_moving([replica.address for replica in nvme.replicas()])
    shell.run()
    shell.settle()
    assert shell.planner.lookup("t", query[1]).held == 0
    shell.planner.check_integrity()


def test_nothing_is_dropped_without_a_budget() -> None:
    shell = Shell(make_planner(16, 64))
    client, lid = shell.session(1), shell.planner.register_layout("t", layout())
    shell.put(client, lid, chain(1, 4))
    shell.planner.flush("t", drop=True)
    shell.run()
    shell.settle()
    nvme = shell.planner.residency.nvme
    assert nvme is not None
    assert shell.planner.not_worth_moving([r.address for r in nvme.replicas()]) == []
