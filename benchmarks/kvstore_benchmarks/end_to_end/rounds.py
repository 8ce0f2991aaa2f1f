"""What is measured for `kvstore bench vllm`: rounds, each with a prompt of its own.

A round takes the same prompt through two engines that run side by side and take
turns, one without the store and one with it, and copies the same bytes plainly.
Which engine begins alternates, so that a slow moment of the machine does not
always fall on the same one. Another prompt is computed by the one with the store
and handed over to a third.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from kvstore_benchmarks.end_to_end.child import Answer, EngineChild
from kvstore_benchmarks.end_to_end.compare import difference
from kvstore_benchmarks.end_to_end.model import BLOCK_TOKENS, SHAPE, build, prompt
from kvstore_benchmarks.end_to_end.watch import Watch
from kvstore_benchmarks.local.baselines import aligned_blocks, memcpy_seconds
from kvstore_benchmarks.server import Server

DRAM = "1GiB"
NVME = "2GiB"
COPY_PIECE_BYTES = 1 << 20
WARM_UP = 1 << 20
"""Number of the first prompt that is not measured."""
HANDED_OVER = 1 << 22
"""Numbers of prompts that are handed over, from here on."""
FOR_DECODE = {"do_remote_decode": True, "do_remote_prefill": False}

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of one prompt: to the first token, unless it says otherwise."""

    cold_without: float
    local_without: float
    cold_with: float
    local_storing: float
    """vLLM's own prefix hit, straight after `cold_with`: its blocks are being stored."""
    still_storing: bool
    """Whether they were, when that hit began."""
    stored: float
    """Seconds from there until every block was committed."""
    local_with: float
    warm_dram: float
    warm_nvme: float
    memcpy: float
    """A plain copy of the bytes of the blocks that a warm request loads."""
    tiers: tuple[str, str]
    """Where the blocks of the two warm requests came from."""
    agree: bool
    """Warm and handed over answers have exactly the log-probabilities of an own prefix hit."""
    handed_tier: str
    """Where the blocks of the one that was handed over came from."""
    handed_over: float
    """In the third engine, asked as soon as the other one has answered."""
    handed_over_local: float
    """By the third engine's own prefix hit after that."""


@dataclass(slots=True)
class Measured:
    tokens: int
    loaded_bytes: int
    """Of KV, by a warm request."""
    rounds: list[Round] = field(default_factory=list)
    peak_memory_bytes: int = 0
    """Of both engines, the server and this process; shared pages counted once."""


def measure(folder: Path | None, rounds: int, tokens: int, progress: Progress) -> Measured:
    progress("building the model")
    model = build(folder=folder)
    # vLLM computes at least the last token, so the block that holds it is not loaded.
    blocks = (tokens - 1) // BLOCK_TOKENS
    measured = Measured(tokens, blocks * BLOCK_TOKENS * SHAPE.kv_bytes_a_token)
    with ExitStack() as stack:
        server = stack.enter_context(Server(dram=DRAM, nvme=NVME, folder=folder))
        progress("starting three engines")
        context = tokens + 2 * BLOCK_TOKENS
        without = stack.enter_context(EngineChild(model, context=context)).wait_ready()
        engine = stack.enter_context(
            EngineChild(model, context=context, store=server.endpoint)
        ).wait_ready()
        decode = stack.enter_context(
            EngineChild(model, context=context, store=server.endpoint)
        ).wait_ready()
        copies = _Copies(measured.loaded_bytes)
        # The round before the first touches every page, and is not kept.
        for number in range(-1, rounds):
            progress(f"round {number + 1} of {rounds}")
            tokens_of_round = prompt(number if number >= 0 else WARM_UP, tokens)
            with Watch(server.endpoint) as watch:
                handed = _hand_over(engine, decode, watch, prompt(HANDED_OVER + number, tokens))
                taken = _round(
                    without, engine, watch, tokens_of_round, copies, handed, number % 2 == 0
                )
            if number >= 0:
                measured.rounds.append(taken)
            measured.peak_memory_bytes = max(
                measured.peak_memory_bytes,
                memory_bytes("self", without.pid, engine.pid, decode.pid, server.pid),
            )
    return measured


class _Copies:
    """Memory for the plain copy, faulted in once."""

    def __init__(self, nbytes: int) -> None:
        pieces = nbytes // COPY_PIECE_BYTES
        self._sources = aligned_blocks(pieces, COPY_PIECE_BYTES)
        self._targets = aligned_blocks(pieces, COPY_PIECE_BYTES)

    def seconds(self) -> float:
        return memcpy_seconds(self._targets, self._sources)


def _round(
    without: EngineChild,
    engine: EngineChild,
    watch: Watch,
    tokens: list[int],
    copies: _Copies,
    handed: tuple[Answer, Answer, str],
    without_first: bool,
) -> Round:
    if without_first:
        alone = _alone(without, tokens)
    blocks = len(tokens) // BLOCK_TOKENS
    # One token: the next request must find the store still under way.
    cold = engine.generate(tokens, answer_tokens=1)
    still_storing = watch.committed() < blocks
    storing = engine.generate(tokens)
    stored = watch.wait_stored(blocks, engine.idle)
    local = engine.generate(tokens)
    memcpy = copies.seconds()
    dram, dram_tier = _warm(engine, watch, tokens)
    watch.flush(engine.idle)
    nvme, nvme_tier = _warm(engine, watch, tokens)
    if not without_first:
        alone = _alone(without, tokens)
    cold_alone, local_alone = alone
    handed_over, handed_over_local, handed_tier = handed
    return Round(
        cold_without=cold_alone.first_token_s,
        local_without=local_alone.first_token_s,
        cold_with=cold.first_token_s,
        local_storing=storing.first_token_s,
        still_storing=still_storing,
        stored=stored,
        local_with=local.first_token_s,
        warm_dram=dram.first_token_s,
        warm_nvme=nvme.first_token_s,
        memcpy=memcpy,
        tiers=(dram_tier, nvme_tier),
        agree=all(difference(warm, local_alone) == 0 for warm in (dram, nvme))
        and difference(handed_over, handed_over_local) == 0,
        handed_tier=handed_tier,
        handed_over=handed_over.first_token_s,
        handed_over_local=handed_over_local.first_token_s,
    )


def _hand_over(
    prefill: EngineChild, decode: EngineChild, watch: Watch, tokens: list[int]
) -> tuple[Answer, Answer, str]:
    """As a proxy does it, and then decode's own prefix hit. And the tier that it came from:
    of such requests vLLM says itself only what prefill had cached."""
    computed = prefill.generate(tokens, answer_tokens=1, handover=FOR_DECODE)
    handed = decode.generate(tokens, handover=computed.handover)
    local = decode.generate(tokens)
    watch.wait_stored(len(tokens) // BLOCK_TOKENS, prefill.idle)
    tier = watch.hits().tier
    watch.mark()
    return handed, local, tier


def _alone(without: EngineChild, tokens: list[int]) -> tuple[Answer, Answer]:
    """Cold, and straight after it vLLM's own prefix hit."""
    return without.generate(tokens, answer_tokens=1), without.generate(tokens)


def _warm(engine: EngineChild, watch: Watch, tokens: list[int]) -> tuple[Answer, str]:
    """With vLLM's own cache empty: the answer, and where its blocks came from."""
    engine.reset()
    watch.mark()
    answer = engine.generate(tokens)
    return answer, watch.hits().tier


def memory_bytes(*pids: int | str) -> int:
    """What these processes have in memory together, shared pages counted once."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total
