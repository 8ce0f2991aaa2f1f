"""What routers are told: what the store holds, no more and no less, as vLLM names it."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request

from kvstore.types import ChainPresence
from kvstore_connectors.vllm import events
from kvstore_connectors.vllm.events import StoreEvents
from kvstore_connectors.vllm.groups import Rule
from tests.unit.connectors.fakes import BLOCK_TOKENS, attached, bands_with, spec

FULL = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32)
WINDOW = SlidingWindowSpec(
    block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=8
)


class Directory:
    """How much of each run every shard holds, and how much of that is in DRAM."""

    def __init__(self) -> None:
        self.tiers: dict[bytes, str] = {}
        self.looks = 0

    def peek(self, layout_ids: list[bytes], keys: list[bytes]) -> ChainPresence:
        self.looks += 1
        found = [self.tiers.get(key, "") for key in keys]
        held = next((at for at, tier in enumerate(found) if not tier), len(keys))
        in_dram = next((at for at, tier in enumerate(found) if tier != "dram"), len(keys))
        return ChainPresence(held, in_dram)

    def put(self, keys: list[bytes], tier: str = "dram") -> None:
        self.tiers |= dict.fromkeys(keys, tier)


class Router:
    """What a consumer of the events believes: (medium, group, hash), and what it knows."""

    def __init__(self) -> None:
        self.claims: set[tuple[str | None, int | None, Any]] = set()
        self.known: set[tuple[int | None, Any]] = set()

    def apply(self, batch: list[Any]) -> None:
        for event in batch:
            if isinstance(event, AllBlocksCleared):
                self.claims.clear()
            elif isinstance(event, BlockStored):
                assert len(event.token_ids) == len(event.block_hashes) * event.block_size
                parent = event.parent_block_hash
                assert parent is None or (event.group_idx, parent) in self.known, "unanchored"
                new = {(event.medium, event.group_idx, each) for each in event.block_hashes}
                assert not new & self.claims, "announced twice"
                self.claims |= new
                self.known |= {(event.group_idx, each) for each in event.block_hashes}
            else:
                assert isinstance(event, BlockRemoved)
                gone = {(event.medium, event.group_idx, each) for each in event.block_hashes}
                assert gone <= self.claims, "withdrawn, but never announced"
                self.claims -= gone


class World:
    def __init__(self, most_blocks: int = 1000, rules: tuple[Rule, ...] = (Rule(),)) -> None:
        init_none_hash(sha256)
        self.now_s = 100.0
        self.directory = Directory()
        specs = [spec(group=group) for group in range(len(rules))]
        current = attached(specs, self.directory)
        link: Any = SimpleNamespace(up=True, generation=1, current=current)
        self.link = link
        kinds = [FULL if rule.is_full else WINDOW for rule in rules]
        config: Any = SimpleNamespace(kv_cache_groups=[KVCacheGroupSpec(["l"], k) for k in kinds])
        self.events = StoreEvents(
            self.link, bands_with(*rules), config, most_blocks, lambda: self.now_s
        )
        self.pool = BlockPool(64, True, BLOCK_TOKENS, enable_kv_cache_events=True)
        self.events.bind_pool(self.pool)
        self.router = Router()
        self.storing = False

    def request(self, tokens: list[int], **options: Any) -> Request:
        hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        parameters = SamplingParams(max_tokens=1)
        return Request("r", tokens, parameters, None, block_hasher=hasher, **options)

    def came_by(self, tokens: list[int], **options: Any) -> list[bytes]:
        """Keys of the prompt's blocks."""
        request = self.request(tokens, **options)
        self.events.note(request)
        return [bytes(each) for each in request.block_hashes]

    def step(self, after_s: float = 0.1) -> list[Any]:
        self.now_s += after_s
        batch: list[Any] = self.pool.take_events()
        batch += self.events.take(self.storing)
        self.events.check_integrity()
        self.router.apply(batch)
        return batch

    def claimed(self, medium: str) -> int:
        return sum(claim[0] == medium for claim in self.router.claims)


def prompt(blocks: int, seed: int = 0) -> list[int]:
    return [seed * 1000 + place for place in range(blocks * BLOCK_TOKENS)]


