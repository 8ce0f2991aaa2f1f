"""`kvstore simulate`: what is asked for is printed, and what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.cli.main import main


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "t.jsonl"
    lines = []
    for turn in range(60):
        ids = [turn % 7 * 10 + n for n in range(6)]
        line = {"timestamp": turn, "input_length": 3072, "output_length": 1, "hash_ids": ids}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return path


def test_each_policy_and_size_is_an_object(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", str(trace), "--policy", "lru,S3FIFO,belady"]
    assert main([*arguments, "--capacity-blocks", "12,40,1000", "--json"]) == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)
    assert [(row["policy"], row["capacity_blocks"]) for row in rows] == [
        (policy, size) for policy in ("lru", "S3FIFO", "belady") for size in (12, 40, 1000)
    ]
    for row in rows:
        for ratio in ("block_hit_ratio", "token_hit_ratio", "compute_saved_ratio"):
            assert 0 <= row[ratio] <= 1
        if row["capacity_blocks"] == 1000:
            assert row["block_hit_ratio"] == pytest.approx(53 / 60, abs=1e-6)
    assert rows[0]["block_hit_ratio"] == 0 < rows[6]["block_hit_ratio"]
    assert not shown.err


def test_one_process_and_many_find_the_same(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for processes in ("1", "2"):
        assert main(["simulate", str(trace), "--processes", processes, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        found.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    assert found[0] == found[1]


def test_a_table_is_shown(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(trace), "--policy", "lru", "--capacity-blocks", "1000"]) == 0
    shown = capsys.readouterr().out
    assert "0.8833" in shown and "Prefill saved" in shown


def test_plots_are_drawn(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "plots"
    assert main(["simulate", str(trace), "--plots", str(folder)]) == 0
    assert (folder / "simulate.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "simulate.json").read_text())


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--policy", "lfru", "did you mean lru"),
        ("--policy", ",", "name a policy"),
        ("--capacity-blocks", "0", "'0' is not a number of one or more"),
        ("--capacity-blocks", "10,-5", "'-5'"),
        ("--capacity-blocks", "1e3", "'1e3'"),
        ("--session-rate", "0", "not a rate"),
        ("--session-rate", "nan", "not a rate"),
        ("--processes", "0", "'0'"),
    ],
)
def test_a_wrong_flag_is_explained(
    trace: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, said: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["simulate", str(trace), f"{flag}={value}"])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_a_wrong_trace_is_one_line_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": []}\n{\n')
    assert main(["simulate", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"kvstore: {path}:2: ") and error.count("\n") == 1
