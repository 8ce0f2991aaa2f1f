"""Which blocks exist, how they chain, and where their replicas are.

A block is found by its *stored key*: a keyed hash of layout and key under a
secret of its tenant. The tenant is thereby part of the name, so one tenant's
lookup cannot reach another's block, and an index that leaks does not tell keys.

Chains: a block knows its parent's stored key and how many blocks name it as
theirs. A block with children is not dropped from its last tier, so what is
present of a chain stays a prefix. A child whose parent is absent (refused for
want of space, or found damaged) is an *orphan*: it is counted under the parent's
key until the parent comes back or the child goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, TypeGuard

from kvstore.core.lifecycle import Event, State, next_state
from kvstore.core.space import SpaceClass
from kvstore.errors import TooMany, UnknownLayout
from kvstore.naming import Namer, RememberedNames
from kvstore.types import LayoutSpec, Tier

MOST_NAMES = 1 << 16
"""Remembered: 32 chains of 2,000 blocks, in 11 MB."""


MOST_USES = 255
"""What a block's uses are counted up to."""
UNUSED_OUTPUT = -1

DEEPEST = (1 << 16) - 1
"""What a block's depth is counted up to."""
_DEPTHS = (*range(DEEPEST + 1), DEEPEST)
# One object a depth, for all blocks.

SHARDS = 256
"""Tables that blocks are spread over by the first byte of their name, so that none is
large: a dict of millions stalls everybody while it is made larger, for most of a
second, and cannot be gone through a part at a time while it changes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A registered layout, with the sizes the engine needs at hand."""

    tenant: str
    layout_id: bytes
    spec: LayoutSpec
    block_bytes: int
    stored_bytes: int
    """Of a block behind DRAM; fewer where it is coded there."""
    dram_class: SpaceClass
    nvme_class: SpaceClass | None
    """None where there is no tier behind DRAM."""
    name: Namer
    """From a key to the name its block is stored under."""


class Replica:
    """A block in one tier. `pins` counts leases and transfers that use it.

    `before`, `after` and `mark` are its eviction policy's, which lists it while it is
    READY; the first two are None otherwise. `confirmed`, of one in DRAM: the server has seen
    that its bytes have their checksum, and not only heard so from who committed them.
    """

    __slots__ = ("address", "after", "before", "block", "confirmed", "mark", "pins", "state")

    tier: ClassVar[Tier]
    before: Replica
    after: Replica
    mark: Any

    def __init__(self, block: Block, address: int, state: State) -> None:
        self.block = block
        self.address = address
        self.state = state
        self.pins = 0
        self.confirmed = False
        self.before = self.after = None  # type: ignore[assignment]
        self.mark = None

    def apply(self, event: Event) -> None:
        """Move to the next state; raises `IllegalTransition`, changing nothing."""
        self.state = next_state(self.state, event)


class DramReplica(Replica):
    __slots__ = ()
    tier = Tier.DRAM


class NvmeReplica(Replica):
    __slots__ = ()
    tier = Tier.NVME


class Block:
    """One block. `dram` and `nvme` are its replicas where there are any. `depth` is the
    number of blocks before it in its chain, as far as they are known, up to `DEEPEST`.
    `uses`: how often somebody asked for it since it was stored, up to `MOST_USES`, or
    `UNUSED_OUTPUT` where a model made it and nobody has yet.

    `checksum` (XXH3-64) is of the bytes in DRAM: None until the first commit, and while what
    is stored has not been decoded since the start. `stored_checksum` is of the bytes behind
    DRAM where those are coded. `children` counts the catalogued blocks that name this one
    as parent.
    """

    __slots__ = (
        "checksum", "children", "depth", "dram", "layout", "nvme", "parent", "stored_checksum",
        "stored_key", "uses",
    )  # fmt: skip

    def __init__(self, stored_key: bytes, parent: bytes, layout: Layout, depth: int = 0) -> None:
        self.stored_key = stored_key
        self.parent = parent
        self.layout = layout
        self.depth = depth
        self.checksum: int | None = None
        self.stored_checksum: int | None = None
        self.children = 0
        self.uses = 0
        self.dram: Replica | None = None
        self.nvme: Replica | None = None

    def hang_on(self, parent: Block) -> None:
        """Its parent is known. One object is both's name for it, which saves its memory
        for every block of a chain."""
        self.parent = parent.stored_key
        self.lie_at(parent.depth + 1)

    def lie_at(self, depth: int) -> None:
        """So many blocks come before it."""
        self.depth = _DEPTHS[min(depth, DEEPEST)]

    @property
    def readable(self) -> bool:
        """Some tier holds the bytes."""
        return is_ready(self.dram) or is_ready(self.nvme)


