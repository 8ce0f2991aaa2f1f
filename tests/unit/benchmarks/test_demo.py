"""What the demo calls wrong, and that its object says the same as its table."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kvstore_benchmarks.end_to_end import demo
from kvstore_benchmarks.end_to_end.child import Answer
from kvstore_benchmarks.end_to_end.demo import Row
from kvstore_benchmarks.end_to_end.watch import Hits


def row(name: str = "engine restarted", **changes: object) -> Row:
    fields: dict[str, object] = {
        "name": name,
        "first_token_s": 0.1,
        "cached_tokens": (2016, 2016),
        "tier": "DRAM",
        "expected_tier": "DRAM",
        "logprob_differences": (0.0, 0.0),
    }
    return Row(**(fields | changes))  # type: ignore[arg-type]


def test_a_good_row_is_not_blamed() -> None:
    assert row().wrong == ""


def test_blocks_from_the_wrong_tier_are_wrong() -> None:
    assert "not from NVMe" in row(expected_tier="NVMe").wrong


@pytest.mark.parametrize("largest", [1e-6, math.inf])
def test_any_difference_of_log_probabilities_is_wrong(largest: float) -> None:
    assert "log-probabilities" in row(logprob_differences=(0.0, largest)).wrong


def test_the_object_is_json_even_when_nothing_agrees() -> None:
    rows = [row("alone", first_token_s=2.0), row(logprob_differences=(math.inf, 0.0))]
    figures = json.loads(json.dumps(demo._as_json(rows, ["x"]), allow_nan=False))
    assert figures["ok"] is False
    assert figures["runs"][1]["logprob_differences"] == [None, 0]
    assert figures["runs"][1]["logprobs_agree"] is False
    assert figures["runs"][1]["speed_up"] == 20


def test_the_table_names_a_difference_loudly() -> None:
    console = Console(width=80)
    rows = [row("alone"), row("own hit"), row(), row(logprob_differences=(math.inf, 0.0))]
    with console.capture() as shown:
        console.print(demo._table(rows))
    assert shown.get().count("reference") == 2
    assert "equal" in shown.get()
    assert "DIFFER" in shown.get()


@pytest.mark.parametrize(
    ("stalls", "tiers", "restarts", "tier"),
    [
        ([False], ["NVMe"], 1, "NVMe"),
        ([True, False], ["none", "NVMe"], 2, "NVMe"),
        ([True] * 9, ["NVMe"], 1, "NVMe"),
        ([True] * 9, ["none"] * 9, demo.TRIES, "none"),
        # It is wrong, and nothing excuses it.
        ([False], ["none"], 1, "none"),
    ],
)
def test_a_disk_that_did_not_answer_is_asked_again_and_nothing_else_is_excused(
    monkeypatch: pytest.MonkeyPatch,
    stalls: list[bool],
    tiers: list[str],
    restarts: int,
    tier: str,
) -> None:
    restarted = 0

    class Server:
        endpoint = ""

        def restart(self) -> None:
            nonlocal restarted
            restarted += 1

    class Watch:
        def __init__(self, endpoint: str) -> None: ...
        def __enter__(self) -> Watch:
            return self

        def __exit__(self, *exc_info: object) -> None: ...
        def hits(self) -> Any:
            return Hits(0, 1) if tiers[restarted - 1] == "NVMe" else Hits(0, 0)

        def has_stalled(self) -> bool:
            return stalls[restarted - 1]

    monkeypatch.setattr(demo, "Watch", Watch)
    monkeypatch.setattr(demo, "_find_again", lambda engine: None)
    answer = Answer(first_token_s=0.1, cached_tokens=16, logprobs=[{1: -1.0}])
    stage = demo._Stage(Server(), [[1]], [answer], [answer])  # type: ignore[arg-type]
    engine: Any = SimpleNamespace(generate=lambda tokens: answer)
    assert stage.restarted("new server", engine, lambda step: None).tier == tier
    assert restarted == restarts


def test_the_command_fails_when_a_row_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [row("alone", tier="none"), row(tier="none")]
    monkeypatch.setattr(demo, "_rows", lambda folder, say: wrong)
    assert demo.run(None, as_object=True) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
