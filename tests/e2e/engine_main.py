"""vLLM in a process of its own: JSON commands in, JSON results out.

    python engine_main.py DESCRIPTOR OPTIONS      OPTIONS: JSON for vllm.LLM, or null

Commands come as lines on stdin, results go as lines to the descriptor, so that
whatever vLLM prints is in nobody's way. There is one engine at a time; `restart` ends
it and makes another, which takes a sixth of what a new process does.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import Any


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
) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=max_tokens,
        temperature=0,
        detokenize=False,
        logprobs=8,
        ignore_eos=True,
        extra_args=None if handover is None else {"kv_transfer_params": handover},
    )
    salted = {} if salt is None else {"cache_salt": salt}
    requests = [{"prompt_token_ids": prompt} | salted for prompt in prompts]
    outputs = llm.generate(requests, parameters, use_tqdm=False)
    return [
        {
            "cached": output.num_cached_tokens,
            "handover": output.kv_transfer_params,
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                {str(token): entry.logprob for token, entry in position.items()}
                for position in output.outputs[0].logprobs
            ],
        }
        for output in outputs
    ]


def reset(llm: Any, connector: bool) -> bool:
    """Empty vLLM's own cache; its blocks may still be held by stores for a moment."""
    deadline = time.monotonic() + 10
    while not llm.reset_prefix_cache(reset_connector=connector):
        if time.monotonic() > deadline:
            return False
        # An engine in this very process steps only when it is told to.
        llm.llm_engine.step()
        time.sleep(0.005)
    return True


def metrics(llm: Any) -> dict[str, float]:
    return {
        metric.name.removeprefix("vllm:"): metric.value
        for metric in llm.llm_engine.get_metrics()
        if hasattr(metric, "value")
    }


_OPERATIONS = {"generate": generate, "reset": reset, "metrics": metrics}

if __name__ == "__main__":
    main()
