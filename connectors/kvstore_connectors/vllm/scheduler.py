"""The scheduler's half: vLLM's hooks, and the loads that come of them.

A request's way to leases is in `leasing`, what is stored of it in `storing`, both of a
`Tracked`. One with a LoRA adapter becomes one when it is known what it is computed with
(`adapters`); until then it bypasses the store. Here is what vLLM calls, and who holds what
meanwhile: a lease lasts until the workers have reported the load, also of requests that
have been aborted.

Blocks of which store jobs still read stay pinned until the workers have reported
(`orders`). What is known of the store's content is forgotten whenever another life of
the server is attached to.

Nothing here does I/O or waits, except for `IDLE_WAIT_S` in a step that has no work.
Threads that have something to do are woken once a step.

Methods with the names of vLLM's hooks are what vLLM calls: see `KVConnectorBase_V1`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore_connectors.vllm.acquire import AcquireQueue
from kvstore_connectors.vllm.adapters import Adapter, AdapterBook
from kvstore_connectors.vllm.groups import Bands
from kvstore_connectors.vllm.handover import Coming, answer_for_decode, is_handed_over
from kvstore_connectors.vllm.held import Held, parts_of
from kvstore_connectors.vllm.hints import reuse_of
from kvstore_connectors.vllm.leasing import ANSWER_GRACE_S, Leasing
from kvstore_connectors.vllm.link import StoreLink
from kvstore_connectors.vllm.metadata import (
    Arrivals,
    LoadJob,
    StepMetadata,
    WorkerReport,
)
from kvstore_connectors.vllm.orders import Pins, StoreOrders
from kvstore_connectors.vllm.prefill import LEAST_TOKENS
from kvstore_connectors.vllm.stats import ConnectorStats
from kvstore_connectors.vllm.storing import Storing
from kvstore_connectors.vllm.tracked import Tracked, keys_of

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvstore.types import LayoutSpec

IDLE_WAIT_S = 0.002

_HOST, _DISK = CacheHitSource.HOST, CacheHitSource.DISK

STEPS_WAITED_FOR = 3
"""For workers to tell which weights an adapter has. What they have loaded before is told in
the next step, which is computed while the one after it is scheduled."""


@dataclass(slots=True, eq=False)
class _Adapted:
    """A LoRA request of which it is not known which weights it has. `tokens`: of its
    prompt, whose blocks have keys. `bypasses`: it is computed already."""

    request: Request
    tokens: int
    since_step: int
    bypasses: bool = False


class SchedulerSide:
    """Called by vLLM's scheduler, on its thread only."""

    def __init__(
        self,
        *,
        link: StoreLink,
        queue: AcquireQueue,
        bands: Bands,
        workers: int,
        acquire_timeout_ms: int,
        handover_timeout_ms: int,
        loads: bool,
        stores: bool,
        follows: bool,
        specs_for: Callable[[str], Sequence[LayoutSpec]],
    ) -> None:
        """`workers`: how many report on each store job. `follows`: whether to begin loads
        of which not all has come, and may not. `specs_for(salt)`: the layouts."""
        self.stats = ConnectorStats()
        self._link = link
        self._queue = queue
        self._bands = bands
        self._hash_tokens = bands.hash_tokens
        self._smallest_block = min(band.block_tokens for band in bands.bands)
        self._seen_groups = bands.full[0].members if bands.full else ()
        self._band_of = {member: band for band in bands.bands for member in band.members}
        self._handover_s = handover_timeout_ms / 1000
        self._loads = loads
        self._stores = stores
        self._specs_for = specs_for
        self._salt = ""
        self._tracked: dict[str, Tracked] = {}
        # Requests of which it is not known what they are computed with.
        self._adapted: dict[str, _Adapted] = {}
        self._adapters = AdapterBook(workers)
        # Those in which there were such requests.
        self._steps = 0
        self._orders = StoreOrders(workers, len(bands.groups), self._is_evicted)
        patience_s = acquire_timeout_ms / 1000 + ANSWER_GRACE_S
        self._leasing = Leasing(link, queue, bands, self._orders, self.stats, patience_s, follows)
        self._storing = Storing(bands, self._orders)
        # What each step looks at, at hand.
        self._prefill = queue.prefill
        self._offering, self._has_states = self._storing.offering, self._storing.states
        # Leases of loads under way, also of requests that have been aborted. What follows
        # another vLLM has none here.
        self._loading: dict[str, Held | None] = {}
        self._dram_tokens: dict[str, int] = {}
        # Whether a request has had an adapter.
        self._lora = False
        # Requests that came since the last step.
        self._new: list[Tracked] = []
        self._known_generation = link.generation
        # Orders for the next step; most have none.
        self._meta: StepMetadata | None = None
        self._nothing = StepMetadata()

    def _is_evicted(self, group: int, key: bytes) -> bool:
        """Whether it can be seen that the store has not got a block."""
        if group in self._seen_groups:
            return self._queue.holds(key) is False
        return self._queue.lacks(self._band_of[group], key)

    def bind_pins(self, pins: Pins) -> None:
        """Nothing is stored before there is a way to keep blocks from being reused."""
        self._orders.pins = pins

    # -- requests ---------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        # Those whose blocks have keys.
        tokens = len(request.block_hashes) * self._hash_tokens
        if tokens > request.num_prompt_tokens:
            tokens = request.num_prompt_tokens
        if tokens < self._smallest_block or request.resumable:
            # A session that goes on has no fixed prompt.
            return
        if request.lora_request is None:
            self._track(request, tokens, None)
        else:
            self._adapted[request.request_id] = _Adapted(request, tokens, self._steps)

    def _track(self, request: Request, tokens: int, adapter: Adapter | None) -> None:
        loadable = 0
        if self._loads and not request.skip_reading_prefix_cache:
            # vLLM needs one token to compute, to have something to sample from.
            loadable = tokens - 1 if tokens == request.num_prompt_tokens else tokens
            loadable -= loadable % self._bands.alignment
        tracked = Tracked(request, tokens, loadable, not loadable, None, adapter)
        self._tracked[request.request_id] = tracked
        if self._stores:
            tracked.storable = True
            self._offering[request.request_id] = tracked
        if loadable:
            self._new.append(tracked)
        params = request.kv_transfer_params
        if params is not None:
            tracked.handed_over = self._stores and is_handed_over(params)
            if loadable:
                now_s = time.monotonic()
                tracked.coming = Coming.of(params, loadable, self._handover_s, now_s)
        self._lora = self._lora or adapter is not None

    def _find_adapter(self, waiting: _Adapted) -> bool:
        """Whether it is known what the request is computed with: then it is like any other."""
        request = waiting.request
        adapter = self._adapters.find(request.lora_request)
        if adapter is not None:
            del self._adapted[request.request_id]
            self._track(request, waiting.tokens, adapter)
        return adapter is not None

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._adapted:
            waiting = self._adapted.get(request.request_id)
            if waiting is not None and not self._find_adapter(waiting):
                if self._loads and self._steps < waiting.since_step + STEPS_WAITED_FOR:
                    return None, False
                waiting.bypasses = True
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return 0, False
        tokens = self._leasing.match(tracked, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(
        self,
        request: Request,
        blocks: KVCacheBlocks,
        num_external_tokens: int,
    ) -> None:
        tracked = self._tracked.get(request.request_id)
        if tracked is None or (tracked.held is None and tracked.coming is None):
            return
        if num_external_tokens == 0:
            self._leasing.end(tracked)
            return
        held = self._leasing.take(tracked)
        position = tracked.local_tokens + num_external_tokens
        if held is None:
            job = self._follow(tracked, position, blocks.get_block_ids())
            from_dram = num_external_tokens
        else:
            job = self._load(tracked, held, position, blocks.get_block_ids())
            from_dram = held.dram_tokens - tracked.local_tokens
        if tracked.local_tokens < self._smallest_block and self._stores:
            # Of what vLLM has itself, some may have to be stored again.
            self._storing.loaded(tracked, position, rest=held is not None and held.rest)
        meta = self._meta
        if meta is None:
            meta = self._orders_for_next_step()
        meta.loads.append(job)
        if tracked.adapter is not None:
            meta.adapters[request.request_id] = tracked.adapter
        self._dram_tokens[request.request_id] = from_dram
        self._loading[request.request_id] = held
        tracked.loading = True

    def _follow(self, tracked: Tracked, position: int, tables: Sequence[Sequence[int]]) -> LoadJob:
        """Load what another vLLM stores, as it comes."""
        attached, (band,) = self._link.current, self._bands.bands
        first, last = tracked.local_tokens // band.block_tokens, position // band.block_tokens
        request, size = tracked.request, band.block_tokens
        arrivals = Arrivals(
            group=0,
            block_ids=list(tables[self._bands.groups[0]][first:last]),
            keys=keys_of(tracked, self._bands.hash_tokens, size, first, last),
            patience_s=self._handover_s,
            reuse=reuse_of(request),
        )
        self.stats.add(asked_blocks=last - first, found_blocks=last - first)
        epoch = b"" if attached is None else attached.epoch
        return LoadJob(request.request_id, [], expires_ns=0, epoch=epoch, arrivals=arrivals)

    def _load(
        self, tracked: Tracked, held: Held, position: int, tables: Sequence[Sequence[int]]
    ) -> LoadJob:
        parts, expires_ns = held.parts, held.expires_ns
        if position != held.tokens:
            # vLLM takes all that was offered or nothing. Were it to take less, windows
            # and states would be those of another position.
            expires_ns = 0
        if position != held.tokens or tracked.local_tokens != held.floor:
            parts = parts_of(held.taken, tracked.local_tokens, position)
        groups, loads = self._bands.groups, []
        for load, first, last in parts:
            load.block_ids = list(tables[groups[load.group]][first:last])
            loads.append(load)
        return LoadJob(tracked.request.request_id, loads, expires_ns, held.attached.epoch)

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """Where the tokens of the load just ordered came from."""
        from_dram = self._dram_tokens.pop(request.request_id, 0)
        if not num_external_tokens:
            return {}
        # The store counts how many blocks were in DRAM, not which: in a chain it
        # is the front that stays there longest.
        if from_dram >= num_external_tokens:
            return {_HOST: num_external_tokens}
        if from_dram <= 0:
            return {_DISK: num_external_tokens}
        return {_HOST: from_dram, _DISK: num_external_tokens - from_dram}

    def request_finished(
        self, request: Request, block_ids: object
    ) -> tuple[bool, dict[str, Any] | None]:
        """False, for blocks that are still read are pinned; and what to hand over to a vLLM
        that decodes, where a proxy asks for that."""
        request_id = request.request_id
        tracked = self._tracked.pop(request_id, None)
        if tracked is not None:
            if not tracked.done:
                self._leasing.end(tracked)
            tracked.storable = False
            self._offering.pop(request_id, None)
            if request_id in self._orders.of_request:
                self._orders.ends(request_id)
            if tracked.loading:
                # It goes on: vLLM holds its blocks until it is reported.
                self._orders_for_next_step().unwanted.append(request_id)
        if self._dram_tokens:
            self._dram_tokens.pop(request_id, None)
        if self._adapted:
            self._adapted.pop(request_id, None)
        if request.kv_transfer_params is None:
            return False, None
        tokens = 0
        if tracked is not None and self._stores and self._link.up:
            tokens = min(tracked.prompt_tokens, request.num_prompt_tokens - 1)
        return False, answer_for_decode(request.kv_transfer_params, self._bands.aligned(tokens))

    request_finished_all_groups = request_finished

    # -- steps ------------------------------------------------------------------

    def _orders_for_next_step(self) -> StepMetadata:
        meta = self._meta
        if meta is None:
            meta = self._meta = StepMetadata(salt=self._salt)
        return meta

    def build_connector_meta(self, output: SchedulerOutput) -> StepMetadata:
        """Orders for the workers, not to be changed. Most steps only decode, and have none:
        what they pass through here costs the engine most of all."""
        if output.preempted_req_ids:
            self._preempted(output.preempted_req_ids)
        if self._adapted:
            self._look_for_adapters()
        if (self._offering or self._has_states) and self._link.current is not None:
            self._order_stores(output)
        if self._new:
            new, self._new = self._new, []
            self._leasing.foresee(new)
        if self._queue.news:
            self._queue.wake()
        tokens = output.total_num_scheduled_tokens
        if tokens >= LEAST_TOKENS:
            self._orders_for_next_step().prefill = self._prefill.begin(tokens)
        elif not tokens:
            self._orders_for_next_step().idle = True
            self._wait_idle()
        orders = self._meta
        if orders is None:
            return self._nothing
        self._meta = None
        return orders

    def _order_stores(self, output: SchedulerOutput) -> None:
        if self._known_generation != self._link.generation:
            self._known_generation = self._link.generation
            self._orders.forget()
        stores = self._storing.jobs(output, self._tracked)
        if not stores:
            return
        meta = self._orders_for_next_step()
        meta.stores = stores
        if self._lora:
            for store in stores:
                adapter = self._tracked[store.request_id].adapter
                if adapter is not None:
                    meta.adapters[store.request_id] = adapter

    def _preempted(self, request_ids: Collection[str]) -> None:
        """Their blocks are free for reuse in this very step."""
        cancelled = self._orders.cancel(request_ids)
        if cancelled:
            self._orders_for_next_step().cancelled += cancelled
        for request_id in request_ids:
            tracked = self._tracked.get(request_id)
            if tracked is not None and self._stores:
                self._storing.begin_anew(tracked)

    def _look_for_adapters(self) -> None:
        self._steps += 1
        for request_id, waiting in list(self._adapted.items()):
            # Too late for a load, but what is computed of it can be stored.
            if waiting.bypasses and self._find_adapter(waiting):
                self._leasing.end(self._tracked[request_id])

    def _wait_idle(self) -> None:
        """The engine has nothing to do until an answer comes."""
        meta = self._orders_for_next_step()
        if not self._loading and not meta.loads and self._awaits_answer():
            self._queue.wait_answer(IDLE_WAIT_S)

    def _awaits_answer(self) -> bool:
        return bool(self._adapted) or any(
            tracked.ticket is not None or (tracked.coming is not None and not tracked.done)
            for tracked in self._tracked.values()
        )

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        report = output.kv_connector_worker_meta
        if output.failed_recving or output.invalid_block_ids:
            self._store_what_failed()
        if output.finished_recving:
            self._loaded(output.finished_recving)
        # Not `isinstance`, which takes longer than all the rest for an abstract class.
        if type(report) is WorkerReport:
            self._prefill.end(report.prefill)
            if report.jobs:
                self._orders.reported(report.jobs)
            if report.adapters:
                self._adapters.heard(report.adapters)
        elif self._prefill.begun:
            self._prefill.end(0)

    def _loaded(self, request_ids: Collection[str]) -> None:
        """Loads that have ended, for better or worse."""
        for request_id in request_ids:
            held = self._loading.pop(request_id, None)
            if held is not None:
                self._queue.release(held)
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                tracked.loading = False
        if self._queue.news and not self._tracked:
            # There may be no next step, which would do it.
            self._queue.wake()

    def _store_what_failed(self) -> None:
        """Of the loads under way some has failed, and will be computed. Which one is not said
        in all cases; what the store has of the others is not stored twice."""
        for request_id in self._loading:
            tracked = self._tracked.get(request_id)
            if tracked is not None and tracked.storable:
                self._storing.begin_anew(tracked)

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        return self.stats.take() if self.stats.data else None

    def has_pending_push_work(self) -> bool:
        """Whether blocks are pinned, to be let go of by a step to come."""
        return bool(self._orders.pending)

    def has_pending_block_frees(self) -> bool:
        """Whether finished requests' blocks are pinned only until their stores are done."""
        return not self._orders.of_request.keys() <= self._tracked.keys()

    def reset(self) -> None:
        """Forget all that was stored so far, as after a change of weights."""
        self._salt = secrets.token_hex(8)
        self._orders.forget()
        self._adapted.clear()
        for tracked in self._tracked.values():
            if not tracked.loading:
                self._leasing.end(tracked)
            self._storing.end(tracked)
        self._nothing = StepMetadata(salt=self._salt)
        if self._meta is not None:
            self._meta.salt = self._salt
        self._link.change_layouts(self._specs_for(self._salt))

    def close(self) -> None:
        self._queue.close()
        self._link.close()

    def check_integrity(self) -> None:
        """Raise AssertionError where the books do not agree."""
        waiting = [t for t in self._tracked.values() if t.ticket is not None or t.held is not None]
        if len(waiting) != self._leasing.outstanding:
            raise AssertionError(f"{len(waiting)} wait, {self._leasing.outstanding} counted")
        self._orders.check_integrity()
        for tracked in self._tracked.values():
            if tracked.loading and tracked.request.request_id not in self._loading:
                raise AssertionError("a request loads without a lease")

    def is_quiet(self) -> bool:
        """Whether nothing is tracked, leased, loading or being stored."""
        requests = self._tracked or self._adapted or self._loading
        return not (requests or self._orders.pending or self._leasing.outstanding)
