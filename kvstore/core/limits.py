"""What the planner is bounded by, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.types import Refusal


@dataclass(frozen=True, slots=True)
class Limits:
    lease_ms: int
    reservation_ms: int
    max_sessions: int
    max_leases: int
    """Leases a session."""
    max_reservations: int
    """Open reservations a session."""
    max_layouts: int
    """Layouts a tenant."""
    max_running: int
    """Batches of copies at a time."""
    prefetch_share: float = 0.25
    """The part of what a tenant has of DRAM that holds what is prefetched and not used yet,
    at most."""


@dataclass(slots=True)
class Counters:
    """Since the start."""

    acquired_positions: int = 0
    acquired_hits: int = 0
    acquired_hits_dram: int = 0
    committed_blocks: int = 0
    denied_blocks: int = 0
    expired_leases: int = 0
    expired_reservations: int = 0
    missed_deadlines: int = 0
    """Acquires whose time was up before all they waited for was there."""
    given_up: int = 0
    """Acquires that waited for longer than was predicted, and longer than it is worth."""
    refused: dict[Refusal, int] = field(default_factory=lambda: dict.fromkeys(Refusal, 0))
    """Chains that were brought up in part or not at all."""
