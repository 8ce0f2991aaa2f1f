"""What the connector's hooks cost the engine's thread, in microseconds a request.

A server whose connector has a clock around each hook (`timed`) gets prompts of
`TOKENS` tokens from several clients, which the store does not hold and then, with vLLM's
own cache emptied, holds. What the clocks take themselves is taken off.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from kvstore_benchmarks.closing import Closing
from kvstore_benchmarks.figures import finite, median
from kvstore_benchmarks.serving.workloads import CLIENTS

if TYPE_CHECKING:
    from kvstore_benchmarks.serving.load import Met

FILE = "KVSTORE_BENCH_HOOKS"
"""In the environment of a vLLM: the file that `timed` writes to."""

IDLE = "steps without work"
HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "get_external_cache_hit_sources",
    "build_connector_meta",
    "update_connector_output",
    "get_kv_connector_stats",
    "take_events",
    "has_pending_push_work",
    "has_pending_block_frees",
    "request_finished_all_groups",
    IDLE,
)
"""In the file two words each, nanoseconds: of the thread at work, and of the clock on the
wall, which goes on while the thread waits or another process has its core."""

EACH_STEP = frozenset(
    (
        "build_connector_meta",
        "update_connector_output",
        "get_kv_connector_stats",
        "take_events",
        "has_pending_push_work",
        "has_pending_block_frees",
    )
)
"""Those that vLLM calls whether or not the step computes something."""

TOKENS, ANSWER = 1024, 8
REQUESTS = 16
SEED = 7000
AIM_US = 50
"""All hooks together, but those of steps without work, at most."""

_FILE_BYTES = 4096


class Server(Protocol):
    @property
    def port(self) -> int: ...
    def forget(self) -> None: ...


class Load(Protocol):
    def run(self, port: int, arguments: Sequence[str]) -> Met: ...


class HookTimes(Closing):
    """A file that a vLLM writes its times to. A context manager; leaving it removes it."""

    def __init__(self) -> None:
        descriptor, self.path = tempfile.mkstemp(prefix="kvstore-hooks-")
        os.ftruncate(descriptor, _FILE_BYTES)
        os.close(descriptor)
        self._times = map_times(self.path)
        self._seen = [0] * (2 * len(HOOKS))

    def close(self) -> None:
        os.unlink(self.path)

    def take(self) -> dict[str, tuple[int, int]]:
        """Nanoseconds in each hook since the last call: at work, and on the wall."""
        now = list(self._times[: 2 * len(HOOKS)])
        taken = [late - early for late, early in zip(now, self._seen, strict=True)]
        self._seen = now
        return dict(zip(HOOKS, zip(taken[::2], taken[1::2], strict=True), strict=True))

    def take_for(self, requests: int) -> dict[str, tuple[float, float]]:
        """The same, microseconds for each of so many requests."""
        thousands = 1e3 * max(1, requests)
        return {
            name: (busy / thousands, wall / thousands) for name, (busy, wall) in self.take().items()
        }


def map_times(path: str) -> memoryview:
    """The file's words."""
    with open(path, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), _FILE_BYTES)).cast("Q")


def measure(server: Server, load: Load, times: HookTimes, rounds: int) -> dict[str, Any]:
    """Microseconds a request by hook, medians over the rounds."""
    taken: dict[str, list[dict[str, tuple[float, float]]]] = {"miss": [], "hit": []}
    for number in range(-1, rounds):
        requests = REQUESTS if number >= 0 else CLIENTS
        # The first time the store holds nothing of the prompts, the second time all.
        for samples in taken.values():
            server.forget()
            times.take()
            met = load.run(server.port, _arguments(number, requests))
            if number >= 0:
                samples.append(times.take_for(met.requests))
    return {
        "tokens": TOKENS,
        "requests": REQUESTS,
        "rounds": rounds,
        "most_us": AIM_US,
        **{kind: median_of(samples) for kind, samples in taken.items()},
    }


def _arguments(number: int, requests: int) -> list[str]:
    return [
        *("--dataset-name", "random", "--seed", str(SEED + number)),
        *("--num-prompts", str(requests), "--request-id-prefix", f"hooks-{number}-"),
        *("--random-input-len", str(TOKENS), "--random-output-len", str(ANSWER)),
        *("--max-concurrency", str(CLIENTS)),
    ]


def median_of(samples: Sequence[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """Of the thread at work, `wall_us` apart. Totals are without the steps that compute
    nothing."""

    def total(one: dict[str, tuple[float, float]], clock: int) -> float:
        return sum(us[clock] for name, us in one.items() if name != IDLE)

    return {
        "total_us": finite(median([total(one, 0) for one in samples]), 1),
        "wall_us": finite(median([total(one, 1) for one in samples]), 1),
        "hooks_us": {name: finite(median([one[name][0] for one in samples]), 1) for name in HOOKS},
    }
