"""Space in one tier: slots inside extents.

A tier is a number of *extents* of equal size. An extent in use belongs to one
*class*, an (owner, slot size) pair, and is cut into slots of that size, so there
is no fragmentation inside it and no owner's block beside another's. Extents that
are empty may move between classes; an extent that changes hands gets a new number,
so an address never means two things in the life of a server.

(The scheme is memcached's slab allocator, with extents for pages.)

    address = extent number * extent_bytes + slot index * slot_bytes
"""

from __future__ import annotations

from typing import NamedTuple

from kvstore.types import ALIGNMENT


class SpaceClass(NamedTuple):
    """Who may share an extent: one owner ("" where it does not matter), one size."""

    owner: str
    slot_bytes: int


class Extent:
    __slots__ = ("broken", "free", "number", "slots", "space_class", "used")

    def __init__(self, number: int, space_class: SpaceClass, slots: int) -> None:
        self.number = number
        self.broken = False
        self.space_class = space_class
        self.slots = slots
        self.used: set[int] = set()
        # Lowest index on top, so that consecutive allocations are adjacent.
        self.free = list(range(slots - 1, -1, -1))


class Space:
    """Reserves and frees slots. Counts only; the bytes are elsewhere."""

    def __init__(self, capacity_bytes: int, extent_bytes: int, first_extent: int = 1) -> None:
        """`first_extent`: the number of the first extent to be opened. One that differs
        from life to life of a server keeps addresses of an earlier one from fitting."""
        if extent_bytes % ALIGNMENT:
            raise ValueError(f"extents must be multiples of {ALIGNMENT} bytes")
        self.extent_bytes = extent_bytes
        self.max_extents = capacity_bytes // extent_bytes
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
        here = sum(len(extent.free) for extent in self._partial.get(space_class, {}).values())
        return here + self.spare_extents * self.slots_per_extent(space_class.slot_bytes)

    def total_slots(self, space_class: SpaceClass) -> int:
        """Slots of this class, free and used, and those it could still open."""
        extents = self.extents_of(space_class) + self.spare_extents
        return extents * self.slots_per_extent(space_class.slot_bytes)

    def allocate(self, space_class: SpaceClass) -> int | None:
        """The address of a free slot in the extents the class has, or None."""
        partial = self._partial.get(space_class)
        if not partial:
            return None
        extent = next(iter(partial.values()))
        index = extent.free.pop()
        extent.used.add(index)
        if not extent.free:
            del partial[extent.number]
        self._used_bytes += space_class.slot_bytes
        return extent.number * self.extent_bytes + index * space_class.slot_bytes

    def free(self, address: int) -> None:
        """Give a slot back. The caller guarantees that it was allocated."""
        extent, index = self._locate(address)
        extent.used.remove(index)
        extent.free.append(index)
        if not extent.broken:
            self._partial[extent.space_class][extent.number] = extent
        self._used_bytes -= extent.space_class.slot_bytes

    def open_extent(self, space_class: SpaceClass) -> int | None:
        """Give the class one more extent: its number, or None when none is spare."""
        if not self.spare_extents or not self.slots_per_extent(space_class.slot_bytes):
            return None
        return self._add(self._next_number, space_class).number

    def empty_extent(self, but: SpaceClass) -> int | None:
        """An extent without a used slot that belongs to another class than `but`."""
        for space_class, partial in self._partial.items():
            if space_class != but:
                for extent in partial.values():
                    if not extent.used:
                        return extent.number
        return None

    def close_extent(self, number: int) -> None:
        """Take an empty extent from its class; its number is not used again."""
        extent = self._extents[number]
        if extent.used:
            raise ValueError("an extent in use cannot be closed")
        del self._extents[number]
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

    def addresses_in(self, number: int) -> list[int]:
        """Addresses of the used slots of an extent."""
        extent = self._extents[number]
        base, size = number * self.extent_bytes, extent.space_class.slot_bytes
        return [base + index * size for index in extent.used]

    def restore_extent(self, number: int, space_class: SpaceClass) -> None:
        """Take over an extent found at a start. Raises ValueError beyond capacity."""
        if not self.spare_extents or number in self._extents:
            raise ValueError(f"extent {number} does not fit")
        self._add(number, space_class)

    def restore_slot(self, address: int) -> None:
        """Mark a slot of a restored extent as used; `finish_restore` must follow. Raises
        ValueError when it is used already or is no slot."""
        extent, index = self._locate(address)
        if index in extent.used or index >= extent.slots:
            raise ValueError(f"slot {index} of extent {extent.number} is not free")
        extent.used.add(index)
        self._used_bytes += extent.space_class.slot_bytes

    def finish_restore(self) -> None:
        """All that was found is marked: the rest is free."""
        for extent in self._extents.values():
            extent.free = [i for i in range(extent.slots - 1, -1, -1) if i not in extent.used]
            if not extent.free:
                self._partial[extent.space_class].pop(extent.number, None)

    def _add(self, number: int, space_class: SpaceClass) -> Extent:
        extent = Extent(number, space_class, self.slots_per_extent(space_class.slot_bytes))
        self._extents[number] = extent
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
            free = set(extent.free)
            listed = extent.number in self._partial[extent.space_class]
            if (
                len(free) != len(extent.free)
                or free & extent.used
                or len(free) + len(extent.used) != extent.slots
                or listed != (bool(extent.free) and not extent.broken)
            ):
                raise AssertionError(f"extent {extent.number} has lost count of its slots")
            used += len(extent.used) * extent.space_class.slot_bytes
        if used != self._used_bytes or len(self._extents) > self.max_extents:
            raise AssertionError("space has lost count of its bytes")
        if sum(self._count.values()) != len(self._extents):
            raise AssertionError("space has lost count of its extents")
