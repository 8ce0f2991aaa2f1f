"""The scheduler's half: which blocks to load, which to store, and who holds what.

One `_Tracked` a request. Its way to the store's blocks:

    first look --> ticket (asked) --> held (leased) --> loading --> done
                     |                  |                 |
                     `-- too late       `-- not needed    `-- load failed
                         or nothing

Every way ends in `done`, with the lease given back. A preemption starts the way
anew, because the request is computed anew. Until an answer has come the request is
skipped (None), which costs the engine nothing while it has other work.

Blocks of which store jobs still read stay pinned until the workers have reported
(`orders`). What is known of the store's content is forgotten whenever another life of
the server is attached to.

Nothing here does I/O or waits, except for `IDLE_WAIT_S` in a step that has no work.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore_connectors.vllm.acquire import AcquireQueue, Held, Taken, Ticket, TicketState
from kvstore_connectors.vllm.groups import Band, Bands
from kvstore_connectors.vllm.handover import (
    ASK_EVERY_S,
    LOOK_EVERY_S,
    Coming,
    answer_for_decode,
)
from kvstore_connectors.vllm.link import StoreLink
from kvstore_connectors.vllm.metadata import LoadJob, LoadPart, StepMetadata, WorkerReport
from kvstore_connectors.vllm.orders import Pins, StoreOrders
from kvstore_connectors.vllm.positions import Wanted
from kvstore_connectors.vllm.stats import ConnectorStats

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvstore.types import LayoutSpec

IDLE_WAIT_S = 0.002
ANSWER_GRACE_S = 0.25
"""How much later than asked an answer may come before the server counts as hung."""

MIN_LEASE_LEFT_S = 2.0
MAX_OUTSTANDING = 256
"""Requests with a ticket or an unused lease: bounds what waiting requests pin."""


NULL_BLOCK = 0
"""In a block table: none, for the layers do not look there any more, or never did."""


@dataclass(slots=True)
class _Tracked:
    """A request the scheduler knows of.

    `prompt_tokens`: those whose blocks have keys. `loadable`: how far a load can go.
    `offered`: for each band, up to which block it has been stored. `junction`: where
    full attention goes on in the store, but windows or states do not. `coming`: what
    another vLLM is storing of it, as long as that is waited for.
    """

    request: Request
    prompt_tokens: int
    loadable: int
    offered: list[int]
    preemptions: int = 0
    done: bool = False
    ticket: Ticket | None = None
    held: Held | None = None
    local_tokens: int = 0
    loading: bool = False
    junction: int = 0
    coming: Coming | None = None


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
        specs_for: Callable[[str], Sequence[LayoutSpec]],
    ) -> None:
        """`workers`: how many report on each store job. `specs_for(salt)`: the layouts."""
        self._link = link
        self._queue = queue
        self._bands = bands
        self._block_sizes = {band.block_tokens for band in bands.bands}
        self._patience_s = acquire_timeout_ms / 1000 + ANSWER_GRACE_S
        self._handover_s = handover_timeout_ms / 1000
        self._loads = loads
        self._stores = stores
        self._specs_for = specs_for
        self._salt = ""
        self._tracked: dict[str, _Tracked] = {}
        # Leases of loads under way, also of requests that have been aborted.
        self._loading: dict[str, Held] = {}
        self._dram_tokens: dict[str, int] = {}
        self._orders = StoreOrders(workers, len(bands.groups))
        self._known_generation = link.generation
        self._outstanding = 0
        self._meta = StepMetadata()
        self.stats = ConnectorStats()

    def bind_pins(self, pins: Pins) -> None:
        """Nothing is stored before there is a way to keep blocks from being reused."""
        self._orders.pins = pins

    # -- requests ---------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        tokens = min(request.num_prompt_tokens, len(request.block_hashes) * self._bands.hash_tokens)
        if tokens < min(self._block_sizes) or request.lora_request is not None or request.resumable:
            # An adapter's name does not say which weights it has, and a session
            # that goes on has no fixed prompt.
            return
        # vLLM needs one token to compute, to have something to sample from.
        loadable = self._bands.aligned(min(request.num_prompt_tokens - 1, tokens))
        self._tracked[request.request_id] = _Tracked(
            request=request,
            prompt_tokens=tokens,
            loadable=loadable,
            offered=[0] * len(self._bands.bands),
            coming=self._coming(request, loadable),
        )

    def _coming(self, request: Request, loadable: int) -> Coming | None:
        if not self._loads or request.skip_reading_prefix_cache:
            return None
        params, now_s = request.kv_transfer_params, time.monotonic()
        return Coming.of(params, loadable, self._handover_s, now_s)

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
        if num_computed_tokens >= tracked.loadable:
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
        tokens = held.tokens - num_computed_tokens
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
        position = tracked.local_tokens + num_external_tokens
        tables = get_block_ids()
        self._meta.loads.append(
            LoadJob(
                request_id=request.request_id,
                parts=[
                    part
                    for taken in held.taken
                    for part in self._parts(taken, tracked.local_tokens, position, tables)
                ],
                # vLLM takes all that was offered or nothing. Were it to take less, windows
                # and states would be those of another position.
                expires_ns=held.expires_ns if position == held.tokens else 0,
                epoch=held.attached.epoch,
            )
        )
        self._dram_tokens[request.request_id] = max(0, held.dram_tokens - tracked.local_tokens)
        self._loading[request.request_id] = held
        self._outstanding -= 1
        tracked.held, tracked.loading, tracked.done = None, True, True

    def _parts(
        self, taken: Taken, local_tokens: int, position: int, tables: Sequence[Sequence[int]]
    ) -> list[LoadPart]:
        """Of a band's leased blocks, those that are to be filled, group by group."""
        band = taken.band
        first, last = band.span(position)
        # What vLLM has of its own is shared, and must not be written.
        first = max(first, local_tokens // band.block_tokens, taken.first)
        leased = slice(first - taken.first, last - taken.first)
        shards = len(taken.addresses) // len(band.members)
        return [
            LoadPart(
                group=member,
                block_ids=list(tables[self._bands.groups[member]][first:last]),
                addresses=[each[leased] for each in taken.addresses[at : at + shards]],
                checksums=[each[leased] for each in taken.checksums[at : at + shards]],
            )
            for at, member in zip(range(0, len(taken.addresses), shards), band.members, strict=True)
            if first < last
        ]

    def hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """Where the tokens of the load just ordered came from."""
        from_dram = self._dram_tokens.pop(request.request_id, 0)
        if not num_external_tokens:
            return {}
        # The store counts how many blocks were in DRAM, not which: in a chain it
        # is the front that stays there longest.
        host = min(from_dram, num_external_tokens)
        split = {CacheHitSource.HOST: host, CacheHitSource.DISK: num_external_tokens - host}
        return {source: tokens for source, tokens in split.items() if tokens}

    def request_finished(self, request: Request) -> dict[str, Any] | None:
        """What to hand over to a vLLM that decodes, where a proxy asks for that."""
        self._dram_tokens.pop(request.request_id, None)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None:
            # A load under way goes on: vLLM holds its blocks until it is reported.
            self._finish_loading_way(tracked)
        stored = tracked is not None and self._stores and self._link.up
        return answer_for_decode(
            request.kv_transfer_params, tracked.loadable if tracked and stored else 0
        )

    # -- steps ------------------------------------------------------------------

    def build_meta(self, output: SchedulerOutput) -> StepMetadata:
        if self._known_generation != self._link.generation:
            self._known_generation = self._link.generation
            self._orders.forget()
        if output.preempted_req_ids:
            # Their blocks are free for reuse in this very step.
            self._meta.cancelled += self._orders.cancel(output.preempted_req_ids)
            for request_id in output.preempted_req_ids:
                if request_id in self._tracked:
                    self._offer_again(self._tracked[request_id])
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
        report = output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self._orders.reported(report)

    @property
    def stores_pending(self) -> bool:
        """Whether blocks are pinned, to be let go of by a step to come."""
        return bool(self._orders)

    def blocks_are_coming_back(self) -> bool:
        """Whether finished requests' blocks are pinned only until their stores are done."""
        return any(request_id not in self._tracked for request_id in self._orders.requests())

    def reset(self) -> None:
        """Forget all that was stored so far, as after a change of weights."""
        self._salt = secrets.token_hex(8)
        self._orders.forget()
        for tracked in self._tracked.values():
            if not tracked.loading:
                self._finish_loading_way(tracked)
            tracked.offered = [
                tracked.prompt_tokens // band.block_tokens for band in self._bands.bands
            ]
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
            if tracked.coming is not None and time.monotonic() < tracked.coming.next_look_s:
                return False
            wanted = self._wanted(tracked, num_computed_tokens)
            seen = self._queue.peek(wanted)
            if seen is not None and self._more_is_coming(tracked, seen, LOOK_EVERY_S):
                return False
            if seen is not None and seen <= num_computed_tokens:
                # The usual case of a new prompt: there is nothing to ask for.
                tracked.done = True
                self._learn(wanted, seen, 0 if self._bands.partial else seen)
                return False
            tracked.ticket = self._queue.submit(wanted)
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
        held = ticket.held
        # Windows and states do not show in a look, and may come after all the rest.
        if self._more_is_coming(tracked, held.tokens if held else 0, ASK_EVERY_S):
            self._outstanding -= 1
            if held is not None:
                self._queue.release(held)
            return False
        tracked.coming = None
        if held is not None:
            self._learn(ticket.wanted, held.full_tokens, held.tokens)
            tracked.junction = held.full_tokens
        if held is None or not held.tokens:
            self._outstanding -= 1
            tracked.done = True
            return True
        tracked.held = held
        return True

    def _more_is_coming(self, tracked: _Tracked, seen: int, pause_s: float) -> bool:
        """Whether to look or ask again in a later step."""
        coming = tracked.coming
        if coming is None:
            return False
        if coming.wait_on(seen, time.monotonic(), pause_s):
            return True
        if seen < coming.tokens:
            self.stats.add(handover_timeouts=1)
            tracked.coming = None
        return False

    def _wanted(self, tracked: _Tracked, local_tokens: int) -> Wanted:
        keys = {
            size: self._keys(tracked.request, size, 0, tracked.loadable // size)
            for size in self._block_sizes
        }
        return Wanted(keys, tracked.loadable, local_tokens)

    def _learn(self, wanted: Wanted, full_tokens: int, tokens: int) -> None:
        """The store holds full attention's blocks up to `full_tokens`, and what else is
        needed to resume at `tokens`."""
        self.stats.add(
            asked_blocks=wanted.limit // self._bands.alignment,
            found_blocks=tokens // self._bands.alignment,
        )
        for band in self._bands.bands:
            keys = wanted.keys[band.block_tokens]
            for member in band.members:
                known = self._orders.known[member]
                if band.rule.is_full:
                    held = full_tokens // band.block_tokens
                    known.add(keys[:held])
                    # Evicted since we stored them. Those being stored now are forgotten
                    # too, which costs one question when they come up again.
                    known.discard(keys[held:])
                else:
                    first, last = band.span(tokens)
                    known.discard(keys[last:])
                    known.add(keys[first:last])

    def _usable(self, held: Held) -> bool:
        left_ns = held.expires_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
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

    def _offer_again(self, tracked: _Tracked) -> None:
        tracked.offered = [0] * len(self._bands.bands)

    def _awaits_answer(self) -> bool:
        return any(
            tracked.ticket is not None or (tracked.coming is not None and not tracked.done)
            for tracked in self._tracked.values()
        )

    # -- stores -----------------------------------------------------------------

    def _order_stores(self, output: SchedulerOutput) -> None:
        state = output.kv_connector_block_state
        if state is None:
            return
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            computed = tracked.request.num_computed_tokens + scheduled
            self._order_computed(tracked, min(computed, tracked.prompt_tokens), state)
        for request_id, states in state.boundary_state_offloads.items():
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                for group, block_id, position in states:
                    self._order_state(tracked, group, block_id, position)

    def _order_computed(
        self, tracked: _Tracked, computed: int, state: KVConnectorBlockState
    ) -> None:
        """Store the blocks that this step completes, of all but states."""
        tables: Sequence[Sequence[int]] | None = None
        for number, band in enumerate(self._bands.bands):
            start, stop = tracked.offered[number], computed // band.block_tokens
            if band.rule.state or start >= stop:
                continue
            tables = tables or state.get_block_ids(tracked.request.request_id)
            if tables is None:
                return
            tracked.offered[number] = stop
            points = () if band.rule.is_full else self._resume_points(tracked)
            wanted = band.wanted(start, stop, points)
            if wanted:
                self._order_blocks(tracked, band, wanted, tables)

    def _resume_points(self, tracked: _Tracked) -> set[int]:
        junctions = (tracked.junction, tracked.request.shared_prefix_boundary)
        return self._bands.resume_points(tracked.request.num_prompt_tokens, junctions)

    def _order_blocks(
        self,
        tracked: _Tracked,
        band: Band,
        wanted: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> None:
        first, last = wanted[0], wanted[-1] + 1
        # From the block before on, for its key is the first one's parent.
        begin = max(first - 1, 0)
        keys = self._keys(tracked.request, band.block_tokens, begin, last)
        parents = [b"", *keys] if begin == first else keys
        keys = keys[first - begin :]
        for member in band.members:
            block_ids = list(tables[self._bands.groups[member]][first:last])
            if len(wanted) == last - first and NULL_BLOCK not in block_ids:
                self._order(tracked, member, keys, parents[: last - first], block_ids)
                continue
            there = [place - first for place in wanted if block_ids[place - first] != NULL_BLOCK]
            self._order(
                tracked,
                member,
                [keys[index] for index in there],
                [parents[index] for index in there],
                [block_ids[index] for index in there],
            )

    def _order_state(self, tracked: _Tracked, group: int, block_id: int, position: int) -> None:
        """Store a state that this step computes. vLLM tells where it is: a recurrent
        group's block table does not."""
        for band in self._bands.bands:
            members = [each for each in band.members if self._bands.groups[each] == group]
            size = band.block_tokens
            if not members or position % size or position > tracked.prompt_tokens:
                continue
            (key,) = self._keys(tracked.request, size, position // size - 1, position // size)
            # States are no chain: none is of use to the next.
            self._order(tracked, members[0], [key], [b""], [block_id])

    def _order(
        self,
        tracked: _Tracked,
        member: int,
        keys: list[bytes],
        parents: list[bytes],
        block_ids: list[int],
    ) -> None:
        job = self._orders.order(tracked.request.request_id, member, keys, parents, block_ids)
        if job is not None:
            self._meta.stores.append(job)

    def _keys(self, request: Request, block_tokens: int, start: int, stop: int) -> list[bytes]:
        """Keys of the blocks [start, stop): the hash at each one's last token."""
        step = block_tokens // self._bands.hash_tokens
        hashes = request.block_hashes
        if step == 1:
            return list(map(bytes, hashes[start:stop]))
        return [bytes(hashes[index * step + step - 1]) for index in range(start, stop)]