@pytest.mark.parametrize("salt", [None, "salt"])
@pytest.mark.parametrize("ints", ["0", "1"])
def test_blocks_are_named_as_vllm_names_its_own(
    monkeypatch: pytest.MonkeyPatch, salt: str | None, ints: str
) -> None:
    """But for the medium, and what vLLM leaves out of its own."""
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", ints)
    world = World()
    request = world.request([*prompt(3), 9], cache_salt=salt, session_id="s")
    blocks = world.pool.get_new_blocks(3)
    world.pool.cache_full_blocks(request, blocks, 0, 3, BLOCK_TOKENS, 0)
    (own,) = world.pool.take_events()
    world.events.note(request)
    world.directory.put([bytes(each) for each in request.block_hashes])
    (ours,) = world.step()
    assert isinstance(own, BlockStored)
    assert (own.medium, ours.medium) == ("GPU", "CPU")
    own.medium, own.kv_cache_spec_kind = "CPU", "full_attention"
    assert ours == own


def test_what_was_not_stored_is_not_announced() -> None:
    world = World()
    keys = world.came_by(prompt(4))
    assert world.step() == []
    world.directory.put(keys[:2])
    world.step()
    assert world.claimed("CPU") == 2
    world.directory.put(keys)
    (grown,) = world.step()
    assert len(grown.block_hashes) == 2 and grown.token_ids == prompt(4)[2 * BLOCK_TOKENS :]
    assert world.step() == []


def test_a_shared_front_is_announced_once_and_is_the_parent_of_the_rest() -> None:
    world = World()
    world.directory.put(world.came_by(prompt(3)))
    world.step()
    world.directory.put(world.came_by(prompt(3) + prompt(2, seed=1)))
    (rest,) = world.step()
    assert len(rest.block_hashes) == 2 and rest.parent_block_hash is not None


def test_what_is_evicted_is_withdrawn() -> None:
    world = World()
    keys = world.came_by(prompt(4))
    world.directory.put(keys)
    world.step()
    del world.directory.tiers[keys[3]]
    (gone,) = world.step(after_s=2)
    assert isinstance(gone, BlockRemoved) and len(gone.block_hashes) == 1
    world.directory.tiers.clear()
    world.step(after_s=2)
    assert not world.router.claims


def test_an_end_that_is_on_disk_alone_puts_the_whole_prompt_there() -> None:
    """Routers follow a medium from the first block: without the front the rest is nothing."""
    world = World()
    front = world.came_by(prompt(3))
    world.directory.put(front)
    world.step()
    whole = world.came_by(prompt(3) + prompt(3, seed=1))
    world.directory.put(whole)
    world.step()
    assert (world.claimed("CPU"), world.claimed("STORAGE")) == (6, 0)
    world.directory.put(whole[4:], "disk")
    world.step(after_s=2)
    assert (world.claimed("CPU"), world.claimed("STORAGE")) == (4, 6)
    world.directory.put(whole)
    world.step(after_s=2)
    assert (world.claimed("CPU"), world.claimed("STORAGE")) == (6, 6)


def test_what_the_store_holds_is_announced_again_when_vllm_announced_that_all_is_gone() -> None:
    world = World()
    world.directory.put(world.came_by(prompt(4)))
    world.step()
    assert world.pool.reset_prefix_cache()
    cleared, *again = world.step()
    assert isinstance(cleared, AllBlocksCleared)
    assert [type(each) for each in again] == [BlockStored]
    assert world.claimed("CPU") == 4


def test_an_engine_steps_until_everything_is_announced_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "MOST_A_STEP", 2)
    world = World()
    for seed in range(5):
        world.directory.put(world.came_by(prompt(2, seed)))
        world.step()
    world.pool.reset_prefix_cache()
    world.step(after_s=0)
    steps = 0
    while world.events.pending:
        world.step(after_s=0)
        steps += 1
    assert steps == 2 and world.claimed("CPU") == 10


def test_the_last_blocks_stored_are_announced_before_an_engine_goes_to_sleep() -> None:
    world = World()
    keys = world.came_by(prompt(4))
    world.storing = True
    world.step()
    world.directory.put(keys)
    world.storing = False
    world.step(after_s=0)
    assert world.claimed("CPU") == 4


