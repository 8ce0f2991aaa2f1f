"""Twins of what surrounds the connector: vLLM's requests and steps, and the store."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import xxhash

from kvstore.client.lease import Layout
from kvstore.client.link import Counters
from kvstore.errors import KVStoreError, LeaseExpired
from kvstore.types import (
    ChainPresence,
    ChainQuery,
    CommitAnswer,
    CommitOutcome,
    LayoutSpec,
    LeaseGrant,
    Segment,
    SlotGrant,
)
from kvstore_connectors.vllm.acquire import Held, Ticket, TicketState
from kvstore_connectors.vllm.link import Attached

BLOCK_TOKENS = 4
FAR_NS = 1 << 62
_numbers = itertools.count()


def spec(rank: int = 0, world: int = 1, block_bytes: int = 64) -> LayoutSpec:
    return LayoutSpec(
        model="m", dtype="d", block_tokens=BLOCK_TOKENS, block_bytes=block_bytes,
        rank=rank, world=world,
    )  # fmt: skip


def hashes(tokens: Sequence[int]) -> list[bytes]:
    """Chained, one for each full block, as vLLM's are."""
    chained, parent = [], b""
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = repr(list(tokens[start : start + BLOCK_TOKENS])).encode()
        parent = hashlib.sha256(parent + block).digest()
        chained.append(parent)
    return chained


@dataclass(eq=False)
class FakeRequest:
    tokens: list[int]
    request_id: str = field(default_factory=lambda: f"r{next(_numbers)}")
    lora_request: Any = None
    resumable: bool = False
    skip_reading_prefix_cache: bool = False
    num_preemptions: int = 0
    num_computed_tokens: int = 0

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)
        self.block_hashes = hashes(self.tokens)


def step(
    scheduled: dict[str, int] | None = None,
    *,
    blocks: dict[str, list[int]] | None = None,
    preempted: set[str] | None = None,
) -> Any:
    """A scheduler's output: tokens a request, and its block table."""
    scheduled = scheduled or {}
    tables = blocks or {}
    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        preempted_req_ids=preempted or set(),
        kv_connector_block_state=SimpleNamespace(
            get_block_ids=lambda request_id: (tables[request_id],)
        ),
    )


def outcome(**fields: Any) -> Any:
    """What the workers report after a step."""
    defaults: dict[str, Any] = {
        "finished_recving": set(), "finished_sending": set(), "kv_connector_worker_meta": None,
    }  # fmt: skip
    return SimpleNamespace(**(defaults | fields))


class FakeLink:
    def __init__(self, world: int = 1) -> None:
        self.up = True
        self.generation = 1
        self.suspected = 0
        self.layouts_changed: list[Sequence[LayoutSpec]] = []
        self.specs = [spec(rank, world) for rank in range(world)]

    def suspect(self) -> None:
        self.suspected += 1
        self.up = False

    def change_layouts(self, specs: Sequence[LayoutSpec]) -> None:
        self.layouts_changed.append(specs)

    def close(self) -> None:
        self.up = False


class FakeQueue:
    """Answers when told; knows which leases are out."""

    def __init__(self, link: FakeLink) -> None:
        self._link = link
        self.tickets: list[Ticket] = []
        self.out: dict[int, Held] = {}
        self.waits = 0
        self.seen: int | None = None
        """What a look without a call shows."""

    def peek(self, keys: list[bytes]) -> int | None:
        return self.seen

    def submit(self, keys: list[bytes]) -> Ticket:
        now_s = time.monotonic()
        ticket = Ticket(keys, now_s, now_s, TicketState.SENT)
        self.tickets.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        held, ticket.held = ticket.held, None
        ticket.state = TicketState.CANCELLED
        if held is not None:
            self.release(held)

    def release(self, held: Held) -> None:
        if held.grant.lease_id:
            del self.out[held.grant.lease_id]

    def answer(
        self, ticket: Ticket, held: int, *, from_dram: int | None = None, expires_ns: int = FAR_NS
    ) -> None:
        if ticket.state is TicketState.CANCELLED:
            return
        world = len(self._link.specs)
        lease_id = next(_numbers) + 1 if held else 0
        grant = LeaseGrant(
            lease_id,
            held,
            [1000 * shard + index for shard in range(world) for index in range(held)],
            [5000 * shard + index for shard in range(world) for index in range(held)],
            expires_ns,
            held if from_dram is None else from_dram,
        )
        ticket.held = Held(grant, attached(self._link.specs))
        ticket.state = TicketState.ANSWERED
        if lease_id:
            self.out[lease_id] = ticket.held

    def fail(self, ticket: Ticket) -> None:
        ticket.state = TicketState.FAILED

    def wait_answer(self, timeout_s: float) -> None:
        self.waits += 1

    def close(self) -> None:
        pass


