"""A shell for the planner without time, threads or tiers, and a model that knows
what may be answered.

Memory is a dict from address to a value that stands for the bytes. Copies take
effect piecemeal: the target is garbage from start to end, and the source is read
at the end, so a slot that is given away too early shows as a wrong answer.
"""

from __future__ import annotations

import random

from kvstore.core.actions import (
    Answer,
    CloseExtent,
    Copy,
    Forget,
    Mirrored,
    Move,
    OpenExtent,
    Unmirrored,
)
from kvstore.core.catalog import Block
from kvstore.core.chores import CHANGED, SEEN
from kvstore.core.lifecycle import State
from kvstore.core.limits import Limits
from kvstore.core.places.mirrors import Mirrors, MirrorWork
from kvstore.core.places.shares import NO_PLACE, Mirror
from kvstore.core.places.vram_room import SETTLES_NS
from kvstore.core.planner import Planner
from kvstore.core.sessions import Session
from kvstore.core.space import Space
from kvstore.core.tickets import AcquireTicket, ClearTicket, ReserveTicket, Ticket
from kvstore.tiers.nvme_calls import DATA_NS
from kvstore.types import (
    ALIGNMENT,
    GPU_ONLY,
    NO_HINTS,
    NO_REUSE,
    OUTPUT,
    ChainQuery,
    CommitOutcome,
    Hints,
    LayoutSpec,
    PutOutcome,
    Reuse,
    Segment,
    Tier,
)

SLOT = ALIGNMENT
LEASE_MS = 1_000
RESERVATION_MS = 2_000
MOST_WAITED_NS = 3_600_000_000_000
GARBAGE = "garbage"
PLENTY = 1 << 40
"""Of a GPU's memory, free."""
READERS = (b"one", b"another")


def tenant_key(tenant: str) -> bytes:
    return tenant.encode().ljust(32, b"\0")


def make_planner(
    dram_slots: int,
    nvme_slots: int,
    extent_slots: int = 4,
    max_slots: int | None = None,
    *,
    eviction: str = "lru",
    nvme_bytes_per_day: int = 0,
) -> Planner:
    extent = extent_slots * SLOT
    return Planner(
        Limits(
            lease_ms=LEASE_MS,
            reservation_ms=RESERVATION_MS,
            max_sessions=16,
            max_leases=64,
            max_reservations=16,
            max_layouts=8,
            max_running=3,
        ),
        tenant_key=tenant_key,
        eviction=eviction,
        dram=Space(dram_slots * SLOT, extent, max_slots=max_slots),
        nvme=Space(nvme_slots * SLOT, extent, max_slots=max_slots) if nvme_slots else None,
        nvme_slot_bytes=(lambda n: n) if nvme_slots else None,
        nvme_bytes_per_day=nvme_bytes_per_day,
    )


def layout(model: str = "m", rank: int = 0, world: int = 1, slots: int = 1) -> LayoutSpec:
    return LayoutSpec(model, "bf16", 16, slots * SLOT, rank=rank, world=world)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def chain(base: int, length: int) -> list[bytes]:
    """Keys of a chain; chains of different bases share nothing."""
    return [key(base * 10_000 + i) for i in range(length)]


