"""One prompt handed over from a prefill to a decode vLLM by `vllm-router`, and what it took.

The router answers with decode's first token, and asks prefill before. What prefill took of
that time it says itself, in its `/metrics`: whole requests, of which there is no other
meanwhile. The rest is the hand-over, the router, and what decode does for any request.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from kvstore_benchmarks.pipe import ChildFailed
from kvstore_benchmarks.serving.instance import CALL_TIMEOUT_S, HOST, Child, completion

REQUEST_SECONDS = "vllm:e2e_request_latency_seconds_sum"


@dataclass(frozen=True, slots=True)
class Handover:
    """`decode_s`: from prefill's answer to the first token of decode's."""

    prefill_s: float
    decode_s: float


def hand_over(router: Child, prefill: Child, prompt: list[int]) -> Handover:
    """Raises `ChildFailed`."""
    before = request_seconds(prefill.get("/metrics"))
    whole_s = first_token(router, prompt)
    prefill_s = request_seconds(prefill.get("/metrics")) - before
    return Handover(prefill_s, whole_s - prefill_s)


def request_seconds(metrics: str) -> float:
    """What all requests together took, as `/metrics` of a vLLM says."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == REQUEST_SECONDS
    )


def first_token(server: Child, prompt: list[int]) -> float:
    """Seconds until it comes. Raises `ChildFailed`."""
    body = json.dumps(completion(prompt, 2, stream=True))
    connection = http.client.HTTPConnection(HOST, server.port, timeout=CALL_TIMEOUT_S)
    started = time.perf_counter()
    first_s: float | None = None
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise ChildFailed(f"{server.name} answered {answer.status}: {answer.read()[:400]!r}")
        for event in events(answer):
            if event.get("choices") and first_s is None:
                first_s = time.perf_counter() - started
    except OSError as error:
        raise ChildFailed(f"{server.name} did not answer: {error}") from error
    finally:
        connection.close()
    if first_s is None:
        raise ChildFailed(f"{server.name} answered without a token")
    return first_s


def events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events."""
    for line in answer:
        text = line.decode().strip().removeprefix("data: ")
        if text.startswith("{"):
            yield json.loads(text)
