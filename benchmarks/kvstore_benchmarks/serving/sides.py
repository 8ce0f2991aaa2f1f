"""Where the tokens of prompts came from, as vLLM says and as the store says.

vLLM counts tokens in its `/metrics`, by the tier that the connector names; the store counts
the blocks that it handed out. It may hand out more than is loaded, where a request finds in
vLLM's own cache, when its turn comes, what it was given a lease on; how much that was, the
connector counts. It can never be less.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from kvstore_benchmarks.end_to_end.model import BLOCK_TOKENS
from kvstore_benchmarks.end_to_end.watch import Hits
from kvstore_benchmarks.figures import finite, ratio

PROMPT = "vllm:prompt_tokens_total"
CACHED = "vllm:prompt_tokens_cached_by_source_total"
UNNEEDED = "vllm:kvstore_unneeded_blocks_total"


class Sources(NamedTuple):
    """Tokens of prompts, since a vLLM started: all of them, those that came from its own
    cache and from the store's tiers, and those that the store handed out for nothing."""

    prompt: float = 0
    device: float = 0
    host: float = 0
    disk: float = 0
    unneeded: float = 0

    def since(self, earlier: Sources) -> Sources:
        return Sources(*(now - then for now, then in zip(self, earlier, strict=True)))

    def plus(self, other: Sources) -> Sources:
        return Sources(*(one + more for one, more in zip(self, other, strict=True)))


def sources(metrics: str) -> Sources:
    """Of what `/metrics` of vLLM says."""
    totals: dict[str, float] = dict.fromkeys(Sources._fields, 0.0)
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == PROMPT:
                totals["prompt"] += sample.value
            elif sample.name == UNNEEDED:
                totals["unneeded"] += sample.value * BLOCK_TOKENS
            elif sample.name == CACHED and sample.labels["source"] in totals:
                totals[sample.labels["source"]] += sample.value
    return Sources(**totals)


def as_json(vllm: Sources, store: Hits) -> dict[str, Any]:
    """Shares of the prompts' tokens. `equal`: both sides name as many. `plausible`: vLLM
    loaded no more than it was handed."""
    handed_out = {"host": store.dram * BLOCK_TOKENS, "disk": store.nvme * BLOCK_TOKENS}
    needed = sum(handed_out.values()) - vllm.unneeded
    return {
        "prompt_tokens": int(vllm.prompt),
        "own_cache": finite(ratio(vllm.device, vllm.prompt)),
        "vllm": {name: finite(ratio(getattr(vllm, name), vllm.prompt)) for name in handed_out},
        "store": {name: finite(ratio(n, vllm.prompt)) for name, n in handed_out.items()},
        "vllm_tokens": {name: int(getattr(vllm, name)) for name in handed_out},
        "store_tokens": handed_out,
        "unneeded": finite(ratio(vllm.unneeded, vllm.prompt)),
        "equal": vllm.host + vllm.disk == needed
        and all(getattr(vllm, name) <= n for name, n in handed_out.items()),
        "plausible": vllm.host + vllm.disk <= sum(handed_out.values()),
    }
