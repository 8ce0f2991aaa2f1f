"""Ratios are taken within a round, and a wrong answer spoils the figures."""

from __future__ import annotations

import json
import os
from dataclasses import replace

from kvstore_benchmarks.end_to_end.bench import as_json, faults, ratios
from kvstore_benchmarks.end_to_end.rounds import Measured, Round, memory_bytes

ROUND = Round(
    cold_without=2.0,
    local_without=0.1,
    cold_with=2.1,
    local_storing=0.11,
    still_storing=True,
    stored=0.2,
    local_with=0.1,
    warm_dram=0.15,
    warm_nvme=0.3,
    memcpy=0.025,
    tiers=("DRAM", "NVMe"),
    agree=True,
    handed_tier="DRAM",
    handed_over=0.14,
    handed_over_local=0.1,
)


def measured(*rounds: Round) -> Measured:
    return Measured(tokens=8192, loaded_bytes=267386880, rounds=list(rounds))


def test_ratios_compare_what_one_round_met() -> None:
    slow_machine = replace(ROUND, cold_without=20.0, cold_with=21.0)
    taken = ratios([ROUND, slow_machine])["cold_with_to_without"]
    assert [round(sample, 3) for sample in taken.samples] == [1.05, 1.05]


def test_loading_is_what_the_prefix_hit_does_not_explain() -> None:
    assert round(ratios([ROUND])["dram_load_to_memcpy"].samples[0], 6) == 2.0
    assert round(ratios([ROUND])["handover_to_memcpy"].samples[0], 6) == 1.6


def test_a_wrong_answer_or_tier_spoils_the_figures() -> None:
    assert faults(measured(ROUND)) == []
    assert len(faults(measured(ROUND, replace(ROUND, agree=False)))) == 1
    assert len(faults(measured(ROUND, replace(ROUND, tiers=("DRAM", "DRAM"))))) == 1
    assert len(faults(measured(replace(ROUND, handed_tier="none")))) == 1


def test_the_object_has_every_sample() -> None:
    figures = json.loads(json.dumps(as_json(measured(ROUND, ROUND)), allow_nan=False))
    assert figures["seconds"]["warm_dram"] == {"median": 0.15, "samples": [0.15, 0.15]}
    assert figures["ratios"]["nvme_to_cold"]["median"] == 0.15
    assert figures["still_storing_rounds"] == 2


def test_memory_is_counted_at_all() -> None:
    assert memory_bytes("self") > 1 << 20
    assert memory_bytes(os.getpid(), os.getpid()) > memory_bytes(os.getpid())
