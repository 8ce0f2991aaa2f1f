"""`kvstore bench gpu` measures, counts what is wrong, and says so without a GPU; all of what
runs on one runs here, on a stand-in, so that no misspelt name is first met there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import closing
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kvstore.device.cuda import CudaDriver
from kvstore.errors import NoDevice
from kvstore.tiers.nvme_disk import direct_io_works
from kvstore_benchmarks.figures import machine
from kvstore_benchmarks.gpu import __main__ as command
from kvstore_benchmarks.gpu import engine, main, measure
from kvstore_benchmarks.gpu.drive import from_drive
from kvstore_benchmarks.gpu.rig import Rig
from tests.gpu import test_copies, test_drive
from tests.unit.device.cupy_standin import Machine, Torch
from tests.unit.device.fakes import FakeDriver
from tests.unit.device.test_cufile import Place

SMALL = measure.Options(
    nbytes=1 << 19,
    rounds=1,
    blocks=(1 << 14, 1 << 16),
    piece_bytes=(1 << 10, 1 << 14),
    pieces=4,
    moved=1 << 20,
    extent_bytes=1 << 17,
    computing_s=0.001,
    directory=Path(tempfile.gettempdir()),
)

needs_o_direct = pytest.mark.skipif(
    not direct_io_works(Path(tempfile.gettempdir())), reason="no O_DIRECT for temporary files"
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
    assert len(figures["coded"]) == 4
    for one in figures["coded"].values():
        assert all(one[way]["ratio"] > 0 for way in ("to_gpu", "to_host"))
    assert "run_coding" in driver.calls
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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Machine:
    stand_in = Machine(FakeDriver())
    stand_in.install(monkeypatch)
    monkeypatch.setattr(engine, "torch", Torch(stand_in.driver))
    monkeypatch.setattr(engine, "HAS_TORCH", True)
    monkeypatch.setattr(
        engine, "SHAPES", {"layers": (4, 1 << 12, False), "outermost": (4, 1 << 12, True)}
    )
    return stand_in


def test_the_whole_command_runs_and_its_table_comes_last(
    gpu: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "QUICK", SMALL)
    monkeypatch.setattr(command, "run_tests", lambda: 0)
    monkeypatch.setenv("COLUMNS", "120")
    assert command.main(["--quick", "--dir", tempfile.gettempdir()]) == 0
    out = capsys.readouterr().out
    assert "(stand-in, " in out
    assert "connector, outermost" in out
    assert "wrong blocks" in out.splitlines()[-2]
    assert gpu.batches
    assert gpu.launches
    assert not gpu.driver.wrong


def read_from_drive(gpu: Machine, directory: Path) -> dict[str, Any]:
    with closing(Rig(CudaDriver(0, lambda: 0), 1 << 19, 1 << 17)) as rig:
        figures = from_drive(rig, directory, 1 << 17, 1)
    assert not gpu.driver.wrong
    assert not gpu.cufile.left
    assert not list(directory.iterdir())
    return figures


@needs_o_direct
def test_a_drive_is_read_straight_and_by_way_of_the_host(gpu: Machine, tmp_path: Path) -> None:
    figures = read_from_drive(gpu, tmp_path)
    assert figures["by_host"] > 0
    assert figures["straight"] > 0
    assert figures["wrong"] == 0
    assert not figures["reason"]


@needs_o_direct
@pytest.mark.parametrize("call", ["driver_open", "handle_register", "buf_register"])
def test_where_a_drive_cannot_be_read_straight_the_reason_is_given(
    gpu: Machine, tmp_path: Path, call: str
) -> None:
    gpu.cufile.refuses = call
    figures = read_from_drive(gpu, tmp_path)
    assert figures["by_host"] > 0
    assert figures["straight"] is None
    assert f"{call}: not supported" in figures["reason"]


@needs_o_direct
def test_a_straight_read_that_falls_short_is_not_a_figure(gpu: Machine, tmp_path: Path) -> None:
    gpu.cufile.reads = "nothing"
    figures = read_from_drive(gpu, tmp_path)
    assert figures["straight"] is None
    assert "cuFile read 0 of" in figures["reason"]


@needs_o_direct
def test_bytes_of_a_drive_that_arrive_wrong_are_counted(gpu: Machine, tmp_path: Path) -> None:
    read = gpu.cufile.read

    def elsewhere(handle: int, address: int, nbytes: int, offset: int, to: int) -> int:
        return read(handle, address, nbytes, offset - 4096, to)

    gpu.cufile.read = elsewhere  # type: ignore[method-assign]
    assert read_from_drive(gpu, tmp_path)["wrong"] == 2 * 4


@needs_o_direct
def test_the_test_of_drives_holds_on_a_stand_in(gpu: Machine, tmp_path: Path) -> None:
    test_drive.test_what_is_read_straight_from_a_drive_is_what_is_there(
        CudaDriver(0, lambda: 0), tmp_path
    )
    gpu.cufile.refuses = "handle_register"
    with pytest.raises(pytest.skip.Exception, match="not supported"):
        test_drive.test_what_is_read_straight_from_a_drive_is_what_is_there(
            CudaDriver(0, lambda: 0), tmp_path
        )


@needs_o_direct
def test_the_tests_of_straight_reads_hold_on_a_stand_in(
    gpu: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_drive, "LENGTHS", (1, 240, 241, 4096, 5000, 1 << 14))
    monkeypatch.setattr(test_drive, "SLOT_BYTES", 1 << 14)
    monkeypatch.setattr(test_drive, "FILE_BYTES", 1 << 17)
    vram: Any = SimpleNamespace(make=lambda nbytes: Place(gpu, nbytes))
    driver = CudaDriver(0, lambda: 0)
    test_drive.test_checksums_taken_on_the_gpu_are_those_of_the_host(driver)
    test = test_drive.test_blocks_read_straight_by_threads_are_delivered_and_damage_is_seen
    test(driver, vram, tmp_path)
    gpu.cufile.refuses = "handle_register"
    with pytest.raises(pytest.skip.Exception, match="not supported"):
        test(driver, vram, tmp_path)
    assert not gpu.driver.wrong
    assert not gpu.cufile.left
    assert not gpu.driver.on_host


def test_a_test_that_fails_there_fails_the_command(
    gpu: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "QUICK", SMALL)
    monkeypatch.setattr(command, "run_tests", lambda: 1)
    assert command.main(["--quick", "--dir", tempfile.gettempdir()]) == 1


def test_the_tests_are_found_without_the_projects_settings(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Here each is skipped, for want of a GPU."""
    assert command.run_tests() == 0
    assert " skipped" in capfd.readouterr().out


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("way", test_copies.WAYS)
def test_the_tests_for_a_gpu_hold_on_a_stand_in(gpu: Machine, way: str, pinned: bool) -> None:
    driver = CudaDriver(0, lambda: 0)
    test_copies.test_what_is_saved_is_loaded_elsewhere(driver, "odd", way, pinned)
    assert not gpu.driver.wrong


@pytest.mark.parametrize(
    "kind",
    [("one piece", "fp8", "bfloat16"), ("layers", "int4", "float16"), ("odd", "int4", "float32")],
)
def test_the_test_of_coding_holds_on_a_stand_in(gpu: Machine, kind: tuple[str, str, str]) -> None:
    test_copies.test_coded_blocks_are_the_references_bytes(CudaDriver(0, lambda: 0), *kind)
    assert not gpu.driver.wrong


def test_the_test_of_waiting_holds_on_a_stand_in(gpu: Machine) -> None:
    driver = CudaDriver(0, lambda: 0)
    test_copies.test_a_store_waits_for_the_engine_and_a_load_does(driver, Torch(gpu.driver))


def test_what_it_imports_is_on_a_bare_machine() -> None:
    """Beside torch and CuPy: no vLLM, and nothing of the server's."""
    script = (
        "import sys\n"
        "import kvstore_benchmarks.gpu.__main__, kvstore_connectors.vllm.blocks\n"
        "for name in ('vllm', 'grpc', 'lmdb', 'msgspec', 'google_crc32c', 'matplotlib'):\n"
        "    assert name not in sys.modules, name\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
