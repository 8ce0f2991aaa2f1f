"""One tier of so many blocks, one policy, every request of a trace.

Two orders of references within a request:

* as published: block by block from the root on; what is missing comes in at once, and
  something else goes, be it the next block of the same prompt. This is how the
  literature replays a trace, and what the golden figures are of.
* as the server has it: what a request asks for is pinned while it runs, and is touched
  and inserted from the deepest block to the root.

A policy whose `by_chain` is true gets the second, every other one the first, unless the
caller asks for one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

from kvstore.core.catalog import Block, Catalog, DramReplica, Replica
from kvstore.core.cost import REFERENCE, Prefill
from kvstore.core.lifecycle import State
from kvstore.core.policies import EvictionPolicy, PolicyError, Use
from kvstore.sim.trace import Request, Trace
from kvstore.types import STORED_KEY_BYTES, LayoutSpec

Progress = Callable[[float], None]
"""Told now and then what part of the requests is done."""

REPORTED_EVERY = 256


@dataclass(slots=True)
class Result:
    """What was asked for and what was there, in sums."""

    blocks: int = 0
    block_hits: int = 0
    tokens: int = 0
    token_hits: int = 0
    """Only up to a prompt's first missing block."""
    prefill_ms: float = 0.0
    saved_ms: float = 0.0
    evictions: int = 0
    by_priority: dict[int, list[int]] = field(default_factory=dict)
    """Tokens, and those of them that were hits."""

    @property
    def block_hit_ratio(self) -> float:
        return self.block_hits / self.blocks if self.blocks else 0.0

    @property
    def token_hit_ratio(self) -> float:
        return self.token_hits / self.tokens if self.tokens else 0.0

    @property
    def compute_saved_ratio(self) -> float:
        return self.saved_ms / self.prefill_ms if self.prefill_ms else 0.0

    def count(
        self, request: Request, blocks: int, hits: int, leading: int, block_tokens: int,
        prefill: Prefill,
    ) -> None:  # fmt: skip
        """Add a request that found `hits` of its blocks, the first `leading` among them."""
        found = min(leading * block_tokens, request.tokens)
        again = request.again_tokens
        if again is not None and leading and again - found < block_tokens:
            # All that this prompt shares with others, which ends within a block, is there.
            found = max(found, again)
        self.blocks += blocks
        self.block_hits += hits
        self.tokens += request.tokens
        self.token_hits += found
        mine = self.by_priority.setdefault(request.priority, [0, 0])
        mine[0] += request.tokens
        mine[1] += found
        self.prefill_ms += prefill.ms(request.tokens)
        self.saved_ms += prefill.ms(found)


