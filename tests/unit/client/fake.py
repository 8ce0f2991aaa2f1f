"""A server made of dictionaries, and a driver that performs flows against it.

It keeps the bytes in memory files handed out as extents, or serves Read and
Write, so that flows run without gRPC, sockets or time. `before` may fail any
step before it reaches the server, `after` once it has been done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from kvstore.client import connecting
from kvstore.client.link import Backoff, Budget, Core, Counters, Link
from kvstore.client.steps import (
    Begin,
    Call,
    Connect,
    Drop,
    End,
    Flow,
    OpenSession,
    ReadStream,
    Step,
    Work,
    WriteStream,
)
from kvstore.client.wire import ServerInfo
from kvstore.clock import ManualClock
from kvstore.errors import KVStoreError, NoSession, ReservationExpired, Unavailable, UnknownLayout
from kvstore.local.arena import Arena
from kvstore.local.copy import checksum
from kvstore.types import ChainPresence, LayoutSpec
from kvstore.wire.columns import pack_numbers, unpack_keys, unpack_numbers
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.unit.local.attach_server import sealed_memfd

T = TypeVar("T")
Hook = Callable[[Step], None]

SLOT = 4096
EXTENT_BYTES = 1 << 20
LEASE_NS = 30_000_000_000
TIMEOUT_S = 5.0


def name_of(step: Step) -> str:
    """The kind of a step, with the method where there is one: "Begin Commit"."""
    match step:
        case Call():
            return step.method
        case Begin(call) | End(Begun(call=call)) | Drop(Begun(call=call)):
            return f"{type(step).__name__} {call.method}"
    return type(step).__name__


def nothing(step: Step) -> None:
    return None


class FakeServer:
    """One layout of any block size up to a slot; sessions are known by their id.

    `room`: how many slots it would grant still. `written`: slots that Write filled.
    """

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.epoch = b"e1"
        self.sessions: set[bytes] = set()
        self.layouts: set[bytes] = set()
        self.blocks: dict[bytes, tuple[int, int]] = {}  # key -> (address, checksum)
        self.leases: dict[int, tuple[bytes, list[bytes]]] = {}  # id -> (session, keys)
        self.slots: dict[int, tuple[bytes, int]] = {}  # open: id -> (session, address)
        self.steps: list[str] = []
        self.reported: list[int] = []
        """Addresses said to be damaged."""
        self.reserved = 0
        self.written = 0
        self.opened = 0
        self.extent = sealed_memfd(EXTENT_BYTES)
        self._calling = b""
        self._next_number = 1
        # The last one freed is the next one used: who writes too late does harm.
        self._free = list(range(0, EXTENT_BYTES, SLOT))

    @property
    def room(self) -> int:
        return len(self._free)

    @room.setter
    def room(self, count: int) -> None:
        del self._free[count:]

    def restart(self) -> None:
        """A new server: it knows nothing, and counts from one again."""
        os.close(self.extent)
        steps, opened = self.steps, self.opened
        self.__init__(self.clock)  # type: ignore[misc]
        self.epoch, self.steps, self.opened = b"e2", steps, opened

    def call(self, step: Call) -> Any:
        self.steps.append(step.method)
        if step.session not in self.sessions:
            raise NoSession("no such session")
        self._calling = step.session
        handler: Callable[[Any], Any] = getattr(self, step.method)
        return handler(step.request)

    def end_session(self, session: bytes) -> None:
        self.sessions.discard(session)
        self._calling = session
        self._close([slot for slot, (owner, _) in self.slots.items() if owner == session])
        for number in [n for n, (owner, _) in self.leases.items() if owner == session]:
            del self.leases[number]

    def GetServerInfo(self, request: Any) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(
            epoch=self.epoch, lease_ms=30_000, max_keys=65536, max_blocks=1024
        )

    def RegisterLayout(self, request: pb.RegisterLayoutRequest) -> pb.RegisterLayoutResponse:
        layout = request.layout
        spec = LayoutSpec(
            model=layout.model,
            dtype=layout.dtype,
            block_tokens=layout.block_tokens,
            block_bytes=layout.block_bytes,
        )
        self.layouts.add(spec.layout_id)
        return pb.RegisterLayoutResponse(layout_id=spec.layout_id)

    def Lookup(self, request: pb.LookupRequest) -> pb.LookupResponse:
        held = [len(self._prefix(unpack_keys(chain.keys))) for chain in request.chains]
        return pb.LookupResponse(chains=[pb.ChainPresence(held=n, in_dram=n) for n in held])

    def Reserve(self, request: pb.ReserveRequest) -> pb.ReserveResponse:
        self._check_layout(request.layout_id)
        return pb.ReserveResponse(slots=self._grant(request.count))

    def Commit(self, request: pb.CommitRequest) -> pb.CommitResponse:
        self._check_layout(request.layout_id)
        named = [
            each
            for segment in request.segments
            for each in zip(
                unpack_keys(segment.keys),
                unpack_numbers(segment.slots),
                unpack_numbers(segment.checksums),
                strict=True,
            )
        ]
        for key, slot, _ in named:
            if slot and not self._is_open(slot) and key not in self.blocks:
                raise ReservationExpired("no such slot is open")
        outcomes = bytes(self._commit(*each) for each in named)
        return pb.CommitResponse(outcomes=outcomes, slots=self._grant(request.reserve))

    def _commit(self, key: bytes, slot: int, value: int) -> Any:
        held = self.blocks.get(key)
        if held is not None:
            self._close([slot])
            return pb.CommitResponse.PRESENT if held[1] == value else pb.CommitResponse.CONFLICT
        if not slot:
            return pb.CommitResponse.ABSENT
        _, address = self.slots.pop(slot)
        self.blocks[key] = (address, value)
        return pb.CommitResponse.STORED

    def _grant(self, count: int) -> pb.Slots:
        addresses = [self._free.pop() for _ in range(min(count, len(self._free)))]
        self.reserved += len(addresses)
        numbers = [self._number() for _ in addresses]
        for number, address in zip(numbers, addresses, strict=True):
            self.slots[number] = (self._calling, address)
        expires_ns = self.clock.now_ns() + LEASE_NS
        first = numbers[0] if numbers else 0
        return pb.Slots(first_slot=first, addresses=pack_numbers(addresses), expires_ns=expires_ns)

    def Abort(self, request: pb.AbortRequest) -> pb.AbortResponse:
        self._close(request.slots)
        return pb.AbortResponse()

    def _is_open(self, slot: int) -> bool:
        return slot in self.slots and self.slots[slot][0] == self._calling

    def _close(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if self._is_open(slot):
                _, address = self.slots.pop(slot)
                self._free.append(address)

    def Acquire(self, request: pb.AcquireRequest) -> pb.AcquireResponse:
        response = pb.AcquireResponse()
        for chain in request.chains:
            lease = response.leases.add()
            held = self._prefix(unpack_keys(chain.keys))
            lease.addresses = pack_numbers([self.blocks[key][0] for key in held])
            lease.checksums = pack_numbers([self.blocks[key][1] for key in held])
            if held:
                lease.lease_id = self._number()
                lease.held = len(held)
                lease.expires_ns = self.clock.now_ns() + LEASE_NS
                self.leases[lease.lease_id] = (self._calling, held)
        return response

    def _prefix(self, keys: Sequence[bytes]) -> list[bytes]:
        held = []
        for key in keys:
            if key not in self.blocks:
                break
            held.append(key)
        return held

    def Release(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        for number in request.lease_ids:
            self.leases.pop(number, None)
        return pb.ReleaseResponse()

    def ReportDamage(self, request: pb.ReportDamageRequest) -> pb.ReportDamageResponse:
        self.reported += unpack_numbers(request.addresses)
        return pb.ReportDamageResponse()

    def Renew(self, request: pb.RenewRequest) -> pb.RenewResponse:
        return pb.RenewResponse(expires_ns=self.clock.now_ns() + LEASE_NS)

    def read(self, step: ReadStream, nbytes: int) -> None:
        self.steps.append("Read")
        if step.session not in self.sessions:
            raise NoSession("no such session")
        request: Any = step.request
        _, held = self.leases[request.lease_id]
        for index in request.indices:
            address, _ = self.blocks[held[index]]
            data = os.pread(self.extent, nbytes, address)
            step.sink(memoryview(data)[: nbytes // 2])
            step.sink(memoryview(data)[nbytes // 2 :])

    def write(self, step: WriteStream) -> None:
        self.steps.append("Write")
        if step.session not in self.sessions:
            raise NoSession("no such session")
        self._calling = step.session
        offsets: dict[int, int] = {}
        for piece in step.pieces:
            if not self._is_open(piece.slot):
                raise ReservationExpired("no such slot is open")
            _, address = self.slots[piece.slot]
            start = offsets.get(piece.slot, 0)
            os.pwrite(self.extent, piece.data, address + start)
            offsets[piece.slot] = start + piece.data.nbytes
        self.written += len(offsets)

    def damage(self, key: bytes) -> None:
        address, _ = self.blocks[key]
        first = os.pread(self.extent, 1, address)
        os.pwrite(self.extent, bytes([first[0] ^ 1]), address)

    def stored(self, key: bytes, nbytes: int) -> bytes:
        address, value = self.blocks[key]
        data = os.pread(self.extent, nbytes, address)
        assert checksum(data) == value
        return data

    def _check_layout(self, layout_id: bytes) -> None:
        if layout_id not in self.layouts:
            raise UnknownLayout("no such layout")

    def _number(self) -> int:
        self._next_number += 1
        return self._next_number - 1


class Begun:
    """A call that was begun; the server does it at once or when it is asked about."""

    def __init__(self, server: FakeServer, call: Call) -> None:
        self.call = call
        self._server = server
        self._answer: Any = None
        self._error: KVStoreError | None = None

    def run(self) -> None:
        if self._answer is None and self._error is None:
            try:
                self._answer = self._server.call(self.call)
            except KVStoreError as error:
                self._error = error

    def end(self) -> Any:
        self.run()
        if self._error is not None:
            raise self._error
        return self._answer

    def drop(self) -> None:
        self.run()
        if self._answer is not None:
            give_back(self._server, self.call, self._answer)


def give_back(server: FakeServer, call: Call, answer: Any) -> None:
    back = None if call.undo is None else call.undo(answer)
    if back is not None:
        server.call(back)


class Driver:
    """Performs flows for one client, local or remote.

    `listed`: whether a block is in a local client's directory; None: it has none.
    `late`: calls that were begun reach the server only when their end is waited for.
    """

    def __init__(self, server: FakeServer, *, local: bool, block_bytes: int) -> None:
        self.server = server
        self.local = local
        self.block_bytes = block_bytes
        self.listed: Callable[[bytes], bool] | None = None
        self.late = False
        self.before: Hook = nothing
        self.after: Hook = nothing
        self.backoff_now = 0.0
        self.core = Core(
            socket_path=None,
            timeout_s=TIMEOUT_S,
            clock=server.clock,
            counters=Counters(),
            backoff=Backoff(lambda: self.backoff_now),
            layouts={},
        )

    def run(self, flow: Flow[T]) -> T:
        try:
            step = flow.send(None)
            while True:
                try:
                    result = self.perform(step)
                except BaseException as error:  # noqa: BLE001 - it goes into the flow
                    step = flow.throw(error)
                else:
                    step = flow.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value

    def perform(self, step: Step) -> Any:
        result: Any = None
        try:
            self.before(step)
            result = self._do(step)
            self.after(step)
        except Unavailable:
            # No answer was heard, whether or not there was one.
            match step:
                case Call(undo=undo) | End(Begun(call=Call(undo=undo))) if undo is not None:
                    undo(None)
            raise
        except KVStoreError:
            raise
        except BaseException:
            # Interrupted: what was granted nobody else hears of.
            match step:
                case End(begun):
                    begun.drop()
                case Call() if result is not None:
                    give_back(self.server, step, result)
            raise
        return result

    def _do(self, step: Step) -> Any:
        match step:
            case Call():
                return self.server.call(step)
            case Begin(call):
                begun = Begun(self.server, call)
                if not self.late:
                    begun.run()
                return begun
            case End(begun):
                return begun.end()
            case Drop(begun):
                return begun.drop()
            case Work():
                return step.run()
            case ReadStream():
                return self.server.read(step, self.block_bytes)
            case WriteStream():
                return self.server.write(step)
            case OpenSession():
                self.server.opened += 1
                session = self.server.opened.to_bytes(16, "big")
                self.server.sessions.add(session)
                return session, Stream(self.server, session)
            case Connect():
                return self.run(self.connect())

    def connect(self) -> Flow[Link]:
        link = yield from connecting.connect(self.core, Budget(TIMEOUT_S))
        if self.local:
            link.arena = Arena(EXTENT_BYTES, lambda _: (os.dup(self.server.extent), EXTENT_BYTES))
            link.presence = Directory(self)  # type: ignore[assignment]
        return link


class Directory:
    """What a local client sees of the server's blocks without asking."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def lookup(
        self, layout_ids: Sequence[bytes], keys: Sequence[bytes], is_open: Callable[[], bool]
    ) -> ChainPresence | None:
        listed = self._driver.listed
        if listed is None:
            return None
        held = next((n for n, key in enumerate(keys) if not listed(key)), len(keys))
        return ChainPresence(held, held)


class Stream:
    def __init__(self, server: FakeServer, session: bytes) -> None:
        self._server = server
        self._session = session

    def alive(self) -> bool:
        return True  # A loss that only the next call finds out.

    def cancel(self) -> None:
        self._server.end_session(self._session)


def info() -> ServerInfo:
    return ServerInfo("0", b"e1", "", 4096, 65536, 30_000, 30_000, 4096)


def gone(step: Step) -> None:
    raise Unavailable(f"{name_of(step)}: gone")