class Shell:
    """Carries out actions; copies and forgets wait until the test ends them."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.now_ns = 1_000_000_000
        self.memory: dict[Tier, dict[int, object]] = {tier: {} for tier in Tier}
        self.extents: dict[Tier, set[int]] = {Tier.DRAM: set(), Tier.NVME: set()}
        self.copies: list[Copy] = []
        # By id, which keeps nothing alive.
        self._begun_ns: dict[int, int] = {}
        self.forgets: list[Forget] = []
        self.answered: list[Ticket] = []
        self.chores_by_hand = False
        self.gpus: list[ModelGpu] = []

    def run(self) -> None:
        self._carry_out()
        while self.planner.chores and not self.chores_by_hand:
            self.do_chores()

    def do_chores(self) -> None:
        self.planner.chores.go_on()
        self._carry_out()

    def _carry_out(self) -> None:
        while actions := self.planner.take_actions(self.now_ns):
            for action in actions:
                match action:
                    case OpenExtent(tier, extent, _):
                        assert extent not in self.extents[tier]
                        self.extents[tier].add(extent)
                        space = self._space(tier)
                        assert len(self.extents[tier]) <= space.max_extents, "beyond capacity"
                    case CloseExtent(tier, extent):
                        self.extents[tier].remove(extent)
                    case Move(copies):
                        for copy in copies:
                            # What is read straight comes to its place when all of it is read.
                            if copy.target.tier is not Tier.VRAM:
                                self.memory[copy.target.tier][copy.target.address] = GARBAGE
                            self._begun_ns[id(copy)] = self.now_ns
                        self.copies += copies
                    case Mirrored(on, mirror):
                        for gpu in self.gpus:
                            gpu.listed(on, mirror)
                    case Unmirrored(on, mirror):
                        for gpu in self.gpus:
                            gpu.struck(on, mirror)
                    case Forget():
                        self.forgets.append(action)
                    case Answer(ticket):
                        assert ticket.answer is not None
                        assert ticket not in self.answered, "answered twice"
                        self.answered.append(ticket)

    def _space(self, tier: Tier) -> Space:
        residency = self.planner.residency
        pool = residency.dram if tier is Tier.DRAM else residency.nvme
        assert pool is not None
        return pool.space

    def end_copy(self, index: int = 0, *, fail: bool = False, full: bool = False) -> None:
        copy = self.copies.pop(index)
        if fail or full or copy.target.address == NO_PLACE:
            self.planner.transfer_failed(copy, self.now_ns, full=full)
        else:
            source = self.memory[copy.source.tier][copy.source.address]
            self.memory[copy.target.tier][copy.target.address] = source
            self.planner.transfer_done(copy, self.now_ns)
        self.run()

    def corrupt_copy(self, index: int = 0) -> None:
        copy = self.copies.pop(index)
        self.planner.transfer_failed(copy, self.now_ns, source_corrupt=True)
        self.run()

    def end_forget(self, index: int = 0) -> None:
        self.planner.forgotten(self.forgets.pop(index).replica)
        self.run()

    def settle(self) -> None:
        """Let everything under way end well."""
        while self.copies or self.forgets:
            if self.copies:
                self.end_copy()
            else:
                self.end_forget()

    def advance(self, milliseconds: float) -> None:
        self.now_ns += int(milliseconds * 1e6)
        self.tick()
        self.run()

    def tick(self) -> None:
        """A copy that takes too long is one that the drive does not answer."""
        self._begun_ns = {id(copy): self._begun_ns[id(copy)] for copy in self.copies}
        oldest_ns = min(self._begun_ns.values(), default=self.now_ns)
        self.planner.tick(self.now_ns, stuck=self.now_ns - oldest_ns >= DATA_NS)

    # A client's usual moves

    def session(self, number: int, tenant: str = "t", *, local: bool = True) -> Session:
        return self.planner.open_session(number.to_bytes(16, "little"), tenant, local=local)

    def reserve(
        self, session: Session, layout_id: bytes, count: int = 1, *, wait: bool = False
    ) -> ReserveTicket:
        ticket = self.planner.reserve(session, layout_id, count, wait=wait, now_ns=self.now_ns)
        self.run()
        return ticket

    def slots(self, session: Session, layout_id: bytes, count: int = 1) -> list[int]:
        """Ids of as many slots, for which there is room."""
        grant = self.reserve(session, layout_id, count).answer
        assert grant is not None
        assert len(grant.addresses) == count
        return list(range(grant.first_slot, grant.first_slot + count))

    def commit(
        self,
        session: Session,
        layout_id: bytes,
        keys: list[bytes],
        slots: list[int],
        sums: list[int] | None = None,
        *,
        parent: bytes = b"",
        ahead: int = 0,
    ) -> list[CommitOutcome]:
        sums = [0] * len(keys) if sums is None else sums
        segment = Segment(parent, keys, slots, sums)
        answer = self.planner.commit(
            session, layout_id, [segment], reserve=ahead, now_ns=self.now_ns
        )
        self.run()
        return answer.outcomes

    def put(
        self, session: Session, layout_id: bytes, keys: list[bytes], *, value: object = None
    ) -> list[PutOutcome]:
        """Store a chain: ask what is there, reserve, write and commit the rest."""
        sums = [hash(key) & 0xFFFF for key in keys]
        there = self.commit(session, layout_id, keys, [0] * len(keys), sums)
        outcomes = [PutOutcome.PRESENT] * len(keys)
        absent = [i for i, outcome in enumerate(there) if outcome is CommitOutcome.ABSENT]
        grant = self.reserve(session, layout_id, len(absent)).answer
        assert grant is not None
        for order, i in enumerate(absent):
            outcomes[i] = PutOutcome.DENIED
            if order < len(grant.addresses):
                stored = (session.tenant, layout_id, keys[i]) if value is None else value
                self.memory[Tier.DRAM][grant.addresses[order]] = stored
                outcomes[i] = PutOutcome.STORED
        segments = [
            Segment(keys[i - 1] if i else b"", [keys[i]], [grant.first_slot + order], [sums[i]])
            for order, i in enumerate(absent[: len(grant.addresses)])
        ]
        # As one chain, the root's side most recent.
        self.planner.commit(session, layout_id, segments[::-1], reserve=0, now_ns=self.now_ns)
        self.run()
        return outcomes

    def acquire(
        self,
        session: Session,
        layout_ids: list[bytes],
        keys: list[bytes],
        *,
        wait: bool = False,
        within_ms: float | None = None,
        hints: Hints = NO_HINTS,
        reader: bytes = b"",
    ) -> AcquireTicket:
        deadline_ns = None if within_ms is None else self.now_ns + int(within_ms * 1e6)
        ticket = self.planner.acquire(
            session, [ChainQuery(layout_ids, keys)],
            wait=wait, now_ns=self.now_ns, deadline_ns=deadline_ns, hints=hints, reader=reader,
        )  # fmt: skip
        self.run()
        return ticket

    def held(self, session: Session, layout_id: bytes, keys: list[bytes]) -> int:
        return self.planner.lookup(session.tenant, ChainQuery([layout_id], keys)).held


class ModelGpu:
    """A GPU's memory, the table of what is there, and the thread that works on it."""

    def __init__(self, shell: Shell, name: str, slots: int, first_extent: int = 1) -> None:
        extent = shell.planner.residency.dram.space.extent_bytes
        space = Space(slots * SLOT, extent, first_extent=first_extent)
        self.mirrors = Mirrors(shell.planner.holdings, space, extent, name)
        self.table: dict[int, tuple[int, int]] = {}
        """By what a block is listed as: where it lies, and its checksum."""
        self.open: set[int] = set()
        self.under_way: MirrorWork | None = None
        self.lost = False
        self._shell = shell
        shell.gpus.append(self)
        shell.planner.holdings.mirrors.append(self.mirrors)

    @property
    def memory(self) -> dict[int, object]:
        return self._shell.memory[Tier.VRAM]

    def listed(self, on: Mirrors, mirror: Mirror) -> None:
        if on is not self.mirrors:
            return
        assert mirror.listed_as not in self.table, "a block has two rows"
        assert mirror.block.checksum is not None
        self.table[mirror.listed_as] = mirror.address, mirror.block.checksum

    def struck(self, on: Mirrors, mirror: Mirror) -> None:
        if on is not self.mirrors:
            return
        place, _ = self.table.pop(mirror.listed_as)
        assert place == mirror.address

    def read(self, listed_as: int, checksum: int) -> object:
        """As workers do: None where it is not there."""
        place, of = self.table.get(listed_as, (NO_PLACE, None))
        return self.memory[place] if of == checksum else None

    def check(self) -> None:
        """What the table says is so, whoever would read it now."""
        for listed_as, (place, checksum) in self.table.items():
            assert place // self.mirrors.space.extent_bytes in self.open, "memory that went back"
            assert self.memory[place] == checksum, "other bytes than the table says"
            assert listed_as < GPU_ONLY or listed_as == GPU_ONLY | place

    def begin(self, free: int = PLENTY) -> None:
        if not self.lost:
            work = self.under_way = self.mirrors.work(free, self._shell.now_ns)
            self._shell.run()
            for mirror in work.copies:
                self.memory[mirror.address] = GARBAGE

    def end(self, *, well: bool = True, opened: bool = True) -> None:
        work, self.under_way = self.under_way, None
        if work is None:
            return
        self.open -= set(work.closes)
        if opened:
            self.open |= set(work.opens)
            for _ in work.opens:
                self.mirrors.opened()
        for mirror in work.copies:
            source = self._shell.memory[Tier.DRAM][mirror.source.address]
            there = opened or self.mirrors.space.extent_of(mirror.address) not in work.opens
            right = well and there and source == mirror.block.checksum
            if right:
                self.memory[mirror.address] = source
            self.mirrors.ended(mirror, well=right)
        for extent in () if opened else work.opens:
            self.mirrors.not_opened(extent, self._shell.now_ns)
        self._shell.run()

    def lose(self) -> None:
        if self.under_way is None:
            self.lost = True
            self.mirrors.lost()
            self._shell.run()

    def wind_down(self) -> None:
        """Nobody reads there any more, and nothing is left."""
        for _ in range(2):
            self.end()
            self._shell.now_ns += SETTLES_NS
            self.begin()
        self.end()
        assert not self.table
        assert not self.mirrors.space.used_bytes, "a place leaked"
        assert not self.mirrors.space.classes(), "an extent leaked"


