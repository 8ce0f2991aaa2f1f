"""What Worth keeps in order, and in bounds, over a long life among clients of all kinds."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import Use
from kvstore.core.policies.worth import Worth, groups, learning, policy
from kvstore.core.policies.worth.ages import AGES, BUCKETS, bucket_of
from kvstore.core.policies.worth.groups import SWEPT_ABOVE, Group, Moment
from kvstore.core.policies.worth.learning import Observer, Seen, known_by
from kvstore.core.policies.worth.rules import ESTIMATED, SHIFTED, Learned
from kvstore.core.policies.worth.shelves import GONE, Listing, Shelves
from kvstore.types import Retention, SessionState
from tests.unit.core.policies.harness import replica

STATES = list(SessionState)


def check_shelves(shelves: Shelves, held: Iterable[Any]) -> None:
    """Everybody is in the order once, children first, and all that is counted is what there
    is."""
    place = {item: at for at, item in enumerate(shelves)}
    alike: dict[Group, set[Any]] = {}
    for item in held:
        alike.setdefault(item.mark.group, set()).add(item)
    assert len(place) == shelves.size == len(list(shelves)) == sum(map(len, alike.values()))
    assert place.keys() == set(held)
    kids = Counter(group.continued() for group in alike)
    for group, items in alike.items():
        assert Counter(i for i in group.items if i.mark is group.mark) == Counter(items)
        assert group.live == len(items) and group.kids == kids[group]
        assert (group.spot is None) is (group in shelves.open or group.kids > 0)
        if group.spot is not None:
            check_place(shelves, group)
        parent = group.continued()
        if parent in alike and group not in shelves.open and parent not in shelves.open:
            assert max(place[item] for item in items) < min(place[item] for item in alike[parent])
    assert len(shelves._columns) <= len(alike) + SWEPT_ABOVE


def check_place(shelves: Shelves, group: Group) -> None:
    assert shelves._columns[group.traits] is group.column
    assert group.bucket == bucket_of(shelves.moment.now - group.since)
    assert [group.spot is spot for spot in group.column.places[group.bucket]].count(True) == 1
    check_listing(shelves._listing, group)
    if shelves._next is not None and group.column in shelves._next:
        check_listing(shelves._next, group)
    if group.bucket + 1 < BUCKETS:
        assert group in shelves._calendar[group.since + AGES[group.bucket + 1]]


def check_listing(listing: Listing, group: Group) -> None:
    grade = listing._grades[group.column][group.bucket]
    assert (group.column, group.bucket) in listing.by_grade[grade]
    assert listing.taken >> grade & 1


def check_observer(observer: Observer) -> None:
    """What is counted as watched is what is watched."""
    alike: dict[Group, list[bytes]] = {}
    for name, mark in observer._marks.items():
        assert mark.group.mark is mark
        alike.setdefault(mark.group, []).append(name)
    watched = [group for side in observer._groups for group in side]
    assert len(watched) == len(alike) and set(watched) == set(alike)
    waiting: dict[Any, Counter[int]] = {}
    sizes = Counter[int]()
    for group, names in alike.items():
        assert sorted(observer._names(group)) == sorted(names) and group.live == len(names)
        assert group in observer._groups[group.side]
        sizes[group.side] += group.live
        waiting.setdefault(known_by(group.traits), Counter())[group.since] += group.live
    assert observer._sizes == [sizes[0], sizes[1], sizes[-1]]
    for traits, counts in observer._counts.items():
        assert counts.waiting == dict(waiting.pop(traits, {}))
        assert min(counts.uses) >= 0 and all(abs(n) < 1e9 for n in counts.reached)
    assert not waiting


def check(worth: Worth, held: dict[int, Replica]) -> None:
    check_shelves(worth._shelves, held.values())
    for trial in worth._trials:
        check_shelves(trial.shelves, trial._held.values())
    check_observer(worth._observer)


def chain(number: int, length: int) -> list[int]:
    """Blocks, the deepest first: all share some, and every third one some more."""
    shared = number % 7
    return [
        (0 if k < shared else 1 + number % 3 if k < 2 * shared else 10 + number) * 1000 + k
        for k in range(length)
    ][::-1]


class Clients:
    """Requests of all kinds, several at a time, to a tier of some size."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.worth = Worth()
        self.held: dict[int, Replica] = {}
        self.room = int(10 ** draw.uniform(1, 2.7))
        self.chains = draw.choice((3, 20, 200))
        self.longest = draw.choice((4, 12, 40))
        self.told = draw.random() < 0.7
        self.sessions = draw.choice((1, 5, 50))
        self.now_ms = 0.0

    def request(self, number: int) -> None:
        draw, worth = self.draw, self.worth
        self.now_ms += draw.choice((1, 100, 5000)) * draw.random()
        asked = int(draw.paretovariate(0.8)) % self.chains
        session = draw.choice((None, asked % self.sessions, draw.randrange(self.sessions)))
        use = Use(now_ms=self.now_ms, session=session, request=draw.choice((None, number // 3)))
        if self.told:
            use = use._replace(
                category=draw.randrange(12),
                priority=draw.randrange(101),
                retention=self.retention(),
                tenant=draw.choice("abc"),
            )
        blocks = chain(asked, draw.randrange(1, self.longest + 1))
        if draw.random() < 0.1:
            blocks += chain(draw.randrange(self.chains), draw.randrange(1, self.longest + 1))
        if draw.random() < 0.1:
            blocks = blocks[::2]
        worth.use(use)
        (self.in_order, self.held_first, self.new_first)[draw.randrange(3)](blocks, use)
        if draw.random() < 0.4:
            expected = draw.choice((None, 10 ** draw.uniform(0, 7)))
            worth.hint(draw.choice((session, 1)), draw.choice(STATES), expected)
        if draw.random() < 0.02:
            self.leave(draw.sample(sorted(self.held), len(self.held) // draw.choice((1, 3))))
        while len(self.held) > self.room:
            self.leave([next(worth.candidates()).address])

    def retention(self) -> tuple[Retention, ...]:
        draw = self.draw
        if draw.random() < 0.7:
            return ()
        first, ttl_ms = 16 * draw.randrange(20), draw.choice((None, 10.0, 1e5))
        return (Retention(first, first + 16 * draw.randrange(1, 20), draw.randrange(101), ttl_ms),)

    def in_order(self, blocks: list[int], use: Use) -> None:
        for block in blocks:
            if block in self.held:
                self.worth.touch(self.held[block])
            else:
                self.new([block])
            if self.draw.random() < 0.02:
                self.worth.hint(1, self.draw.choice(STATES))

    def held_first(self, blocks: list[int], use: Use) -> None:
        self.worth.touch_run([self.held[block] for block in blocks if block in self.held])
        self.worth.use(use)
        while len(self.held) > self.room // 2:
            self.leave([next(self.worth.candidates()).address])
        self.new(blocks)

    def new_first(self, blocks: list[int], use: Use) -> None:
        self.new(blocks)
        self.worth.touch_run([self.held[block] for block in blocks])

    def new(self, blocks: list[int]) -> None:
        new = [replica(b, b % 1000) for b in dict.fromkeys(blocks) if b not in self.held]
        self.held.update((each.address, each) for each in new)
        self.worth.insert_all(new)

    def leave(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.worth.remove(self.held.pop(block))


@pytest.mark.parametrize("seed", range(10))
def test_whatever_comes_between_two_steps_of_an_estimate_all_stays_in_order(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    for module, name, values in (
        (policy, "A_REQUEST", (20, 60)),
        (policy, "LEARN_EVERY", (16, 64)),
        (policy, "LEARN_REQUESTS", (2, 8)),
        (policy, "MOST_AT_ONCE", (4, 1024)),
        (policy, "MOST_WATCHED", (128, 16384)),
        (policy, "SAMPLE_BITS", (0, 1)),
        (groups, "MOST_TOGETHER", (4, 4096)),
    ):
        monkeypatch.setattr(module, name, draw.choice(values))
    clients = Clients(seed)
    between = 0
    for number in range(150):
        clients.request(number)
        between += clients.worth._learning is not None
        check(clients.worth, clients.held)
    assert between


def test_what_is_watched_no_more_and_comes_again_in_one_request_is_watched_once() -> None:
    """More blocks than are watched, in one request, some of them twice."""
    observer = Observer()
    observer.begin(Moment(1, 1))
    names = {bytes([number]): 9 - number for number in range(10)}
    assert [len(alike) for alike, _, _ in observer.see(Seen(names, False, 0, 0.0))] == [10]
    observer.keep(6)
    again = dict(list(names.items())[:4])
    assert [len(alike) for alike, _, _ in observer.see(Seen(again, False, 0, 0.0))] == [4]
    check_observer(observer)
    observer.keep(0)
    assert not len(observer)


def test_what_stays_does_not_come_to_hang_on_ever_more_of_what_went_on_without_it() -> None:
    """A prompt that all begin with is used a million times while one that goes on from it
    waits."""
    worth = Worth()
    begin, waits, goes_on = (
        [replica(100 * n + depth, depth) for depth in depths]
        for n, depths in enumerate(([1, 0], [3, 2], [3, 2]))
    )
    worth.use(Use(session=1))
    worth.insert_all([*waits, *begin])
    worth.use(Use(now_ms=1, session=2))
    worth.insert_all(goes_on)
    worth.touch_run(begin)
    for turn in range(2, 300):
        worth.use(Use(now_ms=turn, session=2))
        worth.touch_run([*goes_on, *begin])
    hooks, hook = 0, waits[1].mark.group.parent
    while hook is not None:
        hooks, hook = hooks + 1, hook.into
    assert hooks <= 2
    worth.use(Use(now_ms=300))
    assert list(worth.candidates()) == [*waits, *goes_on, *begin]


def test_groups_that_parts_of_several_requests_tie_to_each_other_can_all_leave() -> None:
    """One that is tied to itself would never leave."""
    worth = Worth()
    last, ten, nine, eight = (replica(number, number) for number in (11, 10, 9, 8))
    worth.use(Use(request="z"))
    worth.insert(replica(100))
    worth.use(Use())
    worth.insert_all([last, ten, eight])
    worth.use(Use(request="x"))
    worth.insert(replica(101))
    worth.use(Use(request="z"))
    worth.insert(nine)
    worth.touch(eight)
    worth.use(Use(request="x"))
    worth.touch_run([ten, nine])
    worth.use(Use())
    assert sorted(each.address for each in worth.candidates()) == [8, 9, 10, 11, 100, 101]


def test_what_clients_can_say_of_blocks_is_not_remembered_longer_than_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Priorities for years, any priority, any expected time, each said by somebody once."""
    monkeypatch.setattr(groups, "SWEPT_ABOVE", 64)
    monkeypatch.setattr(learning, "MOST_COUNTS", 64)
    draw = random.Random(9)
    worth = Worth()
    held: dict[int, Replica] = {}
    for turn in range(2000):
        years = (Retention(0, 32, draw.randrange(101), 1e11),)
        use = Use(
            now_ms=turn * 300.0,
            category=turn % 9,
            session=turn,
            priority=draw.randrange(101),
            retention=years,
            tenant=draw.choice("abc"),
        )
        worth.use(use)
        for depth in (3, 2, 1, 0):
            held[10 * turn + depth] = replica(10 * turn + depth, depth)
            worth.insert(held[10 * turn + depth])
        worth.hint(turn, draw.choice(STATES), 10 ** draw.uniform(0, 8))
        for _ in range(len(held) - 200):
            victim = next(worth.candidates())
            worth.remove(victim)
            del held[victim.address]
    assert len(worth._observer._counts) < 400
    for shelves in (worth._shelves, *(trial.shelves for trial in worth._trials)):
        assert len(shelves._ends) <= 2 * shelves.size + 64
        assert len(shelves._sessions) <= 2 * shelves.size + 64
    for number in sorted(held):
        worth.remove(held[number])
    for turn in range(2000, 3000):
        worth.use(Use(now_ms=turn * 300.0))
        new = [replica(10 * turn + depth, depth) for depth in (3, 2, 1, 0)]
        worth.insert_all(new)
        for each in new:
            worth.remove(each)
    for shelves in (worth._shelves, *(trial.shelves for trial in worth._trials)):
        assert len(shelves._columns) < 50
    assert len(worth._observer._counts) < 250


def test_a_session_that_says_again_and_again_what_it_does_leaves_nothing_behind() -> None:
    worth = Worth()
    for session in range(3):
        worth.use(Use(now_ms=session, session=session))
        worth.insert(replica(session))
    for turn in range(40):
        worth.use(Use(now_ms=9 + turn))
    worth.hint(0, SessionState.WAITING)
    worth.hint(2, SessionState.IDLE)
    for _ in range(3000):
        worth.hint(1, SessionState.WAITING)
        worth.hint(1, SessionState.IDLE)
    columns = worth._shelves._columns.values()
    assert sum(len(place) for each in columns for place in each.places.values()) < 2 * GONE + 20
    assert sorted(each.address for each in worth.candidates()) == [0, 1, 2]


def test_what_is_known_alike_costs_something_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are hundreds of kinds of groups, by priority and uses, that are known alike."""
    worth = Worth()
    worth.use(Use())
    while True:
        try:
            next(worth._observer.learn())
        except StopIteration as end:
            learned = Learned(end.value, 1.0)
            break
    traits = worth._shelves.group(1, False, False, 1, 0.0).traits
    assert learned.cost(traits) == ESTIMATED
    learned(traits)
    assert learned.cost(traits._replace(level=2)) == SHIFTED
    assert 0 < learned.cost(traits) < SHIFTED
