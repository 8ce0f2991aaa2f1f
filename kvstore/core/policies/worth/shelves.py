"""Shelves: what goes first is found at once, however many blocks there are.

A group that nothing continues stands on a shelf. Groups of the same traits and age (in
buckets) stand in one place, in the order in which they came there. A place has a grade,
and which grades are taken is one number, a bit a grade. A group moves on as it grows
older, all its blocks at once: some twenty times in a million requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count, islice
from typing import Any

from kvstore.core.policies.worth.ages import AGES, BUCKETS, bucket_of
from kvstore.core.policies.worth.groups import Group, Grouping, Moment, Traits

GRADES = 1024

Grade = Callable[[Traits], list[int]]
"""For traits: the grade at each age, from 0 to below GRADES. The least goes first. The list
is not to be changed."""


GONE = 256
"""Groups that may have gone from a column until it is looked for what else stands there."""

LISTED = 10
"""What it costs to list the places of a column, by and large in microseconds."""


class Column:
    """The places of one kind of group, by age."""

    __slots__ = ("gone", "most_gone", "places", "traits")

    def __init__(self, traits: Traits) -> None:
        self.traits = traits
        self.gone = 0
        """Groups whose traits have changed, while what they stood as may still be here."""
        self.most_gone = GONE
        self.places: dict[int, deque[list[Group]]] = {}
        """By bucket of age: those where groups stand, or did; each is listed by its grade."""

    def went(self) -> None:
        """A group's traits have changed: a session may say again and again what it does."""
        self.gone += 1
        if self.gone >= self.most_gone:
            self.places = {
                bucket: deque(spot for spot in place if spot[0].spot is spot)
                for bucket, place in self.places.items()
            }
            self.gone = 0
            self.most_gone = GONE + sum(map(len, self.places.values()))


class Listing:
    """Places by the grade that one rule gives them."""

    __slots__ = ("_grades", "by_grade", "grade", "taken")

    def __init__(self, grade: Grade) -> None:
        self.grade = grade
        self.by_grade: dict[int, list[tuple[Column, int]]] = {}
        self.taken = 0
        """The grades there are, a bit each."""
        self._grades: dict[Column, list[int]] = {}

    def __contains__(self, column: Column) -> bool:
        """Whether it has listed a place of a column."""
        return column in self._grades

    def begin(self, column: Column) -> None:
        """The places of a column are going to be listed."""
        self._grades[column] = self.grade(column.traits)

    def add(self, column: Column, bucket: int) -> None:
        grade = self._grades[column][bucket]
        listed = self.by_grade.get(grade)
        if listed is None:
            self.by_grade[grade] = [(column, bucket)]
            self.taken |= 1 << grade
        else:
            listed.append((column, bucket))

    def keep(self, grade: int, places: list[tuple[Column, int]]) -> None:
        """Of a grade only these are left."""
        if places:
            self.by_grade[grade] = places
        else:
            del self.by_grade[grade]
            self.taken &= ~(1 << grade)


