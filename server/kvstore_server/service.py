"""The KVStore service: each RPC checked at the edge, then handed to the store.

Nothing is decided here but who is calling and whether a request is within bounds.
Handlers run on the store's own loop, so they call it directly.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from kvstore.errors import (
    BadRequest,
    BadSize,
    Draining,
    TooLarge,
)
from kvstore.metrics import Metrics
from kvstore.store import Session, Store
from kvstore.types import (
    KEY_BYTES,
    MAX_HINT_BYTES,
    MAX_PRIORITY,
    MAX_READER_BYTES,
    MAX_RETENTIONS,
    NO_REUSE,
    ChainQuery,
    Hints,
    Landing,
    LayoutSpec,
    Retention,
    Reuse,
    Segment,
    SessionState,
    SlotGrant,
    check_key,
)
from kvstore.wire.columns import pack_numbers, unpack_keys, unpack_numbers
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore_server import limits
from kvstore_server.callers import Caller, Context, GrpcCaller
from kvstore_server.calls import METHODS, SERVICE_NAME, Calls, UnaryMethod, message_class
from kvstore_server.framing import frame_read, parse_write
from kvstore_server.principals import Principals
from kvstore_server.streams import Stream, Streams

_STATES = {int(state): state for state in SessionState}
_NO_END = 1 << 62
_IDLE_POLL_S = 0.02
_NUMBER_BYTES = 8
"""Of a column of numbers (`columns`)."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What `GetServerInfo` says besides what the store knows."""

    version: str
    attach_path: str
    lease_ms: int
    reservation_ms: int


