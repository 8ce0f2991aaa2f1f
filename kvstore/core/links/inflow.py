"""Demand that comes to a link: how much, from whom, how important, and how fast lately.

Who waits is passed by what comes later and is more important. What has come since is a
difference of two counts; what is still to come is taken to come as it did lately. While somebody
of a tenant may wait, its counts are not forgotten: they would be taken for others'.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp

INFLOW_NS = 5_000_000_000
"""How much of what is more important comes is seen over about so long."""
MOST_TENANTS = 1024
"""Whose inflow is known, of those for whom nothing is on its way."""


class Inflow:
    """Work that comes, by tenant and priority."""

    def __init__(self, waiting: Callable[[], set[str]]) -> None:
        """`waiting`: the tenants for whom something is queued or running."""
        self.total_ns = 0
        """Of all, since the start."""
        self._known: dict[str, dict[int, _Stream]] = {}
        self._waiting = waiting
        self._forget_at = MOST_TENANTS

    def __len__(self) -> int:
        """Tenants that are known."""
        return len(self._known)

    def note(self, tenant: str, priority: int, work_ns: int, now_ns: int) -> None:
        known = self._known.get(tenant)
        if known is None:
            if len(self._known) >= self._forget_at:
                self._forget()
            known = self._known[tenant] = {}
        stream = known.get(priority)
        if stream is None:
            stream = known[priority] = _Stream()
        stream.note(work_ns, now_ns)
        self.total_ns += work_ns

    def _forget(self) -> None:
        """Half of those that may be forgotten, quiet for longest, at once: to find them is a
        look at all."""
        waiting = self._waiting()
        quiet = sorted(
            (tenant for tenant in self._known if tenant not in waiting),
            key=lambda tenant: max(stream.at_ns for stream in self._known[tenant].values()),
        )
        for tenant in quiet[: -(MOST_TENANTS // 2)]:
            del self._known[tenant]
        self._forget_at = len(self._known) + MOST_TENANTS // 2

    def before(self, tenant: str, priority: int) -> int:
        """Work that has come since the start and may go before a tenant's demand of this
        priority that came earlier: what is more important to it, and what is others'."""
        known = self._known.get(tenant, {})
        behind = sum(stream.total_ns for p, stream in known.items() if p <= priority)
        return self.total_ns - behind

    def above(self, tenant: str, priority: int, now_ns: int) -> list[tuple[int, float]]:
        """By how many points what comes from a tenant is more important, and its rate:
        nanoseconds of work a nanosecond."""
        known = self._known.get(tenant, {})
        return [(p - priority, stream.rate(now_ns)) for p, stream in known.items() if p > priority]


class _Stream:
    __slots__ = ("_sum", "at_ns", "total_ns")

    def __init__(self) -> None:
        self.total_ns = 0
        self._sum = 0.0
        self.at_ns = 0
        """When the latest came."""

    def note(self, work_ns: int, now_ns: int) -> None:
        self.total_ns += work_ns
        self._sum = self._at(now_ns) + work_ns
        self.at_ns = max(self.at_ns, now_ns)

    def rate(self, now_ns: int) -> float:
        return self._at(now_ns) / INFLOW_NS

    def _at(self, now_ns: int) -> float:
        return self._sum * exp(min(0, self.at_ns - now_ns) / INFLOW_NS)
