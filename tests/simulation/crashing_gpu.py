"""A GPU of a machine that crashes: others take its memory and leave it, it is slow, fails, gets
stuck or is lost, and what is read straight into it fails, or arrives damaged, now and then.

Copies take time, and half of each is there before the other. Memory that was given back holds
what others write there.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from kvstore.core.places.mirrors import Mirrors, MirrorWork
from kvstore.core.places.shares import Mirror
from kvstore.device import waits
from kvstore.device.vram import Made, Straight, StraightFile
from kvstore.device.vram_stand_in import PREFIX, StandInVram
from kvstore.errors import DeviceError, DeviceLost, DeviceStuck
from kvstore.store import Store
from kvstore.types import Tier
from tests.simulation.virtual import NoExecutor, TurnCondition, pause

SLOW_S = 0.003
"""What a copy within the GPU takes, a few times over."""

FAILS = {
    "fill": 0.03, "deliver": 0.004, "write_now": 0.02, "free_bytes": 0.02, "make": 0.1,
    "finish": 0.02,
}  # fmt: skip
SPOILS = 0.02
HANGS = {"fill": 0.02, "deliver": 0.003, "write_now": 0.02, "close": 0.02, "finish": 0.005}
HANGS_S = 1.5


def is_slow(executor: object, work: Callable[..., Any]) -> bool:
    """Work of the store's on a GPU, which may pause. Not one that only asks how much is free."""
    part = work.args[0] if isinstance(work, partial) and work.args else None
    if isinstance(executor, NoExecutor):
        return isinstance(part, list) and any(copy.target.tier is Tier.VRAM for copy in part)
    of_gpu = getattr(executor, "_thread_name_prefix", "") != "kvstore-memory"
    return of_gpu and (not isinstance(part, MirrorWork) or bool(part))


class CrashingGpu(StandInVram):
    """Of one run of the server, whose thread it is asked from takes turns (`virtual`)."""

    def __init__(
        self,
        path: Path,
        rng: random.Random,
        nbytes: int,
        now_s: Callable[[], float],
        seen: Counter[str],
    ) -> None:
        path.touch()
        super().__init__(f"{PREFIX}{path}")
        self.wrong: list[str] = []
        """What it was made to do and must not be."""
        self.lost = False
        self.well = False
        """From now on nothing fails."""
        self._nbytes = nbytes
        self._taken = 0
        self._rng = rng
        self._now_s = now_s
        self.seen = seen
        self._started: list[tuple[_Slow, int, memoryview]] = []

    @property
    def made_bytes(self) -> int:
        return self._made_bytes

    @property
    def slots_bytes(self) -> int:
        return self._slots_bytes

    def belongs_to(self, store: Store) -> None:
        for gpu in store._gpus._gpus:
            if gpu._arena.vram is self:
                gpu._arena._changed = TurnCondition()  # type: ignore[assignment]
                self._count_what_goes(gpu.mirrors)

    def _count_what_goes(self, mirrors: Mirrors) -> None:
        """With extents that others need."""
        seen, close = self.seen, mirrors._close

        def counted(extent: int) -> None:
            coming = {*mirrors.straight.coming()}
            granted = {*mirrors.landings.coming()}
            for mirror in mirrors.space.residents_of(extent):
                assert isinstance(mirror, Mirror)
                seen["taken_under_lease"] += bool(mirror.pins or mirror.source.pins)
                seen["taken_under_straight_read"] += mirror in coming
                seen["taken_under_landing"] += mirror in granted
            close(extent)

        mirrors._close = counted  # type: ignore[method-assign]

    # What others do to it

    def whim(self) -> float:
        """For so many seconds it is now like this."""
        rng = self._rng
        self._taken = 0
        fate = rng.random()
        if fate < 0.25:
            return self.squeeze()
        if fate < 0.26:
            self.lost = True
            self.seen["gpus_lost"] += 1
        elif self.lost:
            # It is back. Nobody is to use it for that.
            self.lost = False
        return rng.expovariate(1 / 2.0)

    def squeeze(self) -> float:
        """Others take of what is held, some or all, for so many seconds."""
        rng, held = self._rng, self._made_bytes
        self._taken = rng.choice([self._nbytes, rng.randint(self._nbytes - held, self._nbytes)])
        return rng.expovariate(1 / 0.3)

    def recover(self) -> None:
        """Nobody does anything to it any more."""
        self._taken, self.well = 0, True

    # As the stand-in, which asks what it is like

    def ask(self, call: str) -> dict[str, Any]:
        if self.lost:
            raise DeviceLost("the GPU is lost")
        refuses = ()
        if not self.well and self._rng.random() < FAILS.get(call, 0):
            if call == "free_bytes":
                raise DeviceError("the GPU does not tell")
            refuses = (call,)
        return {"bytes": self._nbytes, "taken": self._taken, "refuses": refuses}

    def ask_unless_refused(self, call: str) -> dict[str, Any]:
        rng = self._rng
        pause(rng.expovariate(1 / SLOW_S))
        self._may_hang(call)
        says = self.ask(call)
        if call in says["refuses"]:
            self.seen[f"failed_in_{call}"] += 1
            raise DeviceError(f"the GPU refuses {call}")
        if call == "fill" and not self.well and rng.random() < SPOILS:
            self.seen["arrived_damaged"] += 1
            says["spoils"] = ("fill",)
        return says

    def _may_hang(self, call: str) -> None:
        """A drive may take as long as it likes; for the GPU nobody waits for so long."""
        if self.well or self._rng.random() >= HANGS.get(call, 0):
            return
        self.seen[f"hung_in_{call}"] += 1
        seconds = self._rng.expovariate(1 / HANGS_S)
        if call == "fill" or seconds < waits.PATIENCE_S:
            pause(seconds)
            return
        pause(waits.PATIENCE_S)
        self.seen["gpus_stuck"] += 1
        raise DeviceStuck(f"{call} has not ended")

    def make(self, nbytes: int) -> Made:  # type: ignore[override]
        return _Slow(self, super().make(nbytes), nbytes)

    def start(self, to: _Slow, offset: int, data: memoryview) -> None:
        self.ask("write")
        to.writers += 1
        self._started.append((to, offset, data))

    def finish(self) -> None:
        """Where it fails, some of what was started was not copied, and nobody knows what."""
        started, self._started = self._started, []
        fails = not self.well and self._rng.random() < FAILS["finish"]
        for to, offset, data in started:
            try:
                if not self.lost and not (fails and self._rng.random() < 0.5):
                    to.put(offset, data)
            finally:
                to.writers -= 1
        self.ask("finish")
        self._may_hang("finish")
        if fails:
            self.seen["failed_in_finish"] += 1
            raise DeviceError("the GPU refuses finish")

    def straight(self, slots: int, slot_bytes: int) -> Straight:  # type: ignore[override]
        watched = _Watched(self, super().straight(slots, slot_bytes))
        self.seen["slots_taken"] += 1
        return watched

    def half_a_copy(self) -> None:
        pause(self._rng.expovariate(1 / SLOW_S))


