"""`kvstore demo --pd`: one vLLM computes prompts, another one answers them.

Three tables: that the answers are those of one plain vLLM; how long the hand-over of a
prompt takes, beyond computing it; and what clients meet under load, behind vllm-router,
beside one vLLM that has both cores for itself.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kvstore.errors import ConfigError
from kvstore_benchmarks.end_to_end.model import BLOCK_TOKENS, SHAPE, prompt
from kvstore_benchmarks.end_to_end.rounds import COPY_PIECE_BYTES
from kvstore_benchmarks.end_to_end.watch import Watch
from kvstore_benchmarks.figures import finite, machine, median, ratio, seconds_text
from kvstore_benchmarks.local.baselines import aligned_blocks, memcpy_seconds
from kvstore_benchmarks.progress import Progress, progress
from kvstore_benchmarks.server import Server
from kvstore_benchmarks.serving import sides
from kvstore_benchmarks.serving.handover import first_token, hand_over
from kvstore_benchmarks.serving.instance import Instance, Shape, completion
from kvstore_benchmarks.serving.load import Harness, Met
from kvstore_benchmarks.serving.model import served_model
from kvstore_benchmarks.serving.router import Router

DRAM = "2GiB"
NVME = "2GiB"
CACHE_BLOCKS = 768
PREFILL_CORES, DECODE_CORES, ALL_CORES = "0", "1", "0-1"

ANSWERS = 3
COPIES = 3
"""Plain copies, and own prefix hits, that a hand-over is set beside; their medians."""
ANSWER_PROMPT = 1024
LOGPROBS = 5

AIM = 1.3
"""Of the hand-over, at most, as a multiple of a plain copy of its bytes."""

LOAD_PROMPT, LOAD_ANSWER, LOAD_REQUESTS, LOAD_RATE = 768, 48, 10, 0.8
LOAD_ROUNDS = 3
APART, MIXED = "prefill and decode", "one vLLM"

LOAD_FIGURES: dict[str, Callable[[Met], float]] = {
    "first token, p50": lambda met: met.first_token(),
    "first token, p99": lambda met: met.first_token(99),
    "between tokens, p50": lambda met: met.between_tokens(),
    "between tokens, p99": lambda met: met.between_tokens(99),
    "answered tokens/s": lambda met: met.tokens_per_s,
}

WARM_UP = 1 << 21
"""Numbers of prompts from here on are not measured."""


@dataclass(frozen=True, slots=True)
class Options:
    """`tokens`: of the prompts handed over, `rounds` of them."""

    router: Path
    folder: Path | None = None
    tokens: int = 8192
    rounds: int = 3


@dataclass(frozen=True, slots=True)
class Fleet:
    """`mixed`: a plain vLLM with both cores; `router` is in front of the other two."""

    prefill: Instance
    decode: Instance
    mixed: Instance
    router: Router


def run(options: Options, *, as_object: bool) -> int:
    """Print the tables; 1 where an answer is wrong or was not handed over.

    Raises `ConfigError` on a machine that cannot show it.
    """
    if not {0, 1} <= os.sched_getaffinity(0):
        raise ConfigError("prefill and decode each need a core: this may not run on cores 0 and 1")
    with progress() as step:
        figures = measure(options, step)
    if as_object:
        print(json.dumps(figures, indent=2))
    else:
        show(figures, Console())
    wrong = faults(figures)
    for line in wrong:
        Console(stderr=True).print(f"[red]{line}[/red]")
    return 1 if wrong else 0


def measure(options: Options, step: Progress) -> dict[str, Any]:
    step("building the model")
    model = served_model(options.folder)
    context = max(options.tokens, LOAD_PROMPT) + LOAD_ANSWER + BLOCK_TOKENS
    with ExitStack() as stack:
        server = stack.enter_context(Server(dram=DRAM, nvme=NVME, folder=options.folder))

        def start(name: str, cores: str, role: str | None) -> Instance:
            shape = Shape(cores, context, CACHE_BLOCKS, role or "")
            store = server.endpoint if role else None
            return stack.enter_context(Instance(name, model, shape, store))

        step("starting vLLM three times: prefill, decode, and one that does both")
        prefill = start("prefill", PREFILL_CORES, "kv_producer")
        decode = start("decode", DECODE_CORES, "kv_consumer")
        mixed = start("mixed", ALL_CORES, None)
        harness = stack.enter_context(Harness(model))
        for one in (prefill, decode, mixed):
            one.wait_ready()
        router = stack.enter_context(Router(options.router, prefill, decode)).wait_ready()
        harness.wait_ready()
        fleet = Fleet(prefill, decode, mixed, router)
        watch = stack.enter_context(Watch(server.endpoint))
        return figures_of(fleet, harness, watch, options, step)


def figures_of(
    fleet: Fleet, harness: Harness, watch: Watch, options: Options, step: Progress
) -> dict[str, Any]:
    figures: dict[str, Any] = {**machine(), "kv_bytes_a_token": SHAPE.kv_bytes_a_token}
    step("a prompt through each, not measured")
    first_token(fleet.mixed, prompt(WARM_UP, 2 * BLOCK_TOKENS))
    first_token(fleet.router, prompt(WARM_UP + 1, 2 * BLOCK_TOKENS))
    step(f"{ANSWERS} prompts of {ANSWER_PROMPT} tokens, behind the router and by one vLLM")
    figures["answers"] = [_answers(fleet, number) for number in range(ANSWERS)]
    # It also touches the memory that a hand-over goes through.
    figures["load"] = _loads(fleet, harness, step)
    figures["handover"] = _handovers(fleet, watch, options, step)
    return figures


def _answers(fleet: Fleet, number: int) -> dict[str, Any]:
    """The reference is what the prefill vLLM itself answers, by its own prefix hit."""
    tokens = prompt(number, ANSWER_PROMPT)
    body = completion(tokens, 4, logprobs=LOGPROBS)
    handed = fleet.router.post("/v1/completions", body)
    own = fleet.prefill.post("/v1/completions", body)
    return {"logprobs_difference": finite(difference(handed, own), 6)}


def difference(left: Any, right: Any) -> float:
    """The largest of a log-probability; infinite where the likeliest tokens are others."""
    ours, theirs = (each["choices"][0]["logprobs"]["top_logprobs"] for each in (left, right))
    if len(ours) != len(theirs) or not ours:
        return math.inf
    largest = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one.keys() != other.keys():
            return math.inf
        largest = max(largest, *(abs(one[token] - other[token]) for token in one))
    return largest


def _handovers(fleet: Fleet, watch: Watch, options: Options, step: Progress) -> dict[str, Any]:
    blocks = (options.tokens - 1) // BLOCK_TOKENS
    nbytes = blocks * BLOCK_TOKENS * SHAPE.kv_bytes_a_token
    pieces = nbytes // COPY_PIECE_BYTES
    sources, targets = (aligned_blocks(pieces, COPY_PIECE_BYTES) for _ in range(2))
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        step(f"hand-over of {options.tokens} tokens, {number + 1} of {options.rounds}")
        tokens = prompt(WARM_UP - 1 - number, options.tokens)
        before = sides.sources(fleet.decode.get("/metrics"))
        watch.mark()
        handed = hand_over(fleet.router, fleet.prefill, tokens)
        loaded = sides.sources(fleet.decode.get("/metrics")).since(before)
        own_s = median([first_token(fleet.decode, tokens) for _ in range(COPIES)])
        copy_s = median([memcpy_seconds(targets, sources) for _ in range(COPIES)])
        extra_s = handed.decode_s - own_s
        rounds.append(
            {
                "prefill_s": finite(handed.prefill_s),
                "decode_first_token_s": finite(handed.decode_s),
                "own_hit_first_token_s": finite(own_s),
                "handover_s": finite(extra_s),
                "copy_s": finite(copy_s),
                "to_copy": finite(ratio(extra_s, copy_s)),
                "loaded_tokens": int(loaded.host + loaded.disk),
                "handed_out_tokens": sum(watch.hits()) * BLOCK_TOKENS,
            }
        )
    return {"tokens": options.tokens, "bytes": nbytes, "most": AIM, "rounds": rounds}


def _loads(fleet: Fleet, harness: Harness, step: Progress) -> dict[str, Any]:
    """Both take turns at the same requests, and begin in turns."""
    met: dict[str, list[Met]] = {APART: [], MIXED: []}
    for number in range(LOAD_ROUNDS):
        step(f"{LOAD_REQUESTS} requests, {LOAD_RATE} a second, {number + 1} of {LOAD_ROUNDS}")
        turns = [(APART, fleet.router), (MIXED, fleet.mixed)]
        for name, server in turns if number % 2 == 0 else reversed(turns):
            met[name].append(harness.run(server.port, _load_arguments(number)))
    return {
        "rounds": LOAD_ROUNDS,
        "requests": LOAD_REQUESTS,
        "failed": {name: sum(one.failed for one in turns) for name, turns in met.items()},
        "measures": {
            name: _compared([take(one) for one in met[APART]], [take(one) for one in met[MIXED]])
            for name, take in LOAD_FIGURES.items()
        },
    }


def _load_arguments(number: int) -> list[str]:
    return [
        *("--dataset-name", "random", "--seed", str(77 + number)),
        *("--num-prompts", str(LOAD_REQUESTS), "--request-rate", str(LOAD_RATE)),
        *("--random-input-len", str(LOAD_PROMPT), "--random-output-len", str(LOAD_ANSWER)),
    ]


def _compared(apart: list[float], mixed: list[float]) -> dict[str, Any]:
    """Medians over the rounds, and of the ratios within a round."""
    ratios = [ratio(one, other) for one, other in zip(apart, mixed, strict=True)]
    return {
        APART: finite(median(apart)),
        MIXED: finite(median(mixed)),
        "ratio": finite(median(ratios)),
        "ratios": [finite(one) for one in ratios],
    }


def faults(figures: dict[str, Any]) -> list[str]:
    """What makes the figures worthless; nothing about how fast they are."""
    found = []
    for one in figures["answers"]:
        if one["logprobs_difference"] != 0:
            found.append(f"log-probabilities differ by {one['logprobs_difference']}")
    expected = (figures["handover"]["tokens"] - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    for one in figures["handover"]["rounds"]:
        for said_by, tokens in (("vLLM", "loaded_tokens"), ("the store", "handed_out_tokens")):
            if one[tokens] != expected:
                found.append(f"{one[tokens]} of {expected} tokens were handed over, says {said_by}")
    for name, failed in figures["load"]["failed"].items():
        if failed:
            found.append(f"{name}: {failed} requests failed")
    return found


def show(figures: dict[str, Any], console: Console) -> None:
    console.print(_handover_table(figures["handover"]))
    console.print(_load_table(figures["load"]))
    differences = [one["logprobs_difference"] for one in figures["answers"]]
    equal = all(one == 0 for one in differences)
    console.print(
        f"{len(differences)} answers behind the router have"
        f" {'exactly' if equal else '[red]NOT[/red]'} the log-probabilities of plain vLLM."
    )


def _handover_table(handover: dict[str, Any]) -> Table:
    rounds = handover["rounds"]
    megabytes = handover["bytes"] / 1e6
    table = Table(
        title=f"Hand-over of {handover['tokens']} tokens, {megabytes:.0f} MB;"
        f" medians of {len(rounds)}",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("prefill", "then first token", "by its own hit", "hand-over", "plain copy"):
        table.add_column(heading, justify="right")
    table.add_column(f"ratio, aim {handover['most']:g}x", justify="right")
    names = ("prefill_s", "decode_first_token_s", "own_hit_first_token_s", "handover_s", "copy_s")
    cells = [seconds_text(median([one[name] for one in rounds])) for name in names]
    table.add_row(*cells, f"{median([one['to_copy'] for one in rounds]):.2f}x")
    return table


def _load_table(load: dict[str, Any]) -> Table:
    title = (
        f"{LOAD_REQUESTS} requests of {LOAD_PROMPT} tokens, {LOAD_RATE} a second, answered by"
        f" {LOAD_ANSWER}; medians of {load['rounds']}"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in (APART, MIXED, "ratio", "least", "most"):
        table.add_column(heading, justify="right")
    for name, taken in load["measures"].items():
        show_value = str if name.endswith("/s") else seconds_text
        ratios = [each for each in taken["ratios"] if each is not None]
        row = [show_value(taken[side] or math.nan) for side in (APART, MIXED)]
        spread = (taken["ratio"] or 0, min(ratios, default=0), max(ratios, default=0))
        table.add_row(name, *row, *(f"{each:.2f}x" for each in spread))
    return table
