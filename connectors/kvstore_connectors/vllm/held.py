"""What the store has leased of a prompt: from grants, chain by chain, to blocks, band by band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.types import LeaseGrant
from kvstore_connectors.vllm.groups import Band, Bands
from kvstore_connectors.vllm.link import Attached
from kvstore_connectors.vllm.metadata import LoadPart
from kvstore_connectors.vllm.positions import Query


@dataclass(slots=True)
class Taken:
    """Leased blocks of a band from its block `first` on, a list for each of its layouts:
    all shards of the first member, then of the next."""

    band: Band
    first: int
    addresses: list[list[int]]
    checksums: list[list[int]]


class Part(NamedTuple):
    """What is to be filled of a group's blocks [first, last) of a prompt; `load` does not say
    yet into what."""

    load: LoadPart
    first: int
    last: int


@dataclass(slots=True)
class Held:
    """Leases that together let a prompt resume at `tokens`, and whose they are. They begin
    at `floor`, which must be had already.

    `full_tokens`: how far full attention is held, which may be further. `dram_tokens`:
    how far it was in DRAM when it was asked for. `parts`: see `parts_of`, of all that was
    asked for, made ahead of the engine's thread. `rest`: full attention's blocks of the
    whole prompt are there, also those that are not loaded, as far as could be seen.
    """

    floor: int
    tokens: int
    full_tokens: int
    dram_tokens: int
    lease_ids: list[int]
    expires_ns: int
    taken: list[Taken]
    parts: list[Part]
    attached: Attached
    rest: bool = False


def held_of(
    bands: Bands,
    attached: Attached,
    made: Sequence[Query],
    grants: Sequence[LeaseGrant],
    *,
    floor: int,
    position: int,
    full_tokens: int,
) -> Held:
    """What was granted for queries that were to let a prompt, whose blocks up to `floor` are
    had, resume at `position`, where full attention was seen to be held up to `full_tokens`.
    Windows and states do not shorten it."""
    taken = _taken(made, grants)
    tokens = position
    for each in taken:
        if each.band.rule.is_full:
            blocks = each.first + len(each.addresses[0])
            tokens = min(tokens, bands.aligned(blocks * each.band.block_tokens))
    leased = [grant for grant in grants if grant.lease_id]
    return Held(
        floor=floor,
        tokens=tokens,
        full_tokens=full_tokens if bands.partial and tokens == position else tokens,
        dram_tokens=min(_dram_tokens(made, grants), tokens),
        lease_ids=[grant.lease_id for grant in leased],
        expires_ns=min((grant.expires_ns for grant in leased), default=0),
        taken=taken,
        parts=parts_of(taken, floor, tokens),
        attached=attached,
    )


def parts_of(leased: Sequence[Taken], local_tokens: int, position: int) -> list[Part]:
    """Of leased blocks, those that are to be filled to resume at `position`, group by group."""
    parts: list[Part] = []
    for taken in leased:
        band = taken.band
        first, last = band.span(position)
        # What vLLM has of its own is shared, and must not be written.
        first = max(first, local_tokens // band.block_tokens, taken.first)
        if first >= last:
            continue
        blocks = slice(first - taken.first, last - taken.first)
        shards = len(taken.addresses) // len(band.members)
        for place, member in enumerate(band.members):
            own = slice(place * shards, (place + 1) * shards)
            addresses = [each[blocks] for each in taken.addresses[own]]
            checksums = [each[blocks] for each in taken.checksums[own]]
            parts.append(Part(LoadPart(member, [], addresses, checksums), first, last))
    return parts


def _dram_tokens(made: Sequence[Query], grants: Sequence[LeaseGrant]) -> int:
    """How far the longest chain was in DRAM."""
    query, grant = max(
        zip(made, grants, strict=True),
        key=lambda pair: (pair[0].band.rule.is_full, pair[1].from_dram > 0, pair[0].first),
        default=(None, None),
    )
    if query is None or grant is None or not grant.from_dram:
        return 0
    return (query.first + grant.from_dram) * query.band.block_tokens


def _taken(made: Sequence[Query], grants: Sequence[LeaseGrant]) -> list[Taken]:
    """What was granted, band by band, each from its first block on without a hole."""
    taken: list[Taken] = []
    broken = False
    for query, grant in zip(made, grants, strict=True):
        if not taken or taken[-1].band is not query.band:
            empty: list[list[int]] = [[] for _ in query.chain.layout_ids]
            taken.append(Taken(query.band, query.first, empty, [list(each) for each in empty]))
            broken = False
        if not broken:
            held, current = grant.held, taken[-1]
            for number in range(len(query.chain.layout_ids)):
                column = slice(number * held, (number + 1) * held)
                current.addresses[number] += grant.addresses[column]
                current.checksums[number] += grant.checksums[column]
            broken = held < len(query.chain.keys)
    return taken
