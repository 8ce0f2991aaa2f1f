"""What it costs to compute a prompt's KV again.

A token at depth p of its prompt takes 2 N + 4 L Hq dh p floating-point operations: N
parameters, L layers, Hq query heads of dh each (the projections, and attention to the
p tokens before it). Recomputing a block therefore costs more the deeper it is, by half
again at 15,000 tokens for an 8B model.
"""

from __future__ import annotations

from typing import NamedTuple


class Prefill(NamedTuple):
    """Prefill of one model on one machine. The default is Llama 3.1 8B on an H100
    (989 TFLOP/s in BF16) at half of its peak."""

    parameters: float = 8.03e9
    layers: int = 32
    query_heads: int = 32
    head_dim: int = 128
    flops_per_second: float = 0.5 * 989e12

    @property
    def doubling_tokens(self) -> float:
        """The depth at which a token costs twice what the first one does."""
        return 2 * self.parameters / (4 * self.layers * self.query_heads * self.head_dim)

    def ms(self, tokens: float) -> float:
        """Milliseconds for the first `tokens` tokens of a prompt."""
        flops = 2 * self.parameters * tokens * (1 + tokens / (2 * self.doubling_tokens))
        return 1e3 * flops / self.flops_per_second

    def relative(self, depth_tokens: float) -> float:
        """The cost of a token at this depth, that of a prompt's first being 1."""
        return 1 + depth_tokens / self.doubling_tokens


REFERENCE = Prefill()
