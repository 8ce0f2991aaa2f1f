"""The store: the planner, put to work on real tiers.

One asyncio loop runs everything that decides; worker threads run everything that
moves bytes or waits for a disk. So the planner needs no locks, and the loop never
waits for a tier.

    a call -> planner event -> planner actions -> [threads] -> planner event -> ...

    calls       what may be asked of the store; its life
    loop        the planner's actions, carried out; tasks, threads, chores
    waiting     calls that wait for an answer
    movement    copies between tiers, and what the NVMe tier keeps, forgets and syncs
    suspicions  blocks in memory that clients say are damaged
    extents     memory and files that come and go
    vram        copies of hot blocks in GPUs' memory
    straight    blocks that a drive writes there
    directory   what local clients search (`kvstore.listing`), kept in step
    costs       what was learned of this machine, kept
    recovery    what is found at a start
    upkeep      what is done ten times a second
    figures     what can be counted

What is asked of the planner is carried out before the call returns (`Loop.execute`),
so the two never drift apart. A tier that fails is switched off and the others go
on. Everything that waits is bounded in time by its caller.
"""

from __future__ import annotations

from kvstore.core.sessions import Session
from kvstore.store.calls import Store
from kvstore.store.loop import StoreObserver
from kvstore.store.movement import MAX_RUNNING

__all__ = ["MAX_RUNNING", "Session", "Store", "StoreObserver"]
