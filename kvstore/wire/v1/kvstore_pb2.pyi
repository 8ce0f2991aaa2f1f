from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_CODE_UNSPECIFIED: _ClassVar[ErrorCode]
    BAD_REQUEST: _ClassVar[ErrorCode]
    BAD_KEY: _ClassVar[ErrorCode]
    BAD_SIZE: _ClassVar[ErrorCode]
    TOO_LARGE: _ClassVar[ErrorCode]
    UNKNOWN_LAYOUT: _ClassVar[ErrorCode]
    LEASE_EXPIRED: _ClassVar[ErrorCode]
    RESERVATION_EXPIRED: _ClassVar[ErrorCode]
    FOREIGN_LEASE: _ClassVar[ErrorCode]
    NO_SPACE: _ClassVar[ErrorCode]
    TOO_MANY: _ClassVar[ErrorCode]
    NO_SESSION: _ClassVar[ErrorCode]
    NO_TENANT: _ClassVar[ErrorCode]
    NO_LOWER_TIER: _ClassVar[ErrorCode]
    DRAINING: _ClassVar[ErrorCode]
    INTERNAL: _ClassVar[ErrorCode]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_DRAM: _ClassVar[Tier]
    TIER_NVME: _ClassVar[Tier]
    TIER_VRAM: _ClassVar[Tier]
ERROR_CODE_UNSPECIFIED: ErrorCode
BAD_REQUEST: ErrorCode
BAD_KEY: ErrorCode
BAD_SIZE: ErrorCode
TOO_LARGE: ErrorCode
UNKNOWN_LAYOUT: ErrorCode
LEASE_EXPIRED: ErrorCode
RESERVATION_EXPIRED: ErrorCode
FOREIGN_LEASE: ErrorCode
NO_SPACE: ErrorCode
TOO_MANY: ErrorCode
NO_SESSION: ErrorCode
NO_TENANT: ErrorCode
NO_LOWER_TIER: ErrorCode
DRAINING: ErrorCode
INTERNAL: ErrorCode
TIER_UNSPECIFIED: Tier
TIER_DRAM: Tier
TIER_NVME: Tier
TIER_VRAM: Tier

