"""Space in one tier: slots inside extents, and who is in each.

A tier is a number of *extents* of equal size. An extent in use belongs to one
*class*, an (owner, slot size) pair, and is cut into slots of that size, so there
is no fragmentation inside it and no owner's block beside another's. Extents that
are empty may move between classes; an extent that changes hands gets a new number,
so an address never means two things in the life of a server.

(The scheme is memcached's slab allocator, with extents for pages.)

    address = extent number * extent_bytes + slot index * slot_bytes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvstore.types import ALIGNMENT

if TYPE_CHECKING:
    from kvstore.core.catalog import Replica


class SpaceClass(NamedTuple):
    """Who may share an extent: one owner ("" where it does not matter), one size."""

    owner: str
    slot_bytes: int


class Extent:
    __slots__ = ("broken", "free", "number", "residents", "space_class")

    def __init__(self, number: int, space_class: SpaceClass, slots: int) -> None:
        self.number = number
        self.broken = False
        self.space_class = space_class
        self.residents: list[Replica | None] = [None] * slots
        self.free: list[int] = []

    def find_free(self) -> None:
        """Note down the slots nobody is in. The lowest index is on top, so that
        consecutive allocations are adjacent."""
        last = self.slots - 1
        self.free = [i for i in range(last, -1, -1) if self.residents[i] is None]

    @property
    def slots(self) -> int:
        return len(self.residents)

    @property
    def empty(self) -> bool:
        return len(self.free) == len(self.residents)


class Space:
    """Reserves and frees slots. Knows who is in each; the bytes are elsewhere."""

    def __init__(
        self,
        capacity_bytes: int,
        extent_bytes: int,
        *,
        max_slots: int | None = None,
        first_extent: int = 1,
    ) -> None:
        """`max_slots`: the most that extents may be cut into, of all sizes together.
        `first_extent`: the number of the first extent to be opened. One that differs
        from life to life of a server keeps addresses of an earlier one from fitting."""
        if extent_bytes % ALIGNMENT:
            raise ValueError(f"extents must be multiples of {ALIGNMENT} bytes")
        self.extent_bytes = extent_bytes
        self.max_extents = capacity_bytes // extent_bytes
        self.max_slots = capacity_bytes // ALIGNMENT if max_slots is None else max_slots
        self._slots = 0
        self._extents: dict[int, Extent] = {}
        # Extents with a free slot, by class, oldest first.
        self._partial: dict[SpaceClass, dict[int, Extent]] = {}
        self._count: dict[SpaceClass, int] = {}
        self._next_number = first_extent
        self._used_bytes = 0

    @property
    def capacity_bytes(self) -> int:
        return self.max_extents * self.extent_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def spare_extents(self) -> int:
        """Extents that belong to nobody."""
        return max(0, self.max_extents - len(self._extents))

    def classes(self) -> list[SpaceClass]:
        return list(self._count)

    def extents_of(self, space_class: SpaceClass) -> int:
        return self._count.get(space_class, 0)

    def slots_per_extent(self, slot_bytes: int) -> int:
        return self.extent_bytes // slot_bytes

    def free_slots(self, space_class: SpaceClass) -> int:
        """Slots this class could get without anything being dropped."""
        return self.open_slots(space_class) + self.unopened_slots(space_class)

    def open_slots(self, space_class: SpaceClass) -> int:
        """Free slots in the extents this class has."""
        return sum(len(extent.free) for extent in self._partial.get(space_class, {}).values())

    def total_slots(self, space_class: SpaceClass) -> int:
        """Slots of this class, free and used, and those it could still open."""
        opened = self.extents_of(space_class) * self.slots_per_extent(space_class.slot_bytes)
        return opened + self.unopened_slots(space_class)

    def unopened_slots(self, space_class: SpaceClass) -> int:
        """Slots in extents that this class could still open."""
        slots = self.slots_per_extent(space_class.slot_bytes)
        if not slots:
            return 0
        return slots * min(self.spare_extents, max(0, self.max_slots - self._slots) // slots)

    def may_replace(self, other: SpaceClass, space_class: SpaceClass) -> bool:
        """Whether the class can have an extent once one of another class is closed."""
        mine = self.slots_per_extent(space_class.slot_bytes)
        theirs = self.slots_per_extent(other.slot_bytes)
        return mine > 0 and self._slots - theirs + mine <= self.max_slots

    def allocate(self, space_class: SpaceClass, resident: Replica) -> int | None:
        """Put somebody into a free slot of the extents the class has: the slot's
        address, or None when there is none."""
        partial = self._partial.get(space_class)
        if not partial:
            return None
        extent = next(iter(partial.values()))
        index = extent.free.pop()
        extent.residents[index] = resident
        if not extent.free:
            del partial[extent.number]
        self._used_bytes += space_class.slot_bytes
        return extent.number * self.extent_bytes + index * space_class.slot_bytes

    def free(self, address: int) -> None:
        """Give a slot back. The caller guarantees that it was allocated."""
        extent, index = self._locate(address)
        assert extent.residents[index] is not None
        extent.residents[index] = None
        extent.free.append(index)
        if not extent.broken:
            self._partial[extent.space_class][extent.number] = extent
        self._used_bytes -= extent.space_class.slot_bytes

    def at(self, address: int) -> Replica | None:
        """Who is in a slot. Raises ValueError when it is no slot."""
        extent, index = self._locate(address)
        return extent.residents[index]

    def residents_of(self, number: int) -> list[Replica]:
        """Who is in an extent, by address; nobody in one that is not open."""
        extent = self._extents.get(number)
        return [] if extent is None else [r for r in extent.residents if r is not None]

    def residents(self, *, owner: str | None = None) -> Iterator[Replica]:
        """Everybody (in the extents of one owner), by address. The space may change
        meanwhile: who comes or goes is then met or not."""
        for number in sorted(self._extents):
            if owner is None or self.owner_of(number) == owner:
                yield from self.residents_of(number)

    def open_extent(self, space_class: SpaceClass) -> int | None:
        """Give the class one more extent: its number, or None when none is spare or
        there are slots enough."""
        if not self.unopened_slots(space_class):
            return None
        extent = self._add(self._next_number, space_class)
        extent.find_free()
        return extent.number

    def empty_extent(self, for_class: SpaceClass) -> int | None:
        """An extent of another class that nobody is in and that this one could have."""
        for space_class, partial in self._partial.items():
            if space_class != for_class and self.may_replace(space_class, for_class):
                for extent in partial.values():
                    if extent.empty:
                        return extent.number
        return None

    def empty_extents(self, space_class: SpaceClass) -> list[int]:
        """Extents of a class that nobody is in."""
        partial = self._partial.get(space_class, {})
        return [extent.number for extent in partial.values() if extent.empty]

    def close_extent(self, number: int) -> None:
        """Take an empty extent from its class; its number is not used again."""
        extent = self._extents[number]
        if not extent.empty:
            raise ValueError("an extent in use cannot be closed")
        del self._extents[number]
        self._slots -= extent.slots
        del self._partial[extent.space_class][number]
        self._count[extent.space_class] -= 1
        if not self._count[extent.space_class]:
            del self._count[extent.space_class]
            del self._partial[extent.space_class]

    def fail_extent(self, number: int) -> None:
        """The machine has no room for this extent after all: no slot of it is given
        out any more, and no further extent is opened."""
        extent = self._extents[number]
        extent.broken = True
        self._partial[extent.space_class].pop(number, None)
        self.max_extents = len(self._extents)

    def owner_of(self, number: int) -> str | None:
        """Who owns an extent; None when it is not open."""
        extent = self._extents.get(number)
        return None if extent is None else extent.space_class.owner

    def extent_of(self, address: int) -> int:
        return address // self.extent_bytes

    def restore_extent(self, number: int, space_class: SpaceClass) -> None:
        """Take over an extent found at a start; `finish_restore` must follow. Raises
        ValueError beyond capacity."""
        if not self.unopened_slots(space_class) or number in self._extents:
            raise ValueError(f"extent {number} does not fit")
        self._add(number, space_class)

    def restore_slots(
        self, addresses: Sequence[int], space_class: SpaceClass, residents: Sequence[Replica | None]
    ) -> list[int]:
        """Put each into its slot of a restored extent; `finish_restore` must follow.
        Which of them are not there: nobody, who comes to a slot that is taken, and who
        comes to none of the class."""
        slot_bytes, extent_bytes = space_class.slot_bytes, self.extent_bytes
        refused: list[int] = []
        slots: list[Replica | None] = []
        begin = end = 0
        for row, (address, resident) in enumerate(zip(addresses, residents, strict=True)):
            if not begin <= address < end:
                begin = address // extent_bytes * extent_bytes
                end = begin + extent_bytes
                extent = self._extents.get(address // extent_bytes)
                slots = []
                if extent is not None and extent.space_class == space_class:
                    slots = extent.residents
            index = (address - begin) // slot_bytes
            if (
                resident is None
                or index >= len(slots)
                or slots[index] is not None
                or begin + index * slot_bytes != address
            ):
                refused.append(row)
            else:
                slots[index] = resident
        self._used_bytes += (len(addresses) - len(refused)) * slot_bytes
        return refused

    def finish_restore(self) -> None:
        """All that was found is in its slot: the rest is free."""
        for extent in self._extents.values():
            extent.find_free()
            if not extent.free:
                self._partial[extent.space_class].pop(extent.number, None)

    def _add(self, number: int, space_class: SpaceClass) -> Extent:
        extent = Extent(number, space_class, self.slots_per_extent(space_class.slot_bytes))
        self._extents[number] = extent
        self._slots += extent.slots
        self._partial.setdefault(space_class, {})[number] = extent
        self._count[space_class] = self._count.get(space_class, 0) + 1
        self._next_number = max(self._next_number, number + 1)
        return extent

    def _locate(self, address: int) -> tuple[Extent, int]:
        number, offset = divmod(address, self.extent_bytes)
        extent = self._extents.get(number)
        if extent is None or offset % extent.space_class.slot_bytes:
            raise ValueError(f"address {address} is no slot")
        return extent, offset // extent.space_class.slot_bytes

    def check_integrity(self) -> None:
        """Recount; raises AssertionError."""
        used = 0
        for extent in self._extents.values():
            empty = [i for i, resident in enumerate(extent.residents) if resident is None]
            listed = extent.number in self._partial[extent.space_class]
            if sorted(extent.free) != empty or listed != (bool(empty) and not extent.broken):
                raise AssertionError(f"extent {extent.number} has lost count of its slots")
            used += (extent.slots - len(empty)) * extent.space_class.slot_bytes
        if used != self._used_bytes or len(self._extents) > self.max_extents:
            raise AssertionError("space has lost count of its bytes")
        if sum(self._count.values()) != len(self._extents):
            raise AssertionError("space has lost count of its extents")
        if sum(extent.slots for extent in self._extents.values()) != self._slots:
            raise AssertionError("space has lost count of its slots")
        if self._slots > self.max_slots:
            raise AssertionError("there are more slots than there may be")
