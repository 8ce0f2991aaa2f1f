"""A live set larger than DRAM is served from DRAM as far as it fits, and what nobody asks
for again does not push out what somebody does."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from kvstore.core.catalog import Replica
from kvstore.core.places import promotion
from kvstore.core.places.landing import ONE_IN, PART, Landing
from kvstore.core.places.promotion import DramOrder
from kvstore.core.policies import POLICIES, SessionState, Use
from kvstore.types import OUTPUT, ChainQuery, CommitOutcome, Reuse, Segment, Tier
from tests.simulation.model import Shell, chain, layout, make_planner
from tests.unit.core.policies.harness import replica

ROOM, LENGTH = 64, 4
"""Blocks that fit into DRAM; of a chain."""
DOCUMENTED = Path(__file__).parents[3] / "docs" / "policies.md"


class Live(Shell):
    """Chains that are all on NVMe; `asked` and `read` count blocks."""

    def __init__(self, chains: int, eviction: str = "lru") -> None:
        super().__init__(make_planner(ROOM, 8 * ROOM, eviction=eviction))
        self.client = self.session(1)
        self.layout_id = self.planner.register_layout("t", layout())
        self.asked = self.read = 0
        for number in range(chains):
            self.put(self.client, self.layout_id, chain(number, LENGTH))
            self.settle()
        self.planner.flush("t", drop=False)
        self.run()
        self.settle()

    def ask(self, number: int) -> None:
        ticket = self.acquire(self.client, [self.layout_id], chain(number, LENGTH), wait=True)
        self.read += sum(copy.target.tier is Tier.DRAM for copy in self.copies)
        while ticket.answer is None:
            queued = len(self.copies)
            self.end_copy()
            self.read += max(0, len(self.copies) - queued + 1)
        [grant] = ticket.answer
        assert grant.held == LENGTH, "all of it is on NVMe"
        self.asked += LENGTH
        self.planner.release(self.client, [grant.lease_id])
        self.run()

    def hits(self) -> float:
        """In DRAM, of what was asked for since this was asked the last time."""
        ratio = 1 - self.read / self.asked
        self.asked = self.read = 0
        return ratio


def looped(part: float, eviction: str = "lru") -> float:
    """The hit ratio in DRAM of a live set of so many times its size, asked for chain by
    chain, round and round."""
    chains = round(part * ROOM / LENGTH)
    live = Live(chains, eviction)
    for turn in range(14):
        if turn == 10:
            live.hits()
        for number in range(chains):
            live.ask(number)
    live.planner.check_integrity()
    return round(live.hits(), 2)


PARTS = (0.8, 1.0, 1.2, 1.5, 2.0)


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is brought up pushes out what is there."""
    monkeypatch.setattr(promotion, "BETTER", float("inf"))


