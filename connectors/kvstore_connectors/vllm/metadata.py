"""What scheduler and workers tell each other: once a step, and once at the start."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvstore.types import NO_REUSE, LayoutSpec, Reuse
from kvstore_connectors.vllm.adapters import Adapter
from kvstore_connectors.vllm.hints import usual_reuse


@dataclass(slots=True)
class LoadPart:
    """Blocks of one stored group; `addresses[shard][i]` and `checksums[shard][i]` belong
    to `block_ids[i]`."""

    group: int
    block_ids: list[int]
    addresses: list[list[int]]
    checksums: list[list[int]]


@dataclass(slots=True)
class Arrivals:
    """Consecutive blocks of one stored group that another vLLM is storing: `keys[i]` is
    for `block_ids[i]`. `patience_s`: how long to wait when no more of them come."""

    group: int
    block_ids: list[int]
    keys: list[bytes]
    patience_s: float
    reuse: Reuse = NO_REUSE


@dataclass(slots=True)
class LoadJob:
    """Fill blocks of one request from leased slots, or with what is still to come.

    The addresses mean something only to the server life named by `epoch`, and only
    until `expires_ns` on CLOCK_MONOTONIC.
    """

    request_id: str
    parts: list[LoadPart]
    expires_ns: int
    epoch: bytes
    arrivals: Arrivals | None = None


@dataclass(slots=True)
class StoreJob:
    """Publish blocks of one stored group that this step's forward pass completes.

    `parents[i]` is the key of the block before `keys[i]`, empty where there is none.
    The blocks are kept from reuse until the job is reported or cancelled. `said`: what the
    request says of their next use, None where it says nothing. `handed_over`: another vLLM is
    to load them as soon as they are there.
    """

    job_id: int
    request_id: str
    group: int
    block_ids: list[int]
    keys: list[bytes]
    parents: list[bytes]
    said: Reuse | None = None
    handed_over: bool = False

    @property
    def reuse(self) -> Reuse:
        """What is known of their next use."""
        return usual_reuse(self.request_id) if self.said is None else self.said


@dataclass
class StepMetadata(KVConnectorMetadata):
    """The scheduler's orders for one step.

    `cancelled`: store jobs whose blocks are about to be reused. `unwanted`: requests that
    have ended, whose loads need not wait for what is still to come. `idle`: the step
    computes nothing, so waiting costs nobody. `salt`: part of the layouts; changes
    when the engine forgets its cache. `adapters`: by request, of those with loads or
    stores here, with which adapter their keys say that they are computed. `prefill`: a
    number to be sent back when the step is over; 0: none.
    """

    loads: list[LoadJob] = field(default_factory=list)
    stores: list[StoreJob] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    unwanted: list[str] = field(default_factory=list)
    idle: bool = False
    salt: str = ""
    adapters: dict[str, Adapter] = field(default_factory=dict)
    prefill: int = 0


@dataclass(slots=True)
class JobReport:
    """`workers`: how many have reported. `lost`: some block was not stored."""

    workers: int
    lost: bool


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """`jobs`: stores that no longer read their blocks, by job id. `adapters`: identities of
    the LoRA adapters that were loaded, by vLLM's number and worker. `prefill`: the number
    of the step that is over, as in `StepMetadata`."""

    jobs: dict[int, JobReport] = field(default_factory=dict)
    adapters: dict[int, dict[int, bytes]] = field(default_factory=dict)
    prefill: int = 0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        assert isinstance(other, WorkerReport)
        merged = dict(self.jobs)
        for job_id, theirs in other.jobs.items():
            ours = merged.get(job_id)
            if ours is None:
                merged[job_id] = theirs
            else:
                merged[job_id] = JobReport(ours.workers + theirs.workers, ours.lost or theirs.lost)
        adapters = dict(self.adapters)
        for number, identities in other.adapters.items():
            adapters[number] = adapters.get(number, {}) | identities
        return WorkerReport(merged, adapters, max(self.prefill, other.prefill))


@dataclass
class WorkerLayouts(KVConnectorHandshakeMetadata):
    """What a worker keeps in the store: a layout for each group."""

    specs: list[LayoutSpec]
