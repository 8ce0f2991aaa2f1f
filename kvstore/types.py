"""The words the whole project speaks: layouts, outcomes, addresses.

Values only. Nothing here does I/O or knows of gRPC, tiers or vLLM.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from kvstore.errors import BadKey, BadRequest

KEY_BYTES = 32
"""Length of a block's key: the engine's chained hash at the block's end."""

LAYOUT_ID_BYTES = 16
SESSION_ID_BYTES = 16
STORED_KEY_BYTES = 16

ALIGNMENT = 4096
"""Slots start and end on this boundary, in memory and on disk: O_DIRECT moves
them without a bounce buffer."""

GPU_ONLY = 1 << 63
"""An address that is this or more names a block that is in a GPU's memory and not in DRAM:
without this bit, where it is among those that are there."""
MAX_READER_BYTES = 64
"""Of the name under which blocks are read on a GPU."""

MAX_TEXT_BYTES = 512

MAX_PRIORITY = 100
MAX_HINT_BYTES = 64
"""Of the name of a session, a request or a category."""
MAX_RETENTIONS = 16
"""Parts of a prompt that one chain gives a priority each."""


GROUP = 32
"""Elements of a block that share a scale where it is coded."""
CODECS = {"fp8": 8, "int4": 4}
"""Bits an element, without its part of the scale."""
_SCALE_BYTES = {"fp8": 1, "int4": 2}
_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def element_bytes(dtype: str) -> int:
    """Of a dtype that can be coded; 0 for others."""
    return _ELEMENT_BYTES.get(dtype, 0)


def can_be_coded(dtype: str, nbytes: int) -> bool:
    """Whether there is a codec for blocks of so many bytes: floats, in whole groups."""
    size = element_bytes(dtype)
    return bool(size) and nbytes % (GROUP * size) == 0


