"""`KVStoreConnector`: vLLM's hooks, handed to the half that runs in this process.

A connector that cannot serve an engine switches itself off with one warning: every
hook then does nothing, and inference goes on as without it. What a user wrote wrong
is refused at start, with a `ConfigError` that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.logger import init_logger

from kvstore.errors import ConfigError
from kvstore_connectors.vllm import layout
from kvstore_connectors.vllm.acquire import AcquireQueue
from kvstore_connectors.vllm.adapter_files import LoadedAdapters
from kvstore_connectors.vllm.coding import coded, coded_by_gpu
from kvstore_connectors.vllm.config import ConnectorConfig
from kvstore_connectors.vllm.events import StoreEvents
from kvstore_connectors.vllm.groups import bands_of
from kvstore_connectors.vllm.link import StoreLink, connector_of
from kvstore_connectors.vllm.metadata import StepMetadata, WorkerLayouts, WorkerReport
from kvstore_connectors.vllm.orders import PoolPins
from kvstore_connectors.vllm.reader import reader_of
from kvstore_connectors.vllm.scheduler import SchedulerSide
from kvstore_connectors.vllm.stats import ConnectorPromMetrics, ConnectorStats
from kvstore_connectors.vllm.worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorHandshakeMetadata,
        KVConnectorMetadata,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvstore.types import LayoutSpec
    from kvstore_connectors.vllm.blocks import Geometry

logger = init_logger("vllm.kvstore")

_SAFE_HASHES = ("sha256", "sha256_cbor")


_SCHEDULERS_HOOKS = (
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "get_external_cache_hit_sources",
    "build_connector_meta",
    "update_connector_output",
    "get_kv_connector_stats",
    "has_pending_block_frees",
    "request_finished",
    "request_finished_all_groups",
)
"""Methods of `SchedulerSide` that vLLM calls directly: out of cold caches, as they are after
each step, every function on the way costs the engine microseconds."""


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):
    """Prefix caching beyond the engine's own memory and life, through a KV store.

    Of the scheduler's hooks, what is written here is what they do where the connector is off.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        """Raises `ConfigError` for a configuration that cannot be meant."""
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        config = ConnectorConfig.parse(transfer.kv_connector_extra_config or {})
        _check(vllm_config, config)
        self._codec = config.codec
        self._reader = reader_of(vllm_config, config)
        # A load may fail whenever the server does; failing the request over it would
        # make a cache the weakest part. That is vLLM's default, and whether a user
        # wrote it cannot be seen, so who wants it says it in our own words. vLLM reads
        # this after it has made the scheduler's connector.
        transfer.kv_load_failure_policy = config.load_failure
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._events: StoreEvents | None = None
        self._link: StoreLink | None = None
        self._specs: list[LayoutSpec] = []
        reason = layout.unsupported_reason(vllm_config, kv_cache_config)
        if reason is not None:
            logger.warning("KVStoreConnector is off: %s.", reason)
        elif role is KVConnectorRole.SCHEDULER:
            self._scheduler = self._make_scheduler(config)
            for hook in _SCHEDULERS_HOOKS:
                setattr(self, hook, getattr(self._scheduler, hook))
        else:
            self._worker = self._make_worker(config)

    @property
    def _on_gpu(self) -> bool:
        return bool(self._vllm_config.device_config.device_type == "cuda")

    @property
    def _is_alone(self) -> bool:
        """In a worker: whether this is not one of several connectors."""
        return has_kv_transfer_group() and get_kv_transfer_group() is self

    @property
    def _stages(self) -> int:
        stages: int = self._vllm_config.parallel_config.pipeline_parallel_size
        return stages

    def _layouts(self, shards: Sequence[int]) -> list[LayoutSpec]:
        specs = layout.layout_specs(self._vllm_config, self._kv_cache_config, shards)
        return coded(specs, self._codec, self._kv_cache_config, by_gpu=self._on_gpu)

    def _geometries(self, shard: int) -> list[Geometry]:
        cache = self._kv_cache_config
        geometries = layout.geometries(cache)
        if not self._on_gpu:
            return geometries
        specs = layout.layout_specs(self._vllm_config, cache, [shard])
        return coded_by_gpu(geometries, specs, self._codec, cache)

    def _specs_for(self, salt: str) -> list[LayoutSpec]:
        return layout.salted(self._specs, salt)

    def _make_scheduler(self, config: ConnectorConfig) -> SchedulerSide:
        cache = self._kv_cache_config
        bands = bands_of(cache)
        if self._stages == 1:
            self._specs = self._layouts(range(layout.shard_count(self._vllm_config, cache)))
        link = StoreLink(connector_of(config), self._specs, "scheduler")
        weighs = config.recompute == "when_sooner"
        queue = AcquireQueue(link, bands, config.acquire_timeout_ms, weighs, self._reader)
        events = self._vllm_config.kv_events_config
        loads = self._kv_transfer_config.is_kv_consumer
        if loads and events is not None and events.enable_kv_cache_events:
            self._events = StoreEvents(link, bands, cache)
        queue.start()
        self._link = link
        if self._specs:
            self._attach()
        return SchedulerSide(
            link=link,
            queue=queue,
            bands=bands,
            workers=self._vllm_config.parallel_config.world_size,
            acquire_timeout_ms=config.acquire_timeout_ms,
            handover_timeout_ms=config.handover_timeout_ms,
            loads=loads,
            stores=self._kv_transfer_config.is_kv_producer,
            # Of a prompt that another vLLM computes, the rest may not come.
            follows=config.load_failure == "recompute",
            specs_for=self._specs_for,
        )

    def _attach(self) -> None:
        """Now that it is known what there is to store."""
        assert self._link is not None
        self._link.start()
        self._link.wait_first_try()

    def _make_worker(self, config: ConnectorConfig) -> WorkerSide:
        rank = self._vllm_config.parallel_config.rank
        lora = self._vllm_config.lora_config
        shard, writes = layout.shard_of(rank, self._vllm_config, self._kv_cache_config)
        self._specs = self._layouts([shard])
        link = StoreLink(connector_of(config), self._specs, f"worker-{rank}")
        link.start()
        return WorkerSide(
            link=link,
            geometries=self._geometries(shard),
            rank=rank,
            shard=shard,
            writes=writes,
            loads=self._kv_transfer_config.is_kv_consumer,
            specs_for=self._specs_for,
            adapters=None if lora is None else LoadedAdapters(str(lora.lora_dtype)),
        )

    # -- both halves ------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        # Blocks outermost makes a block one contiguous piece. The CPU backend has
        # one layout only, and vLLM warns about a wish that it cannot meet.
        return None if vllm_config.device_config.device_type == "cpu" else "BLHNC"

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return ConnectorStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return ConnectorPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return None if self._worker is None else self._worker.take_stats()

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        if self._worker is None or self._stages == 1:
            return None
        if not self._is_alone:
            # vLLM hands what one of several connectors tells to all of them.
            logger.warning("KVStoreConnector is off: a pipeline has it as its only connector.")
            return None
        return WorkerLayouts(self._worker.layouts)

    # -- scheduler --------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        if self._scheduler is None or self._link is None or self._specs:
            return
        told = [each.specs for each in metadata.values() if isinstance(each, WorkerLayouts)]
        cache = self._kv_cache_config
        try:
            shards = layout.shard_count(self._vllm_config, cache)
            self._specs = layout.merged(told, cache.prefix_cacheable_group_ids, shards)
        except ConfigError as error:
            logger.warning("KVStoreConnector is off: %s.", error)
            self.shutdown()
            self._scheduler = self._events = None
            for hook in _SCHEDULERS_HOOKS:
                delattr(self, hook)
            return
        self._link.change_layouts(self._specs)
        self._attach()

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        if self._scheduler is not None:
            self._scheduler.bind_pins(PoolPins(gpu_block_pool))
        if self._events is not None:
            self._events.bind_pool(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)
        if self._events is not None:
            self._events.note(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None: ...

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        return {}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return StepMetadata()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None: ...

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    def take_events(self) -> list[KVCacheEvent]:
        if self._events is None or self._scheduler is None:
            return []
        return self._events.take(self._scheduler.has_pending_push_work())

    def has_pending_push_work(self) -> bool:
        if self._events is not None and self._events.pending:
            return True
        return self._scheduler is not None and self._scheduler.has_pending_push_work()

    def has_pending_block_frees(self) -> bool:
        return False

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.reset()
        if self._events is not None:
            self._events.forget_all()
        return True

    # -- worker -----------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._worker is not None:
            # Of several connectors the outer one says what becomes of loads that fail.
            reader = self._reader if self._is_alone else b""
            self._worker.register_kv_caches(kv_caches, reader)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None and isinstance(kv_connector_metadata, StepMetadata):
            self._worker.before_step(kv_connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        meta = self._connector_metadata
        if self._worker is not None and isinstance(meta, StepMetadata):
            self._worker.start_loads(meta)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request is computed after its load has ended."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Blocks are stored whole, after the step."""

    def wait_for_save(self) -> None:
        meta = self._connector_metadata
        if self._worker is not None and isinstance(meta, StepMetadata):
            self._worker.start_stores(meta)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        meta = self._connector_metadata
        if self._worker is None or not isinstance(meta, StepMetadata):
            return KVConnectorTransferResults()
        loaded, failed = self._worker.take_loaded(meta)
        return KVConnectorTransferResults(finished_recving=loaded, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._worker is None else self._worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> WorkerReport | None:
        return None if self._worker is None else self._worker.take_report()


def _check(vllm_config: VllmConfig, config: ConnectorConfig) -> None:
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if algorithm not in _SAFE_HASHES:
        raise ConfigError(
            f"KVStoreConnector cannot use --prefix-caching-hash-algo {algorithm}: its hashes are"
            " neither collision resistant nor the same in every process. Use sha256."
        )
    device = vllm_config.device_config.device_type
    if device not in ("cpu", "cuda"):
        raise ConfigError(
            f"KVStoreConnector cannot serve a KV cache on {device!r}, only one in host memory"
            " (vLLM's CPU build) or on an NVIDIA GPU."
        )
    if device == "cuda" and not config.untested_gpu:
        raise ConfigError(
            "KVStoreConnector has not been tried on a GPU yet. To be the first, run"
            " 'kvstore bench gpu', which compares what arrives, and put"
            ' "untested_gpu": true into kv_connector_extra_config.'
        )
