"""`kvstore bench evictions`: what it takes the server's planner to make room for a block
where DRAM is full of millions, and where most of them still wait to be written to NVMe.
Times are those of the processor, so that what runs beside it counts for little.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore.core.actions import Copy, Forget, Move
from kvstore.core.catalog import Replica
from kvstore.core.limits import Limits
from kvstore.core.places.pool import Pool
from kvstore.core.places.shortlist import MayGo
from kvstore.core.planner import Planner
from kvstore.core.space import SpaceClass
from kvstore.errors import BadRequest
from kvstore.sim.events import BEGIN_NS
from kvstore.sim.machine import Machine, Tiers, nvme_slot_bytes, room_in
from kvstore.sim.replay import uncollected
from kvstore.sim.stacks import policy_of_a_server
from kvstore.types import ALIGNMENT, KEY_BYTES, ChainQuery, LayoutSpec, Reuse, Segment
from kvstore_benchmarks.figures import quantiles
from kvstore_benchmarks.progress import progress

PIECE = 16
"""Blocks that a call reserves, as the connector stores a prompt of large blocks."""
BEGUN, GROWN = 3, 2
"""Pieces of a conversation's first prompt, and of what each further one adds."""
CONVERSATIONS = 2000
"""That may be gone on with, the latest."""
SETTLING = 4000
"""Calls after DRAM is full, before any is measured."""
LEAST, MOST = 1000, 4_000_000
_TENANT = "bench"
_MS = 1_000_000


@dataclass(frozen=True)
class Options:
    policies: tuple[str, ...] = ("worth", "lru")
    blocks: int = 1_000_000
    calls: int = 2000


QUICK = Options(blocks=20_000, calls=200)


