"""One run of the whole stack: the planner that the server runs, over tiers of given sizes,
in virtual time. The model of what serves and what it costs is that of docs/simulator.md.
"""

from __future__ import annotations

from functools import partial
from heapq import heapreplace

from kvstore.sim.batches import Batches
from kvstore.sim.events import BEGIN_NS, Events
from kvstore.sim.machine import Machine, Tiers, nvme_slot_bytes, paces_of, room_in
from kvstore.sim.replay import REPORTED_EVERY, Progress, uncollected
from kvstore.sim.serving import Seen, Serving
from kvstore.sim.shell import MS, Shell, planner
from kvstore.sim.trace import Trace
from kvstore.types import LayoutSpec

TENANT = "simulated"


class Stack:
    def __init__(
        self, trace: Trace, tiers: Tiers, machine: Machine, policy: str, *, hints: bool = True
    ) -> None:
        """`policy`: by the name it has in the server's configuration. `hints`: requests say
        which session they are of. Raises `BadRequest` for tiers that cannot be."""
        self.room = room = room_in(tiers, machine, trace.block_tokens)
        spec = LayoutSpec("simulated", "simulated", trace.block_tokens, room.block_bytes)
        self._trace = trace
        self._events = Events()
        self.planner = planner(
            policy,
            room.dram,
            room.nvme,
            slot_bytes=nvme_slot_bytes,
            batches=machine.batches,
            nvme_bytes_per_day=tiers.nvme_bytes_per_day,
        )
        layout = self.planner.catalog.layout(TENANT, self.planner.register_layout(TENANT, spec))
        session = self.planner.open_session(b"simulated", TENANT, local=True)
        self.shell = Shell(self.planner, self._events, Batches(self._events, paces_of(machine)))
        self.serving = Serving(
            self.shell, self._events, trace, machine, layout, session, hints=hints
        )

    def run(self, progress: Progress | None = None) -> Seen:
        """Until the last request is answered, and nothing is left to be done."""
        requests = self._trace.requests
        with uncollected():
            for number, request in enumerate(requests):
                time_ns = BEGIN_NS + int(request.time_ms * MS)
                self._events.at(time_ns, partial(self.serving.arrive, number, request))
                self._events.run(time_ns)
                if progress is not None and number % REPORTED_EVERY == 0:
                    progress(number / len(requests))
            self._events.run()
        return self.serving.seen


def first_tokens_without(trace: Trace, machine: Machine) -> list[float]:
    """Times to the first token, ms, of the same engines without anything held."""
    free_ms = [0.0] * machine.engines
    times = []
    for request in trace.requests:
        end_ms = max(free_ms[0], request.time_ms) + machine.prefill.ms(request.tokens)
        heapreplace(free_ms, end_ms)
        times.append(end_ms - request.time_ms)
    return times
