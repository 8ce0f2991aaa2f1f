"""Leases: prefixes of chains, pinned in DRAM for a client until it gives them back, is gone,
or is out of time.

How one comes about is in `core.calls.acquires`. Letting go of what is pinned takes time for every
block, so it is a chore (`core.chores`). What is pinned stays as it is, but for one thing: it
may come to be DOOMED, when somebody clears it or finds it damaged. Pinned bytes are not
touched, and whoever reads them compares checksums.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from itertools import chain

from kvstore.core.catalog import Replica
from kvstore.core.chores import CHANGED, NAMED, SEEN, Chore, Chores
from kvstore.core.limits import Counters, Limits
from kvstore.core.places.residency import Residency
from kvstore.core.sessions import Lease, Session
from kvstore.errors import ForeignLease, LeaseExpired


class Leases:
    def __init__(
        self,
        residency: Residency,
        chores: Chores,
        limits: Limits,
        counters: Counters,
        ids: Iterator[int],
    ) -> None:
        self._residency = residency
        self._chores = chores
        self._limits = limits
        self._counters = counters
        self._ids = ids
        # In the order in which they end, but for the moments that granting one takes.
        self._leases: OrderedDict[int, Lease] = OrderedDict()
        # Pins that nobody has a use for any more, to be taken off.
        self._letting_go: deque[list[Replica]] = deque()

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, session: Session, replicas: list[Replica], expires_ns: int) -> Lease:
        """Lease what is pinned once for it."""
        lease = Lease(next(self._ids), session, replicas, expires_ns)
        self._leases[lease.lease_id] = session.leases[lease.lease_id] = lease
        session.leased += len(replicas)
        return lease

    def get(self, session: Session, lease_id: int) -> Lease:
        """Raises `ForeignLease`, `LeaseExpired`."""
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseExpired("the lease has ended")
        if lease.session is not session:
            raise ForeignLease("the lease belongs to another session")
        return lease

    def ends_ns(self, now_ns: int) -> int:
        """When what is granted or renewed now ends."""
        return now_ns + self._limits.lease_ms * 1_000_000

    def renew(self, session: Session, lease_ids: Sequence[int], now_ns: int) -> int:
        """All or none. The new end, nanoseconds."""
        leases = [self.get(session, lease_id) for lease_id in lease_ids]
        expires_ns = self.ends_ns(now_ns)
        for lease in leases:
            lease.expires_ns = expires_ns
            self._leases.move_to_end(lease.lease_id)
        return expires_ns

    def release(self, session: Session, lease_ids: Sequence[int]) -> None:
        """Ended leases are ignored. With a foreign one among them, none is released."""
        leases = {i: lease for i in lease_ids if (lease := self._leases.get(i)) is not None}
        if any(lease.session is not session for lease in leases.values()):
            raise ForeignLease("a lease belongs to another session")
        for lease in leases.values():
            self.end(lease)

    def end_session(self, session: Session) -> None:
        """The client is gone: all it holds."""
        for lease in list(session.leases.values()):
            self.end(lease)

    def end(self, lease: Lease) -> None:
        del self._leases[lease.lease_id]
        del lease.session.leases[lease.lease_id]
        lease.session.leased -= len(lease.replicas)
        self.let_go(lease.replicas)

    def expire(self, now_ns: int) -> None:
        """End the leases whose time is up."""
        if self._first_expired(now_ns) is not None:
            self._chores.add(self._expire(now_ns))

    def _first_expired(self, now_ns: int) -> Lease | None:
        lease = next(iter(self._leases.values()), None)
        return lease if lease is not None and lease.expires_ns < now_ns else None

    def _expire(self, now_ns: int) -> Chore:
        while (lease := self._first_expired(now_ns)) is not None:
            self._counters.expired_leases += 1
            self.end(lease)
            yield NAMED

    def let_go(self, replicas: list[Replica]) -> None:
        """Take a pin off each, and each off the list, which is nobody else's any more."""
        self._letting_go.append(replicas)
        if len(self._letting_go) == 1:
            self._chores.add(self._take_pins_off())

    def _take_pins_off(self) -> Chore:
        piece = self._chores.piece
        while self._letting_go:
            replicas = self._letting_go[0]
            while replicas:
                part = replicas[-piece:]
                del replicas[-piece:]
                given_up = self._residency.unpin_all(part)
                yield SEEN * len(part) + CHANGED * given_up
            self._letting_go.popleft()

    def pins(self) -> Iterator[Replica]:
        """Every replica in use here, once a pin; for integrity checks."""
        for lease in self._leases.values():
            yield from lease.replicas
        yield from chain.from_iterable(self._letting_go)