class _Slow:
    """Memory of the stand-in that is written piece by piece, and is another's when freed."""

    def __init__(self, vram: CrashingGpu, made: Any, nbytes: int) -> None:
        self.writers = 0
        self.descriptor: int = made.descriptor
        self._vram = vram
        self._made = made
        self._nbytes = nbytes

    @property
    def address(self) -> int:
        address: int = self._made.address
        return address

    def put(self, offset: int, data: memoryview) -> None:
        memory, half = self._made._memory, data.nbytes // 2
        memory[offset : offset + half] = data[:half]
        self._vram.half_a_copy()
        memory[offset + half : offset + data.nbytes] = data[half:]

    def write(self, offset: int, data: memoryview) -> None:
        self._vram.start(self, offset, data)

    def write_now(self, offset: int, data: memoryview) -> None:
        self.writers += 1
        try:
            self._vram.ask_unless_refused("write_now")
            self.put(offset, data)
        finally:
            self.writers -= 1

    def free(self) -> None:
        if self._nbytes:
            if self.writers:
                self._vram.wrong.append("memory went back while it was written")
            self._made._memory[:] = b"\xdd" * self._nbytes
            self._nbytes = 0
            self._made.free()


class _Watched:
    """Slots that drives write into. Where a read has failed one may be written for ever."""

    def __init__(self, vram: CrashingGpu, straight: Straight) -> None:
        self._vram = vram
        self._straight = straight
        self._reading: set[int] = set()
        self._failed: set[int] = set()

    def fill(self, slot: int, file: StraightFile, offset: int, nbytes: int) -> int:
        if slot in self._failed:
            self._vram.wrong.append("a slot is used in which a read has failed")
        self._reading.add(slot)
        try:
            return self._straight.fill(slot, file, offset, nbytes)
        except DeviceLost:
            # Its memory is nobody's any more.
            raise
        except DeviceError:
            self._failed.add(slot)
            raise
        finally:
            self._reading.discard(slot)

    def deliver(self, slot: int, to: Made, offset: int, nbytes: int) -> None:
        self._straight.deliver(slot, to, offset, nbytes)

    def close(self) -> None:
        if self._reading or self._failed:
            self._vram.wrong.append("slots went back that a drive may be writing into")
        self._straight.close()
        self._vram.seen["slots_given_back"] += 1
