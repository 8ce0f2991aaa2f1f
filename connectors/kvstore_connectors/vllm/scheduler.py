"""The scheduler's half: which blocks to load, which to store, and who holds what.

One `_Tracked` a request. Its way to the store's blocks:

    first look --> ticket (asked) --> held (leased) --> loading --> done
                     |                  |                 |
                     `-- too late       `-- not needed    `-- load failed
                         or nothing

Every way ends in `done`, with the lease given back. A preemption starts the way
anew, because the request is computed anew. Until an answer has come the request is
skipped (None), which costs the engine nothing while it has other work.

A request that finishes while its store jobs still read its blocks keeps them until
the workers have reported. What is known of the store's content is forgotten whenever
another life of the server is attached to.

Nothing here does I/O or waits, except for `IDLE_WAIT_S` in a step that has no work.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore_connectors.vllm.acquire import AcquireQueue, Held, Ticket, TicketState
from kvstore_connectors.vllm.link import StoreLink
from kvstore_connectors.vllm.metadata import LoadJob, StepMetadata, WorkerReport
from kvstore_connectors.vllm.orders import StoreOrders
from kvstore_connectors.vllm.stats import ConnectorStats

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvstore.types import LayoutSpec

IDLE_WAIT_S = 0.002
ANSWER_GRACE_S = 0.25
"""How much later than asked an answer may come before the server counts as hung."""

MIN_LEASE_LEFT_S = 2.0
MAX_OUTSTANDING = 256
"""Requests with a ticket or an unused lease: bounds what waiting requests pin."""


@dataclass(slots=True)
class _Tracked:
    """A request the scheduler knows of. Block counts are in full prompt blocks."""

    request: Request
    blocks: int
    loadable: int
    preemptions: int = 0
    done: bool = False
    ticket: Ticket | None = None
    held: Held | None = None
    local_tokens: int = 0
    loading: bool = False
    offered: int = 0


class SchedulerSide:
    """Called by vLLM's scheduler, on its thread only."""

    def __init__(
        self,
        *,
        link: StoreLink,
        queue: AcquireQueue,
        block_tokens: int,
        hash_tokens: int,
        workers: int,
        acquire_timeout_ms: int,
        loads: bool,
        stores: bool,
        specs_for: Callable[[str], Sequence[LayoutSpec]],
    ) -> None:
        """`workers`: how many report on each store job. `specs_for(salt)`: the layouts."""
        self._link = link
        self._queue = queue
        self._block_tokens = block_tokens
        self._hashes_per_block = block_tokens // hash_tokens
        self._patience_s = acquire_timeout_ms / 1000 + ANSWER_GRACE_S
        self._loads = loads
        self._stores = stores
        self._specs_for = specs_for
        self._salt = ""
        self._tracked: dict[str, _Tracked] = {}
        # Leases of loads under way, also of requests that have been aborted.
        self._loading: dict[str, Held] = {}
        self._load_sources: dict[str, tuple[int, int]] = {}
        self._orders = StoreOrders(workers)
        self._known_generation = link.generation
        self._outstanding = 0
        self._meta = StepMetadata()
        self._flushing: set[str] = set()
        self.stats = ConnectorStats()

    # -- requests ---------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        hashed = len(request.block_hashes) // self._hashes_per_block
        blocks = min(request.num_prompt_tokens // self._block_tokens, hashed)
        if not blocks or request.lora_request is not None or request.resumable:
            # An adapter's name does not say which weights it has, and a session
            # that goes on has no fixed prompt.
            return
        self._tracked[request.request_id] = _Tracked(
            request=request,
            blocks=blocks,
            # vLLM needs one token to compute, to have something to sample from.
            loadable=min((request.num_prompt_tokens - 1) // self._block_tokens, blocks),
        )

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        tracked = self._tracked.get(request.request_id)
        if tracked is None or not self._loads or request.skip_reading_prefix_cache:
            return 0, False
        if tracked.preemptions != request.num_preemptions:
            self._restart(tracked)
        if tracked.done:
            return 0, False
        if num_computed_tokens >= tracked.loadable * self._block_tokens:
            self._finish_loading_way(tracked)
            return 0, False
        held = tracked.held
        if held is None:
            if not self._ask(tracked, num_computed_tokens):
                return (None if not tracked.done else 0), False
            held = tracked.held
        if held is None:
            return 0, False
        if not self._usable(held):
            # Waited too long in the queue to be safe; it may ask again.
            self._drop_lease(tracked)
            return None, False
        tokens = held.grant.held * self._block_tokens - num_computed_tokens
        if tokens <= 0:
            self._finish_loading_way(tracked)
            return 0, False
        tracked.local_tokens = num_computed_tokens
        return tokens, True

    def update_state_after_alloc(
        self,
        request: Request,
        get_block_ids: Callable[[], Sequence[Sequence[int]]],
        num_external_tokens: int,
    ) -> None:
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.loading:
            return
        held = tracked.held
        if held is None:
            return
        if num_external_tokens == 0:
            self._finish_loading_way(tracked)
            return
        start = tracked.local_tokens // self._block_tokens
        stop = start + num_external_tokens // self._block_tokens
        grant, shards = held.grant, len(held.attached.specs)
        columns = [slice(s * grant.held + start, s * grant.held + stop) for s in range(shards)]
        self._meta.loads.append(
            LoadJob(
                request_id=request.request_id,
                block_ids=list(get_block_ids()[0][start:stop]),
                addresses=[list(grant.addresses[column]) for column in columns],
                checksums=[list(grant.checksums[column]) for column in columns],
                expires_ns=grant.expires_ns,
                epoch=held.attached.epoch,
            )
        )
        self._load_sources[request.request_id] = (start, grant.from_dram)
        self._loading[request.request_id] = held
        self._outstanding -= 1
        tracked.held, tracked.loading, tracked.done = None, True, True

    def hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """Where the tokens of the load just ordered came from."""
        start, from_dram = self._load_sources.pop(request.request_id, (0, 0))
        if not num_external_tokens:
            return {}
        # The store counts how many blocks were in DRAM, not which: in a chain it
        # is the front that stays there longest.
        host = min(max(0, from_dram - start) * self._block_tokens, num_external_tokens)
        split = {CacheHitSource.HOST: host, CacheHitSource.DISK: num_external_tokens - host}
        return {source: tokens for source, tokens in split.items() if tokens}

    def request_finished(self, request: Request) -> bool:
        """True: the request's blocks must stay until its store jobs are reported."""
        request_id = request.request_id
        self._load_sources.pop(request_id, None)
        tracked = self._tracked.pop(request_id, None)
        if tracked is None:
            return False
        self._finish_loading_way(tracked)
        if request_id in self._loading:
            # vLLM holds the blocks until the load is reported, and frees them then.
            self._meta.cancelled += self._orders.cancel([request_id])
            return False
        if not self._orders.reads_blocks_of(request_id):
            return False
        self._meta.flushing.append(request_id)
        self._flushing.add(request_id)
        return True

    # -- steps ------------------------------------------------------------------

    def build_meta(self, output: SchedulerOutput) -> StepMetadata:
        if self._known_generation != self._link.generation:
            self._known_generation = self._link.generation
            self._orders.known.clear()
        if output.preempted_req_ids:
            # Their blocks are free for reuse in this very step.
            self._meta.cancelled += self._orders.cancel(output.preempted_req_ids)
            for request_id in output.preempted_req_ids:
                if request_id in self._tracked:
                    self._tracked[request_id].offered = 0
        if self._stores and self._link.up:
            self._order_stores(output)
        idle = output.total_num_scheduled_tokens == 0
        if idle and not self._loading and not self._meta.loads and self._awaits_answer():
            self._queue.wait_answer(IDLE_WAIT_S)
        meta, self._meta = self._meta, StepMetadata()
        meta.idle = idle
        meta.salt = self._salt
        return meta

    def update_output(self, output: KVConnectorOutput) -> None:
        for request_id in output.finished_recving or ():
            held = self._loading.pop(request_id, None)
            if held is not None:
                self._queue.release(held)
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                tracked.loading = False
        self._flushing.difference_update(output.finished_sending or ())
        report = output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self._orders.reported(report)

    def blocks_are_coming_back(self) -> bool:
        """Whether finished requests hold blocks only until their stores are done."""
        return bool(self._flushing)

    def reset(self) -> None:
        """Forget all that was stored so far, as after a change of weights."""
        self._salt = secrets.token_hex(8)
        self._orders.known.clear()
        for tracked in self._tracked.values():
            if not tracked.loading:
                self._finish_loading_way(tracked)
            tracked.offered = tracked.blocks
        self._link.change_layouts(self._specs_for(self._salt))

    def close(self) -> None:
        self._queue.close()
        self._link.close()

    def check_integrity(self) -> None:
        """Raise AssertionError where the books do not agree."""
        waiting = [t for t in self._tracked.values() if t.ticket is not None or t.held is not None]
        if len(waiting) != self._outstanding:
            raise AssertionError(f"{len(waiting)} requests wait, {self._outstanding} counted")
        self._orders.check_integrity()
        for tracked in self._tracked.values():
            if tracked.loading and tracked.request.request_id not in self._loading:
                raise AssertionError("a request loads without a lease")

    def is_quiet(self) -> bool:
        """Whether nothing is tracked, leased, loading or being stored."""
        return not (self._tracked or self._loading or self._orders or self._outstanding)

    # -- the way to a lease -----------------------------------------------------

    def _ask(self, tracked: _Tracked, num_computed_tokens: int) -> bool:
        """Get on with the ticket; True when there is a lease or nothing to wait for."""
        ticket = tracked.ticket
        if ticket is None:
            if not self._link.up:
                self.stats.add(detached=1)
                tracked.done = True
                return False
            if self._outstanding >= MAX_OUTSTANDING:
                return False
            keys = self._keys(tracked.request, 0, tracked.loadable)
            held = self._queue.peek(keys)
            if held is not None and held * self._block_tokens <= num_computed_tokens:
                # The usual case of a new prompt: there is nothing to ask for.
                tracked.done = True
                self._learn(keys, held)
                self.stats.add(asked_blocks=len(keys), found_blocks=held)
                return False
            tracked.ticket = self._queue.submit(keys)
            self._outstanding += 1
            return False
        if ticket.state in (TicketState.WAITING, TicketState.SENT):
            now_s = time.monotonic()
            if now_s - ticket.asked_s > self._patience_s or not self._link.up:
                self.stats.add(acquire_timeouts=1)
                sent_s = ticket.sent_s
                self._finish_loading_way(tracked)
                if sent_s and now_s - sent_s > self._patience_s:
                    # The server has seen the question and promised an answer by now.
                    self._link.suspect()
            return False
        tracked.ticket = None
        if ticket.held is None or not ticket.held.grant.held:
            self._outstanding -= 1
            tracked.done = True
            if ticket.held is not None:
                self._learn(ticket.keys, 0)
                self.stats.add(asked_blocks=len(ticket.keys))
            return True
        tracked.held = ticket.held
        self._learn(ticket.keys, ticket.held.grant.held)
        self.stats.add(asked_blocks=len(ticket.keys), found_blocks=ticket.held.grant.held)
        return True

    def _learn(self, keys: list[bytes], held: int) -> None:
        self._orders.known.add(keys[:held])
        if held < len(keys):
            # Evicted since we stored them. Those being stored now are forgotten
            # too, which costs one question when they come up again.
            self._orders.known.discard(keys[held:])

    def _usable(self, held: Held) -> bool:
        left_ns = held.grant.expires_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        return not held.attached.dropped and left_ns > MIN_LEASE_LEFT_S * 1e9

    def _drop_lease(self, tracked: _Tracked) -> None:
        held, tracked.held = tracked.held, None
        if held is not None:
            self._outstanding -= 1
            self._queue.release(held)

    def _finish_loading_way(self, tracked: _Tracked) -> None:
        """Whatever the store was asked for this request is not wanted any more."""
        tracked.done = True
        ticket, tracked.ticket = tracked.ticket, None
        if ticket is not None:
            self._outstanding -= 1
            self._queue.cancel(ticket)
        self._drop_lease(tracked)

    def _restart(self, tracked: _Tracked) -> None:
        self._finish_loading_way(tracked)
        tracked.preemptions = tracked.request.num_preemptions
        tracked.done = False

    def _awaits_answer(self) -> bool:
        return any(tracked.ticket is not None for tracked in self._tracked.values())

    # -- stores -----------------------------------------------------------------

    def _order_stores(self, output: SchedulerOutput) -> None:
        state = output.kv_connector_block_state
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None or tracked.offered >= tracked.blocks:
                continue
            computed = tracked.request.num_computed_tokens + scheduled
            complete = min(computed // self._block_tokens, tracked.blocks)
            if complete <= tracked.offered or state is None:
                continue
            blocks = state.get_block_ids(request_id)
            if blocks is not None:
                self._order_store(tracked, complete, blocks[0])

    def _order_store(self, tracked: _Tracked, complete: int, block_ids: Sequence[int]) -> None:
        first, tracked.offered = tracked.offered, complete
        keys = self._keys(tracked.request, first, complete)
        before = self._keys(tracked.request, first - 1, first) if first else [b""]
        job = self._orders.order(
            tracked.request.request_id, keys, before + keys[:-1], block_ids[first:complete]
        )
        if job is not None:
            self._meta.stores.append(job)

    def _keys(self, request: Request, start: int, stop: int) -> list[bytes]:
        """Keys of the blocks [start, stop): the hash at each one's last token."""
        step = self._hashes_per_block
        hashes = request.block_hashes
        return [bytes(hashes[index * step + step - 1]) for index in range(start, stop)]
