"""Replicas to feed a policy with, and a tier that it orders."""

from __future__ import annotations

from kvstore.core.catalog import Block, Catalog, DramReplica, Replica
from kvstore.core.lifecycle import State
from kvstore.core.policies import EvictionPolicy
from kvstore.types import LayoutSpec

LAYOUT, _ = Catalog(lambda tenant: b"k", max_layouts=1).register_layout(
    "t", LayoutSpec("m", "bf16", 16, 4096)
)


def replica(number: int, depth: int = 0) -> Replica:
    return DramReplica(Block(number.to_bytes(16), b"", LAYOUT, depth), number, State.READY)


class Cache:
    """So many blocks under one policy; `access` says whether a block was there."""

    def __init__(self, policy: EvictionPolicy, room: int) -> None:
        self.policy = policy
        self.room = room
        self.held: dict[int, Replica] = {}

    def access(self, number: int, depth: int = 0) -> bool:
        if number in self.held:
            self.policy.touch(self.held[number])
            return True
        new = replica(number, depth)
        self.policy.miss(new.block.stored_key)
        if len(self.held) == self.room:
            victim = next(self.policy.candidates())
            self.policy.remove(victim)
            del self.held[victim.address]
        self.policy.insert(new)
        self.held[number] = new
        return False
