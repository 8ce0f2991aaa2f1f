"""Sessions that will be back, with what they used last, and when that is to be in DRAM.

Of each session of which calls tell (`Reuse.session`) it is known what its latest request
used and stored: a few names of blocks along each chain, from which the rest is found by
their parents. When its caller says that it waits, it is expected back after the time that
is said, or that such sessions took before, give or take what they were wrong by
(`core.foresight.delays`). Its blocks are wanted back shortly before, and kept until it should have
come, if that is no longer on average than others stay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count

from kvstore.core.catalog import Block, Catalog, Layout
from kvstore.core.foresight.delays import Delays
from kvstore.core.places.foreseen import GUESSED, TOLD, Reason
from kvstore.core.places.residency import Residency
from kvstore.core.policies import Use
from kvstore.core.tickets import PrefetchTicket
from kvstore.core.uses import session_of, use_of
from kvstore.types import ChainQuery, Reuse, Segment, SessionState, Tier

SURE = 0.95
"""The part of sessions that must find what is brought up for them, as far as is known."""
MOST_SESSIONS = 4096
WAYPOINTS = 8
"""Blocks remembered of a chain. The last ones may be gone from all tiers first."""
UNSAID_NS = 1_000_000_000
"""What ratios are to where no time was said."""
LONGEST_NS = 24 * 3600 * 1_000_000_000
"""The longest time that is believed, and expected."""
GONE = 16
"""Who is not back after so many times what was said is not expected any more."""
HEADROOM = 2.0
"""Slack takes so many times as long as a link that does nothing else."""
TICK_NS = 100_000_000


@dataclass(eq=False, slots=True)
class Absence:
    """`expected_ns` after `since_ns`; not any more at `over_ns`."""

    since_ns: int
    expected_ns: int
    over_ns: int
    delays: Delays


@dataclass(eq=False, slots=True)
class Known:
    """A session. `waypoints`: stored keys by layout id, the deepest last. `request`: of
    which they are; `use`: what policies were told of it. `job`: what brings it back."""

    session: Hashable
    reason: Reason
    request: bytes
    use: Use
    waypoints: dict[bytes, list[bytes]] = field(default_factory=dict)
    absence: Absence | None = None
    job: PrefetchTicket | None = None


class Returns:
    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._catalog: Catalog = residency.catalog
        self._known: OrderedDict[Hashable, Known] = OrderedDict()
        self._delays: dict[Hashable, Delays] = {}
        self._reasons: dict[Hashable, Reason] = {}
        # When to bring something up; and (at the end) when not to expect it any more.
        self._due: list[tuple[int, int, Known, Absence]] = []
        self._order = count()

    def __len__(self) -> int:
        return len(self._known)

    # What sessions use

    def asked(self, tenant: str, chains: Sequence[ChainQuery], now_ns: int) -> list[Known]:
        """Chains are acquired. Which sessions are back with that, as they were known."""
        back: list[Known] = []
        met: set[Hashable] = set()
        for chain in chains:
            name = session_of(tenant, chain.reuse.session)
            if name is None or not chain.keys:
                continue
            known = self._known.get(name)
            if _is_new(known, chain.reuse, otherwise=name not in met):
                if known is not None:
                    self._is_back(known, now_ns)
                    back.append(known)
                known = self._remember(name, tenant, chain.reuse, now_ns)
            met.add(name)
            assert known is not None
            for layout_id in chain.layout_ids:
                layout = self._catalog.layout(tenant, layout_id)
                known.waypoints[layout_id] = _waypoints(layout, chain.keys)
        return back

    def stored(
        self, tenant: str, layout_id: bytes, segments: Sequence[Segment], now_ns: int
    ) -> list[Known]:
        """Segments are committed; otherwise as `asked`."""
        back: list[Known] = []
        for segment in segments:
            name = session_of(tenant, segment.reuse.session)
            if name is None or not segment.keys:
                continue
            known = self._known.get(name)
            if _is_new(known, segment.reuse, otherwise=False):
                if known is not None:
                    self._is_back(known, now_ns)
                    back.append(known)
                known = self._remember(name, tenant, segment.reuse, now_ns)
            assert known is not None
            waypoints = known.waypoints.setdefault(layout_id, [])
            waypoints.append(self._catalog.layout(tenant, layout_id).name(segment.keys[-1]))
            del waypoints[: -2 * WAYPOINTS]
        return back

    def _remember(self, name: Hashable, tenant: str, reuse: Reuse, now_ns: int) -> Known:
        known = Known(name, Reason(GUESSED), reuse.request, use_of(reuse, tenant, now_ns))
        self._known[name] = known
        self._known.move_to_end(name)
        if len(self._known) > MOST_SESSIONS:
            self._known.popitem(last=False)[1].absence = None
        return known

    # What they do next

    def hint(
        self, session: Hashable, state: SessionState, expected_ms: float | None, now_ns: int
    ) -> Known | None:
        """What a caller says. The session, where that ends it. One that is not known is
        not expected."""
        known = self._known.get(session)
        if known is None:
            return None
        known.absence = None
        if state is SessionState.ENDED:
            del self._known[session]
            return known
        if state in (SessionState.WAITING, SessionState.IDLE):
            told, expected_ns, over_ns = expected_ms is not None, UNSAID_NS, LONGEST_NS
            if expected_ms is not None:
                expected_ns = int(min(max(expected_ms, 1.0) * 1e6, LONGEST_NS))
                over_ns = min(GONE * expected_ns, LONGEST_NS)
            kind = (known.use.tenant, state, told)
            delays = self._delays.setdefault(kind, Delays(told=told))
            known.reason = self._reasons.setdefault(kind, Reason(TOLD if told else GUESSED))
            self._expect(known, Absence(now_ns, expected_ns, now_ns + over_ns, delays))
        return None

    def _is_back(self, known: Known, now_ns: int) -> None:
        absence, known.absence = known.absence, None
        if absence is not None:
            absence.delays.note((now_ns - absence.since_ns) / absence.expected_ns)

    def _expect(self, known: Known, absence: Absence) -> None:
        known.absence = absence
        self._push(absence.over_ns, known, absence)
        expected_ns = absence.expected_ns
        lead = (HEADROOM * self._work_ns(known) + TICK_NS) / expected_ns
        begin = absence.delays.begin(self._patience(absence), lead, SURE)
        if begin is not None:
            self._push(absence.since_ns + int(begin * expected_ns), known, absence)

    def _patience(self, absence: Absence) -> float:
        """For how long it is worth keeping something for who is expected."""
        return self._residency.holdings.stays.stay_ns / absence.expected_ns

    def _push(self, due_ns: int, known: Known, absence: Absence) -> None:
        heappush(self._due, (due_ns, next(self._order), known, absence))
        if len(self._due) > 4 * MOST_SESSIONS:
            self._due = [entry for entry in self._due if entry[2].absence is entry[3]]
            heapify(self._due)

    def _work_ns(self, known: Known) -> float:
        """How long the link would take for all that it used, alone."""
        cost, work_ns = self._residency.transfers.costs[Tier.DRAM], 0
        for waypoints in known.waypoints.values():
            block = self.deepest(waypoints)
            if block is not None:
                work_ns += (block.depth + 1) * cost.nominal.work_ns(block.layout.stored_bytes)
        return cost.passing(work_ns).ns

    def next_ns(self) -> int | None:
        """When some session's blocks may be wanted, or it is not expected any more."""
        return self._due[0][0] if self._due else None

    def due(self, now_ns: int) -> Iterator[tuple[Known, int]]:
        """Sessions whose blocks are wanted now, and until when they are to be kept."""
        while self._due and self._due[0][0] <= now_ns:
            _, _, known, absence = heappop(self._due)
            if known.absence is not absence:
                continue
            if now_ns >= absence.over_ns:
                known.absence = None
                absence.delays.note(None)
                continue
            expected_ns = absence.expected_ns
            wait = absence.delays.wait((now_ns - absence.since_ns) / expected_ns, SURE)
            if wait is not None and wait.mean <= self._patience(absence):
                yield known, absence.since_ns + int(wait.end * expected_ns)

    # What they used

    def deepest(self, waypoints: Sequence[bytes]) -> Block | None:
        """The last block of a chain that is there."""
        found = map(self._catalog.get, reversed(waypoints))
        return next((block for block in found if block is not None), None)


def _is_new(known: Known | None, reuse: Reuse, *, otherwise: bool) -> bool:
    """It is of another request than was known; `otherwise`: where requests have no names."""
    if known is None:
        return True
    return reuse.request != known.request if reuse.request else otherwise


def _waypoints(layout: Layout, keys: Sequence[bytes]) -> list[bytes]:
    step = max(1, len(keys) // WAYPOINTS)
    places = range(len(keys) - 1, -1, -step)[:WAYPOINTS]
    return [layout.name(keys[place]) for place in reversed(places)]
