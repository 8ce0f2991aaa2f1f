"""What of each KV cache group a position needs: all before it, a window, or a state.

vLLM puts layers that keep the same kind of KV into a group with a block table of its
own. A prefix that ends at token p can be resumed when every group has what its layers
look at from there:

    full attention          all blocks before p
    sliding window, chunks  the last few blocks before p
    recurrent               one block, the state after token p - 1

Groups with the same rule and block size make a *band*: their blocks lie at the same
positions and are asked for together. Only full attention has the property that what is
held of a prompt is a prefix of it. The others are stored for the few positions at which
a later prompt can resume (`resume_points`), as vLLM's own cache does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

_STATE_AT_BLOCK_ENDS = "align"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a group's layers look at from a position on. At most one field is set."""

    window: int = 0
    """Tokens before the position, the position's own included."""
    chunk: int = 0
    """Tokens since the last multiple of this."""
    state: bool = False

    @property
    def is_full(self) -> bool:
        return not (self.window or self.chunk or self.state)

    def first_token(self, position: int) -> int:
        """The first token whose KV is needed to go on from `position`."""
        if self.window:
            return max(0, position - self.window + 1)
        if self.chunk:
            return position // self.chunk * self.chunk
        return max(0, position - 1) if self.state else 0

    def __str__(self) -> str:
        if self.window:
            return f"window {self.window}"
        if self.chunk:
            return f"chunk {self.chunk}"
        return "state" if self.state else "full"


@dataclass(frozen=True, slots=True)
class Band:
    """Groups with one rule. `members` are places in `Bands.groups`, not vLLM's ids."""

    rule: Rule
    block_tokens: int
    members: tuple[int, ...]

    def span(self, position: int) -> tuple[int, int]:
        """The blocks [first, last) needed at a position, which a block ends at."""
        last = position // self.block_tokens
        return min(self.rule.first_token(position) // self.block_tokens, last), last

    def wanted(self, start: int, stop: int, points: Collection[int]) -> Sequence[int]:
        """Those of the blocks [start, stop) that are needed to resume at some point."""
        if self.rule.is_full:
            return range(start, stop)
        wanted: set[int] = set()
        for point in points:
            first, last = self.span(point)
            wanted.update(range(max(first, start), min(last, stop)))
        return sorted(wanted)


@dataclass(frozen=True, slots=True)
class Bands:
    """All that is stored of a prompt.

    `groups`: vLLM's ids of the stored groups. `alignment`: hits end at multiples of so
    many tokens. `retention`: windows and states are also kept at every multiple of so
    many tokens; 0 for none, None for every position (vLLM's
    --prefix-cache-retention-interval).
    """

    groups: tuple[int, ...]
    bands: tuple[Band, ...]
    alignment: int
    hash_tokens: int
    retention: int | None

    @property
    def full(self) -> tuple[Band, ...]:
        return tuple(band for band in self.bands if band.rule.is_full)

    @property
    def partial(self) -> tuple[Band, ...]:
        """States first: they are the quickest to look up and the fewest."""
        rest = [band for band in self.bands if not band.rule.is_full]
        return tuple(sorted(rest, key=lambda band: not band.rule.state))

    def aligned(self, tokens: int) -> int:
        return tokens // self.alignment * self.alignment

    def resume_points(self, prompt_tokens: int, junctions: Sequence[int] = ()) -> set[int]:
        """Where a later prompt may resume: the same one, a longer one, and where one was
        seen to part from another (`junctions`)."""
        points = {self.aligned(prompt_tokens - 1), self.aligned(prompt_tokens)}
        points.update(map(self.aligned, junctions))
        if self.retention is None or self.retention > 0:
            step = self.retention or self.alignment
            points.update(range(step, prompt_tokens + 1, step))
        return {point for point in points if 0 < point <= prompt_tokens}


def unsupported_spec(spec: KVCacheSpec) -> str | None:
    """Why the store cannot keep a group's KV, None where it can."""
    for each in _layer_specs(spec):
        if isinstance(each, MambaSpec):
            if each.mamba_cache_mode != _STATE_AT_BLOCK_ENDS:
                return "its recurrent layers do not keep their state at block ends"
        elif not isinstance(
            each, FullAttentionSpec | SlidingWindowSpec | ChunkedLocalAttentionSpec
        ):
            return f"the store does not know what a {type(each).__name__} needs"
    return None


def bands_of(kv_cache_config: KVCacheConfig) -> Bands:
    """Only for groups of which `unsupported_spec` has nothing to say."""
    groups: tuple[int, ...] = kv_cache_config.prefix_cacheable_group_ids
    members: dict[tuple[Rule, int], list[int]] = {}
    for place, group in enumerate(groups):
        spec = kv_cache_config.kv_cache_groups[group].kv_cache_spec
        members.setdefault((rule_of(spec), spec.block_size), []).append(place)
    bands = tuple(Band(rule, tokens, tuple(places)) for (rule, tokens), places in members.items())
    alignment = lcm(*(each.kv_cache_spec.block_size for each in kv_cache_config.kv_cache_groups))
    return Bands(
        groups=groups,
        bands=bands,
        alignment=alignment,
        hash_tokens=kv_cache_config.hash_block_size or alignment,
        retention=kv_cache_config.prefix_cache_retention_interval,
    )


def rule_of(spec: KVCacheSpec) -> Rule:
    first = _layer_specs(spec)[0]
    if isinstance(first, SlidingWindowSpec):
        return Rule(window=first.sliding_window + first.extra_retained_tokens)
    if isinstance(first, ChunkedLocalAttentionSpec):
        return Rule(chunk=first.attention_chunk_size)
    return Rule(state=isinstance(first, MambaSpec))


def _layer_specs(spec: KVCacheSpec) -> list[KVCacheSpec]:
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return list(spec.kv_cache_specs.values())
    return [spec]