def coded_bytes(codec: str, dtype: str, nbytes: int) -> int:
    """What a block of `nbytes` takes when it is coded."""
    groups = nbytes // element_bytes(dtype) // GROUP
    return groups * (_SCALE_BYTES[codec] + GROUP * CODECS[codec] // 8)


def align_up(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """`nbytes` rounded up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment


class Tier(enum.IntEnum):
    """Where a replica of a block lives. Values are the wire's. `VRAM`: what was read straight
    from NVMe into a GPU's memory."""

    DRAM = 1
    NVME = 2
    VRAM = 3

    @property
    def label(self) -> str:
        return self.name.lower()


class PutOutcome(enum.Enum):
    """What became of one block of a put."""

    STORED = "stored"
    PRESENT = "present"
    """The very bytes were there already."""
    DENIED = "denied"
    """No space could be made in time."""


class CommitOutcome(enum.IntEnum):
    """What became of one block of a commit. Values are the wire's."""

    STORED = 1
    PRESENT = 2
    """The very bytes were there already."""
    CONFLICT = 3
    """Other bytes are there under this key, and stay."""
    ABSENT = 4
    """Asked without a slot, and not there."""


class Refusal(enum.IntEnum):
    """Why blocks that are held are not brought up for who asks. Values are the wire's."""

    LATE = 1
    """They could not be there in time."""
    RECOMPUTE = 2
    """To compute them takes less long."""
    FULL = 3
    """Too much is queued."""
    STALLED = 4
    """The tier they are in does not answer."""

    @property
    def label(self) -> str:
        return self.name.lower()


class Hints(NamedTuple):
    """What a caller says of its request.

    `priority`: 0 to `MAX_PRIORITY`, of its being answered soon: whose blocks come up first.
    How long blocks are worth keeping is another question (`Reuse`). `tokens_per_s`: for
    callers that compute what they are not given, how fast they do, 0.0 where they have not
    measured it; None for others.
    """

    priority: int = 50
    tokens_per_s: float | None = None


NO_HINTS = Hints()


class SessionState(enum.IntEnum):
    """What a caller says that a session does next. Values are the wire's."""

    WAITING = 1
    """It waits for a tool and goes on by itself."""
    IDLE = 2
    """It waits for a person."""
    ENDED = 3
    PINNED = 4
    """Its blocks count as of the highest priority until its next request."""


OUTPUT = "output"
"""The category of blocks that a model made. They are used again only if somebody continues
them; until then they are not written to NVMe, and are the first to leave DRAM."""


class Retention(NamedTuple):
    """A priority for a part of a prompt, for a while."""

    first_token: int
    stop_token: int
    priority: int
    """0 to `MAX_PRIORITY`."""
    ttl_ms: float | None = None
    """How long it holds, after which the default one does; None: for good."""


class Reuse(NamedTuple):
    """What a caller knows of the next use of a chain's blocks.

    `session`: whose next request is likely to use them, b"" where that is not known.
    `category`: requests of one kind tend to be followed up alike. `priority`: 0 to
    `MAX_PRIORITY`, of their staying, for what no `retention` is for. `request`: calls that
    name one request are one use. Names have `MAX_HINT_BYTES` at most, and there are
    `MAX_RETENTIONS` at most.
    """

    priority: int = 50
    retention: tuple[Retention, ...] = ()
    session: bytes = b""
    category: str = ""
    request: bytes = b""


NO_REUSE = Reuse()


@dataclass(frozen=True, slots=True)
class LayoutSpec:
    """Everything that makes two blocks' bytes interchangeable.

    Fields as in `Layout` of the wire protocol. Equal specs have equal ids, on
    every host and after every restart. `codec`: "", or the name in `CODECS` of what
    blocks may be kept with behind DRAM, which gives them back within its bounds.
    """

    model: str
    dtype: str
    block_tokens: int
    block_bytes: int
    revision: str = ""
    kv_layout: str = ""
    rank: int = 0
    world: int = 1
    group: int = 0
    backend: str = ""
    codec: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "dtype", "revision", "kv_layout", "backend", "codec"):
            if len(getattr(self, name).encode()) > MAX_TEXT_BYTES:
                raise BadRequest(f"layout field {name!r} is longer than {MAX_TEXT_BYTES} bytes")
        if not self.model or not self.dtype:
            raise BadRequest("a layout needs a model and a dtype")
        if not 1 <= self.block_tokens <= 65536:
            raise BadRequest(f"block_tokens must be 1..65536, not {self.block_tokens}")
        if self.block_bytes < 1:
            raise BadRequest(f"block_bytes must be positive, not {self.block_bytes}")
        if not 0 <= self.rank < self.world:
            raise BadRequest(f"rank {self.rank} is not within world {self.world}")
        if not 0 <= self.group < 1 << 32:
            raise BadRequest(f"group must be 0..2^32-1, not {self.group}")
        if self.codec:
            self._check_codec()

    def _check_codec(self) -> None:
        if self.codec not in CODECS:
            raise BadRequest(f"there is no codec {self.codec!r}, only {' and '.join(CODECS)}")
        if not can_be_coded(self.dtype, self.block_bytes):
            raise BadRequest(
                f"{self.codec} is for blocks of {', '.join(_ELEMENT_BYTES)} in whole groups of"
                f" {GROUP}, not for {self.block_bytes} bytes of {self.dtype}"
            )

    def fields(self) -> dict[str, object]:
        """By name. A codec that there is none of is left out: a layout without one is what
        it was before there were any."""
        fields = asdict(self)
        if not self.codec:
            del fields["codec"]
        return fields

    @property
    def stored_bytes(self) -> int:
        """Bytes of a block behind DRAM."""
        if not self.codec:
            return self.block_bytes
        return coded_bytes(self.codec, self.dtype, self.block_bytes)

    @property
    def layout_id(self) -> bytes:
        """16 bytes: a digest over every field, each with its length."""
        digest = hashlib.sha256(b"kvstore layout v1")
        for name, value in sorted(self.fields().items()):
            field = f"{name}={value}".encode()
            digest.update(len(field).to_bytes(4, "little") + field)
        return digest.digest()[:LAYOUT_ID_BYTES]

    @property
    def slot_bytes(self) -> int:
        """Bytes a block occupies in DRAM, padding included."""
        return align_up(self.block_bytes)


class ChainPresence(NamedTuple):
    """How much of a chain is held: positions from its start, without a hole."""

    held: int
    in_dram: int


class Landing(NamedTuple):
    """Places in a GPU's memory for blocks that are handed over to who reads there, as
    `extent * extent_bytes + offset`; 0: none."""

    gpu: str
    addresses: Sequence[int]


class TierStats(NamedTuple):
    """Levels and counters of one tier; bytes and blocks, counted since start."""

    tier: Tier
    capacity_bytes: int
    used_bytes: int
    blocks: int
    evictions: int
    bytes_in: int
    bytes_out: int
    healthy: bool
    stalled: bool
    """It does not answer, and is left alone until it does."""
    stalls: int
    """Times it stopped answering."""
    off_because: str = ""
    """Why it is not healthy, for people."""


class VramStats(NamedTuple):
    """What the store has of one GPU's memory; counters since start."""

    gpu: str
    capacity_bytes: int = 0
    """The most that it may have."""
    held_bytes: int = 0
    used_bytes: int = 0
    blocks: int = 0
    hits: int = 0
    """Blocks that were asked for, by whomever, while they were there."""
    copied_bytes: int = 0
    landed_bytes: int = 0
    """Of blocks that who handed them over wrote there."""
    landed_hits: int = 0
    """Of the hits, those of such blocks."""
    no_room_to_land: int = 0
    """Places for such blocks that were not granted for want of memory."""
    no_share_to_land: int = 0
    """Those not granted because what is to land has all that it may have."""
    evictions: int = 0
    extents_given_back: int = 0
    short: bool = False
    """Others have less of the GPU's memory left than is reserved for them."""
    healthy: bool = False
    off_because: str = ""
    """Why it is not, for people."""
    reads_straight: bool = False
    """Drives are read straight into it."""
    not_straight_because: str = ""
    """Why not, for people, where that is asked for."""
    straight_blocks: int = 0
    bounced_blocks: int = 0
    """Those that came by way of the host's memory, as reading them straight had failed."""


class StoreStats(NamedTuple):
    """A snapshot of the server; see `GetStatsResponse` of the wire protocol."""

    uptime_seconds: float
    tiers: tuple[TierStats, ...]
    sessions: int
    leases: int
    reservations: int
    acquired_positions: int
    acquired_hits: int
    acquired_hits_dram: int
    committed_blocks: int
    corrupt_blocks: int
    mismatched_blocks: int
    tenant_blocks: int
    vram: tuple[VramStats, ...] = ()
    """Of each GPU that the server was told to use."""


class LinkStats(NamedTuple):
    """One direction of the way between DRAM and the tier behind it. Seconds are those of
    all transfers together: predicted, taken, and by how much the two differed."""

    predicted_seconds: float
    actual_seconds: float
    error_seconds: float


class EnduranceStats(NamedTuple):
    """What is written to NVMe, against what may be. `written_bytes`: in the latest 24
    hours. `refused_*`: what was not worth a write, or another one, since the start."""

    bytes_per_day: int
    """0: as many as there are."""
    written_bytes: int
    refused_blocks: int
    refused_bytes: int


class TransferStats(NamedTuple):
    """What moves between tiers, since the start but for `queued`.

    `queued`: transfers that wait or run, by class. `refused`: chains that were brought up
    in part or not at all, by why. `links`: by the tier that is moved into.
    """

    queued: Mapping[str, int]
    refused: Mapping[Refusal, int]
    missed_deadlines: int
    given_up: int
    prefetched_used_bytes: int
    prefetched_wasted_bytes: int
    prefetched_unused_bytes: int
    links: Mapping[Tier, LinkStats]
    endurance: EnduranceStats


def check_key(key: bytes) -> bytes:
    """`key` itself; raises `BadKey` unless it is 32 bytes."""
    if len(key) != KEY_BYTES:
        raise BadKey(f"a key is {KEY_BYTES} bytes, not {len(key)}")
    return key


class ChainQuery(NamedTuple):
    """A chain to look up or acquire.

    `layout_ids`: one for each shard; a position counts only if all hold it.
    `keys`: 32 bytes each, consecutive positions from the first token on.
    """

    layout_ids: Sequence[bytes]
    keys: Sequence[bytes]
    reuse: Reuse = NO_REUSE


class LeaseGrant(NamedTuple):
    """What an acquire pinned for one chain; fields as in the wire's `Lease`.

    `addresses` and `checksums` are layout-major: all `held` positions of the
    first layout, then of the second. A `lease_id` of 0 means nothing is held.
    `refusal`: why it is not more, where more is held.
    """

    lease_id: int
    held: int
    addresses: list[int]
    checksums: list[int]
    expires_ns: int
    from_dram: int
    refusal: Refusal | None = None


class SlotGrant(NamedTuple):
    """Slots to write into, one of each of `addresses`; there may be none.

    Slot i has the id `first_slot` + i. Ids are never used twice in a server's life.
    """

    first_slot: int
    addresses: list[int]
    expires_ns: int


class Segment(NamedTuple):
    """Consecutive positions of one chain, to be committed.

    `parent`: key of the block before the first, b"" where that begins the chain.
    `slots`: the slot each block was written into; 0 asks whether it is there already.
    `checksums`: XXH3-64 of each block's bytes. All three lists are equally long.
    """

    parent: bytes
    keys: Sequence[bytes]
    slots: Sequence[int]
    checksums: Sequence[int]
    reuse: Reuse = NO_REUSE


class CommitAnswer(NamedTuple):
    """An outcome for each block, in order, and the slots reserved ahead."""

    outcomes: list[CommitOutcome]
    slots: SlotGrant
