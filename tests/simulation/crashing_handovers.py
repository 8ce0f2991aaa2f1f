"""Blocks that are handed over on a machine that crashes."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore.types import Landing
from tests.simulation.crashing_workers import Worker

if TYPE_CHECKING:
    from tests.simulation.crashes import Life

LATE_S = 0.5
"""Copies of who died are under way for so long at most."""
RESERVATION_S = 2.0


class HandOver:
    """Blocks of which the writer writes a copy to where another worker decodes, who may die
    before it, meanwhile, or after it, as the writer may."""

    def __init__(self, life: Life, writer: Worker, layout: int, keys: list[bytes]) -> None:
        self._life = life
        self._writer = writer
        self._layout = layout
        self._keys = keys
        luck = life._luck
        self._fate = luck.choice(
            ["", "", "", "", "before", "while", "after", "reading", "writer dies", "late"]
        )
        self._decoder = life._arrive(writer.session.tenant, reads=True)

    async def write(self, slots: Sequence[int], blocks: list[bytes]) -> list[Landing]:
        """What of it the commit is to name."""
        life, luck, writer = self._life, self._life._luck, self._writer
        if luck.random() < 0.5:
            # Whoever decodes has been there for a while, and the GPU's thread has looked.
            await asyncio.sleep(luck.expovariate(1 / 0.1))
        self._end("before")
        layout_id = writer.layout_ids[self._layout]
        landed = []
        for landing in life._store.land(writer.session, layout_id, list(slots)):
            if not writer.lives:
                break
            gpu = next(gpu for gpu in life._gpus if gpu.name == landing.gpu)
            there = zip(landing.addresses, writer.places(gpu, landing), blocks, strict=True)
            granted = [(at, place, block) for at, place, block in there if place is not None]
            life.seen["landings_granted"] += len(granted)
            if granted and await self._write_all(granted):
                landed.append(Landing(landing.gpu, [at for at, _, _ in granted]))
        self._end("after")
        return landed

    async def _write_all(self, granted: list[tuple[int, int, bytes]]) -> bool:
        """Whether it came to that."""
        life, luck = self._life, self._life._luck
        for _, place, block in granted:
            ctypes.memmove(place, block, len(block) // 2)
        await asyncio.sleep(luck.expovariate(1 / 0.02))
        self._end("while")
        if self._fate == "writer dies":
            life.seen["died_while_landing"] += self._writer.lives
            self._writer.die()
            until_s = life._loop.time() + luck.uniform(0, LATE_S)
            life._loop.create_task(self._write_late(granted, until_s))
            return False
        if self._fate == "late":
            await asyncio.sleep(luck.uniform(0.5, 2) * RESERVATION_S)
        for _, place, block in granted:
            ctypes.memmove(place, block, len(block))
        return True

    async def _write_late(self, granted: list[tuple[int, int, bytes]], until_s: float) -> None:
        """Copies of who is gone: nobody may take what they leave for anything."""
        loop, luck = self._life._loop, self._life._luck
        while loop.time() < until_s:
            for _, place, block in granted:
                ctypes.memset(place + luck.randrange(len(block)), 0xEE, 1)
            await asyncio.sleep(0.02)

    async def read(self) -> None:
        """Whoever decodes has it, perhaps on its GPU."""
        life, decoder = self._life, self._decoder
        if not decoder.lives:
            return
        if self._fate == "reading":
            life._loop.call_later(life._luck.expovariate(1 / 0.05), decoder.die)
        await life._get(decoder, self._layout, self._keys)
        if decoder.lives and life._luck.random() < 0.7:
            decoder.die()

    def _end(self, when: str) -> None:
        if self._fate == when:
            self._life.seen[f"decoder_died_{when}"] += 1
            self._decoder.die()
