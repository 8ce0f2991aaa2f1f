"""Stand-in GPUs whose state a test may change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvstore.device.vram_stand_in import PREFIX


class StandInGpu:
    def __init__(self, path: Path, nbytes: int) -> None:
        self.name = f"{PREFIX}{path}"
        self._path = path
        self._says: dict[str, Any] = {"bytes": nbytes}
        self.say()

    def say(self, **changes: Any) -> None:
        """See `vram_stand_in`."""
        self._says |= changes
        fresh = self._path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self._says))
        fresh.replace(self._path)
