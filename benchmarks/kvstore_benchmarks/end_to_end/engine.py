"""The child process: vLLM, told what to do by lines of JSON.

Requests come on standard input, answers go to the descriptor that standard output
was at the start; what vLLM and torch print goes to standard error, a log file of
the parent. Everything runs in this one process, so that the time to the first
token is the engine's and has no other process's wake-up in it.

    {"do": "generate", "tokens": [...], "answer_tokens": 4, "handover": {...} or null}
        -> {"first_token_s", "cached_tokens", "logprobs": [{token: logprob}, ...], "handover"}
    {"do": "reset"}   forget vLLM's own prefix cache
    {"do": "idle"}    let the engine finish what it has pending
    {"do": "stop"}
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

LOGPROBS = 5


class Engine:
    """One vLLM. `store`: the socket of a KV-cache server, or None to run without."""

    def __init__(
        self, model: str, store: str | None, block_tokens: int, context: int, recompute: str
    ) -> None:
        from vllm import LLM

        arguments: dict[str, Any] = {}
        if store is not None:
            from vllm.config import KVTransferConfig

            arguments["kv_transfer_config"] = KVTransferConfig(
                kv_connector="KVStoreConnector",
                kv_connector_module_path="kvstore_connectors.vllm",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={
                    "endpoint": store,
                    "acquire_timeout_ms": 30_000,
                    "recompute": recompute,
                },
            )
        self._llm = LLM(
            model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            block_size=block_tokens,
            max_model_len=context,
            max_num_seqs=4,
            enforce_eager=True,
            enable_prefix_caching=True,
            seed=0,
            **arguments,
        )
        self._requests = 0

    def generate(
        self, tokens: Sequence[int], answer_tokens: int, handover: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Greedy. Seconds until the first token, and the likeliest tokens of each step.
        `handover`: the request's `kv_transfer_params`; the answer's come back."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        engine = self._llm.llm_engine
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=answer_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=LOGPROBS,
            extra_args=None if handover is None else {"kv_transfer_params": handover},
        )
        self._requests += 1
        start = time.perf_counter()
        engine.add_request(
            str(self._requests), TokensPrompt(prompt_token_ids=list(tokens)), parameters
        )
        first_token_s: float | None = None
        answer = None
        while engine.has_unfinished_requests():
            for output in engine.step():
                if first_token_s is None and output.outputs[0].token_ids:
                    first_token_s = time.perf_counter() - start
                answer = output
        assert answer is not None
        return {
            "first_token_s": first_token_s,
            "cached_tokens": answer.num_cached_tokens or 0,
            "logprobs": [
                {str(token): entry.logprob for token, entry in step.items()}
                for step in answer.outputs[0].logprobs or ()
            ],
            "handover": answer.kv_transfer_params,
        }

    def reset(self) -> dict[str, Any]:
        """False when blocks are still held, by a store under way for example."""
        return {"done": bool(self._llm.reset_prefix_cache())}

    def idle(self) -> dict[str, Any]:
        """One step without a request: the connector hands back what it has finished."""
        self._llm.llm_engine.step()
        return {}


def serve(engine: Engine, requests: IO[str], answers: IO[str]) -> None:
    """Until `stop` or the end of the requests."""
    _answer(answers, {"ready": True})
    for line in requests:
        request = json.loads(line)
        match request["do"]:
            case "generate":
                answer = engine.generate(
                    request["tokens"], request["answer_tokens"], request["handover"]
                )
            case "reset":
                answer = engine.reset()
            case "idle":
                answer = engine.idle()
            case "stop":
                return
            case unknown:
                raise ValueError(f"no such request: {unknown}")
        _answer(answers, answer)


def _answer(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--store")
    parser.add_argument("--block-tokens", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--recompute", required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    engine = Engine(args.model, args.store, args.block_tokens, args.context, args.recompute)
    serve(engine, sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
