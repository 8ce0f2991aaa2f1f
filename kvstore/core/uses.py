"""What callers say of the next use of blocks, as policies are told it."""

from __future__ import annotations

from collections.abc import Hashable

from kvstore.core.policies import Use
from kvstore.types import Reuse

NOBODY = Use()
"""A replica came to a tier for no request: a copy has ended."""


def use_of(reuse: Reuse, tenant: str, now_ns: int) -> Use:
    return Use(
        now_ns / 1e6,
        reuse.category,
        session_of(tenant, reuse.session),
        reuse.priority,
        reuse.retention,
        (tenant, reuse.request) if reuse.request else None,
        tenant,
    )


def session_of(tenant: str, session: bytes) -> Hashable:
    """Tenants choose names of their own."""
    return (tenant, session) if session else None
