"""What a planner takes over from an NVMe tier at a start, and in which order it would go."""

from __future__ import annotations

import random
from itertools import groupby

import pytest

from kvstore.core.lifecycle import State
from kvstore.core.planner import Planner
from kvstore.tiers.base import BlockHeader, RecoveredBlocks
from kvstore.types import Tier
from tests.simulation.model import SLOT, Shell, layout, make_planner

LAYOUT = layout()
EXTENT_SLOTS = 4


def header(number: int, parent: int | None = None, length: int = SLOT) -> BlockHeader:
    return BlockHeader(
        name(number), b"" if parent is None else name(parent), LAYOUT.layout_id, "t", length, number
    )


def name(number: int) -> bytes:
    return bytes([number % 7]) + number.to_bytes(15, "little")


def at(slot: int) -> int:
    """The address of a slot; extents have the numbers from 1."""
    return (EXTENT_SLOTS + slot) * SLOT


def columns(headers: list[tuple[BlockHeader, int]]) -> list[RecoveredBlocks]:
    """Those alike that follow each other in one part."""
    return [
        RecoveredBlocks(
            tenant, layout_id, length, [h.stored_key for h, _ in rows], [h.parent for h, _ in rows],
            [h.checksum for h, _ in rows], [address for _, address in rows],
        )
        for (tenant, layout_id, length), found in groupby(
            headers, lambda row: (row[0].tenant, row[0].layout_id, row[0].length)
        )
        if (rows := list(found))
    ]  # fmt: skip


def restored(
    headers: list[tuple[BlockHeader, int]], nvme_slots: int = 32
) -> tuple[Planner, list[int], list[int]]:
    """The planner; the extents it refused; the addresses of blocks it refused."""
    planner = make_planner(dram_slots=8, nvme_slots=nvme_slots, extent_slots=EXTENT_SLOTS)
    numbers = sorted({address // SLOT // EXTENT_SLOTS for _, address in headers})
    extents, blocks = planner.restore(
        [("t", LAYOUT)], [(n, SLOT) for n in numbers], columns(headers)
    )
    planner.check_integrity()
    return planner, extents, [part.addresses[row] for part, row in blocks]


def order(planner: Planner) -> list[int]:
    """The blocks in the order in which they would leave."""
    nvme = planner.residency.nvme
    assert nvme is not None
    [space_class] = nvme.space.classes()
    return [r.block.checksum or 0 for r in nvme.candidates(space_class)]


@pytest.mark.parametrize("seed", range(50))
def test_children_leave_before_their_parents_in_whatever_order_they_are_found(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 24)
    parents = {n: rng.choice([None, *range(1, n), 99]) for n in range(1, count + 1)}
    slots = rng.sample(range(24), count)
    found = [(header(n, parents[n]), at(slot)) for n, slot in zip(parents, slots, strict=True)]
    rng.shuffle(found)
    planner, _, refused = restored(found)
    left = order(planner)
    assert not refused
    assert sorted(left) == list(parents)
    for child, parent in parents.items():
        if parent in parents:
            assert left.index(child) < left.index(parent)


def test_chains_leave_by_age_children_first_and_know_their_depth() -> None:
    chains = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    found = []
    for chain in chains:
        # As write-back leaves them: children before their parents.
        for number in reversed(chain):
            parent = number - 1 if number != chain[0] else None
            found.append((header(number, parent), at(len(found))))
    planner, _, _ = restored(found[::-1])
    assert order(planner) == [3, 2, 1, 5, 4, 9, 8, 7, 6]
    for chain in chains:
        blocks = [planner.catalog.get(name(number)) for number in chain]
        assert [b.depth for b in blocks if b is not None] == list(range(len(chain)))


@pytest.mark.parametrize("seed", range(20))
def test_depths_are_known_in_whatever_order_blocks_are_found(seed: int) -> None:
    rng = random.Random(seed)
    found = [(header(n, n - 1 if n % 6 else None), at(n)) for n in range(24)]
    rng.shuffle(found)
    planner, _, _ = restored(found)
    for number in range(24):
        block = planner.catalog.get(name(number))
        assert block is not None
        assert block.depth == number % 6


def test_parents_in_a_ring_end_the_start_too() -> None:
    planner, _, _ = restored([(header(1, 3), at(0)), (header(2, 1), at(1)), (header(3, 2), at(2))])
    assert sorted(order(planner)) == [1, 2, 3]


def test_a_block_and_its_child_share_the_parents_name() -> None:
    """Half of what a block's name costs, millions of times."""
    planner, _, _ = restored([(header(2, 1), at(0)), (header(1), at(1)), (header(3, 2), at(2))])
    one, two, three = (planner.catalog.get(name(n)) for n in (1, 2, 3))
    assert one is not None and two is not None and three is not None
    assert two.parent is one.stored_key
    assert three.parent is two.stored_key


def test_what_is_found_at_a_start_is_served() -> None:
    planner, _, refused = restored([(header(2, 1), at(0)), (header(1), at(1))])
    assert not refused
    shell = Shell(planner)
    shell.memory[Tier.NVME] = {at(0): "two", at(1): "one"}
    assert planner.presence(name(1)) == (False, True)
    shell.run()
    nvme = planner.residency.nvme
    assert nvme is not None
    assert {r.state for r in nvme.replicas()} == {State.READY}


def test_a_block_found_in_two_places_is_served_from_one() -> None:
    planner, _, refused = restored([(header(1), at(0)), (header(2), at(1)), (header(1), at(2))])
    assert refused == [at(2)]
    assert sorted(order(planner)) == [1, 2]


def test_what_cannot_be_where_it_is_found_is_refused() -> None:
    planner, _, refused = restored(
        [
            (header(1), at(0)),
            (header(2), at(0)),
            (header(3, length=SLOT - 1), at(1)),
            (header(4)._replace(layout_id=b"?" * 16), at(2)),
            (header(5)._replace(tenant="?"), at(3)),
            (header(6), at(4) + 1),
        ]
    )
    assert refused == [at(0), at(1), at(2), at(3), at(4) + 1]
    assert order(planner) == [1]


def test_a_slot_of_another_size_is_refused() -> None:
    """Whoever got it would be listed in one class and counted in another."""
    planner = make_planner(dram_slots=8, nvme_slots=32, extent_slots=EXTENT_SLOTS)
    [part] = columns([(header(1), at(0))])
    assert planner.restore([("t", LAYOUT)], [(1, 2 * SLOT)], [part]) == ([], [(part, 0)])
    planner.check_integrity()


def test_a_smaller_capacity_at_a_start_drops_extents_with_their_blocks() -> None:
    found = [(header(n), at(n)) for n in range(8)]
    planner, extents, refused = restored(found, nvme_slots=4)
    assert (extents, refused) == ([2], [])
    assert len(planner.catalog) == 4
