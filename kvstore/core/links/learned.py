"""What things cost here, learned from those that were done.

A time is compared with a nominal one, from a table or a guess; what is learned is the
ratio: the median of the latest, for each order of magnitude of size. A median does not
move for the few that took much longer, and follows when most do: after half of what it
remembers.

Of a link two ratios are learned. *Turnaround* is from the start of a batch of copies to
its end, beside those that run at the same time. *Pace* is what the link as a whole takes
for the work that goes through it while more is waiting; where that was hardly ever so, a
batch's share of the link tells. A batch is ready once all before it has gone through at
that pace, and its own turnaround is over.

What was learned long ago goes on to count until somebody measures again, and then for
little: the next few say what holds now. So it is where a link breaks with it (`core.links.pulse`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

REMEMBERED = 63
FEW = 4
"""Fewer of a size say less than all sizes together."""
WINDOW = 8
"""Ends that a pace is measured over: copies that run at the same time end in bursts."""
STALE_NS = 5_000_000_000
UNSEEN_NS = 1_000_000_000
SAMPLED_NS = 20_000_000
"""A pace is the mean over so long, so that those remembered are of more than a moment."""
FASTER = 0.4
"""Of what was predicted: a link that takes no more, several times, is another one."""
MOST_SPEEDS = 1024
"""Layouts whose prefill is remembered."""


class Speed(NamedTuple):
    """Nominal: `latency_s` for each block, and then `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    def work_ns(self, nbytes: int) -> int:
        """What a block of so many bytes is to a link: nanoseconds, were it nominal."""
        return max(1, int((self.latency_s + nbytes / self.bytes_per_s) * 1e9))


class Prediction(NamedTuple):
    """Half of what comes is nearer to `ns` than `error_ns`, half is not."""

    ns: float
    error_ns: float


class Ratios:
    """Measured over nominal, the latest `REMEMBERED`."""

    __slots__ = ("_latest", "_sorted")

    def __init__(self) -> None:
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._latest)

    def add(self, ratio: float) -> None:
        """What cannot be (a clock that stepped) is left out."""
        if not 1e-9 < ratio < 1e9:
            return
        if len(self._latest) == REMEMBERED:
            oldest = self._latest.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]
        self._latest.append(ratio)
        insort(self._sorted, ratio)

    def again(self, ratio: float) -> None:
        """As much as a few would say: what is measured now soon counts for more."""
        for _ in range(FEW):
            self.add(ratio)

    def fade(self) -> None:
        """What was measured so far counts for no more than one."""
        if self._sorted:
            median = self.median
            self._latest.clear()
            self._sorted.clear()
            self.add(median)

    @property
    def median(self) -> float:
        return self._sorted[len(self._sorted) // 2] if self._sorted else 1.0

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        last = len(self._sorted) - 1
        if last + 1 < FEW:
            return 0.5 * self.median
        return (self._sorted[3 * last // 4] - self._sorted[last // 4]) / 2


class LinkCost:
    """What one direction of a link costs. Times are the caller's."""

    def __init__(self, nominal: Speed) -> None:
        self.nominal = nominal
        self.predicted_ns = self.actual_ns = self.error_ns = 0.0
        """Of all batches noted: sums of what was said, what was, and by how much the two
        differed."""
        self.fades = 0
        """Times that what was learned was found not to hold any more."""
        self._noted_ns: int | None = None
        self._faster = 0
        self._any = Ratios()
        self._by_size: dict[int, Ratios] = {}
        self._pace = Ratios()
        self._latest = 0.0
        # What the next sample of it is made of.
        self._work_ns = self._taken_ns = 0

    def stale(self, now_ns: int) -> bool:
        """Nothing was measured for so long that what was learned may not hold any more."""
        return self._noted_ns is None or now_ns - self._noted_ns >= STALE_NS

    def unseen(self, now_ns: int) -> bool:
        """Nothing was measured for some time."""
        return self._noted_ns is None or now_ns - self._noted_ns >= UNSEEN_NS

    def turnaround(self, work_ns: int) -> Prediction:
        """From a batch's start to its end."""
        ratios = self._by_size.get(_size(work_ns), self._any)
        if len(ratios) < FEW:
            ratios = self._any
        return Prediction(ratios.median * work_ns, ratios.spread * work_ns)

    def passing(self, work_ns: int) -> Prediction:
        """Until so much work has gone through, one thing after the other. Where that is
        slower at this moment than it mostly is, it may go on to be."""
        error = max(self._pace.spread, self._latest - self._pace.median)
        return Prediction(self._pace.median * work_ns, error * work_ns)

    def note(
        self,
        work_ns: int,
        taken_ns: int,
        said_ns: float,
        now_ns: int,
        beside: int = 1,
        *,
        full: bool = False,
    ) -> None:
        """A batch has ended well, for which `said_ns` was predicted. `beside`: batches that
        ran at the same time, it among them; `full`: as many as can, and no more waited, so
        that its share is all that tells the pace."""
        if taken_ns <= 0:
            return
        self._faster = self._faster + 1 if taken_ns <= FASTER * said_ns else 0
        if self.stale(now_ns) or self._faster >= FEW:
            self.fade()
        self._noted_ns = now_ns
        self.predicted_ns += said_ns
        self.actual_ns += taken_ns
        self.error_ns += abs(said_ns - taken_ns)
        self._any.add(taken_ns / work_ns)
        self._by_size.setdefault(_size(work_ns), Ratios()).add(taken_ns / work_ns)
        if full or len(self._pace) < FEW:
            self._pace.add(taken_ns / work_ns / beside)
            self._latest = taken_ns / work_ns / beside

    def fade(self) -> None:
        """What was learned counts for little from now on."""
        self.fades += 1
        self._faster = 0
        self._work_ns = self._taken_ns = 0
        self._latest = 0.0
        for ratios in (self._any, self._pace, *self._by_size.values()):
            ratios.fade()

    def note_pace(self, work_ns: int, taken_ns: int) -> None:
        """So much went through in so long, while more was waiting."""
        if taken_ns <= 0:
            return
        self._latest = taken_ns / work_ns
        self._work_ns += work_ns
        self._taken_ns += taken_ns
        if self._taken_ns >= SAMPLED_NS:
            self._pace.add(self._taken_ns / self._work_ns)
            self._work_ns = self._taken_ns = 0

    def state(self) -> dict[str, float]:
        """What outlives a restart."""
        state = {str(size): r.median for size, r in self._by_size.items() if len(r)}
        if len(self._pace):
            state["pace"] = self._pace.median
        return state

    def restore(self, state: Mapping[str, object]) -> None:
        """What is not of a state is ignored."""
        for name, ratio in state.items():
            if not isinstance(ratio, float):
                continue
            if name == "pace":
                self._pace.again(ratio)
            elif name.isdecimal() and len(name) < 4:
                self._any.again(ratio)
                self._by_size.setdefault(int(name), Ratios()).again(ratio)


def _size(work_ns: int) -> int:
    return work_ns.bit_length() // 2


class PrefillSpeeds:
    """Tokens a second that engines compute, by layout, as they tell."""

    def __init__(self) -> None:
        self._told: dict[str, Ratios] = {}

    def note(self, layout_id: bytes, tokens_per_s: float) -> None:
        name = layout_id.hex()
        if name not in self._told and len(self._told) >= MOST_SPEEDS:
            del self._told[next(iter(self._told))]
        self._told.setdefault(name, Ratios()).add(tokens_per_s)

    def tokens_per_s(self, layout_id: bytes) -> float:
        """0.0: nobody has told."""
        told = self._told.get(layout_id.hex())
        return told.median if told else 0.0

    def state(self) -> dict[str, float]:
        return {name: told.median for name, told in self._told.items()}

    def restore(self, state: Mapping[str, object]) -> None:
        for name, speed in list(state.items())[:MOST_SPEEDS]:
            if isinstance(speed, float):
                self._told.setdefault(name, Ratios()).again(speed)
