"""What was learned of this machine, kept from one life of the server to the next.

A small file of its own: whoever finds it gone or damaged learns again.
"""

from __future__ import annotations

import asyncio
import json
import logging
from functools import partial
from pathlib import Path

from kvstore.store.loop import Loop

log = logging.getLogger(__name__)

KEPT_EVERY_S = 60.0


class Costs:
    def __init__(self, loop: Loop, path: Path) -> None:
        self._loop = loop
        self._path = path
        self._kept = ""

    def recall(self) -> None:
        """Before anything is asked of the planner."""
        try:
            state = json.loads(self._path.read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.warning("what was learned of this machine is lost: %s", error)
            return
        if isinstance(state, dict):
            parts = {name: part for name, part in state.items() if isinstance(part, dict)}
            self._loop.planner.restore_learned(parts)

    async def work(self) -> None:
        """For as long as the store lives."""
        while True:
            await asyncio.sleep(KEPT_EVERY_S)
            await self._loop.in_thread(partial(self._write, self._text()))

    def keep(self) -> None:
        self._write(self._text())

    def _text(self) -> str:
        return json.dumps(self._loop.planner.learned())

    def _write(self, text: str) -> None:
        if text == self._kept:
            return
        fresh = self._path.with_name(self._path.name + ".tmp")
        try:
            fresh.write_text(text)
            fresh.replace(self._path)
            self._kept = text
        except OSError as error:
            log.warning("what was learned of this machine is not kept: %s", error)
