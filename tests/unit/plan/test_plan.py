"""The plan: sizes that bring what they are said to, and no figure without its formula."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.cli.main import main
from kvstore.core.cost import REFERENCE
from kvstore.errors import BadRequest
from kvstore.parts import load_parts
from kvstore.plan.curve import Held
from kvstore.plan.demand import Demand, from_numbers, from_trace
from kvstore.plan.machine import Engine
from kvstore.plan.report import Wishes, as_json, make
from kvstore.plan.sizes import Point, Prices, Sizing, knee
from kvstore.sim.trace import Request, Trace

PARTS = load_parts()
PRICES = Prices(gpu_hour=2.5, dram_gb=5.0, nvme_gb=0.15, years=4.0)
STATED = [
    "--requests-per-s", "4", "--prompt-tokens", "12000", "--shared-tokens", "6000",
    "--output-tokens", "300", "--reuse-s", "600",
]  # fmt: skip


def engine(ssd: str = "gen5", gpu: str = "h100") -> Engine:
    return Engine(PARTS.model["llama-3.1-8b"], PARTS.gpu[gpu], 1, PARTS.ssd[ssd], 1)


def demand(of: Engine | None = None) -> Demand:
    return from_numbers(
        (of or engine()).prefill, requests_per_s=4.0, prompt_tokens=12_000, shared_tokens=6_000,
        output_tokens=300, reuse_s=600,
    )  # fmt: skip


def sections(wishes: Wishes, sizing: Sizing | None = None) -> dict[str, dict[str, object]]:
    return as_json(make(sizing or Sizing(engine(), demand(), PRICES), wishes))


def wishes(
    dram_gb: float | None = None, nvme_gb: float | None = None, first_token_ms: float | None = None
) -> Wishes:
    return Wishes(dram_gb, nvme_gb, first_token_ms, 1.1, 16)


def test_the_characteristic_time_says_what_a_replay_finds() -> None:
    """Prompts of one block each: half new, half asked for again after a random time."""
    draw = random.Random(3)
    rate, reuse_s, span_s = 5.0, 100.0, 6_000.0
    times: list[tuple[float, int]] = []
    for block in range(int(rate / 2 * span_s)):
        begin = draw.uniform(0, span_s)
        times += [(begin, block), (begin + draw.expovariate(1 / reuse_s), block)]
    times.sort()
    requests = [Request(1e3 * at, 16, 0, ((block, block + 1),)) for at, block in times]
    replayed = from_trace(
        Trace(16, int(rate / 2 * span_s), requests), REFERENCE, requests_per_s=None, policy="lru"
    )
    stated = from_numbers(
        REFERENCE, requests_per_s=rate, prompt_tokens=16, shared_tokens=8, output_tokens=0,
        reuse_s=reuse_s,
    )  # fmt: skip
    for point in replayed.curve[1:]:
        # Of whole blocks in turn, where the model has half of every block.
        assert stated.held(point.tokens).token_hits == pytest.approx(point.token_hits, abs=0.02)


def test_more_of_a_tier_never_brings_less() -> None:
    sizing = Sizing(engine(), demand(), PRICES)
    for steps in (sizing.dram_steps(), sizing.nvme_steps(500.0)):
        points = [step.point for step in steps]
        saved = [point.gpus_saved for point in points]
        assert saved == sorted(saved)
        assert all(step.gpus_a_tb >= 0 for step in steps)
        assert [p.first_token_ms for p in points] == sorted(
            (p.first_token_ms for p in points), reverse=True
        )


def test_the_knee_lies_where_the_curve_bends() -> None:
    assert knee([0, 1, 2, 10], [0.0, 0.8, 0.9, 1.0]) == 1
    assert knee([0, 5, 10], [0.0, 0.0, 0.0]) == 0
    assert knee([], []) == 0


def test_nvme_that_loads_slower_than_gpus_compute_brings_nothing() -> None:
    b200 = engine("gen4", "b200")
    slow = Sizing(b200, demand(b200), PRICES)
    assert slow.point(100.0, 5_000.0).gpus_saved == slow.point(100.0).gpus_saved
    assert not slow.nvme_helps(100.0, 5_000.0)
    fast = Sizing(engine("gen5", "h100"), demand(), PRICES)
    assert fast.point(100.0, 5_000.0).gpus_saved > fast.point(100.0).gpus_saved


def test_gpus_saved_are_the_time_of_the_hits() -> None:
    sizing = Sizing(engine(), demand(), PRICES, utilisation=0.5)
    everything = sizing.point(sizing.most_gb)
    saved_s = everything.saved * sizing.demand.prefill_ms / 1e3
    assert everything.gpus_saved == pytest.approx(4.0 * saved_s / 0.5)


def test_given_sizes_are_kept_and_others_are_the_knees() -> None:
    plan = sections(wishes(dram_gb=256.0, nvme_gb=2000.0))
    assert (plan["choice"]["dram_gb"], plan["choice"]["nvme_gb"]) == (256.0, 2000.0)
    plan = sections(wishes())
    assert plan["choice"]["dram_gb"] == plan["dram"]["knee_gb"]


def test_a_size_of_nothing_is_a_given_one() -> None:
    made = make(Sizing(engine(), demand(), PRICES), wishes(nvme_gb=0.0))
    [choice] = [section for section in made if section.key == "choice"]
    whence = {figure.key: figure.formula for figure in choice.figures}
    assert (whence["nvme_gb"], whence["dram_gb"]) == ("given", "knee")


def test_a_target_is_reached_or_it_is_said_what_it_takes() -> None:
    reached = sections(wishes(first_token_ms=10_000.0))["choice"]["notes"]
    assert "is reached" in str(reached)
    never = sections(wishes(first_token_ms=1.0))["choice"]["notes"]
    assert "No size reaches" in str(never)
    more = sections(wishes(dram_gb=1.0, nvme_gb=0.0, first_token_ms=400.0))["choice"]["notes"]
    assert "needs more DRAM" in str(more)


def test_wear_is_what_is_computed_anew() -> None:
    plan = sections(wishes(dram_gb=256.0, nvme_gb=4000.0))
    hits = plan["choice"]["token_hits"]
    assert isinstance(hits, float)
    a_day = 4.0 * 12_000 * (1 - hits) * 131_072 * 86_400 * 1.1 / 1e12
    assert plan["endurance"]["written_tb_a_day"] == pytest.approx(a_day, rel=1e-4)
    assert "warranted" in str(plan["endurance"]["notes"])


def test_no_nvme_has_no_wear() -> None:
    plan = sections(wishes(dram_gb=20_000.0))
    assert "notes" in plan["nvme"]
    assert plan["choice"]["nvme_gb"] == 0.0
    assert "written_tb_a_day" not in plan["endurance"]


def test_every_computed_figure_shows_its_formula() -> None:
    for section in make(Sizing(engine(), demand(), PRICES), wishes()):
        for figure in section.figures:
            assert figure.formula or isinstance(figure.value, str), figure.key


def test_a_curve_is_read_between_its_points() -> None:
    curve = [Held(0, 0, 0), Held(100, 0.5, 0.4), Held(200, 0.6, 0.5)]
    d = Demand("", 1, 1, 1, 1, curve)
    assert d.held(50) == Held(50, 0.25, 0.2)
    assert d.held(1e9).token_hits == 0.6


def test_a_prompt_shares_at_most_all_of_it() -> None:
    with pytest.raises(BadRequest, match="at most all"):
        from_numbers(REFERENCE, requests_per_s=1, prompt_tokens=10, shared_tokens=11,
                     output_tokens=1, reuse_s=1)  # fmt: skip


def test_the_command_prints_tables_or_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *STATED]) == 0
    assert "10. What it costs and saves" in capsys.readouterr().out
    assert main(["plan", *STATED, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(plan) == [
        "kv", "memory", "speed", "links", "demand", "dram", "nvme", "choice", "endurance", "cost",
    ]  # fmt: skip
    assert all({"dram_gb", "gpus_saved", "gpus_a_tb"} <= set(p) for p in plan["dram"]["curve"])


def test_the_command_plans_for_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"format": "kvstore-trace", "version": 1, "block_tokens": 16}]
    for number in range(200):
        blocks = [f"system{i}" for i in range(4)] + [f"{number % 50}.{i}" for i in range(8)]
        lines.append({"time_ms": 100 * number, "tokens": 192, "blocks": blocks})  # type: ignore[dict-item]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert main(["plan", str(path), "--json", "--requests-per-s", "100"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["demand"]["requests_per_s"] == 100
    assert plan["demand"]["most_hits"] == pytest.approx(1 - (4 + 50 * 8) / (200 * 12), abs=1e-4)
    assert "notes" not in plan["demand"]
    assert main(["plan", str(path), "--json", "--block-tokens", "64"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "in blocks of 64 tokens, not the trace's of 16" in str(plan["demand"]["notes"])


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["plan"], "name a trace, or say --requests-per-s"),
        (["plan", *STATED, "--model", "lama"], "no model 'lama'"),
        (["plan", "trace.jsonl", "--reuse-s", "3"], "--reuse-s itself"),
        (["plan", *STATED, "--ssd", "gen6"], "no SSD 'gen6'"),
        (["plan", *STATED, "--policy", "worth"], "--policy goes with a trace"),
        (["plan", *STATED, "--block-tokens", "64"], "--block-tokens goes with a trace"),
        (["plan", *STATED, "--parameters", "8"], "'llama-3.1-8b' is none"),
    ],
)
def test_wrong_wishes_are_named(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 1
    assert text in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    assert main(["plan", *STATED, "--plots", str(tmp_path / "file")]) == 1
    assert "File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", [("--dram", "lots"), ("--mfu", "2"), ("--gpus", "0"), ("--reuse-s", "-1"),
             ("--mfu", "nan")],
)  # fmt: skip
def test_wrong_numbers_are_refused(
    flag: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *STATED, *flag])
    assert ended.value.code == 2
    assert flag[0] in capsys.readouterr().err


def test_points_are_compared_by_what_they_hold() -> None:
    sizing = Sizing(engine(), demand(), PRICES)
    assert isinstance(sizing.point(0.0), Point)
    assert sizing.point(0.0).gpus_saved == 0.0


def test_drives_that_die_before_they_are_paid_off_cost_what_they_wear() -> None:
    plan = sections(wishes(dram_gb=256.0, nvme_gb=4000.0))
    endurance, cost = plan["endurance"], plan["cost"]
    assert isinstance(endurance["years"], float) and endurance["years"] < PRICES.years
    # One drive of 7680 GB at 0.15 a GB, again and again.
    assert cost["nvme_hour"] == pytest.approx(7680 * 0.15 / (endurance["years"] * 8760), rel=1e-4)
    beside_much = sections(wishes(dram_gb=6_000.0, nvme_gb=8_000.0))
    assert "NVMe saves" in str(beside_much["cost"]["notes"])
    few = Sizing(engine(), replace(demand(), requests_per_s=0.01), PRICES)
    assert sections(wishes(dram_gb=1.0, nvme_gb=4000.0), few)["cost"]["nvme_hour"] == pytest.approx(
        4000 * 0.15 / (4 * 8760), rel=1e-4
    )


def test_where_nothing_is_asked_for_twice_no_cache_is_planned() -> None:
    alone = from_numbers(
        engine().prefill, requests_per_s=4, prompt_tokens=12_000, shared_tokens=0,
        output_tokens=1, reuse_s=600,
    )  # fmt: skip
    plan = sections(wishes(), Sizing(engine(), alone, PRICES))
    for tier in ("dram", "nvme"):
        assert "curve" not in plan[tier] and "brings nothing" in str(plan[tier]["notes"])
    assert plan["demand"]["most_gb"] == plan["choice"]["dram_gb"] == 0


def test_what_is_of_use_ends_where_hits_do() -> None:
    once = [Request(1e3 * n, 16, 0, ((n, n + 1),)) for n in range(100, 200)]
    again = [Request(1e6 + n, 16, 0, ((0, 1),)) for n in range(10)]
    found = from_trace(Trace(16, 200, [*once, *again]), REFERENCE, requests_per_s=None,
                       policy="lru")  # fmt: skip
    assert found.all_tokens == 16, "one block is all that is asked for again"


def test_drives_that_are_too_few_and_nvme_that_is_too_small_are_said() -> None:
    plan = sections(wishes(dram_gb=1.0, nvme_gb=20_000.0))
    assert "takes 3 drives" in str(plan["endurance"]["notes"])
    plan = sections(wishes(dram_gb=300.0, nvme_gb=200.0))
    assert "no larger than DRAM" in str(plan["choice"]["notes"])


def test_weights_that_do_not_fit_are_refused_with_what_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", *STATED, "--model", "llama-3.1-70b"]) == 1
    assert "leave no room on 1 x" in capsys.readouterr().err
    assert main(["plan", *STATED, "--model", "llama-3.1-70b", "--gpus", "2"]) == 1
    assert "say --gpus 3 or more" in capsys.readouterr().err
    assert main(["plan", *STATED, "--model", "llama-3.1-70b", "--gpus", "3"]) == 0
