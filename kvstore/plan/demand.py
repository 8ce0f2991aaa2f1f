"""What is asked for, and how much of it a cache of some size would have held.

From a trace, by replaying it at several sizes (`plan.curve`); or from four numbers, by the
characteristic time of an LRU cache (H. Che, Y. Tung, Z. Wang, "Hierarchical Web caching
systems", IEEE JSAC 20(7), 2002): what was used within the last T seconds is held, where T
is the time in which as much as fits is asked for. With prompts of p tokens at a rate r, s
of them asked for before, and times between the two that are exponential with mean tau,

    capacity = r (p T - s (T - tau (1 - exp(-T / tau)))),    hits = s (1 - exp(-T / tau))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np

from kvstore.core.cost import Prefill
from kvstore.errors import BadRequest
from kvstore.plan.curve import Held, curve_of
from kvstore.sim.replay import Progress
from kvstore.sim.trace import Trace


@dataclass(frozen=True, slots=True)
class Demand:
    """`curve`: by size, from nothing on, to where nothing more is gained. Between two sizes it
    is taken as straight."""

    source: str
    requests_per_s: float
    prompt_tokens: float
    output_tokens: float
    prefill_ms: float
    """Mean, of a prompt without any hit."""
    curve: Sequence[Held]
    hits_formula: str = ""
    """How the hits of the largest size were found."""
    notes: Sequence[str] = ()
    """What is not exact about it."""

    def held(self, tokens: float) -> Held:
        sizes = [point.tokens for point in self.curve]
        hits = float(np.interp(tokens, sizes, [point.token_hits for point in self.curve]))
        saved = float(np.interp(tokens, sizes, [point.saved for point in self.curve]))
        return Held(tokens, hits, saved)

    @property
    def all_tokens(self) -> float:
        """The size from which on nothing is gained."""
        return self.curve[-1].tokens


def from_trace(
    trace: Trace,
    prefill: Prefill,
    *,
    requests_per_s: float | None,
    policy: str,
    block_tokens: int | None = None,
    progress: Progress | None = None,
) -> Demand:
    """`requests_per_s`: as if the trace went faster or slower; hits stay as they are.
    `block_tokens`: see `curve_of`. Raises `BadRequest` for a trace without prompts or without
    time, and `TraceError` for blocks that cannot be made of its own."""
    requests = [request for request in trace.requests if request.tokens]
    if not requests:
        raise BadRequest("the trace has no prompts")
    span_s = (requests[-1].time_ms - requests[0].time_ms) / 1e3
    if requests_per_s is None:
        if span_s <= 0:
            raise BadRequest("the trace takes no time; say how many requests come a second")
        requests_per_s = len(requests) / span_s
    curve = curve_of(trace, prefill, policy, block_tokens=block_tokens, progress=progress)
    notes = []
    if curve.block_tokens != trace.block_tokens:
        notes.append(
            f"Replayed in blocks of {curve.block_tokens} tokens, not the trace's of"
            f" {trace.block_tokens}: a size may have some thousandths more or fewer hits"
            f" (docs/planner.md); --block-tokens {trace.block_tokens} takes them as they are."
        )
    return Demand(
        source=f"{len(requests)} requests of the trace, {span_s:.0f} s,"
        f" {policy} at {curve.replays} sizes",
        requests_per_s=requests_per_s,
        prompt_tokens=sum(r.tokens for r in requests) / len(requests),
        output_tokens=sum(r.output_tokens for r in requests) / len(requests),
        prefill_ms=sum(prefill.ms(r.tokens) for r in requests) / len(requests),
        curve=curve.points,
        hits_formula="tokens up to a prompt's first new block / all",
        notes=notes,
    )


def from_numbers(
    prefill: Prefill,
    *,
    requests_per_s: float,
    prompt_tokens: float,
    shared_tokens: float,
    output_tokens: float,
    reuse_s: float,
) -> Demand:
    """`shared_tokens`: of a prompt, how many were asked for before, `reuse_s` ago in the
    mean. Raises `BadRequest` where there are more than the prompt has."""
    if shared_tokens > prompt_tokens:
        raise BadRequest("a prompt shares at most all of its tokens")
    whole_ms, shared_ms = prefill.ms(prompt_tokens), prefill.ms(shared_tokens)
    curve = [Held(0.0, 0.0, 0.0)]
    for step in range(1, 41) if shared_tokens else ():
        # To where 99.9 % of what is shared is held.
        part = step / 40 * 0.999
        window_s = -reuse_s * np.log1p(-part)
        repeated = shared_tokens * (window_s - reuse_s * (1 - exp(-window_s / reuse_s)))
        tokens = requests_per_s * (prompt_tokens * window_s - repeated)
        curve.append(
            Held(tokens, part * shared_tokens / prompt_tokens, part * shared_ms / whole_ms)
        )
    return Demand(
        source=f"stated: {shared_tokens:g} tokens of each prompt asked for {reuse_s:g} s before",
        requests_per_s=requests_per_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prefill_ms=whole_ms,
        curve=curve,
        hits_formula="99.9 % of shared / prompt",
    )
