"""`kvstore bench gpu` measures, counts what is wrong, and says so without a GPU."""

from __future__ import annotations

import os
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from kvstore.errors import NoDevice
from kvstore_benchmarks.figures import machine
from kvstore_benchmarks.gpu import main, measure
from tests.unit.device.fakes import FakeDriver

SMALL = measure.Options(
    nbytes=1 << 19,
    rounds=1,
    blocks=(1 << 14, 1 << 16),
    piece_bytes=(1 << 10, 1 << 14),
    pieces=4,
    moved=1 << 20,
    extent_bytes=1 << 17,
    computing_s=0.001,
)


def measured(driver: FakeDriver) -> dict[str, Any]:
    figures = machine() | measure.measure(driver, SMALL, lambda: None, lambda text: None)
    figures["connector"] = {"a model": figures["checked"] | {"wrong": 0}}
    return figures | {"aims": list(main._aims(figures))}


def test_every_size_is_measured_both_ways_and_nothing_is_left() -> None:
    driver = FakeDriver()
    figures = measured(driver)
    assert list(figures["blocks"]) == [str(nbytes) for nbytes in SMALL.blocks]
    assert list(figures["pieces"]) == [str(nbytes) for nbytes in SMALL.piece_bytes]
    for one in figures["blocks"].values():
        assert one["pinned"]
        assert all(one[way]["ratio"] > 0 for way in ("to_gpu", "to_host"))
    assert figures["moved"]["nbytes"] >= SMALL.moved
    assert figures["moved"]["wrong_blocks"] == 0
    assert all(one["moved"] > 0 for one in figures["computing"].values())
    assert not driver.wrong
    assert not driver.on_gpu
    assert not driver.on_host
    assert not driver.registered
    text = StringIO()
    main.show(figures, Console(file=text, width=120))
    assert "wrong blocks" in text.getvalue()


def test_bytes_that_arrive_wrong_are_counted() -> None:
    driver = FakeDriver()
    copy_runs = driver._copy_runs

    def shifted(runs: list[Any], *, by_link: bool) -> None:
        copy_runs([(to, from_, nbytes - 1) for to, from_, nbytes in runs], by_link=by_link)

    driver._copy_runs = shifted  # type: ignore[method-assign]
    assert measured(driver)["moved"]["wrong_blocks"] > 0


def test_without_a_gpu_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise NoDevice("there is no CuPy: pip install 'kvstore[gpu]'")

    monkeypatch.setattr(main, "CudaDriver", none)
    assert main.run(SMALL, as_object=False) == os.EX_UNAVAILABLE
    assert "there is no CuPy: pip install 'kvstore[gpu]'" in capsys.readouterr().err
