"""Whether two answers come from the same keys and values.

Equal output tokens would hide damage: a small random model repeats itself. Log-
probabilities do not: they are those of the same arithmetic over the same bytes, so
an answer read from the store has exactly those of vLLM's own prefix hit.
"""

from __future__ import annotations

import math

from kvstore_benchmarks.end_to_end.child import Answer


def difference(left: Answer, right: Answer) -> float:
    """The largest difference of a log-probability; infinite when the likeliest
    tokens are others or the answers have not the same length."""
    if len(left.logprobs) != len(right.logprobs) or not left.logprobs:
        return math.inf
    largest = 0.0
    for ours, theirs in zip(left.logprobs, right.logprobs, strict=True):
        if ours.keys() != theirs.keys():
            return math.inf
        largest = max(largest, *(abs(ours[token] - theirs[token]) for token in ours))
    return largest
