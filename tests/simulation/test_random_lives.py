"""The planner under everything that clients, tiers and time may do to it."""

from __future__ import annotations

import gc

import pytest

from kvstore.core.catalog import Block, DramReplica, NvmeReplica
from kvstore.core.places.shares import Mirror
from tests.simulation.model import RandomLife

SEEDS = 300
STEPS = 400


@pytest.mark.parametrize("block", range(10))
def test_no_order_of_events_makes_it_lie_leak_or_lose_count(block: int) -> None:
    for seed in range(block * SEEDS // 10, (block + 1) * SEEDS // 10):
        life = RandomLife(seed)
        try:
            for _ in range(STEPS):
                life.step()
            life.wind_down()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error


def test_what_ends_is_freed_without_a_garbage_collection() -> None:
    """A full collection visits every block of the server and stalls it meanwhile, so the
    server does without: a block in a ring of references would stay for ever."""
    gc.collect()
    gc.disable()
    # Kept, so that nothing new is taken for what other tests have left behind.
    others = _residents()
    try:
        for seed in range(20):
            life = RandomLife(seed)
            for _ in range(STEPS):
                life.step()
            life.wind_down()
            nvme = life.shell.planner.residency.nvme
            kept = [] if nvme is None else list(nvme.replicas())
            life.forget()
            expected = {id(o) for o in others} | {id(r) for r in kept} | {id(r.block) for r in kept}
            left = _residents()
            assert {id(o) for o in left} <= expected, f"seed {seed}"
            del left, kept, nvme, life
            gc.collect()
    finally:
        gc.enable()


def _residents() -> list[object]:
    # By type, as isinstance asks each object, and a library's may warn or do worse.
    kinds = (Block, DramReplica, Mirror, NvmeReplica)
    return [o for o in gc.get_objects() if type(o) in kinds]
