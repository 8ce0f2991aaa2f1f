"""What the clients ask: arguments of `vllm bench serve`, the same for both sides.

Every round draws other prompts, or else the second round would find those of the first in
the store. Within a round both sides get the same.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

CLIENTS = 4
TRACE_BLOCK = 512
"""Tokens that an id of the trace stands for."""

TRACE_SHRINK = 16
"""A prompt of the trace is asked with a sixteenth of its tokens, block by block; with no
more than `TRACE_PROMPT`, and answered by no more than `TRACE_ANSWER`."""

TRACE_ANSWER = 16
TRACE_PROMPT = 2048
TRACE_LINES = 2000
TRACE_GAP_MS = 1000


@dataclass(frozen=True, slots=True)
class Workload:
    """`arguments(number)`: of round `number`."""

    name: str
    text: str
    arguments: Callable[[int], list[str]]


def workloads(trace: Path | None, scratch: Path, *, quick: bool) -> list[Workload]:
    """`trace`: one in Mooncake's format, or None to leave the replay out. `scratch`: a
    folder for slices of it."""
    several = [no_hits(6 if quick else 16), repeated(8 if quick else 32, 4 if quick else 16)]
    if trace is not None:
        several.append(replayed(trace, 6 if quick else 32, scratch))
    return several


def no_hits(requests: int) -> Workload:
    def arguments(number: int) -> list[str]:
        return [
            *_of("random", number, requests),
            *("--random-input-len", "512", "--random-output-len", "32"),
            *("--max-concurrency", str(CLIENTS)),
        ]

    return Workload("no hits", f"{requests} random prompts of 512 tokens", arguments)


def repeated(requests: int, prefixes: int) -> Workload:
    def arguments(number: int) -> list[str]:
        return [
            *_of("prefix_repetition", number, requests),
            *("--prefix-repetition-prefix-len", "768", "--prefix-repetition-suffix-len", "64"),
            *("--prefix-repetition-num-prefixes", str(prefixes)),
            *("--prefix-repetition-output-len", "16", "--max-concurrency", str(CLIENTS)),
        ]

    return Workload(
        "prefix repetition",
        f"{requests} prompts of 768 + 64 tokens with {prefixes} beginnings",
        arguments,
    )


def replayed(trace: Path, requests: int, scratch: Path) -> Workload:
    def arguments(number: int) -> list[str]:
        slice_of_round = scratch / f"trace-{number}.jsonl"
        lines = trace_slice(trace, (number + 1) * requests, requests)
        slice_of_round.write_text("".join(f"{line}\n" for line in lines))
        return [
            *_of("timed_trace", number, requests),
            *("--dataset-path", str(slice_of_round)),
            *("--timed-trace-chunk-hash-size", str(TRACE_BLOCK // TRACE_SHRINK)),
            *("--timed-trace-sec-multiplier", "0.001"),
        ]

    return Workload(
        "trace",
        f"{requests} requests of {trace.name.partition('.')[0]}, tokens by {TRACE_SHRINK}",
        arguments,
    )


def trace_slice(trace: Path, start: int, count: int) -> Iterator[str]:
    """Requests of conversations with several turns among the first `TRACE_LINES`, one
    conversation after the other being taken and all then in the order of the trace, with
    shorter prompts and answers, the clock starting at 0 and waiting `TRACE_GAP_MS` at
    most. Few other requests share more than a preamble."""
    with lzma.open(trace, "rt") if trace.suffix == ".xz" else trace.open() as file:
        requests = [json.loads(line) for line in islice(file, TRACE_LINES)]
    conversations: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for request in requests:
        conversations.setdefault(_conversation(request), []).append(request)
    wanted = [each for turns in conversations.values() if len(turns) > 1 for each in turns]
    clock, last = 0, None
    for request in sorted(wanted[start : start + count], key=lambda each: int(each["timestamp"])):
        tokens = request["input_length"] // TRACE_SHRINK
        now = request["timestamp"]
        clock += 0 if last is None else min(now - last, TRACE_GAP_MS)
        last = now
        yield json.dumps(
            {
                "timestamp": clock,
                "input_length": max(1, min(tokens, TRACE_PROMPT)),
                "output_length": min(request["output_length"], TRACE_ANSWER),
                "hash_ids": request["hash_ids"],
            }
        )


def _conversation(request: dict[str, Any]) -> tuple[int, ...]:
    """Equal for its turns; the first block is a preamble that many share."""
    return tuple(request["hash_ids"][:3])


def _of(dataset: str, number: int, requests: int) -> list[str]:
    seed = 1000 + number
    words = ["--dataset-name", dataset, "--seed", str(seed), "--num-prompts", str(requests)]
    return [*words, "--request-id-prefix", f"{dataset}-{number}-"]
