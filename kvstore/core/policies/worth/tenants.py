"""What a tenant's priorities count beside those of others.

They are taken relative to what it claims by and large: a tenant that calls everything
important gains nothing, and whose claims differ is served by the difference. Where there
is one tenant only its priorities count as they are.
"""

from __future__ import annotations

from math import log2

MOST_TENANTS = 1024
BLOCKS = 10_000
"""That the mean claim is of, by and large."""


class Tenants:
    def __init__(self, octaves: float) -> None:
        """`octaves`: that a level more of priority weighs more."""
        self._octaves = octaves
        self._claims: dict[str, float] = {}

    def level(self, tenant: str, level: int) -> int:
        """What a claimed level counts."""
        if len(self._claims) < 2:
            return level
        mean = self._claims.get(tenant)
        return level if mean is None else level - round(log2(mean) / self._octaves)

    def claim(self, tenant: str, level: int, blocks: int) -> None:
        """Blocks were used at a claimed level."""
        weight = 2.0 ** (level * self._octaves)
        mean = self._claims.get(tenant)
        if mean is None:
            if len(self._claims) >= MOST_TENANTS:
                del self._claims[next(iter(self._claims))]
            self._claims[tenant] = weight
        else:
            self._claims[tenant] = mean + (weight - mean) * min(1.0, blocks / BLOCKS)
