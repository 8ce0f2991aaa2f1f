"""`kvstore demo`: one model, answered from wherever its keys and values are.

First vLLM alone, cold and by its own prefix hit: the reference. Then with the
store: cold, after vLLM's own cache was emptied, after a restart of the engine, and
after a restart of the server, when only NVMe is left. Every answer's log-
probabilities must be those of the reference.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kvstore_benchmarks.end_to_end.child import Answer, EngineChild
from kvstore_benchmarks.end_to_end.compare import difference
from kvstore_benchmarks.end_to_end.model import BLOCK_TOKENS, SHAPE, build, prompt
from kvstore_benchmarks.end_to_end.watch import SETTLE_TIMEOUT_S, NotInTime, Watch
from kvstore_benchmarks.figures import finite, median, ratio, seconds_text
from kvstore_benchmarks.server import Server

DRAM = "512MiB"
NVME = "1GiB"
PROMPTS = 3
PROMPT_TOKENS = 2048
CONTEXT = PROMPT_TOKENS + 64
TRIES = 5
WARM_UP = 1000
"""Number of the first prompt that is not measured."""

BLOCKS_A_PROMPT = PROMPT_TOKENS // BLOCK_TOKENS

REFERENCE_ROWS = 2
"""vLLM alone, cold and by its own prefix hit: what the others are compared with."""

Answers = list[Answer]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: medians over the prompts."""

    name: str
    first_token_s: float
    cached_tokens: tuple[int, ...]
    """Of each prompt, as the next."""
    tier: str
    expected_tier: str
    logprob_differences: tuple[float, ...]

    @property
    def logprob_difference(self) -> float:
        return max(self.logprob_differences)

    @property
    def wrong(self) -> str:
        """What is not as promised; empty when all is well."""
        if self.tier != self.expected_tier:
            return f"{self.name}: served from {self.tier}, not from {self.expected_tier}"
        if self.logprob_difference > 0:
            return (
                f"{self.name}: log-probabilities differ from those without the store, by"
                f" {', '.join(f'{one:.3g}' for one in self.logprob_differences)}"
                f" with {', '.join(map(str, self.cached_tokens))} tokens cached"
            )
        return ""


def run(folder: Path | None, *, as_object: bool) -> int:
    """Print the table; 1 when an answer is wrong or came from elsewhere."""
    console = Console(stderr=True)
    started = time.monotonic()

    def say(step: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:5.0f} s[/dim]  {step}", highlight=False)

    rows = _rows(folder, say)
    wrong = [row.wrong for row in rows if row.wrong]
    if as_object:
        print(json.dumps(_as_json(rows, wrong), indent=2))
    else:
        Console().print(_table(rows))
    for line in wrong:
        console.print(f"[red]{line}[/red]")
    return 1 if wrong else 0


def _rows(folder: Path | None, say: Say) -> list[Row]:
    say(f"building a small Llama, {SHAPE.kv_bytes_a_token >> 10} KiB of KV a token")
    model = build(folder=folder)
    prompts = [prompt(number, PROMPT_TOKENS) for number in range(PROMPTS)]
    say("starting the store, and vLLM twice: without it and with it")
    with (
        Server(dram=DRAM, nvme=NVME, folder=folder) as server,
        _engine(model, server.endpoint) as engine,
    ):
        with EngineChild(model, context=CONTEXT) as alone:
            _warm_up(engine)
            _warm_up(alone)
            say(f"vLLM alone: {PROMPTS} prompts of {PROMPT_TOKENS} tokens, each twice")
            cold = [alone.generate(tokens) for tokens in prompts]
            own = [alone.generate(tokens) for tokens in prompts]
        stage = _Stage(server, prompts, cold, own)
        return [
            _row("alone, cold", cold, cold, "none", "none"),
            _row("alone, own cache", own, own, "vLLM", "vLLM"),
            *_one_engine(stage, engine, say),
            *_after_restarts(stage, model, say),
        ]


