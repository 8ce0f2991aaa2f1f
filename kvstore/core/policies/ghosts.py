"""Names of blocks that left a while ago, oldest first: how a policy recognises a
block that it should not have let go."""

from __future__ import annotations

from collections import OrderedDict


class Ghosts:
    def __init__(self) -> None:
        self._names: OrderedDict[bytes, None] = OrderedDict()

    def add(self, stored_key: bytes) -> None:
        """As the latest."""
        self._names[stored_key] = None
        self._names.move_to_end(stored_key)

    def take(self, stored_key: bytes) -> bool:
        """Forget one; whether it was known."""
        return self._names.pop(stored_key, self) is None

    def pop(self) -> bytes:
        """Forget the oldest; there is one."""
        return self._names.popitem(last=False)[0]

    def keep(self, most: int) -> None:
        """Forget the oldest beyond `most`."""
        while len(self._names) > most:
            self.pop()

    def __contains__(self, stored_key: bytes) -> bool:
        return stored_key in self._names

    def __len__(self) -> int:
        return len(self._names)
