"""Which of a request's blocks to store, in the step that completes them.

Full blocks of prompts only, each once. Of windows and states only what a later prompt
can resume from. What of it is in the store already, and what is still being read, is
kept in `orders`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvstore_connectors.vllm.groups import Band, Bands
from kvstore_connectors.vllm.metadata import StoreJob
from kvstore_connectors.vllm.orders import StoreOrders
from kvstore_connectors.vllm.tracked import Tracked, keys_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput

NULL_BLOCK = 0
"""In a block table: none, for the layers do not look there any more, or never did."""


class Storing:
    """Called on the scheduler's thread only."""

    def __init__(self, bands: Bands, orders: StoreOrders) -> None:
        self._bands = bands
        self._orders = orders
        self._jobs: list[StoreJob] = []
        self.offering: dict[str, Tracked] = {}
        """Requests of whose prompts there is more to store, waiting ones too."""
        self.states = any(band.rule.state for band in bands.bands)
        """Whether a step may complete something beside that."""
        # Those of which the block tables say where they are.
        self._tabled = [
            (number, band, band.block_tokens, band.rule.is_full)
            for number, band in enumerate(bands.bands)
            if not band.rule.state
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
            for request_id, scheduled in output.num_scheduled_tokens.items():
                tracked = offering.get(request_id)
                if tracked is not None:
                    computed = tracked.request.num_computed_tokens + scheduled
                    self._order_computed(tracked, min(computed, tracked.prompt_tokens), state)
        for request_id, states in state.boundary_state_offloads.items():
            tracked = requests.get(request_id)
            if tracked is not None and tracked.storable:
                for group, block_id, position in states:
                    self._order_state(tracked, group, block_id, position)
        jobs, self._jobs = self._jobs, []
        return jobs

    def _order_computed(
        self, tracked: Tracked, computed: int, state: KVConnectorBlockState
    ) -> None:
        """Store the blocks that this step completes, of all but states."""
        tables: Sequence[Sequence[int]] | None = None
        offered = tracked.offered
        if offered is None:
            offered = tracked.offered = [0] * len(self._bands.bands)
        for number, band, size, is_full in self._tabled:
            start, stop = offered[number], computed // size
            if start >= stop:
                continue
            tables = tables or state.get_block_ids(tracked.request.request_id)
            if tables is None:
                return
            offered[number] = stop
            if is_full:
                self._order_run(tracked, band, start, stop, tables)
            else:
                wanted = band.wanted(start, stop, self._resume_points(tracked))
                if wanted:
                    self._order_some(tracked, band, wanted, tables)
        if computed >= tracked.prompt_tokens:
            del self.offering[tracked.request.request_id]

    def _order_run(
        self, tracked: Tracked, band: Band, start: int, stop: int, tables: Sequence[Sequence[int]]
    ) -> None:
        """Store blocks of full attention, which are all there."""
        # From the block before on, for its key is the first one's parent.
        parents = self._keys(tracked, band, start - 1 if start else 0, stop)
        keys = parents[1:] if start else parents
        if start:
            del parents[-1]
        else:
            parents = [b"", *keys[:-1]]
        for member in band.members:
            block_ids = list(tables[self._bands.groups[member]][start:stop])
            self._order(tracked, member, keys, parents, block_ids, kept=True)

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
                    kept=False,
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
            self._order(tracked, members[0], keys, [b""], [block_id], kept=False)

    def _keys(self, tracked: Tracked, band: Band, start: int, stop: int) -> list[bytes]:
        return keys_of(tracked, self._bands.hash_tokens, band.block_tokens, start, stop)

    def _order(
        self,
        tracked: Tracked,
        member: int,
        keys: list[bytes],
        parents: list[bytes],
        block_ids: list[int],
        kept: bool,
    ) -> None:
        job = self._orders.order(
            tracked.request.request_id, member, keys, parents, block_ids, tracked.reuse, kept
        )
        if job is not None:
            self._jobs.append(job)