def test_after_a_reset_of_the_connector_nothing_is_announced() -> None:
    world = World()
    world.directory.put(world.came_by(prompt(4)))
    world.step()
    world.events.forget_all()
    assert [type(each) for each in world.step(after_s=2)] == [BlockRemoved]
    assert not world.router.claims


def test_what_vllm_has_declared_gone_is_not_withdrawn_as_well() -> None:
    world = World()
    world.directory.put(world.came_by(prompt(4)))
    world.step()
    world.pool.reset_prefix_cache()
    world.events.forget_all()
    assert [type(each) for each in world.step()] == [AllBlocksCleared]


def test_what_is_forgotten_for_want_of_room_is_withdrawn() -> None:
    world = World(most_blocks=10)
    for seed in range(5):
        world.directory.put(world.came_by(prompt(4, seed)))
        world.step()
        world.came_by(prompt(4, 0))
    assert world.claimed("CPU") == 8
    world.directory.put(world.came_by(prompt(4, 0)))
    assert world.step() == [], "the prompt that keeps coming was forgotten"


def test_a_lost_server_is_waited_for_before_all_is_withdrawn() -> None:
    world = World()
    world.directory.put(world.came_by(prompt(4)))
    world.step()
    current, world.link.current, world.link.up = world.link.current, None, False
    assert world.step(after_s=1) == []
    assert len(world.step(after_s=5)) == 1
    assert world.step(after_s=5) == [] and not world.router.claims
    world.link.current, world.link.up, world.link.generation = current, True, 2
    world.step(after_s=0)
    assert world.claimed("CPU") == 4


def test_windows_and_adapters_are_not_announced() -> None:
    world = World(rules=(Rule(window=8), Rule()))
    world.directory.put(world.came_by(prompt(4)))
    assert {event.group_idx for event in world.step()} == {1}
    adapter: Any = SimpleNamespace(lora_name="a", lora_path="a")
    world.directory.put(world.came_by(prompt(4, seed=1), lora_request=adapter))
    assert world.step(after_s=2) == []


def test_a_step_looks_at_a_bounded_number_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_A_STEP", 8)
    world = World(most_blocks=10_000)
    for seed in range(100):
        world.came_by(prompt(2, seed))
    for _ in range(5):
        before = world.directory.looks
        world.step(after_s=40)
        assert world.directory.looks - before <= 8 + events.OLD_A_STEP


@pytest.mark.parametrize("seed", range(4))
def test_in_the_end_a_router_believes_what_the_directory_says(seed: int) -> None:
    rng = random.Random(seed)
    world = World(most_blocks=60)
    stems = [prompt(rng.randrange(1, 5), each) for each in range(6)]
    chains: list[list[bytes]] = []
    for _ in range(300):
        choice = rng.random()
        if choice < 0.3:
            tokens = rng.choice(stems) + prompt(rng.randrange(4), rng.randrange(10, 40))
            chains.append(world.came_by([*tokens, 7]))
        elif choice < 0.6 and chains:
            chain = rng.choice(chains)
            world.directory.put(chain[: rng.randrange(len(chain) + 1)])
        elif choice < 0.8 and chains:
            # Down to disk, from the end; of every chain that goes on from there.
            cut = rng.choice([each for chain in chains for each in chain] or [b""])
            tier = rng.choice(["disk", ""])
            for chain in chains:
                at = chain.index(cut) if cut in chain else len(chain)
                world.directory.put([k for k in chain[at:] if world.directory.tiers.get(k)], tier)
        elif choice < 0.82:
            world.pool.reset_prefix_cache()
        world.step(after_s=rng.choice([0.0, 0.01, 0.1, 2.0]))
    for _ in range(60):
        world.step(after_s=2)
    remembered = {key for run in world.events._runs for key in run.keys}
    tiers = {key: world.directory.tiers.get(key, "") for key in remembered}
    cpu = {claim[2] for claim in world.router.claims if claim[0] == "CPU"}
    storage = {claim[2] for claim in world.router.claims if claim[0] == "STORAGE"}
    in_dram = set(events._hashes([key for key in tiers if tiers[key] == "dram"]))
    on_disk = set(events._hashes([key for key in tiers if tiers[key] == "disk"]))
    assert cpu == in_dram
    assert on_disk <= storage <= on_disk | in_dram
