"""Which position of a prompt is offered: the longest where everything is held and leased."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence

import pytest

from kvstore.types import ChainQuery
from kvstore_connectors.vllm import acquire as module
from kvstore_connectors.vllm.acquire import AcquireQueue, TicketState
from kvstore_connectors.vllm.groups import Band, Bands, Rule
from kvstore_connectors.vllm.held import Held
from kvstore_connectors.vllm.link import StoreLink
from kvstore_connectors.vllm.positions import (
    Wanted,
    full_position,
    longest_position,
    queries,
)
from tests.unit.connectors.fakes import BLOCK_TOKENS, FULL, FakeStore, bands_with, prefills_at, spec

KEYS = [bytes([number]) * 32 for number in range(12)]
HYBRID = bands_with(Rule(), Rule(window=6), Rule(state=True))
"""Needs at block n: all before, the last two, and the last."""


def wanted(blocks: int = len(KEYS), floor: int = 0) -> Wanted:
    return Wanted({BLOCK_TOKENS: KEYS[:blocks]}, blocks * BLOCK_TOKENS, floor * BLOCK_TOKENS)


class World:
    def __init__(self, bands: Bands, world: int = 1, weighs: bool = True) -> None:
        self.bands = bands
        self.store = FakeStore()
        self.store.blocks = {key: key * 2 for key in KEYS}
        self.specs = [
            spec(rank, world, group=group) for group in bands.groups for rank in range(world)
        ]
        self.link = StoreLink(self.store.connect, self.specs, "test")
        self.link.start()
        assert self.link.wait_attached(30)
        self.queue = AcquireQueue(self.link, bands, 10, weighs)
        self.queue.start()

    def lacks(self, group: int, *blocks: int, rank: int = 0) -> None:
        world = len(self.specs) // len(self.bands.groups)
        layout_id = self.specs[group * world + rank].layout_id
        self.store.missing |= {(layout_id, KEYS[block]) for block in blocks}

    def ask(self, asked: Wanted) -> Held:
        ticket = self.queue.submit(lambda: asked)
        self.queue.wake()
        deadline = time.monotonic() + 30
        while ticket.state in (TicketState.WAITING, TicketState.SENT):
            assert time.monotonic() < deadline, "no answer"
            time.sleep(0.001)
        assert ticket.held is not None
        return ticket.held

    def close(self) -> None:
        self.queue.close()
        self.link.close()


@pytest.fixture(params=[True, False], ids=["directory", "calls only"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(HYBRID)
    world.store.shows_directory = request.param
    yield world
    world.close()


def test_all_groups_are_leased_at_one_position(world: World) -> None:
    held = world.ask(wanted())
    assert held.tokens == held.full_tokens == 12 * BLOCK_TOKENS
    taken = {str(taken.band.rule): taken for taken in held.taken}
    spans = {rule: (each.first, len(each.addresses[0])) for rule, each in taken.items()}
    assert spans == {"full": (0, 12), "window 6": (10, 2), "state": (11, 1)}
    assert len(held.lease_ids) == len(world.store.leases) == 3


def test_a_lacking_window_sends_the_search_to_a_shorter_position(world: World) -> None:
    world.lacks(1, 10)
    held = world.ask(wanted())
    assert held.tokens == 10 * BLOCK_TOKENS
    assert held.full_tokens == 12 * BLOCK_TOKENS
    assert len(world.store.leases) == 3, "what was leased in vain is given back"


def test_a_lacking_front_cuts_all_groups_short(world: World) -> None:
    world.lacks(0, *range(7, 12))
    held = world.ask(wanted())
    assert held.tokens == held.full_tokens == 7 * BLOCK_TOKENS
    assert [taken.first for taken in held.taken if taken.band.rule.window] == [5]


def test_nothing_below_what_the_engine_has_is_leased() -> None:
    world = World(HYBRID)
    world.store.shows_directory = True
    world.lacks(2, *range(6, 12))
    held = world.ask(wanted(floor=6))
    assert (held.tokens, held.full_tokens) == (0, 12 * BLOCK_TOKENS)
    assert not world.store.leases
    assert "acquire" not in world.store.calls
    world.close()


def test_of_what_the_engine_has_nothing_is_pinned() -> None:
    """Nor brought up from a slower tier, nor counted as handed out."""
    world = World(HYBRID)
    held = world.ask(wanted(floor=11))
    asked = {len(chain.keys) for call in world.store.acquired for chain in call}
    assert (held.floor, held.tokens, asked) == (11 * BLOCK_TOKENS, 12 * BLOCK_TOKENS, {1})
    assert {taken.first for taken in held.taken} == {11}
    world.close()


def test_a_position_counts_only_if_every_rank_has_it() -> None:
    world = World(HYBRID, world=2)
    world.store.shows_directory = True
    world.lacks(0, *range(9, 12), rank=1)
    world.lacks(2, 8, rank=1)
    held = world.ask(wanted())
    assert held.tokens == 8 * BLOCK_TOKENS
    (full,) = (taken for taken in held.taken if taken.band.rule.is_full)
    assert [len(each) for each in full.addresses] == [8, 8]
    world.close()


def test_a_chain_longer_than_a_call_allows_is_leased_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 5)
    world = World(FULL)
    held = world.ask(wanted())
    assert held.tokens == 12 * BLOCK_TOKENS
    assert [[len(c.keys) for c in call] for call in world.store.acquired] == [[5], [5], [2]]
    assert len(held.taken[0].addresses[0]) == 12
    world.lacks(0, 7)
    held = world.ask(wanted())
    assert held.tokens == 7 * BLOCK_TOKENS
    assert len(held.taken[0].addresses[0]) == 7
    world.close()


def test_only_full_attention_is_cut_where_the_store_says() -> None:
    world = World(FULL)
    world.lacks(0, 4)
    assert world.ask(wanted()).tokens == 4 * BLOCK_TOKENS
    assert len(world.store.acquired) == 1
    world.close()


@pytest.mark.parametrize("seed", range(30))
def test_the_position_found_is_the_longest_there_is(seed: int) -> None:
    """Against trying every position and every block."""
    rng = random.Random(seed)
    rules = rng.choice(
        [
            (Rule(), Rule(window=6)),
            (Rule(), Rule(state=True), Rule(window=9)),
            (Rule(window=5),),
            (Rule(), Rule(chunk=3 * BLOCK_TOKENS)),
        ]
    )
    bands = bands_with(*rules)
    held: dict[Band, set[bytes]] = {}
    for band in bands.bands:
        if band.rule.is_full:
            held[band] = set(KEYS[: rng.randrange(len(KEYS) + 1)])
        else:
            held[band] = {key for key in KEYS if rng.random() < 0.7}

    def look(band: Band, keys: Sequence[bytes]) -> int:
        return len(list(itertools.takewhile(held[band].__contains__, keys)))

    floor = rng.randrange(4)
    asked = wanted(floor=floor)
    limit = full_position(bands, asked, asked.limit, look)
    assert limit is not None
    found = longest_position(bands, asked, limit, look)

    def possible(blocks: int) -> bool:
        spans = ((band, band.span(blocks * BLOCK_TOKENS)) for band in bands.bands)
        return all(set(KEYS[first:last]) <= held[band] for band, (first, last) in spans)

    right = [n for n in range(floor + 1, len(KEYS) + 1) if possible(n)]
    assert found == max(right, default=0) * BLOCK_TOKENS


def test_what_is_asked_for_names_every_layout_of_a_band() -> None:
    made = queries(HYBRID, wanted(), 12 * BLOCK_TOKENS, lambda band: [b"one", b"two"], 100)
    assert [query.chain for query in made] == [
        ChainQuery([b"one", b"two"], KEYS),
        ChainQuery([b"one", b"two"], KEYS[11:]),
        ChainQuery([b"one", b"two"], KEYS[10:]),
    ]


def test_chains_that_are_needed_together_are_not_weighed_one_by_one(world: World) -> None:
    """A single state may take longer to load than its tokens to compute, and spares all
    tokens before it."""
    prefills_at(world.queue.prefill, 1e6)
    world.ask(wanted())
    assert world.store.hints
    assert all(hints.tokens_per_s is None for hints in world.store.hints)


@pytest.mark.parametrize(("weighs", "told"), [(True, 1e6), (False, None)])
def test_an_engine_that_is_to_be_spared_loads_what_it_would_compute_sooner(
    weighs: bool, told: float | None
) -> None:
    world = World(FULL, weighs=weighs)
    prefills_at(world.queue.prefill, 1e6)
    world.ask(wanted())
    assert {hints.tokens_per_s for hints in world.store.hints} == {told}
    world.close()
