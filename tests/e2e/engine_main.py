"""A vLLM engine in a process of its own: JSON commands in, JSON results out.

    python engine_main.py DESCRIPTOR OPTIONS      OPTIONS: JSON for vllm.LLM

Commands come as lines on stdin, results go as lines to the descriptor, so that
whatever vLLM prints is in nobody's way.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    results = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    from vllm import LLM

    llm = LLM(**json.loads(sys.argv[2]))
    results.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        operation = command.pop("op")
        results.write(json.dumps(_OPERATIONS[operation](llm, **command)) + "\n")


def generate(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=max_tokens, temperature=0, detokenize=False, logprobs=8, ignore_eos=True
    )
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(requests, parameters, use_tqdm=False)
    return [
        {
            "cached": output.num_cached_tokens,
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
