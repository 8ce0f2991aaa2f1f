"""What Worth learns, what it may not be talked into, and in which order blocks go."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice

import pytest

from kvstore.core.catalog import Replica
from kvstore.core.policies import SessionState, Use
from kvstore.core.policies.worth import Worth
from kvstore.core.policies.worth.ages import AGES, BUCKETS, bucket_of
from kvstore.core.policies.worth.groups import (
    IDLE,
    MOST_TOGETHER,
    OPEN,
    UNKNOWN,
    WAITING,
    Group,
)
from kvstore.core.policies.worth.learning import Counts, densities
from kvstore.core.policies.worth.paces import MOST_SESSIONS, Paces
from kvstore.core.policies.worth.past import Past
from kvstore.core.policies.worth.policy import (
    A_REQUEST,
    MOST_AT_ONCE,
    MOST_WATCHED,
    WATCHED_A_HELD,
)
from kvstore.core.policies.worth.rules import ESTIMATED
from kvstore.types import Retention
from tests.unit.core.policies.harness import Cache, replica

RETAINED = (Retention(0, 256, 80),)


def test_each_age_is_in_the_bucket_that_begins_below_it() -> None:
    for bucket in range(BUCKETS):
        assert bucket_of(AGES[bucket]) == bucket == bucket_of(AGES[bucket + 1] - 1)
    assert bucket_of(1 << 200) == BUCKETS - 1


def test_a_use_that_is_sure_to_come_is_worth_more_the_nearer_it_is() -> None:
    hazard = [0.0] * BUCKETS
    hazard[bucket_of(100)] = 0.999
    dense = densities(hazard, bucket_of(1000), shortest=1)
    assert 0.005 < dense[0] < dense[bucket_of(50)] < dense[bucket_of(90)] < 0.1
    assert dense[bucket_of(200)] == 0.0


def mixed(policy: Worth, *, api_priority: int = 50, turns: int = 1200) -> float:
    """Conversations that return after a while among prompts that never do: which part of
    each is found again. A tier that holds both for as long is four times as large."""
    cache = Cache(policy, 400)
    hits = asked = single = 0
    for turn in range(turns):
        policy.use(Use(now_ms=turn, category="chat"))
        for number in range(4):
            hit = cache.access(turn % 60 * 4 + number)
            if turn > turns // 2:
                hits += hit
                asked += 1
        policy.use(Use(now_ms=turn, category="api", priority=api_priority))
        for _ in range(20):
            single += 1
            cache.access(10_000 + single)
    return hits / asked


def test_what_never_returns_leaves_first_once_that_is_known() -> None:
    assert mixed(Worth()) > 0.95


def test_a_false_priority_does_not_make_worthless_blocks_stay() -> None:
    """A flood that calls itself all-important, of blocks that are never used again."""
    assert mixed(Worth(), api_priority=100) > 0.9


def rivals(claims: dict[str, int], *, turns: int = 3000) -> dict[str, int]:
    """Hits of tenants that ask alike, each for 60 prompts of 4 blocks in turn, where there
    is room for 75 prompts of all together."""
    policy = Worth()
    cache = Cache(policy, 300)
    hits = dict.fromkeys(claims, 0)
    for turn in range(turns):
        tenant = list(claims)[turn % len(claims)]
        policy.use(Use(now_ms=turn, priority=claims[tenant], tenant=tenant))
        first = (turn % len(claims)) * 10_000 + (turn // len(claims) % 60) * 4
        for number in range(4):
            hits[tenant] += cache.access(first + number)
    return hits


def test_of_requests_that_return_alike_the_more_important_stay() -> None:
    policy = Worth()
    cache = Cache(policy, 300)
    hits = {20: 0, 80: 0}
    for turn in range(3000):
        priority = 80 if turn % 2 else 20
        policy.use(Use(now_ms=turn, priority=priority))
        first = (turn % 2) * 10_000 + (turn // 2 % 60) * 4
        for number in range(4):
            hits[priority] += cache.access(first + number)
    assert hits[80] > 2 * hits[20]


def test_a_tenant_that_calls_everything_important_gains_nothing() -> None:
    honest = rivals({"a": 50, "b": 50})
    lying = rivals({"a": 50, "b": 100})
    assert lying["a"] > 0.95 * honest["a"]


def test_what_is_not_told_of_requests_is_ordered_by_uses() -> None:
    """Where nobody calls `use`: blocks that were used often outlive a flood of others."""
    cache = Cache(Worth(), 300)
    for number in [*range(100)] * 60:
        cache.access(number)
    found = single = 0
    for turn in range(800):
        for number in range(4):
            found += cache.access(turn % 25 * 4 + number)
        for _ in range(30):
            single += 1
            cache.access(10_000 + single)
    assert found > 0.85 * 4 * 800


def prompt(policy: Worth, held: dict[int, Replica], blocks: Iterable[int], use: Use) -> None:
    """A request as the server has it: the deepest block first. Blocks are `chain * 100 +
    depth`."""
    policy.use(use)
    for number in sorted(blocks, key=lambda n: -(n % 100)):
        if number in held:
            policy.touch(held[number])
        else:
            held[number] = replica(number, number % 100)
            policy.insert(held[number])


def order(policy: Worth) -> list[int]:
    return [each.address for each in policy.candidates()]


def test_children_leave_before_what_they_continue() -> None:
    """Whatever is thought of each: a child without its parent is of no use."""
    draw = random.Random(7)
    policy = Worth()
    held: dict[int, Replica] = {}
    for turn in range(1200):
        chain = draw.randrange(1, 40)
        # All share their first three blocks, which are chain 0's.
        length = draw.randrange(4, 14)
        blocks = [*range(3), *(chain * 100 + depth for depth in range(3, length))]
        use = Use(now_ms=turn, session=draw.choice((None, chain)), priority=draw.choice((0, 50)))
        prompt(policy, held, blocks, use)
        for _ in range(max(0, len(held) - 120)):
            victim = next(policy.candidates())
            policy.remove(victim)
            del held[victim.address]
            deeper = [n for n in held if n % 100 > victim.address % 100]
            if victim.address < 3:
                assert not [n for n in deeper if n < 100]
            else:
                assert not [n for n in deeper if n // 100 == victim.address // 100]


def test_what_an_ended_session_leaves_goes_first_once_that_is_known() -> None:
    policy = Worth()
    held: dict[int, Replica] = {}
    hits = {True: 0, False: 0}
    asked = {True: 0, False: 0}
    for turn in range(2000):
        # Every other session ends with its first request; the others come back for long.
        ends = turn % 2 == 0
        chain = 1000 + turn if ends else 1 + turn // 2 % 50
        blocks = [chain * 100 + depth for depth in range(4)]
        if turn > 1000:
            hits[ends] += sum(number in held for number in blocks)
            asked[ends] += 4
        prompt(policy, held, blocks, Use(now_ms=turn, session=chain))
        if ends:
            policy.hint(chain, SessionState.ENDED)
        for _ in range(max(0, len(held) - 220)):
            victim = next(policy.candidates())
            policy.remove(victim)
            del held[victim.address]
    assert hits[False] > 0.99 * asked[False]
    # Who asks what a block is worth, as the budget of a drive does, hears the same.
    ended = [policy.worth(each) for number, each in held.items() if number >= 100_000]
    alive = [policy.worth(each) for number, each in held.items() if number < 100_000]
    assert ended and max(ended) < min(alive)


def test_a_session_is_as_soon_back_as_it_was_when_it_did_the_same() -> None:
    paces = Paces()
    assert paces.came(None, OPEN, 0.0) == 0
    assert paces.came("s", OPEN, 0.0) == paces.tell("s", WAITING) == UNKNOWN
    now_ms = 0.0
    for _ in range(8):
        tool = paces.tell("s", WAITING)
        now_ms += 4_000
        paces.came("s", OPEN, now_ms)
        person = paces.tell("s", IDLE)
        now_ms += 300_000
        paces.came("s", OPEN, now_ms)
    assert (tool, person) == (UNKNOWN + 1 + 2, UNKNOWN + 1 + 8)
    for number in range(MOST_SESSIONS):
        paces.came(number, OPEN, now_ms)
    assert paces.tell("s", WAITING) == UNKNOWN


def paced(*, named: bool) -> float:
    """Hits where 8 sessions at a time are back after 40 requests each, and 320 after 400, in
    a tier with room for 12 of them. All end after six requests."""
    policy = Worth()
    held: dict[int, Replica] = {}
    hits = asked = slow = 0
    for turn in range(12_000):
        number, round_ = turn % 40, turn // 40
        if number >= 8:
            slow += 1
            number, round_ = 8 + slow % 320, slow // 320
        session = 1 + number + 328 * ((round_ + number) // 6)
        blocks = range(session * 100, session * 100 + 4)
        if turn > 8000:
            hits += sum(number in held for number in blocks)
            asked += 4
        prompt(policy, held, blocks, Use(now_ms=turn * 1000, session=session if named else None))
        for _ in range(max(0, len(held) - 48)):
            victim = next(policy.candidates())
            policy.remove(victim)
            del held[victim.address]
    return hits / asked


def test_sessions_that_are_back_soon_are_kept_before_those_that_take_long() -> None:
    told = paced(named=True)
    assert told > 0.7 * 8 / 40 * 5 / 6
    assert told > 1.5 * paced(named=False)


def test_a_pinned_session_outlives_others_and_one_that_is_not_known_changes_nothing() -> None:
    policy = Worth()
    held: dict[int, Replica] = {}
    for chain in range(1, 10):
        prompt(policy, held, range(chain * 100, chain * 100 + 3), Use(now_ms=chain, session=chain))
    policy.hint(1, SessionState.PINNED)
    policy.hint("nobody", SessionState.ENDED)
    prompt(policy, held, [1000], Use(now_ms=99))
    assert order(policy)[-4:] == [102, 101, 100, 1000]


def test_a_retention_is_for_its_tokens_and_for_its_time() -> None:
    policy = Worth()
    held: dict[int, Replica] = {}
    kept = (Retention(0, 32, 100, ttl_ms=1000),)
    prompt(policy, held, range(100, 104), Use(now_ms=0, retention=kept))
    for chain in range(2, 8):
        prompt(policy, held, range(chain * 100, chain * 100 + 2), Use(now_ms=chain))
    prompt(policy, held, [900], Use(now_ms=500))
    found = order(policy)
    assert found.index(103) < found.index(301) < found.index(101)
    prompt(policy, held, [901], Use(now_ms=2000))
    found = order(policy)
    assert found.index(103) < found.index(101) < found.index(301)


def test_the_parts_of_one_request_are_one_use() -> None:
    """A server comes to the blocks before those it has just stored, again and again."""
    policy = Worth()
    held: dict[int, Replica] = {}
    for part in range(1, 5):
        prompt(policy, held, range(100, 100 + part), Use(now_ms=part, request="r"))
    assert {each.mark.group.count for each in held.values()} == {1}
    prompt(policy, held, range(100, 104), Use(now_ms=9, request="s"))
    assert {each.mark.group.count for each in held.values()} == {2}


def test_a_later_part_of_a_request_is_of_its_own_session() -> None:
    policy = Worth()
    held: dict[int, Replica] = {}
    for turn in range(4):
        prompt(policy, held, [100], Use(now_ms=turn * 4000, session="s"))
    prompt(policy, held, [100, 101], Use(now_ms=16_000, session="s", request="r"))
    prompt(policy, held, [200], Use(now_ms=16_001, request="q"))
    prompt(policy, held, [102], Use(now_ms=16_002, session="s", request="r"))
    paces = {number: each.mark.group.traits.pace for number, each in held.items()}
    assert paces == {100: 4, 101: 4, 102: 4, 200: 0}


def test_uses_of_what_left_are_remembered() -> None:
    past = Past()
    past.make_room(10_000)
    names = [random.Random(n).randbytes(16) for n in range(2000)]
    for number, name in enumerate(names):
        past.note(name, number % 60, shared=number % 2 == 1)
    known = sum(past.of(n) == (i % 60, i % 2 == 1) for i, n in enumerate(names))
    assert known > 1700
    assert sum(past.of(random.Random(n + 10**6).randbytes(16))[0] > 0 for n in range(1, 2000)) < 40


@pytest.mark.parametrize("room", [100, 20_000])
def test_the_sample_is_bounded_whatever_is_held(room: int) -> None:
    policy = Worth()
    cache = Cache(policy, room)
    for number in range(3 * room + 2000):
        cache.access(number)
    assert len(policy._observer) <= min(MOST_WATCHED, WATCHED_A_HELD * room)
    assert len(policy._observer) > min(MOST_WATCHED // 8, WATCHED_A_HELD * room // 16)


def test_what_is_found_at_a_start_leaves_no_long_step_to_the_next_request() -> None:
    """Tens of thousands for one request: neither a group of all of them that is gone through
    at once, nor all of the sample to be learned of by whoever comes next."""
    policy = Worth()
    held = [replica(number, 255 - number % 256) for number in range(200 * 256)]
    policy.use(Use())
    policy.insert_all(held)
    assert max(each.mark.group.live for each in held) <= 2 * MOST_TOGETHER
    assert sum(len(seen.depths) for seen in policy._batch) < MOST_AT_ONCE
    assert len(policy._observer) <= MOST_WATCHED + MOST_AT_ONCE
    policy.use(Use(now_ms=1.0))
    assert [each.address for each in policy.candidates()] == list(range(200 * 256))


def test_what_is_known_of_a_group_s_sample_is_what_its_blocks_are() -> None:
    """Groups are gone on with, split, joined, and lose blocks, while the sample gets thinner."""

    class Watched(Worth):
        known = 0

        def _sampled_of(self, run: list[Replica], group: Group) -> dict[bytes, int]:
            found = super()._sampled_of(run, group)
            assert list(found.items()) == list(self._among(run).items())
            self.known += group.sampled is not None and run == group.items
            return found

    draw = random.Random(4)
    policy = Watched()
    prompts = [[replica(100 * n + depth, depth) for depth in range(60)] for n in range(30)]
    held: set[Replica] = set()
    for turn in range(700):
        policy.use(Use(now_ms=turn, session=turn % 7, retention=RETAINED if turn % 5 == 0 else ()))
        asked = draw.choice(prompts)[: draw.choice((20, 45, 60))][::-1]
        policy.touch_run([each for each in asked if each in held])
        policy.insert_all(each for each in asked if each not in held)
        held.update(asked)
        if turn % 150 == 149:
            policy._mask = 2 * policy._mask + 1
        for victim in [v for v in islice(policy.candidates(), 80) if v not in asked][
            : max(0, len(held) - 900)
        ]:
            policy.remove(victim)
            held.discard(victim)
    assert policy.known > 200, "it is made use of"


class Costed(Worth):
    """Notes what each request spends on an estimate, and when one is done."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[int] = []
        self.made = 0

    def use(self, use: Use) -> None:
        self.costs.append(0)
        super().use(use)

    def _learn(self) -> Iterator[int]:
        for cost in super()._learn():
            self.costs[-1] += cost
            yield cost
        self.made += 1


