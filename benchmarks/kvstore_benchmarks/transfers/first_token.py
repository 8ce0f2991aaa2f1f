"""Time to the first token with the store, over that of computing everything.

The real store (`kvstore.store`, with the planner that decides what is worth loading) lives
in virtual time on tiers without bytes, whose drive is calculated from the table of
hardware. Requests come at random (Poisson). Each begins with tokens that lie on that drive,
asks for them, gets what the store says is worth it, and computes the rest; then what is new
is stored, so that write-backs run beside the loads. Nobody waits for the engine: it has as
many GPUs as there are requests, or the store would look better for the work it takes off
them.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from kvstore.config import StoreConfig
from kvstore.core.cost import Prefill
from kvstore.naming import namer
from kvstore.parts import Gpu, Ssd, load_parts
from kvstore.plan.machine import Engine
from kvstore.store import Session, Store
from kvstore.tiers.base import RecoveredBlocks
from kvstore.types import ChainQuery, Hints, LayoutSpec, Segment
from kvstore_benchmarks.figures import finite, percentile
from kvstore_benchmarks.transfers.imagined import (
    CHECKSUM,
    DriveLoop,
    ImaginedMemory,
    ImaginedStorage,
)

MODEL = "llama-3.1-8b"
BLOCK_TOKENS = 16
BLOCK_BYTES = BLOCK_TOKENS * 131_072
SPEC = LayoutSpec(MODEL, "bf16", BLOCK_TOKENS, BLOCK_BYTES)
TENANT = "t"
SECRET = b"s"
LENGTHS = (2048, 4096, 8192, 16384)
"""Tokens of a prompt, each as often."""
PARTS_HELD = (0.5, 0.95)
"""Of a prompt, from this much to that."""
MEAN_HELD_BYTES = sum(LENGTHS) / len(LENGTHS) * sum(PARTS_HELD) / 2 * 131_072
TURNS = 4
CALL_S = 0.0002
BLOCK_S = 2e-7
"""What an acquire takes beside waiting, and more for each block."""
WAIT_MS = 10_000
LOADING_S = 0.03
"""After this time the request in the middle is in the middle of its load."""
NOISE_S = 0.1
"""A drive's speed changes as often."""
SLOT_EXTENT = 64 * BLOCK_BYTES
DRAM_BYTES = 64 << 30
REMEMBERED = 15
EXACT_S = 1e-6
LONGEST_S = 3600
"""After the last request all is soon over."""


@dataclass(frozen=True, slots=True)
class Case:
    """`reads`: what is asked for, as a part of what the drive reads at its full speed.
    `speed`: of that, all the time; `then`: from the middle on, while the request in the middle
    waits, for `then_s` seconds, or to the end. `noise`: standard deviation of the speed's
    logarithm. `turns`: nothing is held at first, and conversations go on."""

    name: str
    reads: float
    ssd: str = "gen4"
    gpu: str = "h100"
    speed: float = 1.0
    then: float = 1.0
    then_s: float | None = None
    noise: float = 0.2
    turns: bool = False


CASES = (
    Case("as named", 0.5),
    Case("cold cache", 0.5, turns=True),
    Case("slow disk", 0.3, speed=0.1),
    Case("slow disk, slow GPU", 0.15, gpu="a100", speed=0.06),
    Case("as fast as computing", 0.3, speed=0.6, noise=0.4),
    Case("overload, twofold", 2.0),
    Case("ten times slower from the middle on", 0.3, then=0.1),
    Case("hangs for 30 s in the middle", 0.3, then=0.0, then_s=30.0),
)


@dataclass(slots=True)
class Prompt:
    """`held`: blocks of it that may be held."""

    at_s: float
    keys: list[bytes]
    held: int


@dataclass(slots=True)
class Seen:
    """A request each: time to the first token with the store, without, seconds; and the
    blocks that were asked for and given."""

    ours_s: list[float] = field(default_factory=list)
    alone_s: list[float] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    told: list[float] = field(default_factory=list)
    """Ratios of those that waited when the drive changed, had they been told so then and
    gone on to compute at once."""

    @property
    def ratios(self) -> list[float]:
        return [ours / alone for ours, alone in zip(self.ours_s, self.alone_s, strict=True)]


