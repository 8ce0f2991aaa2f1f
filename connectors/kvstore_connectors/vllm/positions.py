"""The longest position of a prompt at which the store holds what every group needs.

How far full attention is held is found by halves, for that is a prefix. Where windows
and states are held there is no order to it: the positions are tried from the longest
down. Both only look at the server's directory; a lease makes the answer true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvstore.types import NO_HINTS, NO_REUSE, ChainQuery, Reuse
from kvstore_connectors.vllm.groups import Band, Bands

Look = Callable[[Band, Sequence[bytes]], int | None]
"""How many of a band's blocks are held, from the first on; None where that takes a call."""


@dataclass(slots=True)
class Wanted:
    """What of a prompt might be loaded: positions above `floor`, up to `limit`, tokens.

    `keys[block_tokens]`: keys of all blocks of that size up to `limit`. `reuse`: what the
    request says of their next use. `urgency`: 0 to 100, of its being answered soon. `rest`:
    keys of the prompt's blocks of full attention behind that, which are not loaded.
    """

    keys: Mapping[int, list[bytes]]
    limit: int
    floor: int
    reuse: Reuse = NO_REUSE
    urgency: int = NO_HINTS.priority
    rest: Sequence[bytes] = ()


@dataclass(slots=True)
class Query:
    """Consecutive blocks of a band, `first` being the place of the first in the prompt."""

    band: Band
    first: int
    chain: ChainQuery


def full_position(bands: Bands, wanted: Wanted, limit: int, look: Look) -> int | None:
    """How far full attention is held, at most to `limit`; None where nobody can see."""
    for band in bands.full:
        keys = wanted.keys[band.block_tokens]
        asked = limit // band.block_tokens
        held = look(band, keys if asked == len(keys) else keys[:asked])
        if held is None:
            return None
        limit = bands.aligned(min(limit, held * band.block_tokens))
    return limit


def longest_position(bands: Bands, wanted: Wanted, limit: int, look: Look) -> int:
    """The longest position up to `limit` where windows and states are held, or 0."""
    partial = bands.partial
    for position in range(limit, wanted.floor, -bands.alignment):
        if all(_is_held(band, wanted, position, look) for band in partial):
            return position
    return 0


def _is_held(band: Band, wanted: Wanted, position: int, look: Look) -> bool:
    first, last = band.span(position)
    keys = wanted.keys[band.block_tokens]
    if first == last:
        return True
    # Most windows are not held at all: their last block tells.
    return bool(look(band, keys[last - 1 : last])) and look(band, keys[first:last]) == last - first


def queries(
    bands: Bands,
    wanted: Wanted,
    position: int,
    columns: Callable[[Band], list[bytes]],
    most_keys: int,
) -> list[Query]:
    """What to acquire to resume at `position`, full attention first, of what lies beyond
    the floor. `columns`: the layouts of a band. A chain of more than `most_keys` keys,
    counted once for each layout, comes in several parts, in order."""
    made = []
    for band in (*bands.full, *bands.partial):
        layout_ids = columns(band)
        first, last = band.span(position)
        first = max(first, wanted.floor // band.block_tokens)
        step = max(1, most_keys // len(layout_ids))
        keys = wanted.keys[band.block_tokens]
        for start in range(first, last, step):
            part = keys[start : min(start + step, last)]
            made.append(Query(band, start, ChainQuery(layout_ids, part, wanted.reuse)))
    return made
