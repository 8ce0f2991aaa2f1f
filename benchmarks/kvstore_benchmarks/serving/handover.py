"""One prompt through a prefill and a decode vLLM, and what each step took.

The requests are those that vLLM's own proxy example (`disagg_proxy_demo.py`) makes: the
prefill vLLM is asked for one token, and what it answers as `kv_transfer_params` goes with
the request to the decode vLLM. That proxy refuses to go on where there is no such answer.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvstore_benchmarks.pipe import ChildFailed
from kvstore_benchmarks.serving.instance import CALL_TIMEOUT_S, HOST, Child, completion

ASKED_OF_PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds to the first token, and how many of the prompt's were cached."""

    first_token_s: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Handover:
    """`answered`: whether the prefill vLLM named something for the decode vLLM."""

    prefill_s: float
    decode: Step
    answered: bool


def hand_over(prefill: Child, decode: Child, prompt: list[int]) -> Handover:
    """Raises `ChildFailed`."""
    started = time.perf_counter()
    answer = prefill.post(
        "/v1/completions", completion(prompt, 1, kv_transfer_params=ASKED_OF_PREFILL)
    )
    prefill_s = time.perf_counter() - started
    named = answer.get("kv_transfer_params")
    fields = {"kv_transfer_params": {**named, "remote_host": HOST}} if named else {}
    return Handover(prefill_s, first_token(decode, prompt, **fields), bool(named))


def first_token(server: Child, prompt: list[int], **fields: Any) -> Step:
    """Raises `ChildFailed`."""
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(completion(prompt, 2, **usage, **fields))
    connection = http.client.HTTPConnection(HOST, server.port, timeout=CALL_TIMEOUT_S)
    started = time.perf_counter()
    first_s: float | None = None
    cached = 0
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise ChildFailed(f"{server.name} answered {answer.status}: {answer.read()[:400]!r}")
        for event in events(answer):
            if event.get("choices") and first_s is None:
                first_s = time.perf_counter() - started
            cached = _cached(event) or cached
    except OSError as error:
        raise ChildFailed(f"{server.name} did not answer: {error}") from error
    finally:
        connection.close()
    if first_s is None:
        raise ChildFailed(f"{server.name} answered without a token")
    return Step(first_s, cached)


def events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events."""
    for line in answer:
        text = line.decode().strip().removeprefix("data: ")
        if text.startswith("{"):
            yield json.loads(text)


def _cached(event: dict[str, Any]) -> int:
    details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
    return details.get("cached_tokens") or 0
