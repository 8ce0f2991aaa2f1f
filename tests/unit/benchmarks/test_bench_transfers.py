"""What the order of transfers must do under load, on a drive that is calculated."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore_benchmarks.transfers import main
from kvstore_benchmarks.transfers.main import Options


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    options = Options(loads=(0.95, 1.05), modelled_s=2.0, requests=8, drive="modelled")
    return main._figures(options, lambda step: None)


@pytest.fixture
def drive(figures: dict[str, Any]) -> dict[str, Any]:
    measured: dict[str, Any] = figures["devices"]["modelled"]
    return measured


@pytest.mark.parametrize("case", ["slow disk", "slow disk, slow GPU", "cold cache"])
def test_a_store_that_cannot_help_costs_no_more_than_asking_it(
    figures: dict[str, Any], case: str
) -> None:
    assert figures["first_token"][case]["ratio_worst"] <= 1.02


def test_loads_that_matter_are_hardly_slower_under_load(drive: dict[str, Any]) -> None:
    point = drive["by_load"]["0.95"]
    assert point["ours"]["high_p99_of_alone"] <= 1.5
    assert point["fifo"]["high_p99_of_alone"] > 5


def test_background_gets_what_demand_leaves(drive: dict[str, Any]) -> None:
    assert drive["by_load"]["0.95"]["ours"]["background_of_left"] >= 0.8


def test_nobody_starves_under_more_than_there_is(drive: dict[str, Any]) -> None:
    ours, strict = (drive["by_load"]["1.05"][order] for order in ("ours", "strict"))
    assert ours["prefetch_part"] >= 0.008
    assert ours["write_back_part"] >= 0.025
    assert ours["low_p99_ms"] < 1000
    assert strict["prefetch_part"] + strict["write_back_part"] < 0.03


def test_tenants_get_their_shares_and_all_of_it_alone(drive: dict[str, Any]) -> None:
    assert drive["tenants"]["ratio"] == pytest.approx(3.0, rel=0.05)
    assert drive["tenants"]["a_alone_part"] > 0.95
    assert drive["tenants"]["b_alone_part"] > 0.95