class Planned:
    """A planner whose DRAM is full. `pressed`: behind it is NVMe, which writes one block
    for each that comes from then on, so that all but a few still wait for it."""

    def __init__(self, policy: str, blocks: int, *, pressed: bool) -> None:
        nvme_bytes = 2 * blocks * nvme_slot_bytes(ALIGNMENT) if pressed else 0
        machine = Machine(kv_bytes=ALIGNMENT / 16)
        room = room_in(Tiers(blocks * ALIGNMENT, nvme_bytes), machine, block_tokens=16)
        self.planner = Planner(
            Limits(10_000, 10_000, 1, 16, 16, 1, machine.batches),
            tenant_key=str.encode,
            eviction=policy,
            dram=room.dram,
            nvme=room.nvme,
            nvme_slot_bytes=nvme_slot_bytes if pressed else None,
        )
        spec = LayoutSpec("bench", "bf16", 16, ALIGNMENT)
        self._layout_id = self.planner.register_layout(_TENANT, spec)
        self._session = self.planner.open_session(b"bench", _TENANT, local=True)
        self._draw = random.Random(1)
        self._conversations: deque[list[bytes]] = deque(maxlen=CONVERSATIONS)
        self._writing: deque[Copy] = deque()
        self._now_ns = BEGIN_NS
        self._keys = self._requests = 0
        self.found_s: list[float] = []
        """Each search for one that may leave."""
        self.reserved_s: list[float] = []
        """Of a block, each call that reserved."""
        self.stored_s: list[float] = []
        """The same, with the commit and what follows from it."""
        self._time_searches(self.planner.residency.dram)
        self._written = 0
        while self.planner.residency.dram.space.free_slots(self._class) >= PIECE:
            self._serve()
        self._written = PIECE
        for _ in range(SETTLING // GROWN):
            self._serve()
        for samples in (self.found_s, self.reserved_s, self.stored_s):
            samples.clear()

    def _time_searches(self, pool: Pool) -> None:
        search = pool.coldest

        def timed(space_class: SpaceClass, may_go: MayGo) -> Replica | None:
            began = time.thread_time()
            found = search(space_class, may_go)
            self.found_s.append(time.thread_time() - began)
            return found

        pool.coldest = timed  # type: ignore[method-assign]

    @property
    def _class(self) -> SpaceClass:
        return self.planner.catalog.layout(_TENANT, self._layout_id).dram_class

    def measure(self, calls: int) -> None:
        while len(self.reserved_s) < calls:
            self._serve()

    def _serve(self) -> None:
        """A prompt: half of them go on with a conversation."""
        self._requests += 1
        reuse = Reuse(request=b"%d" % self._requests)
        pieces = BEGUN
        prompt: list[bytes] = []
        if self._conversations and self._draw.random() < 0.5:
            prompt, pieces = self._draw.choice(self._conversations), GROWN
            chain = ChainQuery([self._layout_id], prompt, reuse)
            ticket = self.planner.acquire(self._session, [chain], wait=False, now_ns=self._now_ns)
            assert ticket.answer is not None
            self.planner.release(self._session, [g.lease_id for g in ticket.answer if g.lease_id])
        else:
            self._conversations.append(prompt)
        for _ in range(pieces):
            self._store(prompt, reuse)

    def _store(self, prompt: list[bytes], reuse: Reuse) -> None:
        self._go_on()
        began = time.thread_time()
        ticket = self.planner.reserve(
            self._session, self._layout_id, PIECE, wait=False, now_ns=self._now_ns
        )
        reserved = time.thread_time()
        assert ticket.answer is not None
        first, count = ticket.answer.first_slot, len(ticket.answer.addresses)
        keys = [(self._keys + n).to_bytes(KEY_BYTES, "big") for n in range(count)]
        self._keys += count
        parent = prompt[-1] if prompt else b""
        segment = Segment(parent, keys, range(first, first + count), [0] * count, reuse)
        prompt += keys
        committing = time.thread_time()
        if count:
            self.planner.commit(
                self._session, self._layout_id, [segment], reserve=0, now_ns=self._now_ns
            )
            ended = time.thread_time()
            self.reserved_s.append((reserved - began) / count)
            self.stored_s.append((reserved - began + ended - committing) / count)

    def _go_on(self) -> None:
        """What the shell would do until the next call: the drive has written a piece, once
        there is no room without."""
        self._now_ns += _MS
        self._carry_out()
        for _ in range(min(self._written, len(self._writing))):
            self.planner.transfer_done(self._writing.popleft(), self._now_ns)
        self._carry_out()

    def _carry_out(self) -> None:
        while actions := self.planner.take_actions(self._now_ns):
            for action in actions:
                if isinstance(action, Move):
                    self._writing += action.copies
                elif isinstance(action, Forget):
                    self.planner.forgotten(action.replica)


def measure(policy: str, blocks: int, calls: int, *, pressed: bool) -> dict[str, Any]:
    """Microseconds a block."""
    with uncollected():
        planned = Planned(policy, blocks, pressed=pressed)
        planned.measure(calls)
    return {
        "policy": policy,
        "blocks": blocks,
        "pressed": pressed,
        "find_us": _us(planned.found_s),
        "evict_us": _us(planned.reserved_s),
        "store_us": _us(planned.stored_s),
    }


def _us(seconds: Sequence[float]) -> dict[str, Any]:
    each = [s * 1e6 for s in seconds]
    return {"mean": round(statistics.mean(each), 1), **quantiles(each)}


def run(options: Options, *, as_object: bool) -> int:
    """Raises `BadRequest`."""
    if not LEAST <= options.blocks <= MOST:
        raise BadRequest(f"from {LEAST} to {MOST} blocks can be measured, not {options.blocks}")
    names = [policy_of_a_server(name) for name in options.policies]
    found = []
    with progress() as step:
        for name in names:
            for pressed in (False, True):
                step(f"{name}{', most blocks unwritten' if pressed else ''}")
                found.append(measure(name, options.blocks, options.calls, pressed=pressed))
    if as_object:
        print(json.dumps(found, indent=2))
    else:
        _show(found, options.blocks)
    return 0


def _show(found: Sequence[dict[str, Any]], blocks: int) -> None:
    table = Table(title=f"{blocks:,} blocks; µs a block: mean, p50 / p99 of calls for {PIECE}")
    for title in ("policy", "unwritten", "find who leaves", "make room", "make room and store"):
        table.add_column(title, justify="left" if title == "policy" else "right")
    for row in found:
        cells = [
            f"{r['mean']:.1f}, {r['p50']:.1f} / {r['p99']:.1f}"
            for r in (row["find_us"], row["evict_us"], row["store_us"])
        ]
        table.add_row(row["policy"], "most" if row["pressed"] else "none", *cells)
    Console().print(table)