class KVStoreService:
    """The handlers of one server."""

    def __init__(
        self, store: Store, principals: Principals, metrics: Metrics, info: ServerInfo
    ) -> None:
        self.calls = Calls(metrics, partial(GrpcCaller, store, principals))
        self._store = store
        self._metrics = metrics
        self._info = info
        self._ending = asyncio.Event()
        self._streams = Streams(limits.MAX_STREAMS, limits.SESSION_STREAMS)

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Every method of the .proto; one without a handler here fails at start."""
        codecs: dict[str, dict[str, Any]] = {"Read": {"response_serializer": None}}
        handlers = {}
        for name, method in METHODS.items():
            codec = codecs.get(name, {})
            handlers[name] = self.calls.handler_for(method, self._behaviour(name), **codec)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    def unary(self) -> dict[str, UnaryMethod]:
        """The methods that take one message and answer with one, by name."""
        return {
            name: UnaryMethod(name, message_class(method.input_type), self._behaviour(name))
            for name, method in METHODS.items()
            if not (method.client_streaming or method.server_streaming)
        }

    def _behaviour(self, name: str) -> Any:
        return getattr(self, _snake(name))

    def end_sessions(self) -> None:
        """End the streams that keep remote sessions open."""
        self._ending.set()

    async def wait_idle(self) -> None:
        """Until no call is running but streams with which nobody goes on."""
        # Getting stuck is no event that could be waited for.
        while self.calls.under_way > self._streams.stuck():  # noqa: ASYNC110
            await asyncio.sleep(_IDLE_POLL_S)

    # Sessions and layouts

    def get_server_info(
        self, request: pb.GetServerInfoRequest, caller: Caller
    ) -> pb.GetServerInfoResponse:
        # Answered on the Unix socket before anybody has said who they are: it is
        # how a client learns where to attach.
        if caller.remote:
            caller.tenant()
        return pb.GetServerInfoResponse(
            version=self._info.version,
            epoch=self._store.epoch,
            attach_path="" if caller.remote else self._info.attach_path,
            max_block_bytes=self._store.extent_bytes,
            max_keys=limits.MAX_KEYS,
            max_blocks=limits.MAX_BLOCKS,
            lease_ms=self._info.lease_ms,
            reservation_ms=self._info.reservation_ms,
        )

    async def open_session(
        self, request: pb.OpenSessionRequest, caller: Caller, context: Context
    ) -> None:
        session = self._store.open_session(caller.tenant(), local=False)
        try:
            await context.write(pb.OpenSessionResponse(session=session.id))
            await self._ending.wait()
            raise Draining("the server is shutting down")
        finally:
            self._store.close_session(session)

    def register_layout(
        self, request: pb.RegisterLayoutRequest, caller: Caller
    ) -> pb.RegisterLayoutResponse:
        wanted = request.layout
        spec = LayoutSpec(
            model=wanted.model,
            revision=wanted.revision,
            dtype=wanted.dtype,
            kv_layout=wanted.kv_layout,
            block_tokens=wanted.block_tokens,
            block_bytes=wanted.block_bytes,
            rank=wanted.rank,
            world=wanted.world or 1,
            group=wanted.group,
            backend=wanted.backend,
            codec=wanted.codec,
        )
        layout_id = self._store.register_layout(caller.tenant(), spec)
        return pb.RegisterLayoutResponse(layout_id=layout_id)

    # Chains

    async def lookup(self, request: pb.LookupRequest, caller: Caller) -> pb.LookupResponse:
        found = await self._store.lookup(caller.tenant(), _chains(request.chains))
        return pb.LookupResponse(
            chains=[pb.ChainPresence(held=p.held, in_dram=p.in_dram) for p in found]
        )

    async def acquire(self, request: pb.AcquireRequest, caller: Caller) -> pb.AcquireResponse:
        grants = await self._store.acquire(
            caller.session(),
            _chains(request.chains),
            _wait_ms(request.wait_ms),
            _hints(request),
            _reader(request),
        )
        return pb.AcquireResponse(
            leases=[
                pb.Lease(
                    lease_id=grant.lease_id,
                    held=grant.held,
                    addresses=pack_numbers(grant.addresses),
                    checksums=pack_numbers(grant.checksums),
                    expires_ns=grant.expires_ns,
                    from_dram=grant.from_dram,
                    refusal=_enum(grant.refusal or 0),
                )
                for grant in grants
            ]
        )

    def renew(self, request: pb.RenewRequest, caller: Caller) -> pb.RenewResponse:
        _check_count(len(request.lease_ids))
        expires_ns = self._store.renew(caller.session(), request.lease_ids)
        return pb.RenewResponse(expires_ns=expires_ns)

    async def report_damage(
        self, request: pb.ReportDamageRequest, caller: Caller
    ) -> pb.ReportDamageResponse:
        _check_blocks(len(request.addresses) // _NUMBER_BYTES)
        await self._store.report_damage(caller.tenant(), unpack_numbers(request.addresses))
        return pb.ReportDamageResponse()

    def release(self, request: pb.ReleaseRequest, caller: Caller) -> pb.ReleaseResponse:
        _check_count(len(request.lease_ids))
        self._store.release(caller.session(), request.lease_ids)
        return pb.ReleaseResponse()

    async def prefetch(self, request: pb.PrefetchRequest, caller: Caller) -> pb.PrefetchResponse:
        started = await self._store.prefetch(
            caller.tenant(), _chains(request.chains), request.within_ms, caller.session_or_none()
        )
        return pb.PrefetchResponse(started=started)

    def hint(self, request: pb.HintRequest, caller: Caller) -> pb.HintResponse:
        tenant = caller.tenant()
        if not request.session or request.state not in _STATES:
            raise BadRequest("a hint names a session and what it does")
        _check_text(request.session)
        expected_ms = request.expected_ms if request.HasField("expected_ms") else None
        self._store.hint(tenant, request.session, _STATES[request.state], expected_ms)
        return pb.HintResponse()

    # Writing

    async def reserve(self, request: pb.ReserveRequest, caller: Caller) -> pb.ReserveResponse:
        _check_blocks(request.count)
        grant = await self._store.reserve(
            caller.session(), request.layout_id, request.count, _wait_ms(request.wait_ms)
        )
        return pb.ReserveResponse(slots=_slots(grant))

    def land(self, request: pb.LandRequest, caller: Caller) -> pb.LandResponse:
        _check_blocks(len(request.slots) // _NUMBER_BYTES)
        _check_gpus(len(request.not_on))
        landings = self._store.land(
            caller.session(), request.layout_id, unpack_numbers(request.slots), request.not_on
        )
        return pb.LandResponse(
            landings=[
                pb.Landing(gpu=each.gpu, addresses=pack_numbers(each.addresses))
                for each in landings
            ]
        )

    async def commit(self, request: pb.CommitRequest, caller: Caller) -> pb.CommitResponse:
        _check_blocks(request.reserve)
        _check_gpus(len(request.landed))
        answer = await self._store.commit(
            caller.session(), request.layout_id, _segments(request), request.reserve,
            _landed(request),
        )  # fmt: skip
        return pb.CommitResponse(outcomes=bytes(answer.outcomes), slots=_slots(answer.slots))

    def abort(self, request: pb.AbortRequest, caller: Caller) -> pb.AbortResponse:
        _check_blocks(len(request.slots))
        self._store.abort(caller.session(), request.slots)
        return pb.AbortResponse()

    # Bytes

    async def read(self, request: pb.ReadRequest, caller: Caller, context: Context) -> None:
        session = caller.session()
        _check_count(len(request.indices))
        with self._streams.one(session.id) as stream:
            for index in request.indices or range(_blocks_of(session, request.lease_id)):
                await self._send_block(session, request.lease_id, index, context, stream)

    async def _send_block(
        self, session: Session, lease_id: int, index: int, context: Context, stream: Stream
    ) -> None:
        offset = 0
        while True:
            # Asked for anew for each piece: between two of them the lease may have
            # ended and the slot been given to another block.
            block = self._store.lease_view(session, lease_id, index)
            piece = block[offset : offset + limits.MAX_CHUNK_BYTES]
            framed = frame_read(piece)
            offset += len(piece)
            self._metrics.bytes_read(len(piece))
            await context.write(framed)
            stream.moved()
            if offset >= len(block):
                return

    async def write(self, messages: AsyncIterator[bytes], caller: Caller) -> pb.WriteResponse:
        session = caller.session()
        with self._streams.one(session.id) as stream:
            receiving = asyncio.ensure_future(self._receive(messages, session, stream))
            # Nobody asks for the outcome of one that is given up. It is not cancelled: it
            # ends with the call, into which gRPC may be about to put a message.
            receiving.add_done_callback(lambda end: end.cancelled() or end.exception())
            while not receiving.done():
                left_s = limits.WRITE_IDLE_S - stream.idle_s
                if left_s <= 0:
                    raise BadRequest(f"nothing was written for {limits.WRITE_IDLE_S:.0f} s")
                await asyncio.wait((receiving,), timeout=left_s)
            receiving.result()
        return pb.WriteResponse()

    async def _receive(
        self, messages: AsyncIterator[bytes], session: Session, stream: Stream
    ) -> None:
        current = offset = length = 0
        async for message in messages:
            stream.moved()
            chunk = parse_write(message)
            if len(chunk.data) > limits.MAX_CHUNK_BYTES:
                raise BadSize(f"a message carries at most {limits.MAX_CHUNK_BYTES} bytes of data")
            if chunk.slot != current:
                _check_whole(offset, length)
                current, offset = chunk.slot, 0
            # Asked for anew for each piece, as in `_send_block`.
            slot = self._store.slot_view(session, chunk.slot)
            length = len(slot)
            if offset + len(chunk.data) > length:
                raise BadSize(f"more than the {length} bytes of a block for one slot")
            slot[offset : offset + len(chunk.data)] = chunk.data
            offset += len(chunk.data)
            self._metrics.bytes_written(len(chunk.data))
        _check_whole(offset, length)

    # Administration

    def get_stats(self, request: pb.GetStatsRequest, caller: Caller) -> pb.GetStatsResponse:
        stats = self._store.stats(caller.tenant())
        return pb.GetStatsResponse(
            uptime_seconds=stats.uptime_seconds,
            tiers=[
                pb.TierStats(
                    tier=_enum(tier.tier),
                    capacity_bytes=tier.capacity_bytes,
                    used_bytes=tier.used_bytes,
                    blocks=tier.blocks,
                    evictions=tier.evictions,
                    bytes_in=tier.bytes_in,
                    bytes_out=tier.bytes_out,
                    healthy=tier.healthy,
                    stalled=tier.stalled,
                    stalls=tier.stalls,
                    off_because=tier.off_because,
                )
                for tier in stats.tiers
            ],
            sessions=stats.sessions,
            leases=stats.leases,
            reservations=stats.reservations,
            acquired_positions=stats.acquired_positions,
            acquired_hits=stats.acquired_hits,
            acquired_hits_dram=stats.acquired_hits_dram,
            committed_blocks=stats.committed_blocks,
            corrupt_blocks=stats.corrupt_blocks,
            mismatched_blocks=stats.mismatched_blocks,
            tenant_blocks=stats.tenant_blocks,
            vram=[pb.VramStats(**gpu._asdict()) for gpu in stats.vram],
        )

    async def clear(self, request: pb.ClearRequest, caller: Caller) -> pb.ClearResponse:
        return pb.ClearResponse(blocks=await self._store.clear(caller.tenant()))

    async def flush(self, request: pb.FlushRequest, caller: Caller) -> pb.FlushResponse:
        return pb.FlushResponse(written=await self._store.flush(caller.tenant(), request.drop))


def _enum(value: int) -> Any:
    """A value of one of our enums as the .proto's enum of the same values. The
    stubs want the generated class there, which at run time is not one."""
    return int(value)


def _blocks_of(session: Session, lease_id: int) -> int:
    """Blocks of a lease; 1 for a lease that is not there, whose first block will
    then be refused with the right error."""
    lease = session.leases.get(lease_id)
    return 1 if lease is None else len(lease.replicas)


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _chains(chains: Sequence[pb.Chain]) -> list[ChainQuery]:
    """The chains of a request, once they are within bounds."""
    if len(chains) > limits.MAX_CHAINS:
        raise TooLarge(f"{len(chains)} chains in one call; at most {limits.MAX_CHAINS}")
    # A chain counts even without keys: its layouts are looked up all the same.
    _check_count(
        sum(
            max(1, len(chain.keys) // KEY_BYTES) * max(1, len(chain.layout_ids)) for chain in chains
        )
    )
    queries = []
    for chain in chains:
        if not 1 <= len(chain.layout_ids) <= limits.MAX_LAYOUTS:
            raise BadRequest(f"a chain names 1 to {limits.MAX_LAYOUTS} layouts")
        queries.append(ChainQuery(chain.layout_ids, unpack_keys(chain.keys), _reuse(chain)))
    return queries


def _hints(request: pb.AcquireRequest) -> Hints:
    """What a caller says of its request, once it is within bounds."""
    priority = request.priority if request.HasField("priority") else Hints().priority
    if priority > MAX_PRIORITY:
        raise BadRequest(f"a priority is 0 to {MAX_PRIORITY}, not {priority}")
    speed = request.recompute.tokens_per_s if request.HasField("recompute") else None
    if speed is not None and not 0 <= speed < math.inf:
        raise BadRequest("tokens_per_s is a positive number, or 0")
    return Hints(priority, speed)


def _reader(request: pb.AcquireRequest) -> bytes:
    if len(request.reader) > MAX_READER_BYTES:
        raise BadRequest(f"a reader's name has at most {MAX_READER_BYTES} bytes")
    return request.reader


def _reuse(told: pb.Chain | pb.Segment) -> Reuse:
    """What is said of the next use of blocks, once it is within bounds."""
    if not told.HasField("reuse"):
        return NO_REUSE
    reuse = told.reuse
    priority = reuse.priority if reuse.HasField("priority") else NO_REUSE.priority
    if len(reuse.retention) > MAX_RETENTIONS:
        raise TooLarge(f"a chain has at most {MAX_RETENTIONS} retentions")
    retention = tuple(
        Retention(each.first_token, each.stop_token or _NO_END, each.priority, each.ttl_ms or None)
        for each in reuse.retention
    )
    for claimed in (priority, *(each.priority for each in retention)):
        if claimed > MAX_PRIORITY:
            raise BadRequest(f"a priority is 0 to {MAX_PRIORITY}, not {claimed}")
    for text in (reuse.session, reuse.category.encode(), reuse.request):
        _check_text(text)
    return Reuse(priority, retention, reuse.session, reuse.category, reuse.request)


def _check_text(text: bytes) -> None:
    if len(text) > MAX_HINT_BYTES:
        raise TooLarge(f"a name in a hint has at most {MAX_HINT_BYTES} bytes")


def _segments(request: pb.CommitRequest) -> list[Segment]:
    """The segments of a commit, once they are within bounds."""
    if len(request.segments) > limits.MAX_CHAINS:
        raise TooLarge(f"{len(request.segments)} segments; at most {limits.MAX_CHAINS}")
    _check_blocks(sum(len(segment.keys) // KEY_BYTES for segment in request.segments))
    segments = []
    for each in request.segments:
        if each.parent:
            check_key(each.parent)
        keys = unpack_keys(each.keys)
        # Before they are unpacked: only keys have been counted.
        if not len(each.slots) == len(each.checksums) == len(keys) * _NUMBER_BYTES:
            raise BadRequest("a segment has a slot and a checksum for each of its keys")
        slots, checksums = unpack_numbers(each.slots), unpack_numbers(each.checksums)
        segments.append(Segment(each.parent, keys, slots, checksums, _reuse(each)))
    return segments


def _landed(request: pb.CommitRequest) -> list[Landing]:
    """The places of a commit, once they are within bounds."""
    for each in request.landed:
        _check_blocks(len(each.addresses) // _NUMBER_BYTES)
    return [Landing(each.gpu, unpack_numbers(each.addresses)) for each in request.landed]


def _slots(grant: SlotGrant) -> pb.Slots:
    return pb.Slots(
        first_slot=grant.first_slot,
        addresses=pack_numbers(grant.addresses),
        expires_ns=grant.expires_ns,
    )


def _check_count(count: int, most: int = limits.MAX_KEYS) -> None:
    if count > most:
        raise TooLarge(f"{count} items in one call; at most {most}")


def _check_gpus(count: int) -> None:
    _check_count(count, limits.MAX_GPUS)


def _check_blocks(count: int) -> None:
    _check_count(count, limits.MAX_BLOCKS)


def _wait_ms(wait_ms: int) -> int:
    if wait_ms > limits.MAX_WAIT_MS:
        raise BadRequest(f"wait_ms is at most {limits.MAX_WAIT_MS}")
    return wait_ms


def _check_whole(offset: int, length: int) -> None:
    if offset != length:
        raise BadSize(f"a slot got {offset} of its {length} bytes")