class Replay:
    """A tier of `capacity` blocks under one policy."""

    def __init__(
        self,
        policy: EvictionPolicy,
        trace: Trace,
        capacity: int,
        prefill: Prefill = REFERENCE,
        *,
        hints: bool = True,
    ) -> None:
        """`hints`: the policy is told what the trace says of sessions."""
        self._hints = hints
        self._policy = policy
        self._trace = trace
        self._prefill = prefill
        self._free = self._capacity = capacity
        self._held = bytearray(trace.blocks)
        self._pinned = bytearray(trace.blocks)
        self._replicas: list[Replica] = [_ABSENT] * trace.blocks
        spec = LayoutSpec("simulated", "bf16", trace.block_tokens, 1)
        self._layout, _ = Catalog(lambda tenant: b"", max_layouts=1).register_layout("", spec)
        self._result = Result()

    def run(self, *, by_chain: bool, progress: Progress | None = None) -> Result:
        """Raises `PolicyError` for a policy that breaks its contract in a way that is seen."""
        policy, requests = self._policy, self._trace.requests
        serve = self._serve_by_chain if by_chain else self._serve
        told = type(policy).use is not EvictionPolicy.use
        hinted = self._hints and type(policy).hint is not EvictionPolicy.hint
        with uncollected():
            for number, request in enumerate(requests):
                if told:
                    policy.use(self._use(request))
                serve(request)
                if hinted and request.session is not None and request.then is not None:
                    policy.hint(request.session, request.then, request.expected_ms)
                if progress is not None and number % REPORTED_EVERY == 0:
                    progress(number / len(requests))
        held = self._capacity - self._free
        if len(policy) != held:
            raise self._broken(f"its len() is {len(policy)} where {held} replicas are held")
        return self._result

    def _serve(self, request: Request) -> None:
        held, replicas, policy = self._held, self._replicas, self._policy
        miss, insert = policy.miss, policy.insert
        told = type(policy).miss is not EvictionPolicy.miss
        hits = depth = 0
        leading = None
        for first, stop in request.pieces:
            at = first
            while at < stop:
                absent = held.find(0, at, stop)
                if absent < 0:
                    absent = stop
                if absent > at:
                    policy.touch_run(replicas[at:absent])
                    hits += absent - at
                    at = absent
                if at < stop and leading is None:
                    leading = hits
                while at < stop and not held[at]:
                    if told:
                        miss(_key(at))
                    if self._free:
                        self._free -= 1
                    else:
                        victim = next(policy.candidates(), None)
                        if victim is None:
                            raise self._broken("candidates() ends while something is held")
                        self._evict(victim)
                    replica = replicas[at]
                    if replica is _ABSENT:
                        replica = self._replica(at, depth + at - first)
                    insert(replica)
                    held[at] = 1
                    at += 1
            depth += stop - first
        if leading is None:
            leading = hits
        self._result.count(request, depth, hits, leading, self._trace.block_tokens, self._prefill)

    def _serve_by_chain(self, request: Request) -> None:
        held, pinned, policy = self._held, self._pinned, self._policy
        told = type(policy).miss is not EvictionPolicy.miss
        runs: list[tuple[int, int, int, bool]] = []  # First, stop, depth, held.
        hits = depth = 0
        leading = None
        for first, stop in request.pieces:
            at = first
            while at < stop:
                there = bool(held[at])
                end = held.find(not there, at, stop)
                if end < 0:
                    end = stop
                runs.append((at, end, depth, there))
                if there:
                    hits += end - at
                elif leading is None:
                    leading = depth
                depth += end - at
                at = end
            pinned[first:stop] = b"\1" * (stop - first)
        if leading is None:
            leading = depth
        self._result.count(request, depth, hits, leading, self._trace.block_tokens, self._prefill)
        # Nothing comes in that the tier has no room for beside its own root.
        missing = [
            (first, min(stop, first + max(self._capacity - begins, 0)), begins)
            for first, stop, begins, there in runs
            if not there
        ]
        if told:
            for first, stop, _ in missing:
                for number in range(first, stop):
                    policy.miss(_key(number))
        self._make_room(sum(max(stop - first, 0) for first, stop, _ in missing))
        for first, stop, begins, there in reversed(runs):
            if there:
                policy.touch_run(self._replicas[first:stop][::-1])
                continue
            for number in range(stop - 1, first - 1, -1):
                if begins + number - first >= self._capacity or held[number]:
                    continue  # No room, or named twice in one prompt.
                if not self._free:
                    break
                self._free -= 1
                replica = self._replicas[number]
                if replica is _ABSENT:
                    replica = self._replica(number, begins + number - first)
                policy.insert(replica)
                held[number] = 1
        for first, stop in request.pieces:
            pinned[first:stop] = bytes(stop - first)

    def _make_room(self, slots: int) -> None:
        """Let go as many as are needed, or as there are that nobody asks for."""
        lacking = slots - self._free
        if lacking <= 0:
            return
        pinned = self._pinned
        free_to_go = (r for r in self._policy.candidates() if not pinned[r.address])
        for victim in list(islice(free_to_go, lacking)):
            self._evict(victim)
            self._free += 1

    def _broken(self, how: str) -> PolicyError:
        return PolicyError(f"{type(self._policy).__name__} breaks its contract: {how}")

    def _evict(self, victim: Replica) -> None:
        if not self._held[victim.address]:
            raise self._broken("candidates() gives a replica that has left, or one twice")
        self._policy.remove(victim)
        self._held[victim.address] = 0
        self._result.evictions += 1

    def _use(self, request: Request) -> Use:
        session = request.session if self._hints else None
        return Use(request.time_ms, request.category, session, request.priority)

    def _replica(self, number: int, depth: int) -> Replica:
        block = Block(_key(number), b"", self._layout, depth)
        replica = self._replicas[number] = DramReplica(block, number, State.READY)
        return replica


@contextmanager
def uncollected() -> Iterator[None]:
    """A garbage collection would go through a million replicas, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _key(number: int) -> bytes:
    return number.to_bytes(STORED_KEY_BYTES, "big")


_ABSENT = Replica.__new__(Replica)
