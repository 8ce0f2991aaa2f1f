"""`kvstore bench priorities`, small: two classes share a tier, and only one may suffer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.cli.main import main
from kvstore.sim.trace import Request, Trace
from kvstore_benchmarks.policies.priorities import HIGH, LOW, Classes, begun_at, measure


def test_a_load_is_so_many_times_the_requests_in_the_same_time() -> None:
    made_up = Classes(40)
    trace = Trace(16, 6, [Request(10.0 * n, 32, 1, ((n, n + 2),)) for n in range(5)])
    for classes, requests in ((made_up, 40), (Classes(0, trace), 5)):
        mixed = classes.mixed(3)
        each = {p: [r for r in mixed.requests if r.priority == p] for p in (HIGH, LOW)}
        assert (len(each[HIGH]), len(each[LOW])) == (requests, 3 * requests)
        last = max(stop for r in each[HIGH] for _, stop in r.pieces)
        assert last <= min(first for r in each[LOW] for first, _ in r.pieces)
        span = [(rs[0].time_ms, rs[-1].time_ms) for rs in each.values()]
        assert span[1] == pytest.approx(span[0], abs=20)
        assert {r.priority for r in classes.mixed(0).requests} == {HIGH}


def test_a_copy_begins_elsewhere_and_asks_for_the_same() -> None:
    trace = Trace(16, 4, [Request(100.0 + n, 16, 1, ((n, n + 1),)) for n in range(4)])
    moved = begun_at(trace, 0.5)
    assert [r.pieces[0][0] for r in moved.requests] == [2, 3, 0, 1]
    assert [r.time_ms for r in moved.requests] == [100, 101, 101, 102]


def test_lru_gives_high_priority_away_and_priorities_keep_it() -> None:
    rows = measure(["lru", "priority-lru"], [700], [3], Classes(400))
    kept = {(row["policy"], row["load"]): row["kept"] for row in rows}
    assert kept["lru", 0] == kept["priority-lru", 0] == 1.0
    assert kept["lru", 3] < 0.2 < 0.8 < kept["priority-lru", 3]


def test_it_prints_one_object_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["bench", "priorities", "--policy", "lru", "--loads", "2", "--quick", "--json"]
    assert main([*arguments, "--plots", str(tmp_path)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [(row["load"], row["low"] is None) for row in figures["rows"]] == [(0, True), (2, False)]
    assert json.loads((tmp_path / "priorities.json").read_text()) == figures
    assert (tmp_path / "priorities.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_is_replayed_beside_copies_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"timestamp": n, "input_length": 1024, "output_length": 1, "hash_ids": [n % 5, 9 + n % 5]}
        for n in range(60)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["bench", "priorities", str(path), "--policy", "priority-lru", "--loads", "3"]
    assert main([*command, "--capacity-blocks", "12", "--requests", "50"]) == 0
    shown = capsys.readouterr()
    assert "50 requests (trace.jsonl)" in shown.out and "low x3" in shown.out
    assert main(["bench", "priorities", str(path) + "x", "--quick"]) == 1


@pytest.mark.parametrize(
    "flag", [("--loads", "0"), ("--loads", "x"), ("--requests", "0"), ("--capacity-blocks", "1,0")]
)
def test_a_wrong_flag_is_named(flag: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", "priorities", *flag])
    assert left.value.code == 2 and flag[0] in capsys.readouterr().err


def test_a_policy_that_knows_the_future_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "priorities", "--policy", "belady", "--quick"]) == 1
    assert "knows the future" in capsys.readouterr().err
