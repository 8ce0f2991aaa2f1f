"""`kvstore bench serve` and `kvstore demo --pd`, without vLLM: what they ask, and what they
make of the answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer

from kvstore.errors import ConfigError
from kvstore_benchmarks.end_to_end.watch import Hits
from kvstore_benchmarks.pipe import ChildFailed
from kvstore_benchmarks.serving import hooks, pd, sides
from kvstore_benchmarks.serving.bench import Measured, Turn
from kvstore_benchmarks.serving.handover import REQUEST_SECONDS, first_token, hand_over
from kvstore_benchmarks.serving.instance import Child
from kvstore_benchmarks.serving.load import Met
from kvstore_benchmarks.serving.model import _tokenizer
from kvstore_benchmarks.serving.report import cost, faults, figures_of, show
from kvstore_benchmarks.serving.router import Router
from kvstore_benchmarks.serving.workloads import no_hits, repeated, trace_slice, workloads

METRICS = """\
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 4096.0
# TYPE vllm:prompt_tokens_cached_by_source_total counter
vllm:prompt_tokens_cached_by_source_total{engine="0",model_name="m",source="device"} 64.0
vllm:prompt_tokens_cached_by_source_total{engine="0",model_name="m",source="host"} 1024.0
vllm:prompt_tokens_cached_by_source_total{engine="0",model_name="m",source="disk"} 32.0
vllm:prompt_tokens_cached_by_source_total{engine="0",model_name="m",source="p2p"} 7.0
"""


def test_a_word_is_a_token_and_back() -> None:
    tokenizer = Tokenizer.from_str(json.dumps(_tokenizer(16)))
    assert tokenizer.encode("t3 t15 t0").ids == [3, 15, 0]
    assert tokenizer.decode([3, 15, 0]) == "t3 t15 t0"


def test_sources_are_read_from_what_vllm_exposes() -> None:
    assert sides.sources(METRICS) == sides.Sources(prompt=4096, device=64, host=1024, disk=32)
    assert sides.sources("") == sides.Sources()


@pytest.mark.parametrize(
    ("handed_out", "equal", "plausible"),
    [(Hits(32, 1), True, True), (Hits(33, 0), False, True), (Hits(32, 0), False, False)],
)
def test_both_sides_are_compared_tier_by_tier(
    handed_out: Hits, equal: bool, plausible: bool
) -> None:
    compared = sides.as_json(sides.Sources(prompt=4096, host=1024, disk=32), handed_out)
    assert (compared["equal"], compared["plausible"]) == (equal, plausible)


def test_what_was_handed_out_for_nothing_is_no_difference() -> None:
    seen = sides.sources(METRICS + 'vllm:kvstore_unneeded_blocks_total{engine="0"} 3.0\n')
    assert seen.unneeded == 96
    assert sides.as_json(seen, Hits(35, 1))["equal"]
    assert not sides.as_json(seen, Hits(36, 1))["equal"]


def test_no_round_asks_what_an_earlier_one_stored() -> None:
    for workload in (no_hits(8), repeated(8, 2)):
        seeds = {tuple(workload.arguments(number)) for number in range(-1, 5)}
        assert len(seeds) == 6


def request(timestamp: int, *blocks: int) -> dict[str, Any]:
    return {
        "timestamp": timestamp,
        "input_length": 512 * len(blocks),
        "output_length": 300,
        "hash_ids": list(blocks),
    }


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    requests = [
        request(0, 0, 1, 2),
        request(1, 0, 8, 9),
        request(2, 0, 20, 21),
        request(90_000, 0, 1, 2, 3),
        request(90_100, 0, 1, 2, 3, 4, 5),
        request(90_200, 0, 20, 21, 22),
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in requests))
    return path


def test_a_replay_keeps_conversations_and_shrinks_the_rest(trace: Path) -> None:
    lines = [json.loads(line) for line in trace_slice(trace, 0, 3)]
    assert [each["hash_ids"][-1] for each in lines] == [2, 3, 5]
    assert [each["timestamp"] for each in lines] == [0, 1000, 1100]
    assert [each["input_length"] for each in lines] == [96, 128, 192]
    assert {each["output_length"] for each in lines} == {16}
    everything = [json.loads(line)["hash_ids"][-1] for line in trace_slice(trace, 0, 9)]
    assert everything == [2, 21, 3, 5, 22], "in the order of the trace, without the one turn"


def test_without_a_trace_there_is_no_replay(tmp_path: Path, trace: Path) -> None:
    assert [each.name for each in workloads(None, tmp_path, quick=True)] == [
        "no hits",
        "prefix repetition",
    ]
    replay = workloads(trace, tmp_path, quick=True)[-1]
    assert replay.arguments(-1) != replay.arguments(0)
    assert (tmp_path / "trace-0.jsonl").exists()


def met(seconds: float, first: float, failed: int = 0) -> Met:
    return Met(failed, seconds, 10, 100, (first, 2 * first), (0.01, 0.02))


@pytest.fixture
def measured() -> Measured:
    one = Measured(no_hits(10))
    for seconds in (10.0, 20.0, 40.0):
        one.without.append(Turn(met(seconds, 1.0), sides.Sources(prompt=100), Hits(0, 0)))
        hit = sides.Sources(prompt=128, host=32)
        one.with_store.append(Turn(met(seconds * 1.25, 1.1), hit, Hits(1, 0)))
    return one


def test_ratios_are_of_one_round_and_a_slower_rate_is_a_cost(measured: Measured) -> None:
    figures = figures_of(measured)
    assert figures["measures"]["requests_per_s"]["ratios"] == [0.8] * 3
    assert cost(figures, "requests_per_s") == 1.25
    assert cost(figures, "first_token_s") == 1.1
    assert figures["hits"]["vllm"]["host"] == 0.25


def test_a_failed_request_or_a_load_of_what_was_not_handed_out_is_a_fault(
    measured: Measured,
) -> None:
    good = {"workloads": {"x": figures_of(measured)}}
    assert faults(good) == []
    measured.with_store[0] = Turn(met(1, 1, failed=2), sides.Sources(host=64), Hits(1, 0))
    assert len(faults({"workloads": {"x": figures_of(measured)}})) == 2


class TimedServer:
    """Stands for a vLLM whose connector writes down its times."""

    port = 1

    def __init__(self, times: hooks.HookTimes) -> None:
        self.times = times
        self.asked: list[list[str]] = []

    def forget(self) -> None:
        """What happens in between does not count."""
        self.times._times[0] += 77

    def run(self, port: int, arguments: Sequence[str]) -> Met:
        """Of 10 requests. 2 us in the first hook, 1 ms in steps without work."""
        self.asked.append(list(arguments))
        words = hooks.map_times(self.times.path)
        words[0] += 20_000
        words[1] += 50_000
        words[2 * hooks.HOOKS.index(hooks.IDLE)] += 10_000_000
        return met(1.0, 1.0)


def test_hooks_are_timed_by_the_request_and_without_steps_that_have_no_work() -> None:
    with hooks.HookTimes() as times:
        server = TimedServer(times)
        figures = hooks.measure(server, server, times, rounds=2)
        path = Path(times.path)
    assert not path.exists()
    for kind in ("miss", "hit"):
        assert figures[kind]["total_us"] == figures[kind]["hooks_us"]["on_new_request"] == 2.0
        assert figures[kind]["hooks_us"][hooks.IDLE] == 1000.0
        assert figures[kind]["wall_us"] == 5.0
    assert len(server.asked) == 6
    assert server.asked[2] == server.asked[3] != server.asked[4], "what was missed is found"


def test_the_tables_hold_every_figure(measured: Measured) -> None:
    with hooks.HookTimes() as times:
        server = TimedServer(times)
        hooked = hooks.measure(server, server, times, rounds=1)
    console = Console(width=140)
    with console.capture() as capture:
        workloads = {"no hits": figures_of(measured)}
        show({"clients": 4, "workloads": workloads, "hooks": hooked}, console)
    text = capture.get()
    assert "first token, p50" in text and "cost 1.02x" in text and "25%" in text
    assert "take_events" in text and "aim 50" in text


STREAMED = 'data: {"choices": [{"text": "t1"}]}\n\ndata: [DONE]\n\n'


class Recorder:
    """Stands for a vLLM: writes down what it is asked."""

    def __init__(self, answer: dict[str, Any] | None, text: str = STREAMED) -> None:
        self.asked: list[dict[str, Any]] = []
        self.metrics: list[str] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(f"{REQUEST_SECONDS} {recorder.metrics.pop(0)}\n".encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                recorder.asked.append(body)
                self.send_response(200 if answer is not None else 503)
                self.end_headers()
                said = text if body.get("stream") else json.dumps(answer)
                self.wfile.write(said.encode())

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def child(self) -> Child:
        child = Child.__new__(Child)
        child.name, child.port = "recorder", self.port
        return child

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def test_what_prefill_took_is_what_it_says_itself() -> None:
    recorder = Recorder({})
    try:
        recorder.metrics = ["0.5", "3.5"]
        handed = hand_over(recorder.child(), recorder.child(), [1, 2, 3])
    finally:
        recorder.close()
    assert handed.prefill_s == 3.0
    assert -3.0 < handed.decode_s < 0, "the answer came at once"
    assert recorder.asked[0]["stream"] is True


def test_an_answer_without_a_token_is_an_error() -> None:
    recorder = Recorder({}, text="data: [DONE]")
    try:
        with pytest.raises(ChildFailed, match="without a token"):
            first_token(recorder.child(), [1])
    finally:
        recorder.close()


def test_a_server_that_refuses_is_an_error_that_names_it() -> None:
    recorder = Recorder(None)
    try:
        with pytest.raises(ChildFailed, match="recorder answered 503"):
            recorder.child().post("/v1/completions")
    finally:
        recorder.close()


def test_a_router_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make demo-pd"):
        Router(tmp_path, Child.__new__(Child), Child.__new__(Child))  # type: ignore[arg-type]


def figures(loaded: int = 64, difference: float | None = 0, failed: int = 0) -> dict[str, Any]:
    one = {pd.APART: 0.1, pd.MIXED: 0.2, "ratio": 0.5, "ratios": [0.5, None]}
    load = {
        "rounds": 2,
        "failed": {pd.APART: 0, pd.MIXED: failed},
        "measures": dict.fromkeys(pd.LOAD_FIGURES, one),
    }
    names = ("prefill_s", "decode_first_token_s", "own_hit_first_token_s", "handover_s", "copy_s")
    taken = dict.fromkeys(names, 0.5) | {"to_copy": 1.25}
    taken |= {"loaded_tokens": loaded, "handed_out_tokens": 64}
    return {
        "answers": [{"logprobs_difference": difference}],
        "handover": {"tokens": 65, "bytes": 1 << 20, "most": pd.AIM, "rounds": [taken]},
        "load": load,
    }


def test_a_hand_over_counts_only_when_all_of_it_was_loaded() -> None:
    assert pd.faults(figures()) == []
    assert pd.faults(figures(loaded=32)) == ["32 of 64 tokens were handed over, says vLLM"]
    assert pd.faults(figures(difference=None))
    assert pd.faults(figures(difference=1e-6))
    assert pd.faults(figures(failed=1)) == ["one vLLM: 1 requests failed"]


def test_the_demo_says_whether_answers_agree() -> None:
    for difference, said in ((0, "exactly"), (1e-6, "NOT")):
        console = Console(width=120)
        with console.capture() as capture:
            pd.show(figures(difference=difference), console)
        assert said in capture.get() and "1.25x" in capture.get()


def completion(*steps: dict[str, float]) -> dict[str, Any]:
    return {"choices": [{"logprobs": {"top_logprobs": list(steps)}}]}


def test_answers_differ_by_their_log_probabilities() -> None:
    one = completion({"t1": -1.0, "t2": -2.0})
    assert pd.difference(one, one) == 0
    assert pd.difference(one, completion({"t1": -1.0, "t2": -2.5})) == 0.5
    assert pd.difference(one, completion({"t1": -1.0, "t3": -2.0})) == float("inf")
    assert pd.difference(one, completion()) == float("inf")
