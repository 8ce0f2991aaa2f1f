"""The `kvstore` command: it starts light, and says what is wrong with a command line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

import kvstore
from kvstore.cli.main import main
from kvstore.config_keys import KEYS


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_wrong_command_or_flag_is_refused_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "did you mean status?" in fails(capsys, "staus")
    assert "did you mean --endpoint?" in fails(capsys, "status", "--endpont", "x")
    assert "did you mean --dram-capacity?" in fails(capsys, "serve", "--dram-capcity=1GiB")
    assert fails(capsys, "bench", "local", "more") == (
        "kvstore bench local: unknown argument more (`kvstore bench local --help` has all)\n"
    )
    # No abbreviations: a later flag must not change what a script means.
    assert "unknown argument" in fails(capsys, "serve", "--dram-cap", "1GiB")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("serve", "check-config", "status", "flush", "clear"))


def test_every_key_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert all(key.flag in shown for key in KEYS.values())


def test_check_config_prints_a_file_that_means_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--dram-capacity", "64MiB", "--nvme-capacity", "0", "--tenants-uids", "7=bob"]
    args += ["--nvme-path", str(tmp_path)]
    assert main(["check-config", *args]) == 0
    shown = capsys.readouterr().out
    assert "flag --dram-capacity" in shown
    file = tmp_path / "x.toml"
    file.write_text(shown.replace("4MiB (auto)", "4MiB"))
    assert main(["check-config", "--json", "--config", str(file)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["dram.capacity"]["value"] == "64MiB"
    assert again["tenants.uids"] == {"value": {"7": "bob"}, "source": f"file {file}"}


def test_a_bad_configuration_is_one_line_and_code_78(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check-config", "--lease-ms", "soon"]) == os.EX_CONFIG
    assert capsys.readouterr().err.startswith("kvstore: server.lease_ms (flag --lease-ms): ")


def test_a_disk_that_a_server_cannot_start_with_is_refused_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--dram-capacity", "8GiB", "--nvme-capacity", "512MiB", "--nvme-path", str(tmp_path)]
    for command in ("check-config", "serve"):
        assert main([command, *sizes]) == os.EX_CONFIG
        assert capsys.readouterr().err.startswith("kvstore: nvme.capacity (flag --nvme-capacity): ")


def test_the_version_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{kvstore.__version__}\n"


@pytest.fixture
def stranger() -> Iterator[str]:
    """The address of a gRPC server that has none of the calls."""
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


def test_a_server_of_another_version_is_told_from_one_that_is_gone(
    stranger: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--endpoint", stranger]) == os.EX_UNAVAILABLE
    assert "another version" in capsys.readouterr().err


def test_a_proxy_in_the_environment_is_not_asked_for_a_server_of_this_host(
    stranger: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    main(["status", "--endpoint", stranger])
    assert "no server answers" not in capsys.readouterr().err


def test_a_server_that_hangs_is_told_from_one_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("kvstore.cli.status.CALL_TIMEOUT_S", 0.2)
        assert main(["status", "--endpoint", endpoint]) == os.EX_UNAVAILABLE
    assert "hangs" in capsys.readouterr().err


def test_status_loads_neither_engine_nor_server() -> None:
    probe = (
        "import sys, kvstore.cli.main, kvstore.cli.status;"
        "heavy = ('kvstore.store', 'kvstore.tiers.nvme', 'kvstore_server.app', 'lmdb', 'vllm');"
        "print([name for name in heavy if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert answer.stdout == "[]\n", answer.stderr
