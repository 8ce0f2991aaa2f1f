"""A workload: requests in order of time, and the blocks that each of them asks for.

Blocks are numbers, 0 to `blocks` - 1; a prompt is a few pieces of consecutive numbers,
so that a prompt of 2,000 blocks is worked on a piece at a time.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvstore.core.policies import SessionState
from kvstore.errors import KVStoreError

Piece = tuple[int, int]
"""Blocks [first, stop)."""


class TraceError(KVStoreError):
    """A trace cannot be used: names the file, and the line or request."""


@dataclass(frozen=True, slots=True)
class Request:
    time_ms: float
    tokens: int
    """Of the prompt."""
    output_tokens: int
    pieces: tuple[Piece, ...]
    """Of the prompt, root first."""
    session: int | None = None
    priority: int = 50
    category: str = ""
    then: SessionState | None = None
    """What its session does once it is answered, as a caller would know."""
    expected_ms: float | None = None
    """How long after this request its session makes the next, as its caller says."""
    again_tokens: int | None = None
    """Of the prompt, up to what nobody asked for before: said where the blocks are too large to
    tell."""

    @property
    def blocks(self) -> int:
        return sum(stop - first for first, stop in self.pieces)


@dataclass(frozen=True)
class Trace:
    block_tokens: int
    blocks: int
    """Numbers in use are below this."""
    requests: list[Request]


def pieces_of(numbers: Sequence[int] | NDArray[np.int64]) -> tuple[Piece, ...]:
    """Numbers in the order of a prompt, as pieces."""
    if not len(numbers):
        return ()
    array = np.asarray(numbers, dtype=np.int64)
    ends = np.flatnonzero(np.diff(array) != 1)
    firsts = array[np.concatenate(([0], ends + 1))].tolist()
    stops = (array[np.concatenate((ends, [len(array) - 1]))] + 1).tolist()
    return tuple(zip(firsts, stops, strict=True))


def merged(traces: Iterable[Trace]) -> Trace:
    """Several as one workload that begins at one time; none of them has a block of
    another. Raises `TraceError` when their blocks differ in size."""
    traces = list(traces)
    if len(traces) == 1:
        return traces[0]
    sizes = {trace.block_tokens for trace in traces}
    if len(sizes) > 1:
        raise TraceError(f"the traces have blocks of {sorted(sizes)} tokens; replay them apart")
    requests: list[Request] = []
    base = sessions = 0
    for trace in traces:
        begin = trace.requests[0].time_ms if trace.requests else 0.0
        for request in trace.requests:
            pieces = tuple((first + base, stop + base) for first, stop in request.pieces)
            session = None if request.session is None else request.session + sessions
            requests.append(
                replace(request, time_ms=request.time_ms - begin, pieces=pieces, session=session)
            )
        base += trace.blocks
        sessions += 1 + max((r.session for r in trace.requests if r.session is not None), default=0)
    requests.sort(key=lambda request: request.time_ms)
    return Trace(sizes.pop(), base, requests)


def coarsened(trace: Trace, block_tokens: int) -> Trace:
    """The same requests in larger blocks. A prompt has those that its blocks fill, and two
    are equal where all that they are made of is: a block's name is that of the prompt up to
    its end. Raises `TraceError` where they are not so many of the trace's, or nothing fills
    one."""
    factor, rest = divmod(block_tokens, trace.block_tokens)
    if rest or not factor:
        raise TraceError(f"blocks of {block_tokens} tokens are not some of {trace.block_tokens}")
    numbers = np.full(trace.blocks, -1, dtype=np.int64)
    blocks = 0
    requests: list[Request] = []
    for request in trace.requests:
        prompt = [np.arange(first, stop, dtype=np.int64) for first, stop in request.pieces]
        ends = np.concatenate(prompt)[factor - 1 :: factor] if prompt else np.empty(0, np.int64)
        new = ends[numbers[ends] < 0]
        numbers[new] = np.arange(blocks, blocks + len(new))
        blocks += len(new)
        requests.append(replace(request, pieces=pieces_of(numbers[ends])))
    if trace.blocks and not blocks:
        raise TraceError(f"no prompt fills a block of {block_tokens} tokens")
    return Trace(block_tokens, blocks, requests)


def expecting(trace: Trace, within: float, seed: int) -> Trace:
    """The same requests, whose callers also say when their session will be back: as it will
    be, times a factor that is even between 1 - `within` and 1 + `within`."""
    draw = random.Random(seed)
    following: dict[int, float] = {}
    requests: list[Request] = []
    for request in reversed(trace.requests):
        expected_ms = None
        if request.session is not None:
            if request.session in following:
                factor = 1 + within * (2 * draw.random() - 1)
                expected_ms = factor * (following[request.session] - request.time_ms)
            following[request.session] = request.time_ms
        requests.append(replace(request, expected_ms=expected_ms))
    requests.reverse()
    return Trace(trace.block_tokens, trace.blocks, requests)
