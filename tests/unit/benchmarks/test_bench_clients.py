"""`kvstore bench clients` against a real server, small; and its parts by themselves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvstore_benchmarks.clients.crowd import Shift, cpu_seconds
from kvstore_benchmarks.clients.main import ALONE, ONE_MORE, QUICK
from kvstore_benchmarks.clients.polite import Tally
from kvstore_benchmarks.clients.report import faults, p99_ratios, shift_figures
from kvstore_benchmarks.clients.rude import WAYS
from kvstore_benchmarks.clients.work import SHAPES, Work, stamp, stamped
from kvstore_benchmarks.figures import jain


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "kvstore.cli", "bench", "clients", "--quick", "--json"]
    shown = subprocess.run(
        [*command, "--dir", str(folder)], check=True, capture_output=True, text=True, timeout=280
    )
    assert list(folder.iterdir()) == [], "a measurement leaves nothing behind"
    answer: dict[str, Any] = json.loads(shown.stdout)
    return answer


def test_every_number_of_clients_works_without_an_error(figures: dict[str, Any]) -> None:
    counts = {str(count) for count in QUICK.counts}
    assert figures["clients"].keys() == figures["apart"].keys() == counts
    for count, one in [*figures["clients"].items(), *figures["apart"].items()]:
        assert one["errors"] == {}
        assert one["wrong_blocks"] == 0
        assert one["gbps_in"] > 0 < one["gbps_out"]
        assert len(one["steps_by_client"]) == int(count)
        for kind in ("lookup", "get", "put"):
            taken = one[f"{kind}_us"]
            assert 0 < taken["p50"] <= taken["p99"] <= taken["max"]


def test_every_rude_client_does_its_worst_beside_the_others(figures: dict[str, Any]) -> None:
    scenarios = figures["rude"]["scenarios"]
    assert list(scenarios) == [ALONE, ONE_MORE, *WAYS]
    assert all(scenarios[name]["steps_per_s"] > 0 for name in scenarios)
    assert scenarios["flood"]["rude"][0]["made"]["lookup"] > 0
    assert scenarios["hoard"]["rude"][0]["leases"] > 0
    assert scenarios["stall"]["rude"][0]["stopped"] is True


@pytest.mark.parametrize(
    ("shares", "index"),
    [([5, 5, 5, 5], 1.0), ([8, 0, 0, 0], 0.25), ([1, 3], 0.8), ([7], 1.0)],
)
def test_fairness_is_jains_index(shares: list[float], index: float) -> None:
    assert jain(shares) == pytest.approx(index)


def test_nothing_done_by_nobody_is_neither_fair_nor_unfair() -> None:
    assert math.isnan(jain([0, 0]))


def test_prompts_come_from_the_seed_alone() -> None:
    first, again = Work(1, 0), Work(1, 0)
    prompts = [first.prompt() for _ in range(50)]
    assert prompts == [again.prompt() for _ in range(50)]
    assert prompts != [Work(1, 1).prompt() for _ in range(50)]


def test_clients_share_documents_and_nothing_else() -> None:
    one, other = Work(1, 0), Work(1, 1)
    mine, theirs = ({key for _ in range(200) for key in w.prompt().keys} for w in (one, other))
    documents = {key for shape in one.documents for keys in shape for key in keys}
    assert mine & theirs
    assert mine & theirs <= documents


def test_some_documents_come_up_far_more_often_than_others() -> None:
    work = Work(1, 0)
    seen = Counter(prompt.keys[0] for prompt in (work.prompt() for _ in range(2000)))
    counts = seen.most_common()
    assert len(counts) == sum(shape.documents for shape in SHAPES)
    assert counts[0][1] > 8 * counts[-1][1]


def test_half_of_a_copy_is_seen() -> None:
    block = memoryview(bytearray(4096))
    stamp(block, b"a" * 32)
    assert stamped(block, b"a" * 32)
    assert not stamped(block, b"b" * 32)
    block[2048:] = bytes(2048)
    assert not stamped(block, b"a" * 32)


def tally(steps: int, **changes: Any) -> Tally:
    fields = {"lookup_us": [1.0, 3.0], "get_us": [10.0], "put_us": [20.0]} | changes
    return Tally(steps=steps, bytes_in=10**9, bytes_out=2 * 10**9, **fields)


def test_shifts_of_the_same_clients_are_added_up() -> None:
    shifts = [Shift(2.0, [tally(10), tally(30)], 0.5), Shift(2.0, [tally(30), tally(10)], 0.7)]
    figures = json.loads(json.dumps(shift_figures(shifts), allow_nan=False))
    assert (figures["gbps_in"], figures["gbps_out"]) == (1.0, 2.0)
    assert figures["steps_per_s"] == 20.0
    assert figures["calls_per_s"] == 4.0
    assert figures["steps_by_client"] == [40, 40]
    assert (figures["jain"], figures["slowest_to_fastest"]) == (1.0, 1.0)
    assert figures["server_cpu"] == 0.6
    assert figures["lookup_us"] == {"p50": 1.0, "p99": 3.0, "max": 3.0}


def test_a_client_that_got_nothing_done_is_seen() -> None:
    idle = tally(0, lookup_us=[], get_us=[], put_us=[], errors={"Unavailable": 2})
    one = json.loads(json.dumps(shift_figures([Shift(1.0, [tally(8), idle], 0.1)])))
    assert one["jain"] == 0.5
    assert one["slowest_to_fastest"] == 0.0
    assert one["errors"] == {"Unavailable": 2}


def test_errors_and_wrong_blocks_anywhere_are_faults() -> None:
    good = shift_figures([Shift(1.0, [tally(1)], 0.1)])
    wrong = shift_figures([Shift(1.0, [tally(1, wrong=3)], 0.1)])
    error = shift_figures([Shift(1.0, [tally(1, errors={"Unavailable": 2})], 0.1)])
    denied = shift_figures([Shift(1.0, [tally(1, denied=3, missed=2)], 0.1)])
    figures = {"clients": {"1": good}, "apart": {}, "rude": {"scenarios": {"x": denied}}}
    assert faults(figures) == 0
    figures = {"clients": {}, "apart": {"1": wrong}, "rude": {"scenarios": {"x": error}}}
    assert faults(figures) == 5


def test_ratios_of_latencies_are_left_out_where_nothing_was_called() -> None:
    base = shift_figures([Shift(1.0, [tally(1)], 0.1)])
    here = shift_figures([Shift(1.0, [tally(1, get_us=[], put_us=[50.0])], 0.1)])
    assert p99_ratios(here, base) == {"lookup": 1.0, "get": None, "put": 2.5}


def test_the_cpu_of_a_process_is_read_whatever_its_name(tmp_path: Path) -> None:
    odd = tmp_path / "a) b (c"
    odd.symlink_to(sys.executable)
    with subprocess.Popen([odd, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert cpu_seconds(process.pid) >= 0
        process.communicate(b"\n")