def test_no_request_waits_for_a_whole_estimate() -> None:
    """However many kinds of groups there are to be graded anew."""
    draw = random.Random(3)
    policy = Costed()
    held: dict[int, Replica] = {}
    for turn in range(1500):
        chain = draw.randrange(60)
        use = Use(
            now_ms=turn * 500.0,
            category=chain % 7,
            session=chain if chain % 2 else None,
            priority=draw.choice((0, 25, 50, 75, 100)),
        )
        prompt(policy, held, range(chain * 100, chain * 100 + 12), use)
        policy.hint(chain, draw.choice((SessionState.WAITING, SessionState.IDLE)))
        for _ in range(max(0, len(held) - 400)):
            victim = next(policy.candidates())
            policy.remove(victim)
            del held[victim.address]
    assert policy.made > 5
    assert max(policy.costs) < A_REQUEST + ESTIMATED
    assert sum(policy.costs) / policy.made > 4 * A_REQUEST, "it would have been long"


def test_while_an_estimate_is_made_everybody_is_in_the_order_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups come, age, change their traits and leave between its steps."""
    monkeypatch.setattr("kvstore.core.policies.worth.policy.A_REQUEST", 200)
    draw = random.Random(5)
    policy = Costed()
    held: dict[int, Replica] = {}
    between = 0
    for turn in range(1500):
        chain = draw.randrange(40)
        session = chain if chain % 2 else None
        use = Use(
            now_ms=turn * 500.0, category=chain % 3, session=session, priority=50 * (turn % 2)
        )
        prompt(policy, held, range(chain * 100, chain * 100 + draw.randrange(4, 16)), use)
        policy.hint(chain, draw.choice((SessionState.WAITING, SessionState.IDLE)))
        for _ in range(max(0, len(held) - 200)):
            victim = next(policy.candidates())
            policy.remove(victim)
            del held[victim.address]
        between += policy._learning is not None
        assert sorted(order(policy)) == sorted(held)
    assert policy.made > 3 and between > 5 * policy.made


def test_what_is_watched_counts_up_to_the_age_that_it_has() -> None:
    draw = random.Random(6)
    counts, now = Counts(), 100_000
    expected = [0] * BUCKETS
    for _ in range(400):
        age = int(draw.paretovariate(0.2)) % (now + 1)
        counts.wait(now - age, 3)
        if draw.random() < 0.3:
            counts.wait(now - age, -3)
        else:
            expected[bucket_of(age)] += 3
    assert counts.at(now).reached == expected
    assert counts.reached == [0.0] * BUCKETS