def documented(how: str) -> dict[float, float]:
    """A row of the table in docs/policies.md: hit ratios in DRAM, by the size of the set."""
    found = re.search(rf"^\| {how} \|([ .0-9|]+)\|$", DOCUMENTED.read_text(), re.MULTILINE)
    assert found is not None
    return dict(zip(PARTS, map(float, found[1].split("|")), strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_a_live_set_larger_than_dram_is_no_cliff(part: float) -> None:
    """All that fits should hit, but for what the landing takes and what comes in to try."""
    hits = looped(part)
    assert hits >= min(1.0, 1 / part) - 0.15
    assert hits == documented("by trial")[part]


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize("part", PARTS)
def test_without_a_trial_there_is_the_cliff(part: float) -> None:
    """So the test above can fail."""
    assert looped(part) == documented("always")[part]


def test_a_policy_that_copes_by_itself_copes_no_worse() -> None:
    assert looped(1.2, "worth") >= 1 / 1.2 - 0.15


def recent_first(seed: int) -> float:
    """The hit ratio where what was used lately is most likely to be used next, and a live
    set far larger than DRAM is gone through by and by."""
    rng = random.Random(seed)
    live = Live(3 * ROOM // LENGTH)
    stack = list(range(3 * ROOM // LENGTH))
    for turn in range(600):
        if turn == 200:
            live.hits()
        depth = min(int(rng.expovariate(1 / 8)), len(stack) - 1)
        number = stack.pop(depth)
        stack.insert(0, number)
        live.ask(number)
    return live.hits()


def test_what_recency_serves_well_is_served_as_well_by_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_trial = recent_first(1)
    monkeypatch.setattr(promotion, "BETTER", float("inf"))
    assert by_trial >= recent_first(1) - 0.02


def test_another_live_set_finds_its_way_in() -> None:
    live = Live(2 * ROOM // LENGTH)
    for _ in range(6):
        for number in range(2 * ROOM // LENGTH):
            live.ask(number)
    others = random.Random(2).sample(range(2 * ROOM // LENGTH), ROOM // LENGTH * 3 // 4)
    for turn in range(40):
        if turn == 30:
            live.hits()
        for number in others:
            live.ask(number)
    assert live.hits() == 1.0


# The order by itself


def landed(count: int, *, room: bool = False) -> tuple[Landing, list[Replica]]:
    order = Landing(POLICIES["lru"](), has_room=lambda: room)
    order.lands = True
    there = [replica(number) for number in range(count)]
    for each in there:
        each.pins = 1
        order.enter(each, brought_up=True)
    return order, there


def test_what_has_landed_leaves_first_but_for_one_in_so_many() -> None:
    order = Landing(POLICIES["lru"](), has_room=lambda: False)
    order.lands = True
    kept = [replica(1000 + number) for number in range(PART)]
    for each in kept:
        order.enter(each, brought_up=False)
    brought = [replica(number) for number in range(2 * ONE_IN)]
    for each in brought:
        order.enter(each, brought_up=True)
    let_in = brought[ONE_IN - 1 :: ONE_IN]
    assert list(order.candidates())[-len(kept) - 2 :] == [*kept, *let_in]


def test_a_few_that_have_landed_stay_for_longer_than_what_is_coldest() -> None:
    order, there = landed(1)
    kept = [replica(1000 + number) for number in range(2 * PART)]
    for each in kept:
        order.enter(each, brought_up=False)
    assert list(order.candidates()) == kept + there


def test_where_there_is_room_nothing_lands() -> None:
    order, there = landed(3, room=True)
    order.enter(replica(99), brought_up=False)
    assert list(order.candidates())[:3] == there


def test_only_who_asks_again_keeps_what_has_landed() -> None:
    """A request touches what it had brought up once more when it stores what follows."""
    order, there = landed(3)
    order.touch_run(there)
    assert list(order.candidates()) == there
    there[0].block.uses += 1
    order.touch(there[0])
    assert list(order.candidates()) == [there[1], there[2], there[0]]


def test_a_prefetch_that_is_asked_for_once_has_not_been_asked_for_again() -> None:
    order, _ = landed(0)
    prefetched, other = replica(1), replica(2)
    order.enter(prefetched, brought_up=True)
    order.enter(other, brought_up=False)
    prefetched.block.uses += 1
    order.touch(prefetched)
    assert next(order.candidates()) is prefetched
    prefetched.block.uses += 1
    order.touch(prefetched)
    assert next(order.candidates()) is other


def test_many_in_use_do_not_hide_what_is_not() -> None:
    order, there = landed(1000)
    last = replica(5000)
    order.enter(last, brought_up=False)
    offered = iter(order.candidates())
    assert last in [next(offered) for _ in range(PART * 10)]
    assert len(set(order.candidates())) == len(order) == len(there) + 1


@pytest.mark.parametrize(
    ("name", "seed"),
    # In the last three a request says of two groups that each continues the other.
    [
        ("lru", 1),
        ("arc", 1),
        ("lirs", 1),
        ("priority-lru", 1),
        ("worth", 1),
        ("worth", 22),
        ("worth", 25),
        ("worth", 27),
    ],
)
def test_every_policy_is_told_of_every_replica_once(name: str, seed: int) -> None:
    draw = random.Random(seed)
    order = DramOrder(POLICIES[name], has_room=lambda: draw.random() < 0.1)
    held: list[Replica] = []
    for step in range(3000):
        act = draw.random()
        if act < 0.05:
            order.use(Use(now_ms=step, session=draw.randrange(3)))
        elif act < 0.06:
            order.hint(draw.randrange(3), draw.choice(list(SessionState)))
        elif act < 0.4 or not held:
            new = replica(draw.randrange(300), draw.randrange(20))
            if all(new.address != other.address for other in held):
                new.block.uses = draw.choice((-1, 0, 0, 3))
                new.block.nvme = draw.choice((None, new))
                order.lands = order.lands if step % 7 else not order.lands
                order.insert(new)
                held.append(new)
        elif act < 0.7:
            begin = draw.randrange(len(held))
            run = held[begin : begin + 9]
            for each in run[::2]:
                each.block.uses += 1
            order.touch_run(iter(run))
        else:
            leaving = held[draw.randrange(len(held))] if act < 0.8 else next(order.candidates())
            order.remove(leaving)
            held.remove(leaving)
        assert len(order) == len(held)
        if step % 50 == 0:
            assert sorted(map(id, order.candidates())) == sorted(map(id, held))


# What models make


def stored(shell: Shell, session: object, layout_id: bytes, keys: list[bytes], reuse: Reuse) -> int:
    """How many blocks of a chain find room, stored at once."""
    grant = shell.reserve(session, layout_id, len(keys)).answer  # type: ignore[arg-type]
    assert grant is not None
    slots = list(range(grant.first_slot, grant.first_slot + len(grant.addresses)))
    for address, key in zip(grant.addresses, keys, strict=False):
        shell.memory[Tier.DRAM][address] = key
    keys = keys[: len(slots)]
    answer = shell.planner.commit(
        session, layout_id, [Segment(b"", keys, slots, [0] * len(keys), reuse)],  # type: ignore[arg-type]
        reserve=0, now_ns=shell.now_ns,
    )  # fmt: skip
    shell.run()
    return answer.outcomes.count(CommitOutcome.STORED)


MADE = Reuse(category=OUTPUT)


@pytest.mark.parametrize("eviction", ["lru", "worth"])
def test_output_leaves_first_and_is_not_written_until_somebody_asks_for_it(eviction: str) -> None:
    shell = Shell(make_planner(16, 64, eviction=eviction))
    client, lid = shell.session(1), shell.planner.register_layout("t", layout())
    prompt, made, continued = chain(1, 4), chain(2, 4), chain(3, 4)
    for keys, reuse in ((prompt, Reuse()), (made, MADE), (continued, MADE)):
        assert stored(shell, client, lid, keys, reuse) == 4
    grant = shell.acquire(client, [lid], continued).answer[0]  # type: ignore[index]
    shell.planner.release(client, [grant.lease_id])
    for number in range(4, 10):
        shell.settle()
        assert stored(shell, client, lid, chain(number, 4), Reuse()) == 4
    assert shell.held(client, lid, made) == 0
    assert shell.held(client, lid, prompt) == 4
    assert shell.held(client, lid, continued) == 4
    shell.planner.check_integrity()


def test_output_that_nobody_asked_for_is_not_flushed() -> None:
    shell = Shell(make_planner(16, 64))
    client, lid = shell.session(1), shell.planner.register_layout("t", layout())
    made, again = chain(1, 4), chain(2, 4)
    for keys in (made, again):
        stored(shell, client, lid, keys, MADE)
    # Another request's prompt has the second one in it, and is stored as well.
    assert shell.put(client, lid, again)
    ticket = shell.planner.flush("t", drop=True)
    shell.run()
    shell.settle()
    assert ticket.answer == 4
    assert shell.planner.lookup("t", ChainQuery([lid], made)) == (4, 4)
    assert shell.planner.lookup("t", ChainQuery([lid], again)) == (4, 0)


def test_output_is_kept_where_there_is_room() -> None:
    shell = Shell(make_planner(16, 0))
    client, lid = shell.session(1), shell.planner.register_layout("t", layout())
    stored(shell, client, lid, chain(1, 8), MADE)
    stored(shell, client, lid, chain(2, 8), Reuse())
    assert shell.held(client, lid, chain(1, 8)) == 8
    stored(shell, client, lid, chain(3, 4), Reuse())
    assert shell.held(client, lid, chain(1, 8)) == 4
    assert shell.held(client, lid, chain(2, 8)) == 8