class RandomLife:
    """Clients, tiers and time doing whatever they may do, in an order drawn from a
    seed; after every step the planner is checked against itself and the model."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        rng = self.rng
        nvme_slots = rng.choice([0, 8, 32, 64])
        max_slots = rng.choice([None, None, 18])
        # Apart, so that a life is the same with more or less of these.
        self.aside = aside = random.Random(seed)
        planner = make_planner(
            rng.choice([8, 16, 32]), nvme_slots, max_slots=max_slots,
            eviction=aside.choice(["lru", "worth", "arc"]),
            nvme_bytes_per_day=aside.choice([0, 0, 25 * 16 * SLOT]),
        )  # fmt: skip
        self.shell = Shell(planner)
        # Parts of one to a dozen blocks, so that anything may happen in between.
        self.shell.chores_by_hand = True
        self.shell.planner.chores.part = rng.choice([SEEN, CHANGED, 12 * CHANGED])
        self.clears: list[tuple[ClearTicket, list[Block]]] = []
        self.nvme = bool(nvme_slots)
        self.tenants = ["a", "b"]
        self.layouts: dict[str, list[bytes]] = {
            tenant: [
                self.shell.planner.register_layout(tenant, layout("m")),
                self.shell.planner.register_layout(tenant, layout("big", slots=2)),
            ]
            for tenant in self.tenants
        }
        self.sessions: list[Session] = []
        self.next_session = 1
        self.next_value = 0
        # Every value ever committed under a name: tenant, layout, key.
        self.committed: dict[tuple[str, bytes, bytes], set[object]] = {}
        # Reservations, and what was last written into each slot.
        self.writing: list[tuple[ReserveTicket, dict[int, int]]] = []
        self.reading: list[tuple[AcquireTicket, bytes, list[bytes]]] = []
        # Apart too: a life is the same with GPUs or without.
        self.luck = luck = random.Random(seed)
        extents = 1
        for number in range(luck.choice([0, 1, 1, 2])):
            gpu = ModelGpu(self.shell, f"gpu{number}", luck.choice([8, 16]), extents)
            gpu.mirrors.straight_bytes = luck.choice([SLOT, 2 * SLOT, 2 * SLOT])
            extents += 1000
        self.gpu_only = 0
        """Blocks read in a GPU's memory that are not in DRAM."""

    def step(self) -> None:
        moves = [
            self.connect, self.reserve, self.reserve, self.write_commit, self.write_commit,
            self.acquire, self.acquire, self.read, self.read, self.end_copy, self.end_copy,
            self.end_forget, self.tick, self.disconnect, self.clear, self.abort, self.prefetch,
            self.flush, self.patience, self.doubt, self.do_chores, self.lose_nvme,
        ]  # fmt: skip
        self.rng.choice(moves)()
        if self.luck.random() < 0.4:
            self.luck.choice([self.store, self.ask, self.ask, self.drop_clean, self.end_copy])()
        if self.shell.gpus and self.luck.random() < 0.5:
            self.luck.choice([self.gpu_works, self.gpu_works, self.gpu_is_read, self.gpu_fails])()
        self.shell.run()
        self.shell.planner.check_integrity()
        for gpu in self.shell.gpus:
            gpu.check()

    def some_session(self) -> Session:
        if not self.sessions:
            self.connect()
        return self.rng.choice(self.sessions)

    def some_chain(self) -> list[bytes]:
        # Chains of one base are prefixes of each other, as prompts are.
        return chain(self.rng.randrange(6), self.rng.randint(1, 8))

    def connect(self) -> None:
        if len(self.sessions) < 5:
            tenant = self.rng.choice(self.tenants)
            local = self.rng.random() < 0.7
            self.sessions.append(self.shell.session(self.next_session, tenant, local=local))
            self.next_session += 1

    def disconnect(self) -> None:
        if self.sessions and self.rng.random() < 0.3:
            session = self.sessions.pop(self.rng.randrange(len(self.sessions)))
            self._read_no_more(session)
            self.shell.planner.close_session(session)
            self.writing = [w for w in self.writing if w[0].session is not session]
            self.reading = [r for r in self.reading if r[0].session is not session]

    def _read_no_more(self, session: Session) -> None:
        for layout_id in self.layouts[session.tenant]:
            layout_ = self.shell.planner.catalog.layout(session.tenant, layout_id)
            for gpu in self.shell.gpus:
                gpu.mirrors.reads_no_more(layout_, session)

    def reserve(self) -> None:
        session = self.some_session()
        layout_id = self.rng.choice(self.layouts[session.tenant])
        if len(session.reservations) < 8:
            wait, count = self.rng.random() < 0.5, self.rng.randint(1, 8)
            self.writing.append((self.shell.reserve(session, layout_id, count, wait=wait), {}))

    def write_commit(self) -> None:
        """Write some granted slots, commit some written ones under some names."""
        if not self.writing:
            return
        ticket, written = self.rng.choice(self.writing)
        grant = ticket.answer
        if grant is None:
            return
        session = ticket.session
        for slot, address in enumerate(grant.addresses, grant.first_slot):
            # A local client writes whenever it likes until it has given the slot
            # away; the others only with the server's help, which needs an open slot.
            reservation = session.slots.get(slot)
            open_ = reservation is not None and (session.local or not reservation.expired)
            if open_ and (slot not in written or self.rng.random() < 0.1):
                self.next_value += 1
                written[slot] = self.next_value
                self.shell.memory[Tier.DRAM][address] = self.next_value
        self._commit(ticket, written)

    def store(self) -> None:
        """Write a chain, and commit it from its first block on, while others hold little."""
        while len(self.writing) > 2:
            self.abort()
        session = self.some_session()
        keys = chain(self.luck.randrange(3), self.luck.randint(1, 8))
        layout_id = self.luck.choice(self.layouts[session.tenant])
        ticket = self.shell.reserve(session, layout_id, len(keys))
        written: dict[int, int] = {}
        if ticket.answer is not None:
            for slot, address in enumerate(ticket.answer.addresses, ticket.answer.first_slot):
                self.next_value += 1
                written[slot] = self.next_value
                self.shell.memory[Tier.DRAM][address] = self.next_value
            self._commit(ticket, written, keys)
            self.shell.planner.abort(session, list(written))

    def ask(self) -> None:
        """For what somebody has stored, perhaps."""
        session = self.some_session()
        layout_id = self.luck.choice(self.layouts[session.tenant])
        keys = chain(self.luck.randrange(3), self.luck.randint(1, 8))
        if len(session.leases) < 32:
            reader = self.luck.choice([b"", *READERS])
            ticket = self.shell.acquire(session, [layout_id], keys, wait=True, reader=reader)
            self.reading.append((ticket, layout_id, keys))

    def drop_clean(self) -> None:
        if self.nvme and self.shell.planner.residency.nvme_on and self.luck.random() < 0.3:
            self.shell.planner.flush(None, drop=True)

    def _commit(
        self, ticket: ReserveTicket, written: dict[int, int], chain_: list[bytes] | None = None
    ) -> None:
        """`chain_`: to be committed from its root on."""
        session, layout_id = ticket.session, ticket.layout.layout_id
        ready = [s for s in written if s in session.slots and not session.slots[s].expired]
        keys = self.some_chain() if chain_ is None else chain_
        start = self.rng.randrange(len(keys)) if chain_ is None else 0
        slots = self.rng.sample(ready, min(len(ready), len(keys) - start))
        if not slots:
            return
        if self.rng.random() < 0.3:
            slots[self.rng.randrange(len(slots))] = 0
        parent, keys = keys[start - 1] if start else b"", keys[start : start + len(slots)]
        sums = [written[slot] if slot else 0 for slot in slots]
        ahead = self.rng.choice([0, 0, 3]) if len(session.reservations) < 8 else 0
        answer = self.shell.planner.commit(
            session, layout_id, [Segment(parent, keys, slots, sums, self.some_reuse())],
            reserve=ahead,
            now_ns=self.shell.now_ns,
        )  # fmt: skip
        for key_, slot, value, outcome in zip(keys, slots, sums, answer.outcomes, strict=True):
            name = (session.tenant, layout_id, key_)
            if outcome is CommitOutcome.STORED:
                assert slot
                self.committed.setdefault(name, set()).add(value)
            elif outcome is not CommitOutcome.ABSENT:
                assert name in self.committed, "present, but never committed"
        if answer.slots.addresses:
            more = ReserveTicket(session, ticket.layout, ahead, answer.slots)
            self.writing.append((more, {}))

    def abort(self) -> None:
        if self.writing:
            ticket, _ = self.writing.pop(self.rng.randrange(len(self.writing)))
            if ticket.answer is None:
                self.shell.planner.give_up(ticket, self.shell.now_ns)
            assert ticket.answer is not None
            first, count = ticket.answer.first_slot, len(ticket.answer.addresses)
            self.shell.planner.abort(ticket.session, range(first, first + count))

    def acquire(self) -> None:
        session = self.some_session()
        if len(session.leases) >= 32:
            return
        layout_id = self.rng.choice(self.layouts[session.tenant])
        keys = self.some_chain()
        hints = Hints(self.rng.choice([0, 50, 90]), self.rng.choice([None, 0.0, 1e3, 1e5]))
        ticket = self.shell.acquire(
            session, [layout_id], keys, wait=self.rng.random() < 0.7,
            within_ms=self.rng.choice([None, 0.2, 5.0, 5000.0]), hints=hints,
            reader=self.luck.choice([b"", *READERS, *READERS]),
        )  # fmt: skip
        self.reading.append((ticket, layout_id, keys))

    def read(self) -> None:
        """Everything leased reads as what was committed last under its key."""
        for ticket, layout_id, keys in self.reading:
            grant = None if ticket.answer is None else ticket.answer[0]
            if grant is None or grant.lease_id not in ticket.session.leases:
                continue
            for i in range(grant.held):
                value = self._value(grant.addresses[i], grant.checksums[i])
                if value is None:
                    continue
                assert value == grant.checksums[i], "a lease shows other bytes than committed"
                name = (ticket.session.tenant, layout_id, keys[i])
                assert value in self.committed[name], "a lease shows another block"
        if self.reading:
            index = self.rng.randrange(len(self.reading))
            ticket, layout_id, keys = self.reading[index]
            if ticket.answer is not None:
                self.reading.pop(index)
                self.shell.planner.release(ticket.session, [ticket.answer[0].lease_id])

    def _value(self, address: int, checksum: int) -> object:
        """What who has a lease reads; None where a GPU has it no more, and nobody else."""
        if address < GPU_ONLY:
            return self.shell.memory[Tier.DRAM][address]
        for gpu in self.shell.gpus:
            if (value := gpu.read(address, checksum)) is not None:
                self.gpu_only += 1
                return value
        return None

    def gpu_works(self) -> None:
        gpu = self.luck.choice(self.shell.gpus)
        if gpu.under_way is None:
            gpu.begin(self.luck.choice([0, SLOT, PLENTY, PLENTY, PLENTY, PLENTY]))
        else:
            gpu.end(well=self.luck.random() < 0.9, opened=self.luck.random() < 0.95)

    def gpu_is_read(self) -> None:
        """Somebody reads blocks on a GPU, under this name or that."""
        if not self.sessions:
            return
        session = self.luck.choice(self.sessions)
        gpu = self.luck.choice(self.shell.gpus)
        reader = self.luck.choice([b"", *READERS, *READERS, *READERS])
        if gpu.lost:
            return
        for layout_id in self.layouts[session.tenant]:
            layout_ = self.shell.planner.catalog.layout(session.tenant, layout_id)
            if self.luck.random() < 0.9:
                gpu.mirrors.reads(layout_, session, self.shell.now_ns, reader)
            else:
                gpu.mirrors.reads_no_more(layout_, session)

    def gpu_fails(self) -> None:
        gpu = self.luck.choice(self.shell.gpus)
        if self.luck.random() < 0.02:
            gpu.lose()
        elif self.luck.random() < 0.02:
            gpu.mirrors.straight_bytes = 0

    def end_copy(self) -> None:
        if self.shell.copies:
            index = self.rng.randrange(len(self.shell.copies))
            luck = self.rng.random()
            if luck < 0.05 or not self.nvme:
                self.shell.end_copy(index, fail=True)
            elif luck < 0.08 and self.shell.copies[index].target.tier is Tier.NVME:
                self.shell.end_copy(index, full=True)
            elif luck < 0.11:
                self.shell.corrupt_copy(index)
            else:
                self.shell.end_copy(index)

    def end_forget(self) -> None:
        if self.shell.forgets:
            self.shell.end_forget(self.rng.randrange(len(self.shell.forgets)))

    def tick(self) -> None:
        self.shell.advance(self.rng.choice([1, 50, 400, 1500]))
        nvme = self.shell.planner.residency.nvme
        if nvme is not None and self.aside.random() < 0.2:
            self.shell.planner.worn(self.aside.choice([0, SLOT, 8 * SLOT]))
            self.shell.planner.not_worth_moving(
                [r.address for r in nvme.replicas() if self.aside.random() < 0.5]
            )

    def some_reuse(self) -> Reuse:
        return Reuse(category=OUTPUT) if self.aside.random() < 0.1 else NO_REUSE

    def clear(self) -> None:
        if self.rng.random() < 0.05:
            tenant = self.rng.choice(self.tenants)
            there = [b for b in self.shell.planner.catalog if b.layout.tenant == tenant]
            self.clears.append((self.shell.planner.clear(tenant), there))
        for ticket, there in self.clears:
            if ticket.answer is not None:
                found = [block for block in there if self.shell.planner.catalog.contains(block)]
                assert not found, "a clear is answered and its blocks are found"
        self.clears = [c for c in self.clears if c[0].answer is None]

    def do_chores(self) -> None:
        self.shell.do_chores()

    def lose_nvme(self) -> None:
        if self.nvme and self.rng.random() < 0.005:
            self.nvme = False
            self.shell.planner.tier_failed(self.shell.now_ns)

    def prefetch(self) -> None:
        tenant = self.rng.choice(self.tenants)
        chains = [ChainQuery([self.rng.choice(self.layouts[tenant])], self.some_chain())]
        self.shell.planner.prefetch(
            tenant, chains, within_ns=self.rng.choice([0, 100_000_000]), now_ns=self.shell.now_ns
        )

    def flush(self) -> None:
        if self.nvme and self.rng.random() < 0.1 and self.shell.planner.residency.nvme_on:
            tenant = self.rng.choice([None, *self.tenants])
            self.shell.planner.flush(tenant, drop=self.rng.random() < 0.5)

    def doubt(self) -> None:
        """What was predicted does not come about."""
        looks_ns = self.shell.planner.looks_ns()
        if looks_ns is not None:
            assert looks_ns - self.shell.now_ns < MOST_WAITED_NS
            self.shell.now_ns = max(self.shell.now_ns, looks_ns)

    def patience(self) -> None:
        """Somebody's patience ends."""
        tickets: list[Ticket] = [t for t, _ in self.writing]
        tickets += [t for t, _, _ in self.reading]
        waiting = [t for t in tickets if t.answer is None]
        if waiting:
            self.shell.planner.give_up(self.rng.choice(waiting), self.shell.now_ns)

    def forget(self) -> None:
        """Let go of what the test itself remembers."""
        for memory in (self.reading, self.writing, self.clears, self.shell.answered):
            memory.clear()
        # And of the few that were looked at last for one to leave.
        for tenant, layouts in self.layouts.items():
            for layout_id in layouts:
                space_class = self.shell.planner.catalog.layout(tenant, layout_id).dram_class
                while self.shell.planner.residency.dram.passed_over(space_class) is not None:
                    pass

    def wind_down(self) -> None:
        """All clients leave and everything ends: nothing may be left behind."""
        self.shell.chores_by_hand = False
        for session in list(self.sessions):
            self._read_no_more(session)
            self.shell.planner.close_session(session)
        self.shell.run()
        self.shell.settle()
        for gpu in self.shell.gpus:
            gpu.wind_down()
        self.shell.planner.check_integrity()
        planner = self.shell.planner
        assert planner.open_sessions == planner.open_leases == planner.open_reservations == 0
        for tenant in self.tenants:
            planner.clear(tenant)
        self.shell.run()
        self.shell.settle()
        planner.check_integrity()
        assert len(planner.catalog) == 0
        residency = planner.residency
        assert len(residency.dram) == 0, "a DRAM slot leaked"
        if residency.nvme is not None:
            leaked = [r for r in residency.nvme.replicas() if r.state is not State.DAMAGED]
            assert not leaked, "an NVMe slot leaked"
