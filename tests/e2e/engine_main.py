"""vLLM in a process of its own: JSON commands in, JSON results out.

    python engine_main.py DESCRIPTOR OPTIONS      OPTIONS: JSON for vllm.LLM, or null

Commands come as lines on stdin, results go as lines to the descriptor, so that
whatever vLLM prints is in nobody's way. There is one engine at a time; `restart` ends
it and makes another, which takes a sixth of what a new process does.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 120.0


def main() -> None:
    results = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    options = json.loads(sys.argv[2])
    engines = [] if options is None else [_start(options)]
    results.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        operation = command.pop("op")
        if operation == "restart":
            _end(engines)
            engines.append(_start(command))
            results.write(json.dumps({"ready": True}) + "\n")
        else:
            results.write(json.dumps(_OPERATIONS[operation](engines[0], **command)) + "\n")


def _start(options: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(**options)


def _end(engines: list[Any]) -> None:
    if engines:
        from vllm.distributed import cleanup_dist_env_and_memory

        engines.pop().llm_engine.engine_core.shutdown()
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(
    llm: Any,
    prompts: list[list[int]],
    max_tokens: int,
    salt: str | None = None,
    handover: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    salted = {} if salt is None else {"cache_salt": salt}
    requests = [{"prompt_token_ids": prompt} | salted for prompt in prompts]
    outputs = llm.generate(
        requests,
        _parameters(max_tokens, handover),
        use_tqdm=False,
        lora_request=None if adapter is None else _adapter(adapter),
    )
    return [_answer(output) for output in outputs]


def _adapter(facts: dict[str, Any]) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(**facts)


def load_adapter(llm: Any, adapter: dict[str, Any]) -> bool:
    """As vLLM's OpenAI server does with each when it is told of it."""
    return bool(llm.llm_engine.add_lora(_adapter(adapter)))


def _parameters(max_tokens: int, handover: dict[str, Any] | None = None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0,
        detokenize=False,
        logprobs=8,
        ignore_eos=True,
        extra_args=None if handover is None else {"kv_transfer_params": handover},
    )


def _answer(output: Any) -> dict[str, Any]:
    (completion,) = output.outputs
    return {
        "cached": output.num_cached_tokens,
        "handover": output.kv_transfer_params,
        "finish": completion.finish_reason,
        "tokens": list(completion.token_ids),
        "logprobs": [
            {str(token): entry.logprob for token, entry in position.items()}
            for position in completion.logprobs or ()
        ],
    }


def storm(
    llm: Any,
    seed: int,
    prompts: list[list[int]],
    max_tokens: int,
    at_once: int,
    aborts: float,
    resets: float = 0,
) -> list[dict[str, Any] | None]:
    """Answers to the prompts, None for one that was aborted. They come by chance, up to
    `at_once` of them at a time; in every step one is aborted with a chance of `aborts`, and
    vLLM's own cache is emptied, which preempts all, with a chance of `resets`."""
    rng = random.Random(seed)
    engine = llm.llm_engine
    answers: list[dict[str, Any] | None] = [None] * len(prompts)
    to_come = list(range(len(prompts)))
    rng.shuffle(to_come)
    under_way: set[str] = set()
    while to_come or under_way:
        while to_come and len(under_way) < at_once and rng.random() < 0.7:
            number = to_come.pop()
            tokens = rng.randrange(1, max_tokens + 1)
            prompt = {"prompt_token_ids": prompts[number]}
            engine.add_request(str(number), prompt, _parameters(tokens))
            under_way.add(str(number))
        if under_way and rng.random() < aborts:
            victim = rng.choice(sorted(under_way))
            under_way.discard(victim)
            engine.abort_request([victim])
        if rng.random() < resets:
            # Cannot be while a load is under way; then it is not.
            with contextlib.suppress(RuntimeError):
                llm.reset_prefix_cache(reset_running_requests=True)
        for output in engine.step():
            if output.finished and output.request_id in under_way:
                under_way.discard(output.request_id)
                answers[int(output.request_id)] = _answer(output)
    return answers


def sleep_and_wake(llm: Any, level: int) -> bool:
    """As far as the CPU build does: it keeps the weights."""
    llm.sleep(level)
    llm.wake_up()
    return True


def settle(llm: Any) -> bool:
    """Step until there is nothing left to do, as an engine in a process of its own does. One in
    this very process steps only when it is told to."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    deadline = time.monotonic() + PATIENCE_S
    while scheduler.has_requests():
        if time.monotonic() > deadline:
            return False
        llm.llm_engine.step()
        time.sleep(0.005)
    return True


def reset(llm: Any, connector: bool) -> bool:
    """Empty vLLM's own cache; its blocks may still be held by stores for a moment."""
    deadline = time.monotonic() + PATIENCE_S
    while not llm.reset_prefix_cache(reset_connector=connector):
        if time.monotonic() > deadline:
            return False
        # An engine in this very process steps only when it is told to.
        llm.llm_engine.step()
        time.sleep(0.005)
    return True


def metrics(llm: Any) -> dict[str, float]:
    """By name, and by name and source for those that are split by source."""
    return {
        "/".join([metric.name.removeprefix("vllm:"), *_source(metric.labels)]): metric.value
        for metric in llm.llm_engine.get_metrics()
        if hasattr(metric, "value")
    }


def _source(labels: dict[str, str]) -> list[str]:
    return [labels["source"]] if "source" in labels else []


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "generate": generate,
    "load_adapter": load_adapter,
    "storm": storm,
    "reset": reset,
    "settle": settle,
    "sleep": sleep_and_wake,
    "metrics": metrics,
}

if __name__ == "__main__":
    main()
