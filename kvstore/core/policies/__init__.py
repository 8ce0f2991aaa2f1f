"""Eviction policies by the name they have in the configuration."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.core.policies.base import EvictionPolicy
from kvstore.core.policies.lru import LRU

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU}

__all__ = ["LRU", "POLICIES", "EvictionPolicy"]
