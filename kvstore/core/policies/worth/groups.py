"""Blocks in groups: those that follow each other in a prompt, were used alike by one
request, and have not been used since.

Within a group the deepest comes first, which is the order in which requests name them.
What a group is known by (its traits) can change while it waits: when its session ends, or
says what it is doing, or goes on without it, and when a priority runs out.
"""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

from kvstore.core.policies.base import FOR_GOOD

OPEN, LEFT, WAITING, IDLE, ENDED, PINNED, EXPECTED = range(7)
"""What is known of the session that used a group last: nothing; that it went on without
these blocks; that it waits for a tool, or for a person; that it has ended; that they are
to be kept; from here on, in which octave of seconds it said that it would be back."""

MOST_USES = 63
"""Counted."""
_LEVELS = [min(n, 3) if n < 4 else min(n.bit_length() + 1, 6) for n in range(MOST_USES + 1)]
"""Of uses: 1, 2, 3, to 7, to 15, more."""

UNKNOWN = 1
"""The pace of a session of which none is known; 0 is that of no session."""

MOST_TOGETHER = 4096
"""Blocks in a group before the next ones get another one: no step that is taken for a whole
group takes long."""

SWEPT_ABOVE = 1024
"""Sessions, or priorities that end, remembered before those of what holds nothing any more
are forgotten."""


class Traits(NamedTuple):
    kind: int
    """Of the request, as its caller named it."""
    uses: int
    """A level, see `_LEVELS`."""
    last: bool
    """It ended its prompt."""
    shared: bool
    """More than one session used it."""
    fate: int
    level: int
    """Of priority; 0 for the default one."""
    pace: int = 0
    """Of its session, see `paces`; 0: no session is named."""


class Mark:
    """What tells the group of an item: those that came into it together share one, which stays
    theirs when all of them go into another group, so that none of them need be touched."""

    __slots__ = ("group",)

    def __init__(self, group: Group) -> None:
        self.group = group


class Hook:
    """What the groups that continue one hang on: it goes with all of that into another one, so
    that none of them need be touched."""

    __slots__ = ("group", "into", "since")

    def __init__(self, group: Group) -> None:
        self.group = group
        self.since = group.since
        self.into: Hook | None = None
        """The one of both that is left where two groups went into one: the older one, so that
        what hangs on one for long does not come to hang on ever more of them."""


class Group:
    __slots__ = (
        "bucket", "column", "count", "head", "hook", "items", "kids", "live", "mark", "parent",
        "sampled", "session", "side", "since", "spot", "traits",
    )  # fmt: skip

    def __init__(self, traits: Traits, count: int, since: int, session: Hashable) -> None:
        self.traits = traits
        self.count = count
        """Uses of each, up to MOST_USES."""
        self.since = since
        """When they were used."""
        self.session = session
        self.items: list[Any] = []
        """Those that left it since are still here, until the list is gone through."""
        self.head = 0
        """Where in `items` the deepest is that is still in it."""
        self.live = 0
        """How many are still in it."""
        self.mark: Mark | None = None
        """What these are marked with; None: there are none."""
        self.side = side_of(traits.level)
        """Of the default that its priority was on as it came."""
        self.sampled: tuple[int, dict[bytes, int]] | None = None
        """The mask of a sample, and which of `items` are in it: their depths, by name."""
        self.spot: list[Group] | None = None
        """Itself, as it stands on a shelf; None: it may not leave yet."""
        self.column: Any = None
        self.bucket = 0
        self.parent: Hook | None = None
        """Of what this group's blocks continue."""
        self.kids = 0
        """Groups that continue this one."""
        self.hook: Hook | None = None
        """What these hang on; None: there have been none."""

    def marked(self) -> Mark:
        """What items are marked with that come into it."""
        mark = self.mark
        if mark is None:
            mark = self.mark = Mark(self)
        return mark

    def take_all(self, group: Group, items: list[Any]) -> None:
        """All that are still in another one, while this has none; the list becomes its own."""
        mark = group.marked()
        mark.group = self
        self.mark, group.mark = mark, None
        self.items = items

    def continues(self, parent: Group) -> None:
        """Its blocks do, those of another group."""
        if parent.hook is None:
            parent.hook = Hook(parent)
        self.parent = parent.hook
        parent.kids += 1

    def continued(self) -> Group | None:
        """What its blocks continue."""
        hook = self.parent
        if hook is None:
            return None
        while hook.into is not None:
            hook = self.parent = hook.into
        return hook.group

    def take_kids(self, group: Group) -> None:
        """What continued another one continues this one instead."""
        mine, others = self.hook, group.hook
        if others is not None:
            # Of two as old its own stays: where it takes from many, all come to hang on one.
            if mine is None or others.since < mine.since:
                self.hook, others.group = others, self
                if mine is not None:
                    mine.into = others
            else:
                others.into = mine
            group.hook = None
        self.kids += group.kids
        group.kids = 0


