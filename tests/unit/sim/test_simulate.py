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


def test_larger_blocks_are_those_that_are_filled(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay = ["simulate", str(trace), "--policy", "lru", "--capacity-blocks", "100", "--json"]
    assert main([*replay, "--block-tokens", "2048"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["block_references"] == 60
    assert row["token_hit_ratio"] == pytest.approx(53 / 60 * 2048 / 3072, abs=1e-6)
    assert main([*replay, "--block-tokens", "1000"]) == 1
    assert "blocks of 1000 tokens are not some of 512" in capsys.readouterr().err


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
        ("--policy", ",", "name at least one"),
        ("--capacity-blocks", "0", "'0' is not a number of one or more"),
        ("--capacity-blocks", "10,-5", "'-5'"),
        ("--capacity-blocks", "1e3", "'1e3'"),
        ("--session-rate", "0", "not a rate"),
        ("--session-rate", "nan", "not a rate"),
        ("--processes", "0", "'0'"),
        ("--block-tokens", "0", "'0'"),
        ("--expected", "1", "not a share"),
    ],
)
def test_a_wrong_flag_is_explained(
    trace: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, said: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["simulate", str(trace), f"{flag}={value}"])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


STACK = ["--tiers", "dram=4GiB,nvme=8GiB", "--policy", "lru"]


def test_with_tiers_each_policy_and_size_is_an_object(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["simulate", str(trace), "--tiers", "dram=2GiB,nvme=8GiB", "--tiers", "dram=8GiB"]
    assert main([*arguments, "--machine", "gpu=b200,engines=4,ssd=gen5", "--json"]) == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)
    assert [(row["policy"], row["dram_bytes"] >> 30, row["nvme_bytes"] >> 30) for row in rows] == [
        ("worth", 2, 8), ("lru", 2, 8), ("worth", 8, 0), ("lru", 8, 0)
    ]  # fmt: skip
    for row in rows:
        assert row["first_token_ms"]["requests"] == 60
        assert set(row["block_hits_from"]) == {"dram", "nvme"}
    assert not shown.err


def test_with_tiers_tables_are_shown_and_plots_drawn(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["simulate", str(trace), *STACK, "--plots", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Time to the first token" in shown and "drive" in shown and "none held" in shown
    assert (tmp_path / "stacks.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "stacks.json").read_text())


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--tiers", "dram=0", "say how large DRAM is"),
        ("--tiers", "nvme=1TiB", "say how large DRAM is"),
        ("--tiers", "dram=1GiB,nvm=1TiB", "did you mean nvme"),
        ("--tiers", "dram=1GiB,dram=2GiB", "say dram once"),
        ("--tiers", "dram=-1GiB", "is not a size"),
        ("--tiers", "dram=1GiB,endurance=1TB", "endurance is what may be written to nvme"),
        ("--machine", "engines=0", "is not from 1 to 1024"),
        ("--machine", "mfu=2", "is not above 0"),
        ("--machine", "gpi=h100", "did you mean gpu"),
        ("--machine", "gpu=", "say gpu once, as gpu=VALUE"),
    ],
)
def test_a_wrong_stack_is_explained(
    trace: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, said: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["simulate", str(trace), *STACK, f"{flag}={value}"])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*STACK, "--capacity-blocks", "10"], "--capacity-blocks goes without --tiers"),
        ([*STACK, "--order", "chain"], "--order goes without --tiers"),
        (["--machine", "engines=2"], "--machine goes with --tiers"),
        ([*STACK, "--machine", "ssd=gen9"], "no SSD 'gen9'"),
        ([*STACK, "--policy", "belady"], "knows the future"),
        (["--tiers", "dram=1MiB"], "hold no block"),
        (["--tiers", "dram=1GiB,nvme=64MiB"], "nvme: 67108864 bytes hold no block"),
    ],
)
def test_a_stack_that_cannot_be_is_one_line(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["simulate", str(trace), *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_folder_that_cannot_be_is_said_before_anything_is_replayed(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["simulate", str(trace) + "x", "--plots", str(trace)]) == 1
    assert "File exists" in capsys.readouterr().err


def test_a_wrong_trace_is_one_line_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": []}\n{\n')
    assert main(["simulate", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"kvstore: {path}:2: ") and error.count("\n") == 1
