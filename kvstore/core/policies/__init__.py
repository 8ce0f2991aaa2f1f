"""Eviction policies by the name they have in the configuration.

Others' policies are found by the entry points that their distributions declare in the
group `kvstore.policies`: the name, and what makes one.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from kvstore.config_keys import EVICTION_ENTRY_POINTS
from kvstore.core.policies.arc import ARC
from kvstore.core.policies.base import EvictionPolicy, Use
from kvstore.core.policies.clock import Clock
from kvstore.core.policies.fifo import FIFO
from kvstore.core.policies.gdsf import GDSF
from kvstore.core.policies.lfu import LFU
from kvstore.core.policies.lhd import LHD
from kvstore.core.policies.lirs import LIRS
from kvstore.core.policies.loading import PolicyError, load
from kvstore.core.policies.lru import LRU
from kvstore.core.policies.priority_lru import PriorityLRU
from kvstore.core.policies.s3_fifo import S3FIFO
from kvstore.core.policies.sieve import Sieve
from kvstore.core.policies.two_q import TwoQ
from kvstore.core.policies.w_tinylfu import WTinyLFU
from kvstore.core.policies.workload_aware import WorkloadAware
from kvstore.core.policies.worth import Worth
from kvstore.types import SessionState

MakePolicy = Callable[[], EvictionPolicy]


class _Policies(dict[str, MakePolicy]):
    """Those of the project; another's is looked up when it is asked for. Raises `PolicyError`
    for one that cannot be used."""

    def __missing__(self, name: str) -> MakePolicy:
        for declared in entry_points(group=EVICTION_ENTRY_POINTS, name=name):
            return load(declared)
        raise KeyError(name)


POLICIES = _Policies({
    "lru": LRU,
    "fifo": FIFO,
    "clock": Clock,
    "lfu": LFU,
    "sieve": Sieve,
    "2q": TwoQ,
    "arc": ARC,
    "lirs": LIRS,
    "s3-fifo": S3FIFO,
    "w-tinylfu": WTinyLFU,
    "lhd": LHD,
    "gdsf": GDSF,
    "priority-lru": PriorityLRU,
    "workload-aware": WorkloadAware,
        "worth": Worth,
})  # fmt: skip

__all__ = [
    "LRU", "POLICIES", "EvictionPolicy", "MakePolicy", "PolicyError", "SessionState", "Use",
]  # fmt: skip
