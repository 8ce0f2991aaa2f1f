"""What `kvstore bench local` measures, before anything is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.errors import KVStoreError

BLOCK_BYTES = (64 << 10, 1 << 20, 4 << 20)
CHAIN_LENGTHS = (1, 32, 256, 2000)
LOOKUP_KINDS = ("hit", "partial", "miss")

Lookups = dict[str, dict[int, list[float]]]
"""Microseconds by kind and by the length of the chain."""


class Wrong(KVStoreError):
    """The store answered in a way that makes a figure meaningless."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    rounds: int = 7
    round_bytes: int = 128 << 20
    """Moved by each step of each round."""
    lookups: int = 4000
    """Of each kind and length."""
    calls: int = 300
    """Of each kind that asks the server."""
    peer_lookups: int = 200
    peer_calls: int = 60


QUICK = Plan(rounds=2, round_bytes=16 << 20, lookups=100, calls=20, peer_lookups=20, peer_calls=10)


@dataclass(slots=True)
class Bandwidth:
    """Of one block size: GB/s in each round."""

    memcpy: list[float] = field(default_factory=list)
    put: list[float] = field(default_factory=list)
    get: list[float] = field(default_factory=list)
    direct_write: list[float] = field(default_factory=list)
    direct_read: list[float] = field(default_factory=list)
    nvme_write: list[float] = field(default_factory=list)
    nvme_get: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Latency:
    """Microseconds of each call."""

    lookup: Lookups = field(default_factory=dict)
    lookup_rpcs: dict[str, int] = field(default_factory=dict)
    """Calls to the server made by all lookups of a kind."""
    harness: list[float] = field(default_factory=list)
    """A call that does nothing, measured like a lookup."""
    acquire_release: dict[int, list[float]] = field(default_factory=dict)
    rpc: list[float] = field(default_factory=list)
    """The smallest call over gRPC: the bound of every call that asks the server."""
    put_one: list[float] = field(default_factory=list)
    get_one: list[float] = field(default_factory=list)


@dataclass(slots=True)
class PeerSamples:
    """As for our own store. `reason`: why it is not there, or not any more."""

    reason: str | None = None
    version: str = ""
    way: str = ""
    bandwidth: dict[int, Bandwidth] = field(default_factory=dict)
    """Of which only `put` and `get` are measured."""
    lookup: Lookups = field(default_factory=dict)
    put_one: list[float] = field(default_factory=list)
    get_one: list[float] = field(default_factory=list)
    failed: int = 0
    wrong: int = 0


@dataclass(slots=True)
class Samples:
    """`local`: whether bytes went through shared memory."""

    local: bool
    bandwidth: dict[int, Bandwidth] = field(default_factory=dict)
    latency: Latency = field(default_factory=Latency)
    peers: dict[str, PeerSamples] = field(default_factory=dict)
