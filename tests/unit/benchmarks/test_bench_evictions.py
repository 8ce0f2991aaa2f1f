"""`kvstore bench evictions`, small: room is made and timed, in memory that is full."""

from __future__ import annotations

import json

import pytest

from kvstore.cli.main import main
from kvstore_benchmarks.policies import evictions
from kvstore_benchmarks.policies.evictions import PIECE, Planned


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evictions, "SETTLING", 40)


@pytest.mark.parametrize("pressed", [False, True])
def test_every_call_measured_has_to_make_room(pressed: bool) -> None:
    planned = Planned("worth", 2000, pressed=pressed)
    pool = planned.planner.residency.dram
    before = pool.evictions
    planned.measure(30)
    assert pool.evictions - before == pytest.approx(30 * PIECE, rel=0.2)
    if pressed:
        dirty = sum(len(planned.planner.holdings.dirty(c)) for c in pool.space.classes())
        assert dirty > 0.8 * len(pool), "most of them still wait to be written"
    planned.planner.check_integrity()


def test_it_prints_one_object_for_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evictions, "LEAST", 1)
    arguments = ["bench", "evictions", "--policy", "lru", "--blocks", "1000", "--json", "--quick"]
    monkeypatch.setattr(evictions, "QUICK", evictions.Options(blocks=1000, calls=5))
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["policy"], row["pressed"]) for row in rows] == [("lru", False), ("lru", True)]
    assert all(row["evict_us"]["mean"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--policy", "belady"], "knows the future"), (["--blocks", "10"], "blocks can be measured")],
)
def test_what_cannot_be_measured_is_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "evictions", *arguments]) == 1
    assert said in capsys.readouterr().err
