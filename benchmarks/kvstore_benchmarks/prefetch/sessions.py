"""Agents' sessions from a trace, as requests with the names of their blocks.

Blocks of a trace are put together to larger ones, so that a prompt is some hundred of them
and not thousands: what is asked is how bytes move, and those are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from kvstore.sim.trace import Request, Trace
from kvstore.types import KEY_BYTES, SessionState


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of session `session`, which does `then` and is back at `back_s` (None: never).
    `keys`: of the whole blocks of its prompt."""

    at_s: float
    session: int
    tokens: int
    output_tokens: int
    keys: list[bytes]
    then: SessionState
    back_s: float | None


def asked_of(trace: Trace, together: int) -> list[Asked]:
    """The requests of a trace, with so many blocks of it as one."""
    names: dict[bytes, bytes] = {}
    back: dict[int, float] = {}
    asked: list[Asked] = []
    for number, request in reversed(list(enumerate(trace.requests))):
        session = -1 - number if request.session is None else request.session
        then = request.then if request.then is not None else SessionState.IDLE
        at_s = request.time_ms / 1e3
        asked.append(
            Asked(
                at_s,
                session,
                request.tokens,
                request.output_tokens,
                _keys(request, together, names),
                then,
                back.get(session),
            )
        )
        back[session] = at_s
    asked.reverse()
    return asked


def _keys(request: Request, together: int, names: dict[bytes, bytes]) -> list[bytes]:
    """A chain of names, one object each, whoever asks for it."""
    numbers = np.concatenate(
        [np.arange(first, stop) for first, stop in request.pieces] or [np.zeros(0, np.int64)]
    ).tobytes()
    size = together * 8
    keys: list[bytes] = []
    name = b""
    for begin in range(0, len(numbers) // size * size, size):
        name = blake2b(name + numbers[begin : begin + size], digest_size=KEY_BYTES).digest()
        keys.append(names.setdefault(name, name))
    return keys
