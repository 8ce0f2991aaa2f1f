"""What the server tells Prometheus.

Two kinds of figures. Events (a transfer, an eviction, a refused call) are counted
as they happen. Levels and the store's own counters are read from `Store.stats()`
when somebody scrapes, so they cost the hot path nothing and cannot disagree with
what `GetStats` answers.

Labels come from closed sets: tiers, classes, error names, method names. Never a
key, a session, a tenant or anything else that a caller can make up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from kvstore.clock import Clock
from kvstore.errors import WIRE_ERRORS
from kvstore.types import CODECS, EnduranceStats, StoreStats, Tier, TransferStats, VramStats

if TYPE_CHECKING:
    from prometheus_client.core import Metric

LATENCY_BUCKETS_S = (
    10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3,
    10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip


class Metrics:
    """The server's metrics, in a registry of their own. Implements `StoreObserver`."""

    def __init__(self, registry: CollectorRegistry, *, version: str) -> None:
        self.registry = registry
        ProcessCollector(registry=registry)
        build = Gauge(
            "kvstore_build_info", "Always 1; the version is a label.", ["version"],
            registry=registry,
        )  # fmt: skip
        build.labels(version).set(1)
        self._ready = Gauge(
            "kvstore_ready", "1 while the server takes calls, as /readyz.", registry=registry
        )
        self._add_store_metrics(registry)
        self._add_call_metrics(registry)

    def _add_store_metrics(self, registry: CollectorRegistry) -> None:
        moved = ["src", "dst", "class"]
        self._transfer_bytes = Counter(
            "kvstore_transfer_bytes_total", "Bytes moved between tiers.", moved, registry=registry
        )
        self._transfer_seconds = Histogram(
            "kvstore_transfer_seconds", "Time of one transfer between tiers.", moved,
            buckets=LATENCY_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._evictions = Counter(
            "kvstore_evictions_total", "Blocks dropped from a tier.", ["tier", "reason"],
            registry=registry,
        )  # fmt: skip
        self._corrupt = Counter(
            "kvstore_corrupt_blocks_total", "Blocks found damaged and dropped.", ["tier"],
            registry=registry,
        )  # fmt: skip
        self._io_errors = Counter(
            "kvstore_io_errors_total", "Failed operations of a tier.", ["op", "errno"],
            registry=registry,
        )  # fmt: skip
        self._tiers_off = Counter(
            "kvstore_tier_failures_total", "Times a tier was switched off.", ["tier"],
            registry=registry,
        )  # fmt: skip
        self._coded = Counter(
            "kvstore_coded_blocks_total",
            "Blocks coded, with loss, on their way to a tier, or given back within the bounds.",
            ["codec", "src", "dst"], registry=registry,
        )  # fmt: skip
        self._straight_refused = Counter(
            "kvstore_gpudirect_fallbacks_total",
            "Straight reads into a GPU's memory that could not begin (unusable), or that stopped "
            "as others needed the memory (memory), blocks that came by way of the host's memory "
            "instead (failed), and GPUs given up for it (off).",
            ["gpu", "reason"], registry=registry,
        )  # fmt: skip
        # A series that is there from the start can be alerted on: its first
        # increase is one.
        for tier in Tier:
            self._corrupt.labels(tier.label)
            self._tiers_off.labels(tier.label)
        for codec in CODECS:
            self._coded.labels(codec, Tier.DRAM.label, Tier.NVME.label)
            self._coded.labels(codec, Tier.NVME.label, Tier.DRAM.label)

    def _add_call_metrics(self, registry: CollectorRegistry) -> None:
        self._call_seconds = Histogram(
            "kvstore_call_seconds", "Time of a finished call, waiting included.", ["method"],
            buckets=LATENCY_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._rejected = Counter(
            "kvstore_rejected_total", "Calls answered with an error, by its name.", ["reason"],
            registry=registry,
        )  # fmt: skip
        for code in WIRE_ERRORS:
            self._rejected.labels(code)
        self._unexpected = Counter(
            "kvstore_unexpected_errors_total", "Faults of the server itself, each in the log.",
            ["where"], registry=registry,
        )  # fmt: skip
        for where in ("call", "attach", "admin"):
            self._unexpected.labels(where)
        self._remote = Counter(
            "kvstore_remote_bytes_total", "Bytes of blocks sent by Read and taken by Write.",
            ["direction"], registry=registry,
        )  # fmt: skip
        self._read_bytes = self._remote.labels("read")
        self._write_bytes = self._remote.labels("write")

    # StoreObserver

    def transfer_done(self, src: str, dst: str, kind: str, nbytes: int, seconds: float) -> None:
        self._transfer_bytes.labels(src, dst, kind).inc(nbytes)
        self._transfer_seconds.labels(src, dst, kind).observe(seconds)

    def evicted(self, tier: str, reason: str, blocks: int) -> None:
        self._evictions.labels(tier, reason).inc(blocks)

    def io_error(self, op: str, errno_name: str) -> None:
        self._io_errors.labels(op, errno_name).inc()

    def corrupt(self, tier: str) -> None:
        self._corrupt.labels(tier).inc()

    def tier_off(self, tier: str) -> None:
        self._tiers_off.labels(tier).inc()

    def coded(self, codec: str, src: str, dst: str) -> None:
        self._coded.labels(codec, src, dst).inc()

    def straight_refused(self, gpu: str, reason: str) -> None:
        self._straight_refused.labels(gpu, reason).inc()

    # The server's own events

    def call_done(self, method: str, seconds: float) -> None:
        self._call_seconds.labels(method).observe(seconds)

    def rejected(self, code: str) -> None:
        """`code`: a name of the wire's `ErrorCode`."""
        self._rejected.labels(code).inc()

    def unexpected(self, where: str) -> None:
        self._unexpected.labels(where).inc()

    def bytes_read(self, nbytes: int) -> None:
        self._read_bytes.inc(nbytes)

    def bytes_written(self, nbytes: int) -> None:
        self._write_bytes.inc(nbytes)

    def set_ready(self, ready: bool) -> None:
        self._ready.set(1 if ready else 0)

    def watch_store(
        self, stats: Callable[[], StoreStats], stalled_seconds: Callable[[], float]
    ) -> None:
        """Read the store's figures at every scrape from now on."""
        self.registry.register(StoreCollector(stats, stalled_seconds))

    def watch_transfers(self, stats: Callable[[], TransferStats]) -> None:
        """Read what moves between tiers at every scrape from now on."""
        self.registry.register(TransferCollector(stats))

    def watch_vram(self, stats: Callable[[], Sequence[VramStats]]) -> None:
        """Read at every scrape."""
        for each in stats():
            if each.reads_straight or each.not_straight_because:
                for reason in ("unusable", "memory", "failed", "off"):
                    self._straight_refused.labels(each.gpu, reason)
        self.registry.register(VramCollector(stats))

    def watch_wear(self, wear: Callable[[], Mapping[str, int]], clock: Clock) -> None:
        """Read at every scrape what was written to NVMe since now: bytes by purpose,
        of which "store" is what was asked for."""
        self.registry.register(WearCollector(wear, clock))


class VramCollector(Collector):
    """`Store.vram_stats()` as metrics, read when scraped."""

    def __init__(self, stats: Callable[[], Sequence[VramStats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        levels = {
            "capacity_bytes": "The most that is taken of a GPU's memory.",
            "held_bytes": "What the store has of a GPU's memory now.",
            "used_bytes": "What lies there.",
            "blocks": "Blocks of which there is a copy there.",
            "short": "1 while others have less of the GPU's memory left than is reserved.",
            "healthy": "0 where the GPU cannot be used, or has failed.",
            "reads_straight": "1 while drives are read straight into it.",
        }
        counts = {
            "hits": "Blocks that were asked for, by whomever, while they were there.",
            "copied_bytes": "Bytes of blocks copied there.",
            "landed_bytes": "Bytes of blocks that who handed them over wrote there.",
            "landed_hits": "Of the hits, those of such blocks.",
            "evictions": "Copies that went for others.",
            "extents_given_back": "Extents given back to the GPU.",
        }
        stats = self._stats()
        for name, meaning in levels.items():
            gauge = GaugeMetricFamily(f"kvstore_vram_{name}", meaning, labels=["gpu"])
            for each in stats:
                gauge.add_metric([each.gpu], float(getattr(each, name)))
            yield gauge
        for name, meaning in counts.items():
            counter = CounterMetricFamily(f"kvstore_vram_{name}", meaning, labels=["gpu"])
            for each in stats:
                counter.add_metric([each.gpu], getattr(each, name))
            yield counter
        refused = CounterMetricFamily(
            "kvstore_vram_landings_refused",
            "Places not granted to blocks that were handed over, by why.",
            labels=["gpu", "reason"],
        )
        for each in stats:
            refused.add_metric([each.gpu, "room"], each.no_room_to_land)
            refused.add_metric([each.gpu, "share"], each.no_share_to_land)
        yield refused
        reads = CounterMetricFamily(
            "kvstore_gpudirect_reads",
            "Blocks read into a GPU's memory alone: straight, or by way of the host's memory.",
            labels=["gpu", "way"],
        )
        for each in stats:
            reads.add_metric([each.gpu, "straight"], each.straight_blocks)
            reads.add_metric([each.gpu, "bounce"], each.bounced_blocks)
        yield reads


class StoreCollector(Collector):
    """`Store.stats()` as metrics, read when scraped."""

    def __init__(
        self, stats: Callable[[], StoreStats], stalled_seconds: Callable[[], float]
    ) -> None:
        self._stats = stats
        self._stalled_seconds = stalled_seconds

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield _gauge("kvstore_uptime_seconds", "Since the store started.", stats.uptime_seconds)
        yield _gauge(
            "kvstore_housekeeping_age_seconds",
            "Since the store's housekeeping last finished; what /livez judges.",
            self._stalled_seconds(),
        )
        yield _gauge("kvstore_sessions", "Open sessions.", stats.sessions)
        yield _gauge("kvstore_leases", "Leases held.", stats.leases)
        yield _gauge("kvstore_reservations", "Reservations held.", stats.reservations)
        yield from _lookups(stats)
        committed = CounterMetricFamily(
            "kvstore_committed_blocks", "Blocks committed by clients.", stats.committed_blocks
        )
        yield committed
        yield CounterMetricFamily(
            "kvstore_mismatched_blocks",
            "Blocks dropped that did not have their client's checksum when first looked at.",
            stats.mismatched_blocks,
        )
        yield from _tiers(stats)


class TransferCollector(Collector):
    """`Store.transfer_stats()` as metrics, read when scraped."""

    def __init__(self, stats: Callable[[], TransferStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        queued = GaugeMetricFamily(
            "kvstore_transfers_queued", "Transfers that wait or run.", labels=["class"]
        )
        for name, count in stats.queued.items():
            queued.add_metric([name], count)
        refused = CounterMetricFamily(
            "kvstore_loads_refused",
            "Chains that were brought up in part or not at all, by why.",
            labels=["reason"],
        )
        for reason, count in stats.refused.items():
            refused.add_metric([reason.label], count)
        yield from (queued, refused)
        yield CounterMetricFamily(
            "kvstore_deadlines_missed",
            "Acquires whose time was up before all they waited for was there.",
            stats.missed_deadlines,
        )
        yield CounterMetricFamily(
            "kvstore_loads_given_up",
            "Acquires that stopped waiting because computing had become the faster way.",
            stats.given_up,
        )
        prefetched = CounterMetricFamily(
            "kvstore_prefetched_bytes",
            "Prefetched, and then asked for (used) or gone before anybody did (wasted).",
            labels=["result"],
        )
        prefetched.add_metric(["used"], stats.prefetched_used_bytes)
        prefetched.add_metric(["wasted"], stats.prefetched_wasted_bytes)
        yield prefetched
        yield _gauge(
            "kvstore_prefetched_unused_bytes",
            "Prefetched and there, and not asked for yet.",
            stats.prefetched_unused_bytes,
        )
        yield from _predictions(stats)
        yield from _endurance(stats.endurance)


class WearCollector(Collector):
    """What the NVMe tier wrote, and how fast that uses up a drive."""

    def __init__(self, wear: Callable[[], Mapping[str, int]], clock: Clock) -> None:
        self._wear = wear
        self._clock = clock
        self._since_ns = clock.now_ns()

    def collect(self) -> Iterable[Metric]:
        wear = self._wear()
        family = CounterMetricFamily(
            "kvstore_nvme_written_bytes",
            "Bytes written to the segments: asked for (store), to win room (move), notes (note).",
            labels=["purpose"],
        )
        for purpose, nbytes in wear.items():
            family.add_metric([purpose], nbytes)
        yield family
        written = sum(wear.values())
        yield _gauge(
            "kvstore_nvme_write_amplification",
            "Bytes written for each that was asked for, since the start.",
            written / wear["store"] if wear["store"] else 1.0,
        )
        days = (self._clock.now_ns() - self._since_ns) / 86_400e9
        yield _gauge(
            "kvstore_nvme_written_bytes_per_day",
            "Bytes written a day at the rate since the start.",
            written / days if days > 0 else 0.0,
        )


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value)


def _endurance(stats: EnduranceStats) -> Iterable[Metric]:
    yield _gauge(
        "kvstore_nvme_budget_bytes",
        "That may be written to NVMe in 24 hours; 0: any.",
        stats.bytes_per_day,
    )
    yield _gauge(
        "kvstore_nvme_written_last_day_bytes",
        "Written to NVMe in the latest 24 hours, by whole hours.",
        stats.written_bytes,
    )
    yield CounterMetricFamily(
        "kvstore_nvme_refused_blocks",
        "Blocks dropped that were not worth a write to NVMe, or another one.",
        stats.refused_blocks,
    )
    yield CounterMetricFamily(
        "kvstore_nvme_refused_bytes", "What those would have taken there.", stats.refused_bytes
    )


def _predictions(stats: TransferStats) -> Iterable[Metric]:
    """Of the time of transfers: what was predicted, what it was, and the difference."""
    said = CounterMetricFamily(
        "kvstore_predicted_seconds", "What transfers were predicted to take.", labels=["dst"]
    )
    taken = CounterMetricFamily(
        "kvstore_taken_seconds", "What those transfers took.", labels=["dst"]
    )
    error = CounterMetricFamily(
        "kvstore_prediction_error_seconds", "By how much the two differed.", labels=["dst"]
    )
    for tier, link in stats.links.items():
        said.add_metric([tier.label], link.predicted_seconds)
        taken.add_metric([tier.label], link.actual_seconds)
        error.add_metric([tier.label], link.error_seconds)
    yield from (said, taken, error)


def _lookups(stats: StoreStats) -> Iterable[Metric]:
    family = CounterMetricFamily(
        "kvstore_lookups",
        "Positions of chains asked for in acquires, by where they were found.",
        labels=["tier", "result"],
    )
    family.add_metric([Tier.DRAM.label, "hit"], stats.acquired_hits_dram)
    family.add_metric([Tier.NVME.label, "hit"], stats.acquired_hits - stats.acquired_hits_dram)
    family.add_metric(["none", "miss"], stats.acquired_positions - stats.acquired_hits)
    yield family


def _tiers(stats: StoreStats) -> Iterable[Metric]:
    capacity = GaugeMetricFamily(
        "kvstore_tier_capacity_bytes", "The most a tier may hold.", labels=["tier"]
    )
    used = GaugeMetricFamily("kvstore_tier_used_bytes", "What a tier holds.", labels=["tier"])
    blocks = GaugeMetricFamily("kvstore_tier_blocks", "Blocks in a tier.", labels=["tier"])
    healthy = GaugeMetricFamily(
        "kvstore_tier_healthy", "0 once a fault switched the tier off.", labels=["tier"]
    )
    stalled = GaugeMetricFamily(
        "kvstore_tier_stalled", "1 while the tier does not answer.", labels=["tier"]
    )
    stalls = CounterMetricFamily(
        "kvstore_tier_stalls", "Times a tier stopped answering.", labels=["tier"]
    )
    for tier in stats.tiers:
        label = [tier.tier.label]
        capacity.add_metric(label, tier.capacity_bytes)
        used.add_metric(label, tier.used_bytes)
        blocks.add_metric(label, tier.blocks)
        healthy.add_metric(label, 1 if tier.healthy else 0)
        stalled.add_metric(label, 1 if tier.stalled else 0)
        stalls.add_metric(label, tier.stalls)
    yield from (capacity, used, blocks, healthy, stalled, stalls)
