"""Tiers and the machine they are in, as numbers. Nothing here is measured: what is not
stated is that of one H100 with one drive of PCIe 4.0 and Llama 3.1 8B.
"""

from __future__ import annotations

from typing import NamedTuple

from kvstore.core.cost import REFERENCE, Prefill
from kvstore.core.space import Space
from kvstore.drive import Pace
from kvstore.errors import BadRequest
from kvstore.types import ALIGNMENT, Tier, align_up

MOST_BLOCKS = 100_000_000
"""What `server.max_blocks` may be at most."""
EXTENTS = 16
MOST_SLOTS = 256
"""A tier has at least so many extents, as the server's own sizes come to, of at most so
many slots. What does not fill an extent is not used, so a tier is a sixteenth smaller at
most."""


class Tiers(NamedTuple):
    """`nvme_bytes`: 0 for none. `nvme_bytes_per_day`: that may be written there; 0: any."""

    dram_bytes: int
    nvme_bytes: int = 0
    nvme_bytes_per_day: int = 0


class Machine(NamedTuple):
    """`engines`: that share the tiers, each computing one prompt at a time as `prefill`
    says. `kv_bytes`: of one token. `dram_bytes_per_s`: between DRAM and one engine's GPUs,
    each way. `batches`: of copies at a time, as the server has them. `acquire_timeout_ms`:
    how long an engine waits for what comes from NVMe."""

    prefill: Prefill = REFERENCE
    kv_bytes: float = 131072.0
    engines: int = 1
    dram_bytes_per_s: float = 50e9
    read_bytes_per_s: float = 6.8e9
    write_bytes_per_s: float = 5.3e9
    read_latency_s: float = 80e-6
    write_latency_s: float = 15e-6
    batches: int = 4
    acquire_timeout_ms: int = 1000


class Room(NamedTuple):
    """The two tiers for blocks of `block_bytes`; `nvme` is None where there is none."""

    block_bytes: int
    dram: Space
    nvme: Space | None

    @property
    def dram_blocks(self) -> int:
        return self.dram.capacity_bytes // align_up(self.block_bytes)

    @property
    def nvme_blocks(self) -> int:
        if self.nvme is None:
            return 0
        return self.nvme.capacity_bytes // nvme_slot_bytes(self.block_bytes)


def room_in(tiers: Tiers, machine: Machine, block_tokens: int) -> Room:
    """Raises `BadRequest` where a tier holds no block, or more than a server can."""
    block_bytes = max(1, round(block_tokens * machine.kv_bytes))
    dram = _space("dram", tiers.dram_bytes, align_up(block_bytes))
    nvme = None
    if tiers.nvme_bytes:
        nvme = _space("nvme", tiers.nvme_bytes, nvme_slot_bytes(block_bytes))
    return Room(block_bytes, dram, nvme)


def paces_of(machine: Machine) -> dict[Tier, Pace]:
    """Of its drive, by the tier that is moved into."""
    return {
        Tier.DRAM: Pace(machine.read_latency_s * 1e9, 1e9 / machine.read_bytes_per_s),
        Tier.NVME: Pace(machine.write_latency_s * 1e9, 1e9 / machine.write_bytes_per_s),
    }


def nvme_slot_bytes(block_bytes: int) -> int:
    """What a block occupies on a drive: a page that describes it, and itself."""
    return ALIGNMENT + align_up(block_bytes)


def _space(name: str, capacity_bytes: int, slot_bytes: int) -> Space:
    blocks = capacity_bytes // slot_bytes
    if not blocks:
        raise BadRequest(
            f"{name}: {capacity_bytes} bytes hold no block of this trace, which takes {slot_bytes}"
        )
    if blocks > MOST_BLOCKS:
        raise BadRequest(
            f"{name}: {capacity_bytes} bytes are {blocks} blocks of this trace; a server holds"
            f" {MOST_BLOCKS} at most"
        )
    slots = max(1, min(MOST_SLOTS, blocks // EXTENTS))
    return Space(capacity_bytes, slots * slot_bytes)
