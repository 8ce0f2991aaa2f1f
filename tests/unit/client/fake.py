"""A server made of dictionaries, and a driver that performs flows against it.

It keeps the bytes in memory files handed out as extents, or serves Read and
Write, so that flows run without gRPC, sockets or time. `before` may fail any
step before it reaches the server, `after` once it has been done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from kvstore.client import connecting
from kvstore.client.link import Backoff, Budget, Core, Counters, Link
from kvstore.client.steps import (
    Call,
    Connect,
    Flow,
    OpenSession,
    ReadStream,
    Step,
    Work,
    WriteStream,
)
from kvstore.client.wire import ServerInfo
from kvstore.clock import ManualClock
from kvstore.errors import NoSession, Unavailable
from kvstore.local.arena import Arena
from kvstore.local.copy import checksum
from kvstore.types import LayoutSpec
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.unit.local.attach_server import EXTENT_BYTES, sealed_memfd

T = TypeVar("T")
Hook = Callable[[Step], None]

SLOT = 4096
LEASE_NS = 30_000_000_000


def name_of(step: Step) -> str:
    return step.method if isinstance(step, Call) else type(step).__name__


def nothing(step: Step) -> None:
    return None


class FakeServer:
    """One layout of any block size up to a slot; sessions are known by their id."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.epoch = b"e1"
        self.sessions: set[bytes] = set()
        self.layouts: set[bytes] = set()
        self.slots: dict[int, bytearray] = {}
        self.blocks: dict[bytes, tuple[int, int]] = {}  # key -> (address, checksum)
        self.leases: dict[int, list[bytes]] = {}
        self.reservations: dict[int, list[tuple[bytes, int]]] = {}
        self.steps: list[str] = []
        self.extent = sealed_memfd()
        self.next_number = 1
        self.next_address = 0
        self.opened = 0

    def restart(self) -> None:
        """A new server: it knows nothing, and counts from one again."""
        os.close(self.extent)
        steps, opened = self.steps, self.opened
        self.__init__(self.clock)  # type: ignore[misc]
        self.epoch, self.steps, self.opened = b"e2", steps, opened

    def call(self, step: Call) -> Any:
        if step.session not in self.sessions:
            raise NoSession("no such session")
        handler: Callable[[Any], Any] = getattr(self, step.method)
        return handler(step.request)

    def GetServerInfo(self, request: Any) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(epoch=self.epoch, lease_ms=30_000)

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

    def Reserve(self, request: pb.ReserveRequest) -> pb.ReserveResponse:
        response = pb.ReserveResponse(expires_ns=self.clock.now_ns() + LEASE_NS)
        granted: list[tuple[bytes, int]] = []
        for entry in request.entries:
            held = self.blocks.get(entry.key)
            if held is not None:
                response.results.add(outcome=pb.ReserveResult.PRESENT, checksum=held[1])
                granted.append((b"", 0))
            else:
                address = self.next_address
                self.next_address += SLOT
                response.results.add(outcome=pb.ReserveResult.GRANTED, address=address)
                granted.append((entry.key, address))
        if any(key for key, _ in granted):
            response.reservation_id = self._number()
            self.reservations[response.reservation_id] = granted
        return response

    def Commit(self, request: pb.CommitRequest) -> pb.CommitResponse:
        entries = self.reservations.pop(request.reservation_id)
        for index, value in zip(request.indices, request.checksums, strict=True):
            key, address = entries[index]
            self.blocks[key] = (address, value)
        return pb.CommitResponse()

    def Abort(self, request: pb.AbortRequest) -> pb.AbortResponse:
        self.reservations.pop(request.reservation_id, None)
        return pb.AbortResponse()

    def Acquire(self, request: pb.AcquireRequest) -> pb.AcquireResponse:
        response = pb.AcquireResponse()
        for chain in request.chains:
            lease = response.leases.add()
            held = []
            for key in chain.keys:
                if key not in self.blocks:
                    break
                held.append(key)
                address, value = self.blocks[key]
                lease.addresses.append(address)
                lease.checksums.append(value)
            if held:
                lease.lease_id = self._number()
                lease.held = len(held)
                lease.expires_ns = self.clock.now_ns() + LEASE_NS
                self.leases[lease.lease_id] = held
        return response

    def Release(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        for number in request.lease_ids:
            self.leases.pop(number, None)
        return pb.ReleaseResponse()

    def Renew(self, request: pb.RenewRequest) -> pb.RenewResponse:
        return pb.RenewResponse(expires_ns=self.clock.now_ns() + LEASE_NS)

    def read(self, step: ReadStream, nbytes: int) -> None:
        request: Any = step.request
        held = self.leases[request.lease_id]
        for index in request.indices:
            address, _ = self.blocks[held[index]]
            data = os.pread(self.extent, nbytes, address)
            step.sink(memoryview(data)[: nbytes // 2])
            step.sink(memoryview(data)[nbytes // 2 :])

    def write(self, step: WriteStream) -> None:
        offsets: dict[int, int] = {}
        reservation: int | None = None
        for piece in step.pieces:
            reservation = reservation or piece.reservation_id
            _, address = self.reservations[reservation][piece.entry]
            start = offsets.get(piece.entry, 0)
            os.pwrite(self.extent, piece.data, address + start)
            offsets[piece.entry] = start + piece.data.nbytes

    def damage(self, key: bytes) -> None:
        address, _ = self.blocks[key]
        first = os.pread(self.extent, 1, address)
        os.pwrite(self.extent, bytes([first[0] ^ 1]), address)

    def stored(self, key: bytes, nbytes: int) -> bytes:
        address, value = self.blocks[key]
        data = os.pread(self.extent, nbytes, address)
        assert checksum(data) == value
        return data

    def _number(self) -> int:
        self.next_number += 1
        return self.next_number - 1


class Driver:
    """Performs flows for one client, local or remote."""

    def __init__(self, server: FakeServer, *, local: bool, block_bytes: int) -> None:
        self.server = server
        self.local = local
        self.block_bytes = block_bytes
        self.before: Hook = nothing
        self.after: Hook = nothing
        self.backoff_now = 0.0
        self.core = Core(
            socket_path=None,
            timeout_s=5.0,
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
        self.before(step)
        result: Any = None
        match step:
            case Call():
                self.server.steps.append(step.method)
                result = self.server.call(step)
            case Work():
                result = step.run()
            case ReadStream():
                self.server.steps.append("Read")
                self.server.read(step, self.block_bytes)
            case WriteStream():
                self.server.steps.append("Write")
                self.server.write(step)
            case OpenSession():
                self.server.opened += 1
                session = self.server.opened.to_bytes(16, "big")
                self.server.sessions.add(session)
                result = (session, Stream(self.server, session))
            case Connect():
                result = self.run(self.connect())
        self.after(step)
        return result

    def connect(self) -> Flow[Link]:
        link = yield from connecting.connect(self.core, Budget(step_timeout_s))
        if self.local:
            link.arena = Arena(EXTENT_BYTES, lambda _: (os.dup(self.server.extent), EXTENT_BYTES))
        return link


step_timeout_s = 5.0


class Stream:
    def __init__(self, server: FakeServer, session: bytes) -> None:
        self._server = server
        self._session = session

    def alive(self) -> bool:
        return True  # A loss that only the next call finds out.

    def cancel(self) -> None:
        self._server.sessions.discard(self._session)


def info() -> ServerInfo:
    return ServerInfo("0", b"e1", "", 4096, 65536, 30_000, 30_000)


def gone(step: Step) -> None:
    raise Unavailable(f"{name_of(step)}: gone")
