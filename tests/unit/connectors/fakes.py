"""Twins of what surrounds the connector: vLLM's requests and steps, and the store."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import xxhash

from kvstore.client.lease import Layout
from kvstore.client.link import Counters, VramGrant
from kvstore.errors import BadRequest, KVStoreError, LeaseExpired
from kvstore.types import (
    NO_HINTS,
    ChainPresence,
    ChainQuery,
    CommitAnswer,
    CommitOutcome,
    Hints,
    Landing,
    LayoutSpec,
    LeaseGrant,
    Segment,
    SlotGrant,
)
from kvstore_connectors.vllm.acquire import Ticket, TicketState, Want
from kvstore_connectors.vllm.groups import Band, Bands, Rule
from kvstore_connectors.vllm.held import Held, Taken, parts_of
from kvstore_connectors.vllm.link import Attached
from kvstore_connectors.vllm.positions import Wanted
from kvstore_connectors.vllm.prefill import PrefillMeter

T = TypeVar("T")

BLOCK_TOKENS = 4
FAR_NS = 1 << 62
_numbers = itertools.count()


def spec(rank: int = 0, world: int = 1, block_bytes: int = 64, group: int = 0) -> LayoutSpec:
    return LayoutSpec(
        model="m", dtype="d", block_tokens=BLOCK_TOKENS, block_bytes=block_bytes,
        rank=rank, world=world, group=group,
    )  # fmt: skip


def bands_with(*rules: Rule, retention: int | None = 0) -> Bands:
    """One group for each rule, all with the same block size."""
    return Bands(
        groups=tuple(range(len(rules))),
        bands=tuple(Band(rule, BLOCK_TOKENS, (place,)) for place, rule in enumerate(rules)),
        alignment=BLOCK_TOKENS,
        hash_tokens=BLOCK_TOKENS,
        retention=retention,
    )


FULL = bands_with(Rule())


def hashes(tokens: Sequence[int]) -> list[bytes]:
    """Chained, one for each full block, as vLLM's are."""
    chained, parent = [], b""
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = repr(list(tokens[start : start + BLOCK_TOKENS])).encode()
        parent = hashlib.sha256(parent + block).digest()
        chained.append(parent)
    return chained


PLACES: dict[bytes, int] = {}
"""Of blocks, in their prompts."""


@dataclass(eq=False)
class FakeRequest:
    tokens: list[int]
    request_id: str = field(default_factory=lambda: f"r{next(_numbers)}")
    lora_request: Any = None
    resumable: bool = False
    skip_reading_prefix_cache: bool = False
    num_preemptions: int = 0
    num_computed_tokens: int = 0
    shared_prefix_boundary: int = 0
    kv_transfer_params: Any = None
    priority: int = 0
    session_id: str | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)
        self.block_hashes = hashes(self.tokens)
        PLACES.update((key, place) for place, key in enumerate(self.block_hashes))


def step(
    scheduled: dict[str, int] | None = None,
    *,
    blocks: dict[str, Sequence[list[int]]] | None = None,
    preempted: set[str] | None = None,
    states: dict[str, list[tuple[int, int, int]]] | None = None,
) -> Any:
    """A scheduler's output: tokens a request, its block tables, and states handed over."""
    scheduled = scheduled or {}
    tables = blocks or {}
    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        preempted_req_ids=preempted or set(),
        kv_connector_block_state=SimpleNamespace(
            get_block_ids=lambda request_id: tables[request_id],
            boundary_state_offloads=states or {},
        ),
    )


def outcome(**fields: Any) -> Any:
    """What the workers report after a step."""
    defaults: dict[str, Any] = {
        "finished_recving": set(), "finished_sending": set(), "failed_recving": None,
        "invalid_block_ids": set(), "kv_connector_worker_meta": None,
    }  # fmt: skip
    return SimpleNamespace(**(defaults | fields))


class FakeBlocks:
    """What vLLM has allocated for a request: a table of each group."""

    def __init__(self, *tables: list[int]) -> None:
        self._tables = tables

    def get_block_ids(self) -> tuple[list[int], ...]:
        return self._tables


