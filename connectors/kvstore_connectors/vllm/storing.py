"""Which of a request's blocks to store, in the step that completes them.

Full blocks of prompts only, each once. Of windows and states only what a later prompt
can resume from. What of it is in the store already, and what is still being read, is
kept in `orders`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvstore_connectors.vllm.groups import Band, Bands
from kvstore_connectors.vllm.hints import said_of
from kvstore_connectors.vllm.metadata import StoreJob
from kvstore_connectors.vllm.orders import StoreOrders
from kvstore_connectors.vllm.tracked import Tracked, keys_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput

NULL_BLOCK = 0
"""In a block table: none, for the layers do not look there any more, or never did."""


class Storing:
    """Called on the scheduler's thread only. `_order_run` is written out in one: it is what
    every new prompt passes through, after an engine's step has emptied the caches."""

    def __init__(self, bands: Bands, orders: StoreOrders) -> None:
        self._bands = bands
        self._orders = orders
        self._jobs: list[StoreJob] = []
        self.offering: dict[str, Tracked] = {}
        """Requests of whose prompts there is more to store, waiting ones too."""
        self._only_full = not bands.partial
        self.states = any(band.rule.state for band in bands.bands)
        """Whether a step may complete something beside that."""
        # Those of which the block tables say where they are; how many hashes make a key of one
        # of full attention.
        self._tabled = [
            (
                number,
                band,
                band.block_tokens,
                band.block_tokens // bands.hash_tokens if band.rule.is_full else 0,
            )
            for number, band in enumerate(bands.bands)
            if not band.rule.state
        ]

    def loaded(self, tracked: Tracked, position: int, *, rest: bool) -> None:
        """All before `position` is being loaded, so full attention has it in the store; `rest`:
        as it has the rest of the prompt."""
        if rest and self._only_full:
            self.offering.pop(tracked.request.request_id, None)
        elif tracked.offered is None:
            tracked.offered = [
                position // band.block_tokens if band.rule.is_full else 0
                for band in self._bands.bands
            ]

    def begin_anew(self, tracked: Tracked) -> None:
        """It is computed again from its first token on."""
        tracked.offered = None
        tracked.storable = True
        self.offering[tracked.request.request_id] = tracked

    def end(self, tracked: Tracked) -> None:
        """What is computed of it from here on is not to be stored. Idempotent."""
        tracked.storable = False
        self.offering.pop(tracked.request.request_id, None)

    def jobs(self, output: SchedulerOutput, requests: Mapping[str, Tracked]) -> list[StoreJob]:
        """What to store of what this step computes."""
        state = output.kv_connector_block_state
        if state is None:
            return []
        offering = self.offering
        if offering:
            scheduled = output.num_scheduled_tokens
            for request_id in list(offering) if len(offering) < len(scheduled) else scheduled:
                if request_id in offering and request_id in scheduled:
                    self._order_computed(offering[request_id], scheduled[request_id], state)
        for request_id, states in state.boundary_state_offloads.items():
            tracked = requests.get(request_id)
            if tracked is not None and tracked.storable:
                for group, block_id, position in states:
                    self._order_state(tracked, group, block_id, position)
        jobs, self._jobs = self._jobs, []
        return jobs

    def _order_computed(
        self, tracked: Tracked, scheduled: int, state: KVConnectorBlockState
    ) -> None:
        """Store the blocks that this step completes, of all but states."""
        tables: Sequence[Sequence[int]] | None = None
        computed, prompt = tracked.request.num_computed_tokens + scheduled, tracked.prompt_tokens
        if computed > prompt:
            computed = prompt
        offered = tracked.offered
        if offered is None:
            offered = tracked.offered = [0] * len(self._bands.bands)
        for number, band, size, step in self._tabled:
            start, stop = offered[number], computed // size
            if start >= stop:
                continue
            if tables is None:
                tables = state.get_block_ids(tracked.request.request_id)
                if tables is None:
                    return
            offered[number] = stop
            if step:
                self._order_run(tracked, band, step, start, stop, tables)
            else:
                wanted = band.wanted(start, stop, self._resume_points(tracked))
                if wanted:
                    self._order_some(tracked, band, wanted, tables)
        if computed == prompt:
            del self.offering[tracked.request.request_id]

    def _order_run(
        self,
        tracked: Tracked,
        band: Band,
        step: int,
        start: int,
        stop: int,
        tables: Sequence[Sequence[int]],
    ) -> None:
        """Store blocks of full attention, which are all there. `step`: hashes to a key."""
        request = tracked.request
        hashes = request.block_hashes if tracked.adapter is None else tracked.hashes()
        # As `keys_of`; the key of the block before is the first one's parent.
        keys = hashes[(start + 1) * step - 1 : stop * step : step]
        parents = [hashes[start * step - 1] if start else b"", *keys[:-1]]
        said = said_of(request)
        for member in band.members:
            block_ids = list(tables[self._bands.groups[member]][start:stop])
            job = self._orders.order(
                request.request_id, member, keys, parents, block_ids, said, True,
                tracked.handed_over,
            )  # fmt: skip
            if job is not None:
                self._jobs.append(job)

    def _resume_points(self, tracked: Tracked) -> set[int]:
        junctions = (tracked.junction, tracked.request.shared_prefix_boundary)
        return self._bands.resume_points(tracked.request.num_prompt_tokens, junctions)

    def _order_some(
        self,
        tracked: Tracked,
        band: Band,
        wanted: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> None:
        """Store those of some blocks that are still there."""
        first, last = max(wanted[0] - 1, 0), wanted[-1] + 1
        keys = self._keys(tracked, band, first, last)
        for member in band.members:
            table = tables[self._bands.groups[member]]
            there = [place for place in wanted if table[place] != NULL_BLOCK]
            if there:
                self._order(
                    tracked,
                    member,
                    [keys[place - first] for place in there],
                    [keys[place - 1 - first] if place else b"" for place in there],
                    [table[place] for place in there],
                )

    def _order_state(self, tracked: Tracked, group: int, block_id: int, position: int) -> None:
        """Store a state that this step computes. vLLM tells where it is: a recurrent
        group's block table does not."""
        for band in self._bands.bands:
            members = [each for each in band.members if self._bands.groups[each] == group]
            size = band.block_tokens
            if not members or position % size or position > tracked.prompt_tokens:
                continue
            keys = self._keys(tracked, band, position // size - 1, position // size)
            # States are no chain: none is of use to the next.
            self._order(tracked, members[0], keys, [b""], [block_id])

    def _keys(self, tracked: Tracked, band: Band, start: int, stop: int) -> list[bytes]:
        return keys_of(tracked, self._bands.hash_tokens, band.block_tokens, start, stop)

    def _order(
        self,
        tracked: Tracked,
        member: int,
        keys: list[bytes],
        parents: list[bytes],
        block_ids: list[int],
    ) -> None:
        request = tracked.request
        job = self._orders.order(
            request.request_id, member, keys, parents, block_ids, said_of(request), False,
            tracked.handed_over,
        )  # fmt: skip
        if job is not None:
            self._jobs.append(job)
