"""Time to the first token with the store, over that of computing everything.

The server's planner, which decides what is worth loading, lives in virtual time on tiers
without bytes (`kvstore.sim.shell`), whose drive is calculated from the table of hardware.
Requests come at random (Poisson). Each begins with tokens that lie on that drive,
asks for them, gets what the store says is worth it, and computes the rest; then what is new
is stored, so that write-backs run beside the loads. Nobody waits for the engine: it has as
many GPUs as there are requests, or the store would look better for the work it takes off
them.
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from kvstore.config_keys import Policy
from kvstore.core.cost import Prefill
from kvstore.core.space import Space
from kvstore.core.tickets import AcquireTicket, ReserveTicket
from kvstore.drive import Pace
from kvstore.parts import Gpu, Ssd, load_parts
from kvstore.plan.machine import Engine
from kvstore.sim.batches import Batches
from kvstore.sim.events import Events
from kvstore.sim.shell import MS, Shell, planner
from kvstore.tiers.base import RecoveredBlocks
from kvstore.types import ChainQuery, Hints, LayoutSpec, Segment, Tier
from kvstore_benchmarks.figures import finite, percentile

MODEL = "llama-3.1-8b"
BLOCK_TOKENS = 16
BLOCK_BYTES = BLOCK_TOKENS * 131_072
SPEC = LayoutSpec(MODEL, "bf16", BLOCK_TOKENS, BLOCK_BYTES)
TENANT = "t"
BATCHES = 4
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
NVME_BYTES = 4 << 40
REMEMBERED = 15


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


class Wait(NamedTuple):
    """What a request was given: when, and how many blocks."""

    asked_ns: int
    answered_ns: int
    held: int
    lease_id: int


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
    counters = life.planner.counters
    return {
        "requests": len(ratios),
        "seconds": finite(life.seconds, 1),
        "given": finite(sum(seen.given) / max(1, sum(seen.asked)), 3),
        "refused": sum(counters.refused.values()),
        "given_up": counters.given_up,
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
        # What is held was computed once, and somebody told how fast.
        self._tokens_per_s = deque([4096e3 / self._prefill.ms(4096)], REMEMBERED)
        self.seen = Seen()
        self.seconds = 0.0
        """Until the last request was over."""
        self._events = events = Events()
        self._began_ns = events.now_ns
        self._changes_ns = self._changed_ns = 0
        self._forecasts = 0
        self.planner = planner(
            Policy().eviction,
            Space(DRAM_BYTES, SLOT_EXTENT),
            Space(NVME_BYTES, SLOT_EXTENT),
            slot_bytes=lambda nbytes: nbytes,
            batches=BATCHES,
        )
        self._layout = self.planner.catalog.layout(
            TENANT, self.planner.register_layout(TENANT, SPEC)
        )
        if not case.turns:
            found = list(_found(self._prompts_in_order, self._layout.name))
            extents = [(extent, BLOCK_BYTES) for extent in range(len(found))]
            self.planner.restore([(TENANT, SPEC)], extents, found)
        self._session = self.planner.open_session(bytes(16), TENANT, local=True)
        self._drive = Batches(
            events,
            {
                Tier.DRAM: Pace(ssd.read_us * 1e3, 1 / ssd.read_gbps),
                Tier.NVME: Pace(ssd.write_us * 1e3, 1 / ssd.write_gbps),
            },
        )
        self._shell = Shell(self.planner, events, self._drive)

    def run(self) -> Seen:
        prompts = self._prompts_in_order
        middle_s = prompts[len(prompts) // 2].at_s
        self._changes_ns = self._began_ns + int((middle_s + LOADING_S) * 1e9)
        self._weather()
        self._events.at(self._changes_ns, self._weather, awaited=False)
        for prompt in prompts:
            at_ns = self._began_ns + int(prompt.at_s * 1e9)
            self._events.at(at_ns, partial(self._ask, prompt))
        self._events.run()
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

    def _weather(self, forecast: int | None = None) -> None:
        """How fast the drive is from now on, a moment at a time."""
        if forecast is not None and forecast != self._forecasts:
            return
        case, now_ns = self._case, self._events.now_ns
        changed = now_ns >= self._changes_ns and (
            case.then_s is None or now_ns < self._changes_ns + int(case.then_s * 1e9)
        )
        if changed and not self._changed_ns:
            self._changed_ns = now_ns
        speed = case.speed * (case.then if changed else 1.0)
        self._drive.set_speed(speed * self._rng.lognormvariate(0.0, case.noise))
        self._forecasts += 1
        again = partial(self._weather, self._forecasts)
        self._events.at(now_ns + int(NOISE_S * 1e9), again, awaited=False)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._events.at(self._events.now_ns + int(seconds * 1e9), call)

    def _ask(self, prompt: Prompt) -> None:
        now_ns = self._events.now_ns
        ticket = self.planner.acquire(
            self._session,
            [ChainQuery([self._layout.layout_id], prompt.keys)],
            wait=True,
            now_ns=now_ns,
            deadline_ns=now_ns + WAIT_MS * MS,
            hints=Hints(tokens_per_s=statistics.median(self._tokens_per_s)),
        )
        self._shell.wait(ticket, WAIT_MS, partial(self._load, prompt, ticket, now_ns))

    def _load(self, prompt: Prompt, ticket: AcquireTicket, asked_ns: int) -> None:
        assert ticket.answer is not None
        [grant] = ticket.answer
        copying_s = grant.held * BLOCK_BYTES / self._gpu.host_gbps / 1e9
        wait = Wait(asked_ns, self._events.now_ns, grant.held, grant.lease_id)
        self._later(
            CALL_S + BLOCK_S * len(prompt.keys) + copying_s, partial(self._compute, prompt, wait)
        )

    def _compute(self, prompt: Prompt, wait: Wait) -> None:
        if wait.held:
            self.planner.release(self._session, [wait.lease_id])
            self._shell.execute()
        tokens, given = len(prompt.keys) * BLOCK_TOKENS, wait.held * BLOCK_TOKENS
        computing_s = (self._prefill.ms(tokens) - self._prefill.ms(given)) / 1e3
        speed = (tokens - given) / computing_s
        self._later(computing_s, partial(self._answer, prompt, wait, speed))

    def _answer(self, prompt: Prompt, wait: Wait, tokens_per_s: float) -> None:
        self._tokens_per_s.append(tokens_per_s)
        seen, changed_ns, now_ns = self.seen, self._changed_ns, self._events.now_ns
        alone_s = self._prefill.ms(len(prompt.keys) * BLOCK_TOKENS) / 1e3
        seen.ours_s.append((now_ns - wait.asked_ns) / 1e9)
        seen.alone_s.append(alone_s)
        if self._case.then != 1.0 and wait.asked_ns < changed_ns < wait.answered_ns:
            told_ns = now_ns - wait.asked_ns - (wait.answered_ns - changed_ns)
            seen.told.append(told_ns / 1e9 / alone_s)
        seen.asked.append(prompt.held)
        seen.given.append(wait.held)
        self._reserve(prompt.keys, wait.held)

    def _reserve(self, keys: Sequence[bytes], held: int) -> None:
        ticket = self.planner.reserve(
            self._session, self._layout.layout_id, len(keys) - held,
            wait=False, now_ns=self._events.now_ns,
        )  # fmt: skip
        self._shell.wait(ticket, 0, partial(self._store, keys, held, ticket))

    def _store(self, keys: Sequence[bytes], held: int, ticket: ReserveTicket) -> None:
        """What is new, as far as there is room at once."""
        assert ticket.answer is not None
        first, count = ticket.answer.first_slot, len(ticket.answer.addresses)
        parent = keys[held - 1] if held else b""
        new = keys[held : held + count]
        segment = Segment(parent, new, range(first, first + count), [0] * count)
        self.planner.commit(
            self._session, self._layout.layout_id, [segment], reserve=0,
            now_ns=self._events.now_ns,
        )  # fmt: skip
        self._shell.execute()
        self.seconds = (self._events.now_ns - self._began_ns) / 1e9


def _prefill_of(ssd: Ssd, gpu: Gpu) -> Prefill:
    return Engine(model=load_parts().model[MODEL], gpu=gpu, gpus=1, ssd=ssd, ssds=1).prefill


def _keys(number: int, blocks: int) -> list[bytes]:
    return [number.to_bytes(16, "big") + place.to_bytes(16, "big") for place in range(blocks)]


def _found(prompts: Sequence[Prompt], name: Callable[[bytes], bytes]) -> Iterable[RecoveredBlocks]:
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
        yield RecoveredBlocks(
            TENANT, SPEC.layout_id, BLOCK_BYTES,
            [stored for stored, _ in part], [parent for _, parent in part],
            [0] * len(part),
            [extent * SLOT_EXTENT + slot * BLOCK_BYTES for slot in range(len(part))],
        )  # fmt: skip