def is_ready(replica: Replica | None) -> TypeGuard[Replica]:
    """Whether there is a replica and its bytes can be read."""
    return replica is not None and replica.state is State.READY


def never_confirmed(replica: Replica) -> bool:
    """Whether all that says what its bytes should be is the word of a client, who may have
    been wrong from the start."""
    return replica.tier is Tier.DRAM and not replica.confirmed


class Catalog:
    def __init__(
        self,
        tenant_key: Callable[[str], bytes],
        max_layouts: int,
        nvme_slot_bytes: Callable[[int], int] | None = None,
    ) -> None:
        """`tenant_key` gives a tenant's secret, at most 64 bytes. `nvme_slot_bytes`
        tells what a block of so many bytes occupies behind DRAM."""
        self._tenant_key = tenant_key
        self._nvme_slot_bytes = nvme_slot_bytes
        self._max_layouts = max_layouts
        self._shards: list[dict[bytes, Block]] = [{} for _ in range(SHARDS)]
        self._orphans: dict[bytes, int] = {}
        self._layouts: dict[str, dict[bytes, Layout]] = {}
        self._secrets: dict[str, bytes] = {}
        self._names = RememberedNames(MOST_NAMES)
        self._tenant_blocks: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def __iter__(self) -> Iterator[Block]:
        """The catalog may change meanwhile: what comes or goes is then met or not."""
        for shard in self._shards:
            yield from list(shard.values())

    def names(self) -> Iterator[Iterable[bytes]]:
        """The stored keys of all blocks, a shard at a time; unchanging meanwhile."""
        return iter(self._shards)

    # Layouts

    def register_layout(self, tenant: str, spec: LayoutSpec) -> tuple[Layout, bool]:
        """The layout, and whether it is new to this tenant. Raises `TooMany`."""
        known = self._layouts.setdefault(tenant, {})
        layout_id = spec.layout_id
        if layout_id in known:
            return known[layout_id], False
        if len(known) >= self._max_layouts:
            raise TooMany(f"a tenant may register {self._max_layouts} layouts")
        nvme_class = None
        if self._nvme_slot_bytes is not None:
            nvme_class = SpaceClass("", self._nvme_slot_bytes(spec.stored_bytes))
        dram_class = SpaceClass(tenant, spec.slot_bytes)
        name = self._names.namer(self.secret(tenant), layout_id)
        layout = Layout(
            tenant, layout_id, spec, spec.block_bytes, spec.stored_bytes, dram_class, nvme_class,
            name,
        )  # fmt: skip
        known[layout_id] = layout
        return layout, True

    def layout(self, tenant: str, layout_id: bytes) -> Layout:
        try:
            return self._layouts[tenant][layout_id]
        except KeyError:
            raise UnknownLayout("no such layout is registered; register it first") from None

    # Blocks

    def secret(self, tenant: str) -> bytes:
        """A tenant's secret, at most 64 bytes."""
        secret = self._secrets.get(tenant)
        if secret is None:
            secret = self._secrets[tenant] = self._tenant_key(tenant)
        return secret

    def find(self, layout: Layout, key: bytes) -> Block | None:
        return self.get(layout.name(key))

    def get(self, stored_key: bytes) -> Block | None:
        """`stored_key` may be b"", which is no block's."""
        return self._shards[stored_key[0]].get(stored_key) if stored_key else None

    def run_in_dram(self, layout: Layout, keys: Sequence[bytes], most: int) -> list[Replica]:
        """The DRAM replicas of keys[:most], up to the first that is not READY there."""
        name, shards, ready = layout.name, self._shards, State.READY
        run: list[Replica] = []
        for key in islice(keys, most):
            stored_key = name(key)
            block = shards[stored_key[0]].get(stored_key)
            if block is None:
                break
            replica = block.dram
            if replica is None or replica.state is not ready:
                break
            run.append(replica)
        return run

    def add(self, stored_key: bytes, parent: bytes, layout: Layout) -> Block:
        """A new block without replicas. The caller guarantees that it is absent."""
        block = Block(stored_key, parent, layout)
        self.enter(block)
        return block

    def enter(self, block: Block) -> None:
        """Catalogue a block. The caller guarantees that its name is free."""
        shard = self._shards[block.stored_key[0]]
        assert block.stored_key not in shard
        shard[block.stored_key] = block
        self._count(block.layout.tenant, 1)
        block.children = self._orphans.pop(block.stored_key, 0)
        if not block.parent:
            return
        parent = self.get(block.parent)
        if parent is None:
            self._orphans[block.parent] = self._orphans.get(block.parent, 0) + 1
            return
        parent.children += 1
        block.hang_on(parent)

    def enter_many(
        self,
        layout: Layout,
        stored_keys: Sequence[bytes],
        parents: Sequence[bytes],
        checksums: Sequence[int],
    ) -> tuple[list[Block | None], list[Block]]:
        """Catalogue new blocks, parents best before their children: the blocks, None where
        the name is taken, and those whose parent was not there yet. Written out, as it is
        done for millions at a start."""
        shards, orphans, depths = self._shards, self._orphans, _DEPTHS
        coded = bool(layout.spec.codec)
        entered: list[Block | None] = []
        early: list[Block] = []
        block: Block | None = None
        for stored_key, parent, checksum in zip(stored_keys, parents, checksums, strict=True):
            shard = shards[stored_key[0]]
            if stored_key in shard:
                entered.append(None)
                continue
            found = None
            if parent:
                # The one just before it, mostly; another is a search in a large table.
                if block is not None and block.stored_key == parent:
                    found = block
                else:
                    found = shards[parent[0]].get(parent)
            if found is None:
                block = Block(stored_key, parent, layout)
                if parent:
                    orphans[parent] = orphans.get(parent, 0) + 1
                    early.append(block)
            else:
                found.children += 1
                block = Block(stored_key, found.stored_key, layout, depths[found.depth + 1])
            shard[stored_key] = block
            if coded:
                block.stored_checksum = checksum
            else:
                block.checksum = checksum
            if orphans:
                block.children = orphans.pop(stored_key, 0)
            entered.append(block)
        self._count(layout.tenant, len(entered) - entered.count(None))
        return entered, early

    def _count(self, tenant: str, blocks: int) -> None:
        self._tenant_blocks[tenant] = self._tenant_blocks.get(tenant, 0) + blocks

    def remove(self, block: Block) -> None:
        """Forget a block; its name is free at once. Replicas that are still pinned
        live on without it until they are let go."""
        removed = self._shards[block.stored_key[0]].pop(block.stored_key)
        assert removed is block
        self._count(block.layout.tenant, -1)
        if block.children:
            self._orphans[block.stored_key] = block.children
        if block.parent:
            self._disown(block.parent)

    def _disown(self, parent: bytes) -> None:
        block = self.get(parent)
        if block is not None:
            block.children -= 1
            return
        count = self._orphans[parent] - 1
        if count:
            self._orphans[parent] = count
        else:
            del self._orphans[parent]

    def contains(self, block: Block) -> bool:
        """Whether this very block is catalogued, not a successor of its name."""
        return self.get(block.stored_key) is block

    def tenant_blocks(self, tenant: str) -> int:
        return self._tenant_blocks.get(tenant, 0)

    def check_integrity(self) -> None:
        """Recount everything that is kept as a count; raises AssertionError."""
        children: dict[bytes, int] = {}
        tenants: dict[str, int] = {}
        for number, shard in enumerate(self._shards):
            for stored_key, block in shard.items():
                filed = block.stored_key == stored_key and stored_key[0] == number
                _check(filed, "a block is filed under another name")
        for block in self:
            _check(block.dram is not None or block.nvme is not None, "a block without any replica")
            if block.parent:
                children[block.parent] = children.get(block.parent, 0) + 1
            tenants[block.layout.tenant] = tenants.get(block.layout.tenant, 0) + 1
        for block in self:
            children_here = children.pop(block.stored_key, 0)
            _check(block.children == children_here, "a wrong count of children")
        _check(children == self._orphans, "a wrong count of orphans")
        _check(
            tenants == {name: n for name, n in self._tenant_blocks.items() if n},
            "a wrong count of a tenant's blocks",
        )


def _check(holds: bool, what: str) -> None:
    # Not an assert statement: the check must survive `python -O`.
    if not holds:
        raise AssertionError(what)