class Layout(_message.Message):
    __slots__ = ("model", "revision", "dtype", "kv_layout", "block_tokens", "block_bytes", "rank", "world", "group", "backend", "codec")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    dtype: str
    kv_layout: str
    block_tokens: int
    block_bytes: int
    rank: int
    world: int
    group: int
    backend: str
    codec: str
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., dtype: _Optional[str] = ..., kv_layout: _Optional[str] = ..., block_tokens: _Optional[int] = ..., block_bytes: _Optional[int] = ..., rank: _Optional[int] = ..., world: _Optional[int] = ..., group: _Optional[int] = ..., backend: _Optional[str] = ..., codec: _Optional[str] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "epoch", "attach_path", "max_block_bytes", "max_keys", "lease_ms", "reservation_ms", "max_blocks")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ATTACH_PATH_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_KEYS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    version: str
    epoch: bytes
    attach_path: str
    max_block_bytes: int
    max_keys: int
    lease_ms: int
    reservation_ms: int
    max_blocks: int
    def __init__(self, version: _Optional[str] = ..., epoch: _Optional[bytes] = ..., attach_path: _Optional[str] = ..., max_block_bytes: _Optional[int] = ..., max_keys: _Optional[int] = ..., lease_ms: _Optional[int] = ..., reservation_ms: _Optional[int] = ..., max_blocks: _Optional[int] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    def __init__(self, session: _Optional[bytes] = ...) -> None: ...

class RegisterLayoutRequest(_message.Message):
    __slots__ = ("layout",)
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...

class RegisterLayoutResponse(_message.Message):
    __slots__ = ("layout_id",)
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    layout_id: bytes
    def __init__(self, layout_id: _Optional[bytes] = ...) -> None: ...

class Chain(_message.Message):
    __slots__ = ("layout_ids", "keys", "reuse")
    LAYOUT_IDS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    REUSE_FIELD_NUMBER: _ClassVar[int]
    layout_ids: _containers.RepeatedScalarFieldContainer[bytes]
    keys: bytes
    reuse: Reuse
    def __init__(self, layout_ids: _Optional[_Iterable[bytes]] = ..., keys: _Optional[bytes] = ..., reuse: _Optional[_Union[Reuse, _Mapping]] = ...) -> None: ...

class Reuse(_message.Message):
    __slots__ = ("priority", "retention", "session", "category", "request")
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    priority: int
    retention: _containers.RepeatedCompositeFieldContainer[Retention]
    session: bytes
    category: str
    request: bytes
    def __init__(self, priority: _Optional[int] = ..., retention: _Optional[_Iterable[_Union[Retention, _Mapping]]] = ..., session: _Optional[bytes] = ..., category: _Optional[str] = ..., request: _Optional[bytes] = ...) -> None: ...

class Retention(_message.Message):
    __slots__ = ("first_token", "stop_token", "priority", "ttl_ms")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    first_token: int
    stop_token: int
    priority: int
    ttl_ms: int
    def __init__(self, first_token: _Optional[int] = ..., stop_token: _Optional[int] = ..., priority: _Optional[int] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("chains",)
    CHAINS_FIELD_NUMBER: _ClassVar[int]
    chains: _containers.RepeatedCompositeFieldContainer[Chain]
    def __init__(self, chains: _Optional[_Iterable[_Union[Chain, _Mapping]]] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("chains",)
    CHAINS_FIELD_NUMBER: _ClassVar[int]
    chains: _containers.RepeatedCompositeFieldContainer[ChainPresence]
    def __init__(self, chains: _Optional[_Iterable[_Union[ChainPresence, _Mapping]]] = ...) -> None: ...

class ChainPresence(_message.Message):
    __slots__ = ("held", "in_dram")
    HELD_FIELD_NUMBER: _ClassVar[int]
    IN_DRAM_FIELD_NUMBER: _ClassVar[int]
    held: int
    in_dram: int
    def __init__(self, held: _Optional[int] = ..., in_dram: _Optional[int] = ...) -> None: ...

class AcquireRequest(_message.Message):
    __slots__ = ("chains", "wait_ms", "priority", "recompute", "reader")
    CHAINS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_FIELD_NUMBER: _ClassVar[int]
    READER_FIELD_NUMBER: _ClassVar[int]
    chains: _containers.RepeatedCompositeFieldContainer[Chain]
    wait_ms: int
    priority: int
    recompute: Recompute
    reader: bytes
    def __init__(self, chains: _Optional[_Iterable[_Union[Chain, _Mapping]]] = ..., wait_ms: _Optional[int] = ..., priority: _Optional[int] = ..., recompute: _Optional[_Union[Recompute, _Mapping]] = ..., reader: _Optional[bytes] = ...) -> None: ...

class Recompute(_message.Message):
    __slots__ = ("tokens_per_s",)
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    tokens_per_s: float
    def __init__(self, tokens_per_s: _Optional[float] = ...) -> None: ...

class AcquireResponse(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    def __init__(self, leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("lease_id", "held", "addresses", "checksums", "expires_ns", "from_dram", "refusal")
    class Refusal(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        NONE: _ClassVar[Lease.Refusal]
        LATE: _ClassVar[Lease.Refusal]
        RECOMPUTE: _ClassVar[Lease.Refusal]
        FULL: _ClassVar[Lease.Refusal]
        STALLED: _ClassVar[Lease.Refusal]
    NONE: Lease.Refusal
    LATE: Lease.Refusal
    RECOMPUTE: Lease.Refusal
    FULL: Lease.Refusal
    STALLED: Lease.Refusal
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_NS_FIELD_NUMBER: _ClassVar[int]
    FROM_DRAM_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    held: int
    addresses: bytes
    checksums: bytes
    expires_ns: int
    from_dram: int
    refusal: Lease.Refusal
    def __init__(self, lease_id: _Optional[int] = ..., held: _Optional[int] = ..., addresses: _Optional[bytes] = ..., checksums: _Optional[bytes] = ..., expires_ns: _Optional[int] = ..., from_dram: _Optional[int] = ..., refusal: _Optional[_Union[Lease.Refusal, str]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("lease_ids",)
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("expires_ns",)
    EXPIRES_NS_FIELD_NUMBER: _ClassVar[int]
    expires_ns: int
    def __init__(self, expires_ns: _Optional[int] = ...) -> None: ...

class ReportDamageRequest(_message.Message):
    __slots__ = ("addresses",)
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: bytes
    def __init__(self, addresses: _Optional[bytes] = ...) -> None: ...

class ReportDamageResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("lease_ids",)
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("layout_id", "count", "wait_ms")
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    layout_id: bytes
    count: int
    wait_ms: int
    def __init__(self, layout_id: _Optional[bytes] = ..., count: _Optional[int] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: Slots
    def __init__(self, slots: _Optional[_Union[Slots, _Mapping]] = ...) -> None: ...

class Slots(_message.Message):
    __slots__ = ("first_slot", "addresses", "expires_ns")
    FIRST_SLOT_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_NS_FIELD_NUMBER: _ClassVar[int]
    first_slot: int
    addresses: bytes
    expires_ns: int
    def __init__(self, first_slot: _Optional[int] = ..., addresses: _Optional[bytes] = ..., expires_ns: _Optional[int] = ...) -> None: ...

class LandRequest(_message.Message):
    __slots__ = ("layout_id", "slots", "not_on")
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    NOT_ON_FIELD_NUMBER: _ClassVar[int]
    layout_id: bytes
    slots: bytes
    not_on: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, layout_id: _Optional[bytes] = ..., slots: _Optional[bytes] = ..., not_on: _Optional[_Iterable[str]] = ...) -> None: ...

class LandResponse(_message.Message):
    __slots__ = ("landings",)
    LANDINGS_FIELD_NUMBER: _ClassVar[int]
    landings: _containers.RepeatedCompositeFieldContainer[Landing]
    def __init__(self, landings: _Optional[_Iterable[_Union[Landing, _Mapping]]] = ...) -> None: ...

class Landing(_message.Message):
    __slots__ = ("gpu", "addresses")
    GPU_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    gpu: str
    addresses: bytes
    def __init__(self, gpu: _Optional[str] = ..., addresses: _Optional[bytes] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("layout_id", "segments", "reserve", "landed")
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    LANDED_FIELD_NUMBER: _ClassVar[int]
    layout_id: bytes
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    reserve: int
    landed: _containers.RepeatedCompositeFieldContainer[Landing]
    def __init__(self, layout_id: _Optional[bytes] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., reserve: _Optional[int] = ..., landed: _Optional[_Iterable[_Union[Landing, _Mapping]]] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("parent", "keys", "slots", "checksums", "reuse")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    REUSE_FIELD_NUMBER: _ClassVar[int]
    parent: bytes
    keys: bytes
    slots: bytes
    checksums: bytes
    reuse: Reuse
    def __init__(self, parent: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., slots: _Optional[bytes] = ..., checksums: _Optional[bytes] = ..., reuse: _Optional[_Union[Reuse, _Mapping]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("outcomes", "slots")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[CommitResponse.Outcome]
        STORED: _ClassVar[CommitResponse.Outcome]
        PRESENT: _ClassVar[CommitResponse.Outcome]
        CONFLICT: _ClassVar[CommitResponse.Outcome]
        ABSENT: _ClassVar[CommitResponse.Outcome]
    OUTCOME_UNSPECIFIED: CommitResponse.Outcome
    STORED: CommitResponse.Outcome
    PRESENT: CommitResponse.Outcome
    CONFLICT: CommitResponse.Outcome
    ABSENT: CommitResponse.Outcome
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    outcomes: bytes
    slots: Slots
    def __init__(self, outcomes: _Optional[bytes] = ..., slots: _Optional[_Union[Slots, _Mapping]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, slots: _Optional[_Iterable[int]] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("chains", "within_ms")
    CHAINS_FIELD_NUMBER: _ClassVar[int]
    WITHIN_MS_FIELD_NUMBER: _ClassVar[int]
    chains: _containers.RepeatedCompositeFieldContainer[Chain]
    within_ms: int
    def __init__(self, chains: _Optional[_Iterable[_Union[Chain, _Mapping]]] = ..., within_ms: _Optional[int] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("started",)
    STARTED_FIELD_NUMBER: _ClassVar[int]
    started: int
    def __init__(self, started: _Optional[int] = ...) -> None: ...

class HintRequest(_message.Message):
    __slots__ = ("session", "state", "expected_ms")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[HintRequest.State]
        WAITING: _ClassVar[HintRequest.State]
        IDLE: _ClassVar[HintRequest.State]
        ENDED: _ClassVar[HintRequest.State]
        PINNED: _ClassVar[HintRequest.State]
    STATE_UNSPECIFIED: HintRequest.State
    WAITING: HintRequest.State
    IDLE: HintRequest.State
    ENDED: HintRequest.State
    PINNED: HintRequest.State
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_MS_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    state: HintRequest.State
    expected_ms: int
    def __init__(self, session: _Optional[bytes] = ..., state: _Optional[_Union[HintRequest.State, str]] = ..., expected_ms: _Optional[int] = ...) -> None: ...

class HintResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("lease_id", "indices")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_id: _Optional[int] = ..., indices: _Optional[_Iterable[int]] = ...) -> None: ...

class ReadResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("slot", "data")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    slot: int
    data: bytes
    def __init__(self, slot: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class WriteResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("uptime_seconds", "tiers", "sessions", "leases", "reservations", "acquired_positions", "acquired_hits", "acquired_hits_dram", "committed_blocks", "corrupt_blocks", "tenant_blocks", "vram", "mismatched_blocks")
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    ACQUIRED_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    ACQUIRED_HITS_FIELD_NUMBER: _ClassVar[int]
    ACQUIRED_HITS_DRAM_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TENANT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    VRAM_FIELD_NUMBER: _ClassVar[int]
    MISMATCHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    uptime_seconds: float
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    sessions: int
    leases: int
    reservations: int
    acquired_positions: int
    acquired_hits: int
    acquired_hits_dram: int
    committed_blocks: int
    corrupt_blocks: int
    tenant_blocks: int
    vram: _containers.RepeatedCompositeFieldContainer[VramStats]
    mismatched_blocks: int
    def __init__(self, uptime_seconds: _Optional[float] = ..., tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., sessions: _Optional[int] = ..., leases: _Optional[int] = ..., reservations: _Optional[int] = ..., acquired_positions: _Optional[int] = ..., acquired_hits: _Optional[int] = ..., acquired_hits_dram: _Optional[int] = ..., committed_blocks: _Optional[int] = ..., corrupt_blocks: _Optional[int] = ..., tenant_blocks: _Optional[int] = ..., vram: _Optional[_Iterable[_Union[VramStats, _Mapping]]] = ..., mismatched_blocks: _Optional[int] = ...) -> None: ...

class TierStats(_message.Message):
    __slots__ = ("tier", "capacity_bytes", "used_bytes", "blocks", "evictions", "bytes_in", "bytes_out", "healthy", "stalled", "stalls", "off_because")
    TIER_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    STALLED_FIELD_NUMBER: _ClassVar[int]
    STALLS_FIELD_NUMBER: _ClassVar[int]
    OFF_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    capacity_bytes: int
    used_bytes: int
    blocks: int
    evictions: int
    bytes_in: int
    bytes_out: int
    healthy: bool
    stalled: bool
    stalls: int
    off_because: str
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., evictions: _Optional[int] = ..., bytes_in: _Optional[int] = ..., bytes_out: _Optional[int] = ..., healthy: bool = ..., stalled: bool = ..., stalls: _Optional[int] = ..., off_because: _Optional[str] = ...) -> None: ...

class VramStats(_message.Message):
    __slots__ = ("gpu", "capacity_bytes", "held_bytes", "used_bytes", "blocks", "hits", "copied_bytes", "landed_bytes", "landed_hits", "no_room_to_land", "no_share_to_land", "evictions", "extents_given_back", "short", "healthy", "off_because", "reads_straight", "not_straight_because", "straight_blocks", "bounced_blocks")
    GPU_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    COPIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LANDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LANDED_HITS_FIELD_NUMBER: _ClassVar[int]
    NO_ROOM_TO_LAND_FIELD_NUMBER: _ClassVar[int]
    NO_SHARE_TO_LAND_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_GIVEN_BACK_FIELD_NUMBER: _ClassVar[int]
    SHORT_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    OFF_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    READS_STRAIGHT_FIELD_NUMBER: _ClassVar[int]
    NOT_STRAIGHT_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    STRAIGHT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BOUNCED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    gpu: str
    capacity_bytes: int
    held_bytes: int
    used_bytes: int
    blocks: int
    hits: int
    copied_bytes: int
    landed_bytes: int
    landed_hits: int
    no_room_to_land: int
    no_share_to_land: int
    evictions: int
    extents_given_back: int
    short: bool
    healthy: bool
    off_because: str
    reads_straight: bool
    not_straight_because: str
    straight_blocks: int
    bounced_blocks: int
    def __init__(self, gpu: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., held_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., hits: _Optional[int] = ..., copied_bytes: _Optional[int] = ..., landed_bytes: _Optional[int] = ..., landed_hits: _Optional[int] = ..., no_room_to_land: _Optional[int] = ..., no_share_to_land: _Optional[int] = ..., evictions: _Optional[int] = ..., extents_given_back: _Optional[int] = ..., short: bool = ..., healthy: bool = ..., off_because: _Optional[str] = ..., reads_straight: bool = ..., not_straight_because: _Optional[str] = ..., straight_blocks: _Optional[int] = ..., bounced_blocks: _Optional[int] = ...) -> None: ...

class ClearRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClearResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class FlushRequest(_message.Message):
    __slots__ = ("drop",)
    DROP_FIELD_NUMBER: _ClassVar[int]
    drop: bool
    def __init__(self, drop: bool = ...) -> None: ...

class FlushResponse(_message.Message):
    __slots__ = ("written",)
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    written: int
    def __init__(self, written: _Optional[int] = ...) -> None: ...