class Shelves(Grouping):
    """An item is anything with a `mark`, which tells its group while it is held."""

    def __init__(self, depth: Callable[[Any], int], grade: Grade) -> None:
        """`depth`: of an item in its chain."""
        super().__init__()
        self._depth = depth
        self._columns: dict[Traits, Column] = {}
        self._listing = Listing(grade)
        self._next: Listing | None = None
        """What will hold once all is listed there."""
        self._calendar: dict[int, list[Group]] = {}
        self._order = count()
        self.size = 0

    def begin(self, moment: Moment) -> None:
        super().begin(moment)
        now = moment.now
        calendar = self._calendar
        # In one piece, without calls: this is most of what a request costs by itself.
        for group in calendar.pop(now, ()):
            bucket = group.bucket + 1
            if group.spot is None or now - group.since != AGES[bucket]:
                continue
            group.bucket = bucket
            place = group.column.places.get(bucket)
            if place is None:
                self._stand(group)
            else:
                group.spot = spot = [group]
                while place and place[0][0].spot is not place[0]:
                    place.popleft()
                place.append(spot)
            if bucket + 1 < BUCKETS:
                when = group.since + AGES[bucket + 1]
                due = calendar.get(when)
                if due is None:
                    calendar[when] = [group]
                else:
                    due.append(group)

    def enter(self, items: list[Any], group: Group) -> None:
        """Items that are in no group come into one of this request, the deepest first."""
        self._link(items[0], group)
        mark = group.marked()
        for item in items:
            item.mark = mark
        group.items += items
        group.live += len(items)
        self.size += len(items)

    def move(self, items: list[Any], group: Group, to: Group) -> None:
        """Some of a group go into one of this request, the deepest first. The list becomes the
        group's."""
        self._link(items[0], to)
        if len(items) == group.live and not to.live:
            to.take_all(group, items)
        else:
            mark = to.marked()
            for item in items:
                item.mark = mark
            to.items += items
        to.live += len(items)
        group.live -= len(items)
        self._moved(group, to)

    def _link(self, item: Any, group: Group) -> None:
        """The request's latest group, which an item comes into, is what the one before
        continues."""
        if not group.live and len(self.open) > 1 and self.open[-1] is group:
            deeper = self.open[-2]
            if deeper.live and self._depth(deeper.items[-1]) > self._depth(item):
                self.continues(deeper, group)

    def continued_by_latest(self, group: Group, item: Any) -> None:
        """What this request has brought continues an item of a group that it used
        before."""
        latest = self.open[-1] if self.open else group
        if latest is group or latest.parent is not None or not latest.live:
            return
        if self._depth(latest.items[-1]) > self._depth(item):
            self.continues(latest, group)

    def _moved(self, group: Group, to: Group) -> None:
        """Some of a group are in `to` now: what is left of it, and what continued it,
        continues the first that any went to, which are the deepest of those that went."""
        parent = group.continued()
        if parent is not None and parent.since == self.moment.now:
            to = parent
        self.left(group)
        if group.live:
            self.continues(group, to)
        elif group.kids:
            if self._follows(to, group):
                # It would continue itself through them.
                self._part(to)
            to.take_kids(group)

    def leave(self, item: Any) -> None:
        group = item.mark.group
        item.mark = None
        self.size -= 1
        group.live -= 1
        self.left(group)

    def left(self, group: Group) -> None:
        """Some have left it, as `live` says."""
        if not group.live:
            group.items = []
            group.mark = None
            group.head = 0
            group.spot = None
            self._part(group)
        elif group.spot is not None:
            items, head, mark = group.items, group.head, group.mark
            if items[head].mark is not mark:
                while items[head].mark is not mark:
                    head += 1
                group.head = head
            if 2 * group.live + 8 < len(items):
                _gather(group)

    def continues(self, group: Group, parent: Group) -> None:
        """What the group's blocks continue, unless it is the other way round: a request of
        several chains may say both, and groups in a ring could never leave."""
        before = group.continued()
        if before is not parent and not self._follows(parent, group):
            group.continues(parent)
            parent.spot = None
            if before is not None:
                self._childless(before)

    def traits(self) -> list[Traits]:
        """By which groups stand, or did."""
        return list(self._columns)

    def grade_of(self, item: Any) -> int:
        """What is thought of an item that is held, whatever continues it: the more, the
        later it would go."""
        return self._grade_of(item.mark.group)

    def _grade_of(self, group: Group) -> int:
        return self._listing.grade(group.traits)[bucket_of(self.moment.now - group.since)]

    def _follows(self, group: Group, other: Group) -> bool:
        """Whether a group continues another, by however many, or is it."""
        at: Group | None = group
        while at is not None and at is not other:
            at = at.continued()
        return at is other

    def _part(self, group: Group) -> None:
        """It continues nothing any more."""
        parent, group.parent = group.continued(), None
        if parent is not None:
            self._childless(parent)

    def closed(self, group: Group) -> None:
        if not group.kids:
            self._stand_up(group)

    def changed(self, group: Group, before: Traits) -> None:
        if group.spot is not None:
            column: Column = group.column
            self._place(group)
            column.went()

    def grade_anew(self, grade: Grade) -> Iterator[int]:
        """Grades are not what they were: every step tells what it cost, and up to the last one
        the old ones hold. One at a time."""
        listing = self._next = Listing(grade)
        for column in list(self._columns.values()):
            if column not in listing:
                taken = [b for b in sorted(column.places) if self._stands_in(column, b)]
                if taken:
                    listing.begin(column)
                    for bucket in taken:
                        listing.add(column, bucket)
                else:
                    del self._columns[column.traits]
                yield LISTED
        self._listing, self._next = listing, None

    def __iter__(self) -> Iterator[Any]:
        """Every item, the one to go first coming first, as if those before it had left."""
        kids: dict[Group, int] = {}
        freed: list[tuple[int, int, Group]] = []
        taken = self._listing.taken
        while taken:
            bit = taken & -taken
            taken ^= bit
            grade = bit.bit_length() - 1
            while freed and freed[0][0] < grade:
                group = heappop(freed)[2]
                yield from _items(group)
                self._free(group, kids, freed)
            for column, bucket in self._at(grade):
                for spot in column.places[bucket]:
                    if spot[0].spot is spot:
                        yield from _items(spot[0])
                        self._free(spot[0], kids, freed)
                        while freed and freed[0][0] <= grade:
                            group = heappop(freed)[2]
                            yield from _items(group)
                            self._free(group, kids, freed)
        for group in self.open:
            yield from _items(group)
            self._free(group, kids, freed)
        while freed:
            group = heappop(freed)[2]
            yield from _items(group)
            self._free(group, kids, freed)

    def _free(
        self, group: Group, kids: dict[Group, int], freed: list[tuple[int, int, Group]]
    ) -> None:
        """What a group continues that is thought to have left, if nothing else does."""
        parent = group.continued()
        if parent is not None:
            kids[parent] = kids.get(parent, parent.kids) - 1
            if not kids[parent] and parent.since < self.moment.now:
                heappush(freed, (self._grade_of(parent), next(self._order), parent))

    def _at(self, grade: int) -> list[tuple[Column, int]]:
        """The places of a grade where groups stand."""
        listed = self._listing.by_grade[grade]
        # A place that nobody stood in for a while may be listed twice.
        fronts = [place for place in dict.fromkeys(listed) if self._stands_in(*place)]
        if len(fronts) < len(listed):
            self._listing.keep(grade, fronts)
        return fronts

    def _stands_in(self, column: Column, bucket: int) -> bool:
        """Whether a group stands in a place; if none does there is no such place any more."""
        place = column.places.get(bucket)
        if place is None:
            return False
        _clear_front(place)
        if not place:
            del column.places[bucket]
        return bool(place)

    def _childless(self, group: Group) -> None:
        """One group less continues it."""
        group.kids -= 1
        if not group.kids and group.live and group.since < self.moment.now:
            self._stand_up(group)

    def _stand_up(self, group: Group) -> None:
        """It may leave from now on."""
        if len(group.items) != group.live:
            _gather(group)
        group.bucket = bucket_of(self.moment.now - group.since)
        self._place(group)
        self._note(group)

    def _place(self, group: Group) -> None:
        """Into the column of its traits."""
        group.column = self._column(group.traits)
        self._stand(group)

    def _column(self, traits: Traits) -> Column:
        column = self._columns.get(traits)
        if column is None:
            column = self._columns[traits] = Column(traits)
            self._listing.begin(column)
            if self._next is not None:
                self._next.begin(column)
        return column

    def _stand(self, group: Group) -> None:
        places, bucket = group.column.places, group.bucket
        group.spot = spot = [group]
        place = places.get(bucket)
        if place is None:
            places[bucket] = deque((spot,))
            self._list(group.column, bucket)
        else:
            _clear_front(place)
            place.append(spot)

    def _list(self, column: Column, bucket: int) -> None:
        self._listing.add(column, bucket)
        if self._next is not None and column in self._next:
            self._next.add(column, bucket)

    def _note(self, group: Group) -> None:
        """When it will be in the next bucket."""
        following = group.bucket + 1
        if following < BUCKETS:
            when = group.since + AGES[following]
            due = self._calendar.get(when)
            if due is None:
                self._calendar[when] = [group]
            else:
                due.append(group)


def _clear_front(place: deque[list[Group]]) -> None:
    """Drop those that moved on, up to the first that has not."""
    while place and place[0][0].spot is not place[0]:
        place.popleft()


def _items(group: Group) -> Iterator[Any]:
    mark = group.mark
    for item in islice(group.items, group.head, None):
        if item.mark is mark:
            yield item


def _gather(group: Group) -> None:
    """Forget those that left it."""
    mark = group.mark
    group.items = [item for item in group.items if item.mark is mark]
    group.head = 0
    group.sampled = None
