"""A lease on a chain's blocks, as clients hold it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.client.connecting import local_arena
from kvstore.client.link import Core, Link
from kvstore.errors import BadRequest, LeaseExpired
from kvstore.types import NO_REUSE, ChainQuery, LayoutSpec, LeaseGrant, Reuse


@dataclass(frozen=True, slots=True)
class Layout:
    """A registered layout. `id`: 16 bytes, equal for equal specs everywhere."""

    id: bytes
    spec: LayoutSpec

    @property
    def block_bytes(self) -> int:
        return self.spec.block_bytes


class LeaseBase:
    """The part of a lease that needs no server.

    `held`: positions pinned from the chain's start. Blocks are numbered layout by
    layout: block `i` is position `i % held` of layout `i // held`. The blocks stay
    as they are until `expires_ns` (CLOCK_MONOTONIC of the server's host), the
    release, or the loss of the session, whichever comes first; those in a GPU's memory
    alone (`addresses` of `GPU_ONLY` or more, for a `reader`) for no longer than that
    GPU's engine leaves it to the store.
    """

    def __init__(
        self, core: Core, link: Link, grant: LeaseGrant, layouts: Sequence[Layout]
    ) -> None:
        self._core = core
        self._link = link
        self._granted_at_s = time.monotonic()
        self._released = False
        self._block_bytes = [layout.block_bytes for layout in layouts]
        self.lease_id = grant.lease_id
        self.held = grant.held
        self.addresses = grant.addresses
        self.checksums = grant.checksums
        self.expires_ns = grant.expires_ns
        self.from_dram = grant.from_dram

    def __len__(self) -> int:
        """Blocks: positions times layouts."""
        return len(self.checksums)

    @property
    def expired(self) -> bool:
        """Whether the blocks may have changed since the lease was granted.

        Over TCP the server's clock is not known: there the lease time is counted
        from when the grant arrived, and the server has the last word.
        """
        if self._released or self._core.link is not self._link or not self._link.alive():
            return True
        if self._link.arena is not None:
            return self._core.clock.now_ns() >= self.expires_ns
        return time.monotonic() - self._granted_at_s >= self._link.info.lease_ms / 1000

    def block_bytes(self, index: int) -> int:
        """Size of block `index`. Raises `BadRequest` when the lease has no such block."""
        if not 0 <= index < len(self):
            raise BadRequest(f"block {index} of a lease of {len(self)}")
        return self._block_bytes[index // self.held]

    def _view(self, index: int) -> memoryview:
        nbytes = self.block_bytes(index)
        self._check_current()
        if self._link.arena is None:
            raise BadRequest("views need a server on this host; use read")
        return local_arena(self._link).view(self.addresses[index], nbytes, writable=False)

    def _check_current(self) -> None:
        if self.expired:
            raise LeaseExpired("the lease has ended")

    def _renewed(self, expires_ns: int) -> None:
        self.expires_ns = expires_ns
        self._granted_at_s = time.monotonic()


def as_layouts(layouts: Layout | Sequence[Layout]) -> Sequence[Layout]:
    return (layouts,) if isinstance(layouts, Layout) else layouts


def chain_of(
    layouts: Layout | Sequence[Layout], keys: Sequence[bytes], reuse: Reuse = NO_REUSE
) -> ChainQuery:
    return ChainQuery([layout.id for layout in as_layouts(layouts)], keys, reuse)
