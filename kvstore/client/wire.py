"""The client's words to and from the wire's messages.

Repeated fields go in and out as whole lists; the bulk messages of Read and Write
are encoded by hand, because the generated code would copy every block three
times. `tests/unit/client` holds the hand-written encoding against the generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

from kvstore.client.steps import WritePiece
from kvstore.types import (
    NO_REUSE,
    ChainPresence,
    ChainQuery,
    CommitAnswer,
    CommitOutcome,
    Landing,
    LayoutSpec,
    LeaseGrant,
    Refusal,
    Reuse,
    Segment,
    SlotGrant,
    StoreStats,
    Tier,
    TierStats,
    VramStats,
)
from kvstore.wire.columns import pack_keys, pack_numbers, unpack_numbers
from kvstore.wire.v1 import kvstore_pb2 as pb

MAX_MESSAGE_BYTES = 4 << 20
MAX_CHAINS = 1024
MAX_WAIT_MS = 60_000
PIECE_BYTES = 1 << 20
"""Most data in one message of Read or Write."""

SESSION_METADATA = "kvstore-session-bin"
ERROR_METADATA = "kvstore-error"

_READ_DATA_TAG = 0x0A  # field 1, length-delimited
_WRITE_SLOT_TAG = b"\x08"  # field 1, varint
_WRITE_DATA_TAG = b"\x12"  # field 2, length-delimited

_OUTCOMES = {int(outcome): outcome for outcome in CommitOutcome}
_REFUSALS = {int(refusal): refusal for refusal in Refusal}


class ServerInfo(NamedTuple):
    """Who the server is and its limits; fields as in `GetServerInfoResponse`."""

    version: str
    epoch: bytes
    attach_path: str
    max_block_bytes: int
    max_keys: int
    lease_ms: int
    reservation_ms: int
    max_blocks: int


def layout_message(spec: LayoutSpec) -> pb.Layout:
    return pb.Layout(**asdict(spec))


def chain_messages(chains: Sequence[ChainQuery]) -> list[pb.Chain]:
    return [
        pb.Chain(
            layout_ids=chain.layout_ids,
            keys=pack_keys(chain.keys),
            reuse=reuse_message(chain.reuse),
        )
        for chain in chains
    ]


def reuse_message(reuse: Reuse) -> pb.Reuse | None:
    """None where nothing is said."""
    if reuse == NO_REUSE:
        return None
    retention = [
        pb.Retention(
            first_token=each.first_token,
            stop_token=each.stop_token,
            priority=each.priority,
            ttl_ms=0 if each.ttl_ms is None else max(1, round(each.ttl_ms)),
        )
        for each in reuse.retention
    ]
    return pb.Reuse(
        priority=reuse.priority,
        retention=retention,
        session=reuse.session,
        category=reuse.category,
        request=reuse.request,
    )


def presences(response: pb.LookupResponse) -> list[ChainPresence]:
    return [ChainPresence(chain.held, chain.in_dram) for chain in response.chains]


def grants(response: pb.AcquireResponse, tag: int) -> list[LeaseGrant]:
    """`tag` is added to every lease id; see `Link`."""
    return [
        LeaseGrant(
            lease.lease_id + tag if lease.lease_id else 0,
            lease.held,
            unpack_numbers(lease.addresses),
            unpack_numbers(lease.checksums),
            lease.expires_ns,
            lease.from_dram,
            _REFUSALS.get(lease.refusal),
        )
        for lease in response.leases
    ]


def slot_grant(slots: pb.Slots, tag: int) -> SlotGrant:
    """`tag` is added to the slots' ids; see `Link`."""
    addresses = unpack_numbers(slots.addresses)
    return SlotGrant(slots.first_slot + tag if addresses else 0, addresses, slots.expires_ns)


def landings(response: pb.LandResponse) -> list[Landing]:
    return [Landing(each.gpu, unpack_numbers(each.addresses)) for each in response.landings]


def landing_messages(landings: Sequence[Landing]) -> list[pb.Landing]:
    return [pb.Landing(gpu=each.gpu, addresses=pack_numbers(each.addresses)) for each in landings]


def segment_messages(segments: Sequence[Segment], tag: int) -> list[pb.Segment]:
    """`tag` is taken from the slots' ids; see `Link`."""
    return [
        pb.Segment(
            parent=segment.parent,
            keys=pack_keys(segment.keys),
            slots=pack_numbers([slot - tag if slot else 0 for slot in segment.slots]),
            checksums=pack_numbers(segment.checksums),
            reuse=reuse_message(segment.reuse),
        )
        for segment in segments
    ]


def commit_answer(response: pb.CommitResponse, tag: int) -> CommitAnswer:
    # Of an outcome this client does not know, only that nothing was published is safe.
    absent = CommitOutcome.ABSENT
    outcomes = [_OUTCOMES.get(outcome, absent) for outcome in response.outcomes]
    return CommitAnswer(outcomes, slot_grant(response.slots, tag))


def server_info(response: pb.GetServerInfoResponse) -> ServerInfo:
    return ServerInfo(
        version=response.version,
        epoch=response.epoch,
        attach_path=response.attach_path,
        max_block_bytes=response.max_block_bytes,
        max_keys=response.max_keys,
        lease_ms=response.lease_ms,
        reservation_ms=response.reservation_ms,
        max_blocks=response.max_blocks,
    )


def stats(response: pb.GetStatsResponse) -> StoreStats:
    known = {int(tier) for tier in Tier}
    return StoreStats(
        uptime_seconds=response.uptime_seconds,
        tiers=tuple(
            TierStats(
                tier=Tier(tier.tier),
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
            for tier in response.tiers
            if tier.tier in known
        ),
        sessions=response.sessions,
        leases=response.leases,
        reservations=response.reservations,
        acquired_positions=response.acquired_positions,
        acquired_hits=response.acquired_hits,
        acquired_hits_dram=response.acquired_hits_dram,
        committed_blocks=response.committed_blocks,
        corrupt_blocks=response.corrupt_blocks,
        mismatched_blocks=response.mismatched_blocks,
        tenant_blocks=response.tenant_blocks,
        vram=tuple(
            VramStats(*(getattr(gpu, name) for name in VramStats._fields)) for gpu in response.vram
        ),
    )


def encode_write(piece: WritePiece) -> bytes:
    """A serialized `WriteRequest`, with one copy of the data."""
    head = (_WRITE_SLOT_TAG, _varint(piece.slot), _WRITE_DATA_TAG, _varint(piece.data.nbytes))
    return b"".join((*head, piece.data))


def decode_read(message: bytes) -> memoryview:
    """The data of a serialized `ReadResponse`, without a copy where it is alone."""
    if message and message[0] == _READ_DATA_TAG:
        length = shift = 0
        for position in range(1, min(len(message), 11)):
            length |= (message[position] & 0x7F) << shift
            if not message[position] & 0x80:
                if position + 1 + length == len(message):
                    return memoryview(message)[position + 1 :]
                break
            shift += 7
    return memoryview(pb.ReadResponse.FromString(message).data)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