def side_of(level: int) -> int:
    """Of the default: -1, 0 or 1."""
    return (level > 0) - (level < 0)


class Moment(NamedTuple):
    """The request being served."""

    now: int = 0
    """Requests so far."""
    first: int = 0
    """When the request began, of which this is a later part; else as `now`."""
    now_ms: float = 0.0
    kind: int = 0
    session: Hashable = None
    pace: int = 0
    """Of the session."""


class Grouping:
    """The groups that are there, by session, and those of the request being served."""

    def __init__(self) -> None:
        self.moment = Moment()
        self.open: list[Group] = []
        """Of the request being served, deepest first."""
        self._sessions: dict[Hashable, list[Group]] = {}
        """Those that a session has not left behind."""
        self._sweep_above = SWEPT_ABOVE
        # (when its priority runs out, a number, group)
        self._ends: list[tuple[float, int, Group]] = []
        self._most_ends = SWEPT_ABOVE
        self._numbers = 0

    def begin(self, moment: Moment) -> None:
        """The next request, or a part of one."""
        for group in self.open:
            if group.live:
                self.closed(group)
        if self.moment.session is not None:
            self._close_session()
        self.moment = moment
        self.open = []
        while self._ends and self._ends[0][0] <= moment.now_ms:
            group = heappop(self._ends)[2]
            if group.live:
                self._become(group, group.traits._replace(level=0))

    def group(self, count: int, last: bool, shared: bool, level: int, until_ms: float) -> Group:
        """The group of this request for blocks that have been used so often, and whose
        priority holds until then."""
        count = min(count, MOST_USES)
        if self.open:
            group = self.open[-1]
            traits = group.traits
            if (
                group.count == count
                and traits.shared is shared
                and traits.last is last
                and traits.level == level
                and group.live < MOST_TOGETHER
            ):
                return group
        moment = self.moment
        traits = Traits(moment.kind, _LEVELS[count], last, shared, OPEN, level, moment.pace)
        group = Group(traits, count, moment.now, moment.session)
        self.open.append(group)
        if level and until_ms != FOR_GOOD:
            self._numbers += 1
            heappush(self._ends, (until_ms, self._numbers, group))
            if len(self._ends) > self._most_ends:
                # Some are for years.
                self._ends = [end for end in self._ends if end[2].live or end[2] is group]
                heapify(self._ends)
                self._most_ends = 2 * len(self._ends) + SWEPT_ABOVE
        return group

    def tell(self, session: Hashable, fate: int, pace: int) -> None:
        """What is known of a session from now on. Of one that is not known nothing is."""
        if session is None:
            return
        groups = self._sessions.get(session, [])
        latest = session == self.moment.session
        for group in [*groups, *self.open] if latest else groups:
            if group.live:
                self._become(group, group.traits._replace(fate=fate, pace=pace))
        if fate == ENDED:
            self._sessions.pop(session, None)
            if latest:
                self.moment = self.moment._replace(session=None)

    def closed(self, group: Group) -> None:
        """Its request is over."""

    def changed(self, group: Group, before: Traits) -> None:
        """Its traits are not what they were."""

    def _close_session(self) -> None:
        """What the session has not used in its latest request it has left behind."""
        mine = []
        for group in self._sessions.get(self.moment.session, ()):
            if group.live and group.since < self.moment.first:
                pace = min(group.traits.pace, UNKNOWN)
                self._become(group, group.traits._replace(fate=LEFT, pace=pace))
            elif group.live:
                mine.append(group)
        self._sessions[self.moment.session] = mine + self.open
        if len(self._sessions) > self._sweep_above:
            self._sessions = {
                session: live
                for session, groups in self._sessions.items()
                if (live := [group for group in groups if group.live])
            }
            self._sweep_above = 2 * len(self._sessions) + SWEPT_ABOVE

    def _become(self, group: Group, traits: Traits) -> None:
        before = group.traits
        if traits != before:
            group.traits = traits
            self.changed(group, before)
