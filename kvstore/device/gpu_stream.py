"""A stream of copies: two of the GPU's, and the steps that are in them.

One copies over the link to the host, the other gathers and scatters within the GPU's memory.
Copies go in *steps* (`gpu_steps`), so that checksums of one step are taken while the next is
copied. Staging memory is bounded: `Tuning.steps_ahead` steps a stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from kvstore.device.base import Blocks, Copies, Event
from kvstore.device.gpu_staging import Staging
from kvstore.device.gpu_steps import GpuBlocks, Step, StepOverLink, StepWithin
from kvstore.errors import DeviceError, DeviceLost, DeviceStuck

if TYPE_CHECKING:
    from kvstore.device.gpu import GpuDevice


class Recorded(NamedTuple):
    """An event of the driver's, or why there is none."""

    event: Any
    error: DeviceError | None = None


class GpuStream:
    def __init__(self, device: GpuDevice) -> None:
        self.device = device
        self.driver = device.driver
        tuning = device.tuning
        self._idle = [Staging(self.driver, tuning.step_bytes) for _ in range(tuning.steps_ahead)]
        self._staged: deque[Step] = deque()
        self._stuck: DeviceStuck | None = None

    # Made when first used, which is where a GPU that fails may be told of.

    @cached_property
    def link(self) -> Any:
        return self.driver.new_stream()

    @cached_property
    def gathering(self) -> Any:
        return self.driver.new_stream()

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Recorded)
        if event.error is not None:
            raise event.error
        self.driver.wait(self.link, event.event)
        self.driver.wait(self.gathering, event.event)

    def load(self, blocks: Blocks, block_ids: Sequence[int], slots: Sequence[memoryview]) -> Copies:
        return self._over_link(blocks, block_ids, slots, save=False)

    def save(self, blocks: Blocks, block_ids: Sequence[int], slots: Sequence[memoryview]) -> Copies:
        return self._over_link(blocks, block_ids, slots, save=True)

    def load_within(
        self, blocks: Blocks, block_ids: Sequence[int], addresses: Sequence[int]
    ) -> Copies:
        return self._within(blocks, block_ids, addresses, save=False)

    def save_within(
        self, blocks: Blocks, block_ids: Sequence[int], addresses: Sequence[int]
    ) -> Copies:
        return self._within(blocks, block_ids, addresses, save=True)

    def _within(
        self, blocks: Blocks, block_ids: Sequence[int], addresses: Sequence[int], *, save: bool
    ) -> Copies:
        assert isinstance(blocks, GpuBlocks)
        if not blocks.within:
            raise DeviceError("this GPU has no kernel for coded blocks")
        return _GpuCopies(self, [StepWithin(self, blocks, block_ids, addresses, save=save)])

    def _over_link(
        self, blocks: Blocks, block_ids: Sequence[int], slots: Sequence[memoryview], *, save: bool
    ) -> Copies:
        assert isinstance(blocks, GpuBlocks)
        size = max(1, self.device.tuning.step_bytes // blocks.raw_bytes)
        parts = [slice(start, start + size) for start in range(0, len(block_ids), size)]
        steps = [StepOverLink(self, blocks, block_ids[p], slots[p], save=save) for p in parts]
        return _GpuCopies(self, steps)

    def wait_out(self) -> None:
        """Wait for all that is under way, whatever has failed of it. Raises `DeviceStuck`; the
        stream copies nothing more then, for what it used may be in use."""
        # What was never used was never made.
        made = [vars(self)[name] for name in ("link", "gathering") if name in vars(self)]
        for stream in made:
            try:
                self.driver.drain(stream)
            except DeviceLost:
                # It copies nothing any more.
                continue
            except DeviceError as error:
                self._stuck = DeviceStuck(f"copies cannot be waited for: {error}")
        self.check()

    def check(self) -> None:
        if self._stuck is not None:
            raise self._stuck

    def close(self) -> None:
        idle, self._idle = self._idle, []
        for staging in idle:
            staging.free()
        if self._stuck is None:
            self.device.open_streams.discard(self)

    @property
    def has_room(self) -> bool:
        return bool(self._idle)

    def take_staging(self, step: Step) -> Staging:
        """Waits for the oldest step that has some where there is none to spare."""
        while not self._idle:
            self._staged[0].finish()
        self._staged.append(step)
        return self._idle.pop()

    def give_back(self, step: Step, staging: Staging) -> None:
        self._staged.remove(step)
        self._idle.append(staging)


class _GpuCopies:
    """Steps that were started, and those that have yet to be, for want of staging."""

    def __init__(self, stream: GpuStream, steps: Iterable[Step]) -> None:
        self._stream = stream
        self._to_start = deque(steps)
        self._started: deque[Step] = deque()
        stream.check()
        try:
            self._start()
        except BaseException:
            self._abandon()
            raise

    def finish(self) -> list[int]:
        sums: list[int] = []
        try:
            while self._started or self._to_start:
                if not self._started:
                    self._start_next()
                step = self._started[0]
                step.finish()
                self._started.popleft()
                self._start()
                sums += self._stream.device.checksums(step.slots)
        except BaseException:
            self._abandon()
            raise
        return sums

    def _start(self) -> None:
        """All that can be without waiting."""
        while self._to_start and (self._stream.has_room or self._to_start[0].direct):
            self._start_next()

    def _start_next(self) -> None:
        self._stream.check()
        # Among the started first: what fails half way is under way too.
        step = self._to_start.popleft()
        self._started.append(step)
        step.start()

    def _abandon(self) -> None:
        self._to_start.clear()
        self._stream.wait_out()
        while self._started:
            self._started.popleft().forget()
