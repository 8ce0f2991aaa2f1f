"""How soon each session has come back, by what it was doing meanwhile: a tool that answers in
seconds goes on doing so, and so does a person who thinks for minutes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from math import log2

from kvstore.core.policies.worth.groups import IDLE, OPEN, UNKNOWN, WAITING

MOST_SESSIONS = 16384
"""Remembered, those that came last."""
GAPS = 32
"""That a mean is of, by and large."""
OCTAVES = 20
"""Told apart, from a second on."""


class _Session:
    __slots__ = ("fate", "means", "seen_ms")

    def __init__(self, fate: int) -> None:
        self.seen_ms = 0.0
        self.fate = fate
        self.means: dict[int, tuple[int, float]] = {}
        """By fate: gaps counted, and the mean of their logarithms."""


class Paces:
    def __init__(self) -> None:
        self._sessions: OrderedDict[Hashable, _Session] = OrderedDict()

    def came(self, session: Hashable, fate: int, now_ms: float) -> int:
        """A session has made a request, after which its fate is this; its pace then."""
        if session is None:
            return 0
        known = self._sessions.pop(session, None)
        if known is None:
            known = _Session(fate)
            if len(self._sessions) >= MOST_SESSIONS:
                self._sessions.popitem(last=False)
        else:
            count, mean = known.means.get(known.fate, (0, 0.0))
            count = min(count + 1, GAPS)
            octaves = log2(max(now_ms - known.seen_ms, 1000.0) / 1000)
            known.means[known.fate] = count, mean + (octaves - mean) / count
        known.seen_ms = now_ms
        known.fate = fate
        self._sessions[session] = known
        return _pace(known)

    def of(self, session: Hashable) -> int:
        if session is None:
            return 0
        known = self._sessions.get(session)
        return UNKNOWN if known is None else _pace(known)

    def tell(self, session: Hashable, fate: int) -> int:
        """What a session does from now on; its pace then."""
        known = self._sessions.get(session)
        if known is not None:
            known.fate = fate
        return self.of(session)

    def forget(self, session: Hashable) -> None:
        self._sessions.pop(session, None)


def _pace(session: _Session) -> int:
    """Of what else a session can do, its own word is better or it does not come back."""
    found = session.means.get(session.fate) if session.fate in (OPEN, WAITING, IDLE) else None
    return UNKNOWN if found is None else UNKNOWN + 1 + min(round(found[1]), OCTAVES)