def figures_of(case: Case, requests: int, seed: int) -> dict[str, Any]:
    life = Life(case, requests, seed)
    seen = life.run()
    ratios = seen.ratios
    stats = life.store.transfer_stats()
    return {
        "requests": len(ratios),
        "seconds": finite(life.seconds, 1),
        "given": finite(sum(seen.given) / max(1, sum(seen.asked)), 3),
        "refused": sum(stats.refused.values()),
        "given_up": stats.given_up,
        "ratio_p50": finite(percentile(ratios, 50), 3),
        "ratio_p99": finite(percentile(ratios, 99), 3),
        "ratio_worst": finite(max(ratios), 3),
        "waited_at_change": len(seen.told),
        "told_worst": finite(max(seen.told, default=1.0), 3),
        "ratio_mean": finite(statistics.fmean(ratios), 3),
        "time_saved": finite(1 - sum(seen.ours_s) / sum(seen.alone_s), 3),
        "loss_mean": finite(statistics.fmean(max(0.0, ratio - 1) for ratio in ratios), 4),
    }


class Life:
    """One case, from the start of the store to its end."""

    def __init__(self, case: Case, requests: int, seed: int) -> None:
        parts = load_parts()
        self._case = case
        self._rng = random.Random(seed)
        ssd, self._gpu = parts.ssd[case.ssd], parts.gpu[case.gpu]
        self._prefill = _prefill_of(ssd, self._gpu)
        self._rate = case.reads * ssd.read_gbps * 1e9 / MEAN_HELD_BYTES
        make = self._conversations if case.turns else self._prompts
        self._prompts_in_order = sorted(make(requests), key=lambda prompt: prompt.at_s)
        self._ends_s = self._prompts_in_order[-1].at_s
        middle = self._prompts_in_order[len(self._prompts_in_order) // 2]
        self._changes_s = middle.at_s + LOADING_S
        held = [] if case.turns else self._prompts_in_order
        name = namer(SECRET, SPEC.layout_id)
        storage = ImaginedStorage(
            SLOT_EXTENT, 4 << 40, ssd, lambda: _found(held, name), [(TENANT, asdict(SPEC))]
        )
        self._loop = DriveLoop(storage, ssd.depth)
        # What is held was computed once, and somebody told how fast.
        self._tokens_per_s = deque([4096e3 / self._prefill.ms(4096)], REMEMBERED)
        self.seen = Seen()
        self.seconds = self._began_s = 0.0
        self._changed_s: float | None = None
        self._forecast: asyncio.TimerHandle | None = None
        asyncio.set_event_loop(self._loop)
        self.store = Store(
            config=StoreConfig(dram_capacity_bytes=0, nvme_capacity_bytes=0),
            clock=self._loop,
            dram=ImaginedMemory(SLOT_EXTENT, DRAM_BYTES),
            nvme=storage,
            tenant_key=lambda tenant: SECRET,
            executor=ThreadPoolExecutor(1),
            observer=_Nobody(),
        )

    def run(self) -> Seen:
        loop = self._loop
        try:
            loop.run_until_complete(self._live())
        finally:
            asyncio.set_event_loop(None)
            loop.close()
        return self.seen

    def _prompts(self, requests: int) -> Iterator[Prompt]:
        """Each of its own, and on the drive in part."""
        rng, at_s = self._rng, 0.0
        for number in range(requests):
            at_s += rng.expovariate(self._rate)
            blocks = rng.choice(LENGTHS) // BLOCK_TOKENS
            yield Prompt(at_s, _keys(number, blocks), int(blocks * rng.uniform(*PARTS_HELD)))

    def _conversations(self, requests: int) -> Iterator[Prompt]:
        """Each turn begins with all of the one before."""
        rng, at_s = self._rng, 0.0
        for number in range(requests // TURNS):
            at_s += rng.expovariate(self._rate / TURNS)
            blocks, turn_s = 0, at_s
            for _ in range(TURNS):
                held, blocks = blocks, blocks + rng.choice(LENGTHS) // 2 // BLOCK_TOKENS
                yield Prompt(turn_s, _keys(number, blocks), held)
                turn_s += 5 + rng.expovariate(1 / 60)

    async def _live(self) -> None:
        loop, store = self._loop, self.store
        await store.start()
        began_s = self._began_s = loop.time()
        loop.ends_s = began_s + self._ends_s + LONGEST_S
        self._weather()
        loop.call_at(began_s + self._changes_s, self._weather)
        session = store.open_session(TENANT, local=True)
        tasks = []
        for prompt in self._prompts_in_order:
            await asyncio.sleep(max(0.0, began_s + prompt.at_s - loop.time()))
            tasks.append(loop.create_task(self._request(session, prompt)))
        await asyncio.gather(*tasks)
        self.seconds = loop.time() - began_s
        if self._forecast is not None:
            self._forecast.cancel()
        loop.set_speed(1.0)
        store.close_session(session)
        await store.close()

    def _weather(self) -> None:
        """How fast the drive is from now on, a moment at a time."""
        case, loop = self._case, self._loop
        if self._forecast is not None:
            self._forecast.cancel()
        since_s = loop.time() - self._began_s - self._changes_s
        changed = -EXACT_S <= since_s < (case.then_s or math.inf)
        if changed and self._changed_s is None:
            self._changed_s = loop.time()
        speed = case.speed * (case.then if changed else 1.0)
        loop.set_speed(speed * self._rng.lognormvariate(0.0, case.noise))
        self._forecast = loop.call_later(NOISE_S, self._weather)

    async def _request(self, session: Session, prompt: Prompt) -> None:
        loop, store, prefill = self._loop, self.store, self._prefill
        asked_s = loop.time()
        speed = statistics.median(self._tokens_per_s)
        asked = ChainQuery([SPEC.layout_id], prompt.keys)
        [grant] = await store.acquire(session, [asked], WAIT_MS, Hints(tokens_per_s=speed))
        answered_s = loop.time()
        copying_s = grant.held * BLOCK_BYTES / self._gpu.host_gbps / 1e9
        await asyncio.sleep(CALL_S + BLOCK_S * len(prompt.keys) + copying_s)
        if grant.held:
            store.release(session, [grant.lease_id])
        tokens, given = len(prompt.keys) * BLOCK_TOKENS, grant.held * BLOCK_TOKENS
        computing_s = (prefill.ms(tokens) - prefill.ms(given)) / 1e3
        await asyncio.sleep(computing_s)
        self._tokens_per_s.append((tokens - given) / computing_s)
        seen = self.seen
        seen.ours_s.append(loop.time() - asked_s)
        seen.alone_s.append(prefill.ms(tokens) / 1e3)
        changed_s = self._changed_s
        if self._case.then != 1.0 and changed_s is not None and asked_s < changed_s < answered_s:
            seen.told.append((seen.ours_s[-1] - answered_s + changed_s) / seen.alone_s[-1])
        seen.asked.append(prompt.held)
        seen.given.append(grant.held)
        await self._store(session, prompt.keys, grant.held)

    async def _store(self, session: Session, keys: Sequence[bytes], held: int) -> None:
        """What is new, as far as there is room at once."""
        store, new = self.store, keys[held:]
        slots = await store.reserve(session, SPEC.layout_id, len(new), 0)
        new = new[: len(slots.addresses)]
        parent = keys[held - 1] if held else b""
        named = range(slots.first_slot, slots.first_slot + len(new))
        segment = Segment(parent, new, named, [CHECKSUM] * len(new))
        await store.commit(session, SPEC.layout_id, [segment], 0)


class _Nobody:
    """A `StoreObserver`."""

    def transfer_done(self, src: str, dst: str, kind: str, nbytes: int, seconds: float) -> None: ...
    def evicted(self, tier: str, reason: str, blocks: int) -> None: ...
    def io_error(self, op: str, errno_name: str) -> None:
        raise AssertionError(f"{op}: {errno_name}")

    def corrupt(self, tier: str) -> None: ...
    def tier_off(self, tier: str) -> None: ...
    def coded(self, codec: str, src: str, dst: str) -> None: ...


def _prefill_of(ssd: Ssd, gpu: Gpu) -> Prefill:
    return Engine(model=load_parts().model[MODEL], gpu=gpu, gpus=1, ssd=ssd, ssds=1).prefill


def _keys(number: int, blocks: int) -> list[bytes]:
    return [number.to_bytes(16, "big") + place.to_bytes(16, "big") for place in range(blocks)]


def _found(prompts: Sequence[Prompt], name: Any) -> Iterable[tuple[int, int, RecoveredBlocks]]:
    """What the drive holds of them at the start, an extent at a time."""
    columns: list[tuple[bytes, bytes]] = []
    for prompt in prompts:
        parent = b""
        for key in prompt.keys[: prompt.held]:
            stored = name(key)
            columns.append((stored, parent))
            parent = stored
    slots = SLOT_EXTENT // BLOCK_BYTES
    for extent, begin in enumerate(range(0, len(columns), slots)):
        part = columns[begin : begin + slots]
        yield extent, BLOCK_BYTES, RecoveredBlocks(
            TENANT, SPEC.layout_id, BLOCK_BYTES,
            [stored for stored, _ in part], [parent for _, parent in part],
            [CHECKSUM] * len(part),
            [extent * SLOT_EXTENT + slot * BLOCK_BYTES for slot in range(len(part))],
        )  # fmt: skip