class FakePins:
    """Which blocks are held, and how often."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}

    def hold(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            self.held[block_id] = self.held.get(block_id, 0) + 1

    def let_go(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            self.held[block_id] -= 1
            if not self.held[block_id]:
                del self.held[block_id]


class FakeLink:
    def __init__(self, world: int = 1, groups: int = 1) -> None:
        self.up = True
        self.generation = 1
        self.suspected = 0
        self.layouts_changed: list[Sequence[LayoutSpec]] = []
        self.specs = [
            spec(rank, world, group=group) for group in range(groups) for rank in range(world)
        ]

    @property
    def current(self) -> Attached | None:
        return attached(self.specs) if self.up else None

    def suspect(self) -> None:
        self.suspected += 1
        self.up = False

    def change_layouts(self, specs: Sequence[LayoutSpec]) -> None:
        self.layouts_changed.append(specs)

    def close(self) -> None:
        self.up = False


class FakeQueue:
    """Answers when told; knows which leases are out."""

    def __init__(self, link: FakeLink, bands: Bands = FULL) -> None:
        self._link = link
        self._bands = bands
        self.tickets: list[Ticket] = []
        self.out: dict[int, Held] = {}
        self.foreseen: list[Wanted] = []
        self.waits = 0
        self.prefill = PrefillMeter()
        self.seen: int | None = None
        """Tokens that a look without a call shows."""
        self.gone: set[bytes] = set()
        """Keys of windows and states that it shows not to be there."""

    def peek(self, wanted: Wanted) -> int | None:
        return self.seen

    def holds(self, key: bytes) -> bool | None:
        return None if self.seen is None else PLACES[key] * BLOCK_TOKENS < self.seen

    def lacks(self, band: Band, key: bytes) -> bool:
        return key in self.gone

    def submit(self, want: Want) -> Ticket:
        now_s = time.monotonic()
        ticket = Ticket(want, now_s, now_s, TicketState.SENT, wanted=want())
        self.tickets.append(ticket)
        return ticket

    def foresee(self, want: Want) -> None:
        self.foreseen.append(want())

    news = False

    def wake(self) -> None:
        pass

    def cancel(self, ticket: Ticket) -> Held | None:
        held, ticket.held = ticket.held, None
        ticket.state = TicketState.CANCELLED
        if held is not None:
            self.release(held)
        return held

    def release(self, held: Held) -> None:
        for lease_id in held.lease_ids:
            del self.out[lease_id]

    def answer(
        self,
        ticket: Ticket,
        held: int,
        *,
        full: int | None = None,
        from_dram: int | None = None,
        expires_ns: int = FAR_NS,
        rest: bool = False,
    ) -> None:
        """`held`, `full`, `from_dram`: blocks. The i-th block of layout n of a band lies
        at 1000 n + i, its checksum is 5000 n + i."""
        if ticket.state is TicketState.CANCELLED:
            return
        assert ticket.wanted is not None
        world = len(self._link.specs) // len(self._bands.groups)
        tokens = held * BLOCK_TOKENS
        taken = []
        for band in self._bands.bands if held else ():
            first, last = band.span(tokens)
            first = min(max(first, ticket.wanted.floor // BLOCK_TOKENS), last)
            layouts = range(world * len(band.members))
            taken.append(
                Taken(
                    band,
                    first,
                    [[1000 * n + index for index in range(first, last)] for n in layouts],
                    [[5000 * n + index for index in range(first, last)] for n in layouts],
                )
            )
        ticket.held = Held(
            floor=ticket.wanted.floor,
            tokens=tokens,
            full_tokens=tokens if full is None else full * BLOCK_TOKENS,
            dram_tokens=tokens if from_dram is None else from_dram * BLOCK_TOKENS,
            lease_ids=[next(_numbers) + 1] if held else [],
            expires_ns=expires_ns,
            taken=taken,
            parts=parts_of(taken, ticket.wanted.floor, tokens),
            attached=attached(self._link.specs),
            rest=rest,
        )
        ticket.state = TicketState.ANSWERED
        self.out |= dict.fromkeys(ticket.held.lease_ids, ticket.held)

    def fail(self, ticket: Ticket) -> None:
        ticket.state = TicketState.FAILED

    def wait_answer(self, timeout_s: float) -> None:
        self.waits += 1

    def close(self) -> None:
        pass


def prefills_at(meter: PrefillMeter, tokens_per_s: float) -> None:
    """The engine has been seen to."""
    meter._latest.append(tokens_per_s)


def attached(specs: Sequence[LayoutSpec], client: Any = None) -> Attached:
    return Attached(client, specs, [Layout(each.layout_id, each) for each in specs], b"epoch")


class FakeStore:
    """A store of one process: slots are bytearrays, every call can be held or made to fail."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self.missing: set[tuple[bytes, bytes]] = set()
        """Blocks that some layouts lack: (layout id, key)."""
        self.committed: list[tuple[bytes, bytes]] = []
        self.shows_directory = False
        self.behind: set[bytes] = set()
        """Keys of blocks that are not in memory."""
        self.prefetched: list[ChainQuery] = []
        self.acquired: list[list[ChainQuery]] = []
        self.hints: list[Hints] = []
        self.readers: list[bytes] = []
        """Whom each acquire named."""
        self.reads: list[tuple[bytes, list[bytes]]] = []
        """What was said to be read on a GPU: the reader, and layouts."""
        self.slots: dict[int, bytearray] = {}
        self.leases: set[int] = set()
        self.reported: list[int] = []
        """Addresses said to be damaged."""
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
        self.on_gpu: Callable[[str], VramGrant] | None = None
        """What it has of a GPU's memory."""
        self.lands: Callable[[Sequence[int], Sequence[str]], list[Landing]] | None = None
        """What it grants there for slots, but for GPUs that are not reached."""
        self.landed: dict[int, bytes] = {}
        """By place that a commit said is written, the key of the block of its slot."""
        self._slot_of: dict[int, int] = {}

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
        self.gate.wait(60)
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
        if not self.shows_directory:
            return None
        found = self._found(ChainQuery(layout_ids, keys))
        in_dram = itertools.takewhile(lambda key: key not in self.behind, found)
        return ChainPresence(len(found), len(list(in_dram)))

    def watch(self, layout_ids: Sequence[bytes]) -> Callable[[bytes], bool | None]:
        def holds(key: bytes) -> bool | None:
            seen = self.peek(layout_ids, (key,))
            return None if seen is None else seen.held > 0

        return holds

    def prefetch_many(self, chains: Sequence[ChainQuery], within_ms: int = 0) -> int:
        self._pass("prefetch")
        self.prefetched += chains
        return len(chains)

    def acquire_many(
        self,
        chains: Sequence[ChainQuery],
        wait_ms: int,
        hints: Hints = NO_HINTS,
        *,
        reader: bytes = b"",
    ) -> list[LeaseGrant]:
        self._pass("acquire")
        self.hints.append(hints)
        self.readers.append(reader)
        self.acquired.append(list(chains))
        return [self._grant(chain) for chain in chains]

    def _found(self, chain: ChainQuery) -> list[bytes]:
        def held(key: bytes) -> bool:
            lacking = any((layout_id, key) in self.missing for layout_id in chain.layout_ids)
            return key in self.blocks and not lacking

        return list(itertools.takewhile(held, chain.keys))

    def _grant(self, chain: ChainQuery) -> LeaseGrant:
        found = self._found(chain)
        if not found:
            return LeaseGrant(0, 0, [], [], 0, 0)
        lease_id = next(_numbers) + 1
        self.leases.add(lease_id)
        everything = [self.blocks[key] for _ in chain.layout_ids for key in found]
        addresses = [self.place(data) for data in everything]
        checksums = [xxhash.xxh3_64_intdigest(data) for data in everything]
        return LeaseGrant(lease_id, len(found), addresses, checksums, self.expires_ns, len(found))

    def place(self, data: bytes) -> int:
        address = next(_numbers)
        self.slots[address] = bytearray(data)
        return address

    def release(self, lease_ids: Sequence[int]) -> None:
        self._pass("release")
        self.leases.difference_update(lease_ids)

    def report_damage(self, addresses: Sequence[int]) -> None:
        self._pass("damage")
        self.reported += addresses

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

    def land(
        self, layout: Layout, slots: Sequence[int], *, not_on: Collection[str] = ()
    ) -> list[Landing]:
        self._pass("land")
        if self.lands is None:
            raise BadRequest("nothing lands here")
        landings = self.lands(slots, sorted(not_on))
        for each in landings:
            self._slot_of |= dict(zip(each.addresses, slots, strict=True))
        return landings

    def commit(
        self,
        layout: Layout,
        segments: Sequence[Segment],
        *,
        ahead: int,
        landed: Sequence[Landing] = (),
    ) -> CommitAnswer:
        self._pass("commit")
        outcomes = []
        keys = {
            slot: key for each in segments for slot, key in zip(each.slots, each.keys, strict=True)
        }
        for address in (address for each in landed for address in each.addresses):
            if self._slot_of[address] in keys:
                self.landed[address] = keys[self._slot_of[address]]
        for segment in segments:
            entries = zip(segment.keys, segment.slots, segment.checksums, strict=True)
            for key, slot, checksum in entries:
                data = bytes(self.slots[self.reserved.pop(slot)])
                assert xxhash.xxh3_64_intdigest(data) == checksum
                present = key in self.blocks
                self.committed.append((key, layout.id))
                self.blocks.setdefault(key, data)
                outcomes.append(CommitOutcome.PRESENT if present else CommitOutcome.STORED)
        return CommitAnswer(outcomes, self._reserve(layout, ahead))

    def abort(self, slots: Sequence[int]) -> None:
        self._pass("abort")
        for slot in slots:
            self.reserved.pop(slot, None)

    def vram(self, gpu: str, layout_ids: Sequence[bytes], *, reader: bytes = b"") -> VramGrant:
        self.reads.append((reader, list(layout_ids)))
        self._pass("vram")
        if self.on_gpu is None:
            raise BadRequest("no memory on this GPU")
        return self.on_gpu(gpu)

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
        write: Callable[[list[memoryview]], T],
    ) -> T:
        if self.before_slot is not None:
            self.before_slot()
        if not all(slot in self.reserved for slot in slots):
            raise LeaseExpired("of an earlier session")
        views = [memoryview(self.slots[address]) for address in addresses]
        assert all(view.nbytes == nbytes for view in views)
        return write(views)
