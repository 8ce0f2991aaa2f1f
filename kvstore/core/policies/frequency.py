"""How often a name was seen of late, in a fixed room: a count-min sketch that is halved
now and then.

Source: G. Cormode, S. Muthukrishnan, "An improved data stream summary: the count-min
sketch and its applications", J. Algorithms 55(1), 2005; halving after G. Einziger et
al. (see w_tinylfu).
"""

from __future__ import annotations

from zlib import crc32

ROWS = 4
MOST = 15
SEEN_A_NAME = 10
"""Names counted, for each that there is room for, before all counts are halved."""

_HALVED = bytes(count >> 1 for count in range(256))
_MIX = 0x9E3779B97F4A7C15
# A checksum differs wherever names do, of which numbers, too, make good ones.


class Frequency:
    def __init__(self) -> None:
        self._width = 256
        self._rows = [bytearray(self._width) for _ in range(ROWS)]
        self._seen = 0

    def grow(self, names: int) -> None:
        """Make room for so many names. What was counted stays."""
        while self._width < names:
            self._width *= 2
            self._rows = [row + row for row in self._rows]

    def add(self, name: bytes) -> None:
        mask = self._width - 1
        spread = crc32(name) * _MIX & 0xFFFFFFFFFFFFFFFF
        step = (spread >> 32) | 1
        for row in self._rows:
            place = (spread >> 8) & mask
            if row[place] < MOST:
                row[place] += 1
            spread += step << 8
        self._seen += 1
        if self._seen >= SEEN_A_NAME * self._width:
            self._seen //= 2
            self._rows = [row.translate(_HALVED) for row in self._rows]

    def of(self, name: bytes) -> int:
        """At least how often it was seen, as far as that is remembered."""
        mask = self._width - 1
        spread = crc32(name) * _MIX & 0xFFFFFFFFFFFFFFFF
        step = (spread >> 32) | 1
        least = MOST
        for row in self._rows:
            count = row[(spread >> 8) & mask]
            if count < least:
                least = count
            spread += step << 8
        return least