def attached(specs: Sequence[LayoutSpec], client: Any = None) -> Attached:
    return Attached(client, specs, [Layout(each.layout_id, each) for each in specs], b"epoch")


class FakeStore:
    """A store of one process: slots are bytearrays, every call can be held or made to fail."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self.slots: dict[int, bytearray] = {}
        self.leases: set[int] = set()
        self.reserved: dict[int, int] = {}
        """Open slots: id and address."""
        self.calls: list[str] = []
        self.error: KVStoreError | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.before_slot: Any = None
        self.on_call: Any = None
        self.room = 1 << 20
        """Slots that can still be granted."""
        self.epoch = b"epoch"
        self.is_local = True
        self.closed = False
        self.counters = Counters()
        self.expires_ns = FAR_NS

    def connect(self) -> FakeStore:
        self._pass("connect")
        self.counters.count_connect()
        self.closed = False
        return self

    @property
    def connects(self) -> int:
        return self.counters.connects

    def lose_session(self) -> None:
        """As a client does that finds its session gone: it opens another."""
        self.reserved.clear()
        self.counters.count_connect()

    def _pass(self, call: str) -> None:
        self.calls.append(call)
        self.gate.wait(10)
        if self.on_call is not None:
            self.on_call(call)
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.closed = True

    def server_info(self) -> object:
        self._pass("info")
        return None

    def register_layout(self, layout: LayoutSpec) -> Layout:
        self._pass("register")
        return Layout(layout.layout_id, layout)

    def peek(self, layout_ids: Sequence[bytes], keys: Sequence[bytes]) -> ChainPresence | None:
        return None

    def acquire_many(self, chains: Sequence[ChainQuery], wait_ms: int) -> list[LeaseGrant]:
        self._pass("acquire")
        return [self._grant(chain) for chain in chains]

    def _grant(self, chain: ChainQuery) -> LeaseGrant:
        found = list(itertools.takewhile(lambda key: key in self.blocks, chain.keys))
        if not found:
            return LeaseGrant(0, 0, [], [], 0, 0)
        lease_id = next(_numbers) + 1
        self.leases.add(lease_id)
        addresses = [self.place(self.blocks[key]) for key in found]
        checksums = [xxhash.xxh3_64_intdigest(self.blocks[key]) for key in found]
        return LeaseGrant(lease_id, len(found), addresses, checksums, self.expires_ns, len(found))

    def place(self, data: bytes) -> int:
        address = next(_numbers)
        self.slots[address] = bytearray(data)
        return address

    def release(self, lease_ids: Sequence[int]) -> None:
        self._pass("release")
        self.leases.difference_update(lease_ids)

    def reserve(self, layout: Layout, count: int, wait_ms: int) -> SlotGrant:
        self._pass("reserve")
        return self._reserve(layout, count)

    def _reserve(self, layout: Layout, count: int) -> SlotGrant:
        count = min(count, self.room)
        self.room -= count
        addresses = [self.place(bytes(layout.block_bytes)) for _ in range(count)]
        first = 1_000_000 * (next(_numbers) + 1)
        self.reserved |= {first + i: address for i, address in enumerate(addresses)}
        return SlotGrant(first, addresses, self.expires_ns)

    def commit(self, layout: Layout, segments: Sequence[Segment], *, ahead: int) -> CommitAnswer:
        self._pass("commit")
        outcomes = []
        for segment in segments:
            entries = zip(segment.keys, segment.slots, segment.checksums, strict=True)
            for key, slot, checksum in entries:
                data = bytes(self.slots[self.reserved.pop(slot)])
                assert xxhash.xxh3_64_intdigest(data) == checksum
                present = key in self.blocks
                self.blocks.setdefault(key, data)
                outcomes.append(CommitOutcome.PRESENT if present else CommitOutcome.STORED)
        return CommitAnswer(outcomes, self._reserve(layout, ahead))

    def abort(self, slots: Sequence[int]) -> None:
        self._pass("abort")
        for slot in slots:
            self.reserved.pop(slot, None)

    def slot(self, address: int, nbytes: int, *, epoch: bytes | None = None) -> memoryview:
        if self.before_slot is not None:
            self.before_slot()
        view = memoryview(self.slots[address])
        assert view.nbytes == nbytes
        return view.toreadonly()

    def write_slots(
        self,
        slots: Sequence[int],
        addresses: Sequence[int],
        nbytes: int,
        write: Callable[[list[memoryview]], None],
    ) -> None:
        if self.before_slot is not None:
            self.before_slot()
        if not all(slot in self.reserved for slot in slots):
            raise LeaseExpired("of an earlier session")
        views = [memoryview(self.slots[address]) for address in addresses]
        assert all(view.nbytes == nbytes for view in views)
        write(views)
