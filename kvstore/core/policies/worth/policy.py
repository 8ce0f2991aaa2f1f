"""The policy: every block in a group, every group on a shelf, a rule to grade them by.

A sample of blocks, chosen by name, is watched whether they are held or not
(`learning`), and on the same sample each rule is tried (`trials`). The one that saved
most, lately, rules.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from itertools import groupby, islice
from operator import attrgetter
from zlib import crc32

from kvstore.core.catalog import Replica
from kvstore.core.policies.base import (
    DEFAULT_PRIORITY,
    FOR_GOOD,
    EvictionPolicy,
    Use,
    token_of,
)
from kvstore.core.policies.worth.groups import (
    ENDED,
    EXPECTED,
    IDLE,
    OPEN,
    PINNED,
    WAITING,
    Group,
    Grouping,
    Moment,
)
from kvstore.core.policies.worth.learning import Observer, Seen
from kvstore.core.policies.worth.paces import Paces
from kvstore.core.policies.worth.past import Past
from kvstore.core.policies.worth.rules import LEVELS, OCTAVES, UNLEARNED, Learned
from kvstore.core.policies.worth.shelves import Shelves
from kvstore.core.policies.worth.tenants import Tenants
from kvstore.core.policies.worth.trials import Trial
from kvstore.types import SessionState

MOST_KINDS = 8
"""Categories told apart; the others are one."""
MOST_REQUESTS = 4096
"""Remembered, of those of which more may come."""
OCTAVES_OF_SECONDS = 16
"""Told apart of the times at which sessions are expected back."""

SAMPLE_BITS = 2
"""A quarter of all blocks is watched, or fewer where there are many."""
MOST_WATCHED = 16384
WATCHED_A_HELD = 8
"""How many times as many blocks as are held the sample is of, those that left included."""
MOST_AT_ONCE = 1024
"""Uses in the sample until what they tell is learned: where millions of blocks come for one
request, as at a start, they keep nobody waiting for long."""
PIECE = 4096
"""Blocks that come in at a time."""
LEARN_EVERY = 512
"""Uses in the sample between two estimates, at least."""
LEARN_REQUESTS = 64
"""Requests between two estimates, at least: the blocks of one are used alike."""
A_REQUEST = 1000
"""What an estimate may cost each request while it is made, by and large in microseconds."""
REMEMBERED_A_HELD = 4
"""How many times as many names of blocks that left are remembered as are held."""
KEPT = 0.97
"""Of what a trial saved, from one estimate to the next."""
BETTER = 1.01
SURE = 3.0
"""How much more another rule must have saved than the one that rules: as a factor, and
in standard deviations of a count."""

_FATES = {
    SessionState.WAITING: WAITING,
    SessionState.IDLE: IDLE,
    SessionState.ENDED: ENDED,
    SessionState.PINNED: PINNED,
}


class Worth(EvictionPolicy):
    by_chain = True

    def __init__(self) -> None:
        self._rules = list(UNLEARNED)
        self._rule = 0
        self._shelves = Shelves(_depth, self._rules[0])
        self._observer = Observer()
        self._trials = [Trial(rule) for rule in self._rules]
        self._groupings: list[Grouping] = [
            self._shelves,
            self._observer,
            *(trial.shelves for trial in self._trials),
        ]
        self._past = Past()
        self._paces = Paces()
        self._tenants = Tenants(OCTAVES)
        self._kinds: dict[Hashable, int] = {}
        self._begun: dict[Hashable, int] = {}
        """When each request began that may have more parts."""
        self._use: Use | None = None
        self._level = 0
        self._last = False
        """What comes next ends a prompt."""
        self._room = 0
        self._life = 1.0
        """How long a block stays after its last use, lately."""
        self._mask = (1 << SAMPLE_BITS) - 1
        self._batch: list[Seen] = []
        """Uses in the sample by this request, that nothing was learned of."""
        self._until_learning = LEARN_EVERY
        self._learned = 0
        """When the last estimate was begun."""
        self._learning: Iterator[int] | None = None
        """The one that is being made."""

    def use(self, use: Use) -> None:
        before = self._use
        if before is not None:
            blocks = sum(group.live for group in self._shelves.open)
            self._tenants.claim(before.tenant, _level(before.priority), blocks)
        self._use = use
        self._level = self._tenants.level(use.tenant, _level(use.priority))
        now = first = self._shelves.moment.now + 1
        if use.request is not None:
            first = self._begun.setdefault(use.request, now)
            if len(self._begun) > MOST_REQUESTS:
                del self._begun[next(iter(self._begun))]
        session, kind = use.session, self._kind(use.category)
        if first == now:
            pace = self._paces.came(session, OPEN, use.now_ms)
        else:
            pace = self._paces.of(session)
        self._begin(Moment(now, first, use.now_ms, kind, session, pace))
        self._last = first == now

    def hint(
        self, session: Hashable, state: SessionState, expected_ms: float | None = None
    ) -> None:
        fate = _FATES[state]
        if expected_ms is not None and state in (SessionState.WAITING, SessionState.IDLE):
            octave = int(max(expected_ms, 0) / 1000).bit_length()
            fate = EXPECTED + min(octave, OCTAVES_OF_SECONDS)
        pace = self._paces.tell(session, fate)
        if fate == ENDED:
            self._paces.forget(session)
        self._learn_of_uses()
        for grouping in self._groupings:
            grouping.tell(session, fate, pace)

    def insert(self, replica: Replica) -> None:
        self.insert_all((replica,))

    def insert_all(self, replicas: Iterable[Replica]) -> None:
        if self._use is None:
            self._begin_unnamed()
        rest = iter(replicas)
        while piece := list(islice(rest, PIECE)):
            if self._room:
                for (count, shared), run in groupby(piece, self._before):
                    self._insert(list(run), count, shared)
            else:
                # Nothing has left yet.
                self._insert(piece, 0, False)

    def _before(self, replica: Replica) -> tuple[int, bool]:
        return self._past.of(replica.block.stored_key)

    def _insert(self, run: list[Replica], count: int, shared: bool) -> None:
        """Those that were used so often before they left."""
        for part, last in self._parts(run):
            level, until_ms = self._priority(part[0])
            group = self._shelves.group(count + 1, last, shared, level, until_ms)
            sampled = self._among(part)
            self._shelves.enter(part, group)
            self._note(sampled, part, group, Seen({}, last, level, until_ms))

    def touch(self, replica: Replica) -> None:
        self.touch_run((replica,))

    def touch_run(self, replicas: Iterable[Replica]) -> None:
        if self._use is None:
            self._begin_unnamed()
        run = list(replicas)
        at = 0
        while at < len(run):
            mark = run[at].mark
            group: Group = mark.group
            begin, items = at, group.items
            if (
                items[0] is run[at]
                and len(items) == group.live
                and items == (some := run[at : at + group.live])
            ):
                at += group.live
            else:
                while at < len(run) and run[at].mark is mark:
                    at += 1
                some = list(dict.fromkeys(run[begin:at]))
            self._touch(group, some)

    def _touch(self, group: Group, run: list[Replica]) -> None:
        """Use some of a group, the deepest first."""
        shelves = self._shelves
        if group.since >= shelves.moment.first:
            # By this very request, which has come to the blocks before its new ones.
            for replica in run:
                shelves.continued_by_latest(group, replica)
            return
        for part, last in self._parts(run):
            level, until_ms = self._priority(part[0])
            shared = group.traits.shared or group.session != shelves.moment.session
            new = shelves.group(group.count + 1, last, shared, level, until_ms)
            sampled = self._sampled_of(part, group)
            shelves.move(part, group, new)
            self._note(sampled, part, new, Seen({}, last, level, until_ms))

    def _parts(self, run: list[Replica]) -> Iterator[tuple[list[Replica], bool]]:
        """Parts of a run that this request uses alike, and whether they end its prompt."""
        if self._last:
            self._last = False
            yield run[:1], True
            run = run[1:]
        if self._use is not None and self._use.retention:
            for replica in run:
                yield [replica], False
        elif run:
            yield run, False

    def remove(self, replica: Replica) -> None:
        shelves = self._shelves
        if shelves.size > self._room:
            self._room = shelves.size
            self._past.make_room(REMEMBERED_A_HELD * self._room)
        group: Group = replica.mark.group
        self._past.note(replica.block.stored_key, group.count, group.traits.shared)
        self._life += (shelves.moment.now - group.since - self._life) / 1000
        shelves.leave(replica)

    def worth(self, replica: Replica) -> float:
        return self._shelves.grade_of(replica)

    def candidates(self) -> Iterator[Replica]:
        return iter(self._shelves)

    def __len__(self) -> int:
        return self._shelves.size

    # Requests

    def _begin(self, moment: Moment) -> None:
        self._learn_of_uses()
        self._go_on_learning()
        for grouping in self._groupings:
            grouping.begin(moment)

    def _begin_unnamed(self) -> None:
        """Nobody says what it is for: each call is a request."""
        now = self._shelves.moment.now + 1
        self._begin(Moment(now, now))

    def _kind(self, category: Hashable) -> int:
        kind = self._kinds.get(category)
        if kind is None:
            kind = len(self._kinds)
            if kind < MOST_KINDS:
                self._kinds[category] = kind
        return kind

    def _priority(self, replica: Replica) -> tuple[int, float]:
        """The level that it counts as, and until when."""
        use = self._use
        if use is None or not use.retention:
            return self._level, FOR_GOOD
        priority, until_ms = use.priority_at(token_of(replica))
        return self._tenants.level(use.tenant, _level(priority)), until_ms

    # The sample

    def _among(self, run: list[Replica]) -> dict[bytes, int]:
        """Those of a run that are in the sample: their depths, by name."""
        mask, blocks = self._mask, map(_block, run)
        return {name: block.depth for block in blocks if not crc32(name := block.stored_key) & mask}

    def _sampled_of(self, run: list[Replica], group: Group) -> dict[bytes, int]:
        """The same, where it is all of a group: then it need not be found out anew."""
        if group.sampled is None or len(run) != group.live or run != group.items:
            return self._among(run)
        mask, depths = group.sampled
        if mask == self._mask:
            return depths
        return {name: depth for name, depth in depths.items() if self._sampled(name)}

    def _note(self, depths: dict[bytes, int], run: list[Replica], group: Group, seen: Seen) -> None:
        """A run has come into a group, and `depths` of it are in the sample. `seen`: what is
        known of them, without them."""
        if len(group.items) == len(run):
            group.sampled = self._mask, depths
        elif group.sampled is not None and group.sampled[0] == self._mask:
            group.sampled[1].update(depths)
        else:
            group.sampled = None
        if not depths:
            return
        latest = self._batch[-1] if self._batch else None
        if latest is not None and latest[1:] == seen[1:]:
            latest.depths.update(depths)
            if len(latest.depths) >= MOST_AT_ONCE:
                self._learn_of_uses()
        else:
            self._batch.append(seen._replace(depths=dict(depths)))

    def _learn_of_uses(self) -> None:
        """Show the sample what the request has used, and learn from it now and then."""
        if not self._batch:
            return
        batch, self._batch = self._batch, []
        room = max(self._room, self._shelves.size, 64)
        self._thin(room)
        sampled = room // (self._mask + 1)
        if self._room:
            for trial in self._trials:
                trial.keep(sampled)
        observer = self._observer
        for seen in batch:
            worth = 2.0 ** (seen.level * OCTAVES)
            for names, count, shared in observer.see(seen):
                for trial in self._trials:
                    trial.use(seen, names, count, shared, worth)
            self._until_learning -= len(seen.depths)
        observer.keep(WATCHED_A_HELD * sampled)
        now = self._shelves.moment.now
        if (
            self._until_learning <= 0
            and now - self._learned >= LEARN_REQUESTS
            and self._learning is None
        ):
            self._learned = now
            self._until_learning = max(LEARN_EVERY, len(observer) // 8)
            self._learning = self._learn()

    def _thin(self, room: int) -> None:
        """Make the sample one of fewer blocks, where there is room for many."""
        while WATCHED_A_HELD * room // (self._mask + 1) > MOST_WATCHED:
            self._mask = 2 * self._mask + 1
            self._observer.thin(self._sampled)
            for trial in self._trials:
                trial.thin(self._sampled)
                trial.saved /= 2

    def _sampled(self, name: bytes) -> bool:
        return not crc32(name) & self._mask

    def _go_on_learning(self) -> None:
        """Do so much of an estimate that no request waits for long."""
        cost = 0
        while self._learning is not None and cost < A_REQUEST:
            step = next(self._learning, None)
            if step is None:
                self._learning = None
            else:
                cost += step

    def _learn(self) -> Iterator[int]:
        """Estimate anew what is worth what, and which rule is best. Every step tells what it
        cost; each order is as it was until it is known anew as a whole."""
        hazards = yield from self._observer.learn()
        learned = Learned(hazards, self._life)
        self._rules[0] = learned
        saved = [trial.saved for trial in self._trials]
        ruling = saved[self._rule]
        if max(saved) > BETTER * ruling + SURE * ruling**0.5:
            self._rule = saved.index(max(saved))
        for trial in self._trials:
            trial.saved *= KEPT
        orders = [self._shelves, *(trial.shelves for trial in self._trials)]
        rules = [self._rules[self._rule], *self._rules]
        for shelves, rule in zip(orders, rules, strict=True):
            if rule is learned:
                for traits in shelves.traits():
                    yield learned.cost(traits)
                    learned(traits)
            yield from shelves.grade_anew(rule)


def _level(priority: int) -> int:
    return round((priority - DEFAULT_PRIORITY) * LEVELS / DEFAULT_PRIORITY)


def _depth(replica: Replica) -> int:
    return replica.block.depth


_block = attrgetter("block")
