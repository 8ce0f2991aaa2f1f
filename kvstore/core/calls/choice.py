"""Load or recompute: how much of a chain that lies behind DRAM is worth waiting for.

With `load(k)` for the first k positions and `compute(k)` for the last k of n, the time to
the first token is load(k) + compute(n - k). Both grow evenly with k, but for what has to
be waited for before the first block moves. So either all of it is worth loading, or none;
and only what can be there in time counts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstore.core.links.learned import Prediction
from kvstore.types import Refusal

WORTH_IT = 0.9
"""Of the time to compute it a load may take so much. It is copied on when it is there; what
engines tell is how fast they compute what comes after it, deeper in a prompt, where a token
costs more; and a little that is won is not worth what may go wrong."""


class Choice(NamedTuple):
    """Load so many positions, which takes `prediction`. `refusal`: why not more."""

    positions: int
    prediction: Prediction
    refusal: Refusal | None


def choose(
    works_ns: Sequence[int],
    ready: Callable[[int], Prediction],
    left_ns: int | None,
    compute_ns: float,
) -> Choice:
    """`works_ns[k]`: the work of loading the first k positions, of which `ready` tells the
    time. `left_ns`: until the deadline, None where there is none. `compute_ns`: what it takes
    to compute a position; 0.0 where the caller does not, or it is not known."""
    positions = len(works_ns) - 1
    refusal = None
    if left_ns is not None:
        positions = bisect_right(works_ns, left_ns, key=lambda work_ns: int(ready(work_ns).ns)) - 1
        if positions < len(works_ns) - 1:
            refusal = Refusal.LATE
    if positions <= 0 or not works_ns[positions]:
        return Choice(max(0, positions), Prediction(0.0, 0.0), refusal)
    said = ready(works_ns[positions])
    if compute_ns and said.ns + said.error_ns >= positions * compute_ns * WORTH_IT:
        return Choice(0, said, Refusal.RECOMPUTE)
    return Choice(positions, said, refusal)


def is_settled(
    works_ns: Sequence[int],
    ready: Callable[[int], Prediction],
    left_ns: int | None,
    compute_ns: float,
) -> bool:
    """Whether `choose` would say the same with more positions: it is too late for the last
    of these, or each takes longer than to compute it."""
    said_ns = ready(works_ns[-1]).ns
    if left_ns is not None and said_ns > left_ns:
        return True
    more = len(works_ns) - 2
    return compute_ns > 0 and more > 0 and said_ns - ready(works_ns[1]).ns >= more * compute_ns