@dataclass(frozen=True, slots=True)
class _Stage:
    """What every run with the store needs: the prompts, and the answers to meet."""

    server: Server
    prompts: list[list[int]]
    cold: Answers
    own: Answers

    def measured_cold(self, name: str, engine: EngineChild) -> Row:
        """Each prompt is stored before the next one begins: an engine that is short of
        time gives up storing, and the runs after this one need every block."""
        answers = []
        with Watch(self.server.endpoint) as watch:
            for number, tokens in enumerate(self.prompts, start=1):
                answers.append(engine.generate(tokens))
                watch.wait_stored(number * BLOCKS_A_PROMPT, engine.idle)
            tier = watch.hits().tier
        return _row(name, answers, self.cold, tier, "none")

    def measured(self, name: str, engine: EngineChild, expected: str) -> Row:
        with Watch(self.server.endpoint) as watch:
            return self._measured(name, engine, expected, watch)

    def restarted(self, name: str, engine: EngineChild, say: Say) -> Row:
        """From NVMe alone; once more where the disk did not answer for a while."""
        for tries_left in reversed(range(TRIES)):
            self.server.restart()
            _find_again(engine)
            with Watch(self.server.endpoint) as watch:
                row = self._measured(name, engine, "NVMe", watch)
                if not (row.wrong and tries_left and watch.has_stalled()):
                    break
            say("the disk did not answer for a while: once more")
        return row

    def _measured(self, name: str, engine: EngineChild, expected: str, watch: Watch) -> Row:
        answers = [engine.generate(tokens) for tokens in self.prompts]
        return _row(name, answers, self.own, watch.hits().tier, expected)


def _one_engine(stage: _Stage, engine: EngineChild, say: Say) -> list[Row]:
    """Ends the engine."""
    with engine:
        say("vLLM with the store: the same prompts, stored while they are computed")
        cold = stage.measured_cold("store, cold", engine)
        say("once more, vLLM's own cache emptied")
        engine.reset()
        return [cold, stage.measured("store, cache emptied", engine, "DRAM")]


def _after_restarts(stage: _Stage, model: Path, say: Say) -> list[Row]:
    say("a new engine, the same store")
    with _engine(model, stage.server.endpoint) as engine:
        _warm_up(engine)
        new_engine = stage.measured("store, new engine", engine, "DRAM")
        say("a new server on the same data, under the running engine")
        return [new_engine, stage.restarted("store, new server", engine, say)]


def _engine(model: Path, endpoint: str) -> EngineChild:
    """It loads whatever there is: the demo shows where answers may come from, on a machine that
    may have anything to do beside it."""
    return EngineChild(model, context=CONTEXT, store=endpoint, recompute="never")


def _find_again(engine: EngineChild) -> None:
    """Until the engine loads from the new server what it was warmed up with."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while not _warmed_up(engine).cached_tokens:
        if time.monotonic() > deadline:
            raise NotInTime(f"nothing was loaded for {SETTLE_TIMEOUT_S:.0f} s after a restart")
        time.sleep(0.1)
    engine.reset()


def _warm_up(engine: EngineChild) -> None:
    """Wait for the engine, and run it once: no figure shall have its first run in it."""
    engine.wait_ready()
    _warmed_up(engine)


def _warmed_up(engine: EngineChild) -> Answer:
    engine.reset()
    return engine.generate(prompt(WARM_UP, 2 * BLOCK_TOKENS - 1))


def _row(name: str, answers: Answers, reference: Answers, tier: str, expected: str) -> Row:
    return Row(
        name=name,
        first_token_s=median([answer.first_token_s for answer in answers]),
        cached_tokens=tuple(answer.cached_tokens for answer in answers),
        tier=tier,
        expected_tier=expected,
        logprob_differences=tuple(map(difference, answers, reference)),
    )


def _as_json(rows: list[Row], wrong: list[str]) -> dict[str, Any]:
    """Times in seconds; `speed_up` against vLLM alone, cold. Cached tokens and
    differences are those of each prompt; a difference of null means that the likeliest
    tokens are others."""
    cold = rows[0].first_token_s
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "prompts": PROMPTS,
        "kv_bytes_a_token": SHAPE.kv_bytes_a_token,
        "runs": [
            {
                "name": row.name,
                "first_token_s": finite(row.first_token_s),
                "cached_tokens": list(row.cached_tokens),
                "tier": row.tier,
                "speed_up": finite(ratio(cold, row.first_token_s), 2),
                "logprob_differences": [finite(one, 6) for one in row.logprob_differences],
                "logprobs_agree": row.logprob_difference == 0,
            }
            for row in rows
        ],
        "ok": not wrong,
        "wrong": wrong,
    }


def _table(rows: list[Row]) -> Table:
    title = f"Prompts of {PROMPT_TOKENS} tokens, medians of {PROMPTS}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("run", no_wrap=True)
    for heading in ("first token", "speed-up", "cached", "from", "logprobs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        table.add_row(
            row.name,
            seconds_text(row.first_token_s),
            f"{ratio(rows[0].first_token_s, row.first_token_s):.1f}x",
            str(min(row.cached_tokens)),
            row.tier,
            "reference" if index < REFERENCE_ROWS else _agreement(row.logprob_difference),
        )
    return table


def _agreement(largest: float) -> str:
    if largest == 0:
        return "equal"
    return "DIFFER" if math.isinf(largest) else f"DIFFER by {largest:.3g}"
