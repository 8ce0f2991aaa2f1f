"""How often blocks that left had been used: two bytes a name, in a table that newer names
overwrite. A name may be taken for another one, one time in a thousand."""

from __future__ import annotations

from array import array
from zlib import crc32

from kvstore.core.policies.worth.groups import MOST_USES

MOST = 1 << 24
_SHARED = 1 << 6
_PRINT = 7


class Past:
    def __init__(self) -> None:
        self._names = array("H", bytes(2 * 1024))

    def make_room(self, names: int) -> None:
        """Remember about so many; what is known is forgotten when that is far more than
        there was room for."""
        if names > len(self._names) and len(self._names) < MOST:
            size = min(1 << (names - 1).bit_length(), MOST)
            # Every old place is where its names would be looked for in the new table.
            self._names = self._names * (size // len(self._names))

    def note(self, name: bytes, count: int, shared: bool) -> None:
        spread = crc32(name, 1)
        names = self._names
        names[spread % len(names)] = (
            (spread >> 23 | 1) << _PRINT | (_SHARED if shared else 0) | min(count, MOST_USES)
        ) & 0xFFFF

    def of(self, name: bytes) -> tuple[int, bool]:
        """Uses, and whether by more than one session."""
        spread = crc32(name, 1)
        found = self._names[spread % len(self._names)]
        if found >> _PRINT != (spread >> 23 | 1):
            return 0, False
        return found & MOST_USES, bool(found & _SHARED)
