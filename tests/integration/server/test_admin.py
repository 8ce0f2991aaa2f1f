"""The admin port: probes that mean something, and metrics that are there."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path

import pytest

import kvstore_server.admin
from kvstore_server.app import App
from kvstore_server.limits import ADMIN_REQUEST_BYTES
from tests.integration.server.harness import (
    PATIENCE_S,
    acquire,
    eventually,
    eventually_answered,
    http_get,
    in_loop,
    put,
    register,
    remote_session,
    serving,
    small_config,
    stub_for,
    tcp_target,
    without_admin,
)
from tests.unit.device.gpus import StandInGpu

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"


@in_loop
async def test_a_working_server_is_live_and_ready(tmp_path: Path) -> None:
    async with serving(tmp_path) as app:
        assert app.admin_port is not None
        assert await http_get(app.admin_port, "/livez") == (200, "ok\n")
        assert await http_get(app.admin_port, "/readyz") == (200, "ok\n")
        assert (await http_get(app.admin_port, "/"))[0] == 404


@in_loop
async def test_a_server_whose_housekeeping_died_is_not_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as app:
        assert app.admin_port is not None
        before_ns, long_ns = app.store.progress_ns(), int(2e9 * PATIENCE_S)
        await eventually(lambda: app.store.progress_ns() > before_ns)
        assert (await http_get(app.admin_port, "/livez"))[0] == 200
        monkeypatch.setattr(app.store, "progress_ns", lambda: before_ns - long_ns)
        assert await http_get(app.admin_port, "/livez") == (503, "no progress\n")
        assert (await http_get(app.admin_port, "/readyz"))[0] == 503


@in_loop
@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /livez HTTP/1.1\r\n\r\n", 405),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\n" + b"a: b\r\n" * ADMIN_REQUEST_BYTES, 0),
    ],
    ids=["post", "nonsense", "endless"],
)
async def test_what_is_not_a_small_get_is_refused(
    tmp_path: Path, request_bytes: bytes, status: int
) -> None:
    async with serving(tmp_path) as app:
        assert app.admin_port is not None
        assert (await http_get(app.admin_port, "", request_bytes))[0] == status
        assert (await http_get(app.admin_port, "/livez"))[0] == 200


@in_loop
async def test_idle_connections_do_not_shut_others_out_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore_server.admin, "ADMIN_CONNECTIONS", 2)
    async with serving(tmp_path) as app:
        assert app.admin_port is not None
        port = app.admin_port

        async def answers() -> bool:
            return (await http_get(port, "/livez"))[0] == 200

        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        assert not await answers()
        for connection in idle:
            connection.close()
        monkeypatch.setattr(kvstore_server.admin, "ADMIN_TIMEOUT_S", 0.2)
        await eventually_answered(answers)
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        await eventually_answered(answers)
        for connection in idle:
            connection.close()


@in_loop
async def test_every_documented_metric_is_live_and_every_live_one_documented(
    tmp_path: Path,
) -> None:
    """Drives a server so that each kind of event happens, DRAM being too small."""
    documented = set(re.findall(r"^\| `(kvstore_\w+)`", OPERATIONS.read_text(), re.MULTILINE))
    gpu = StandInGpu(tmp_path / "gpu.json", 1 << 30)
    sizes = {"nvme__capacity": "256MiB", "dram__capacity": "2MiB", "vram__gpus": gpu.name}
    sizes["vram__gpudirect"] = "true"
    async with (
        serving(tmp_path, **sizes) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
    ):
        layout_id = await register(stub)
        for number in range(40):
            await put(stub, session, layout_id, number)
        lease = await acquire(stub, session, layout_id, 0)
        assert lease.held == 1
        # No disk fails here: what a failing one reports is reported by hand.
        app.metrics.io_error("read", "EIO")
        assert app.admin_port is not None
        status, text = await http_get(app.admin_port, "/metrics")
        assert status == 200
        samples = set(re.findall(r"^(kvstore_\w+?)(?:\{| )", text, re.MULTILINE))
        live = {
            re.sub(r"_(bucket|sum|count)$", "", name)
            for name in samples
            if not name.endswith("_created")
        }
        assert live == documented
        assert 'kvstore_lookups_total{result="hit",tier="nvme"} 1.0' in text


@in_loop
async def test_no_label_carries_what_a_client_sent(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, stub_for(tcp_target(app)) as stub:
        async with remote_session(stub) as session:
            await put(stub, session, await register(stub), 0x5EC4E7)
        assert app.admin_port is not None
        _, text = await http_get(app.admin_port, "/metrics")
        labels = set(re.findall(r'[{,](\w+)="', text))
        assert labels <= {
            "version", "tier", "op", "errno", "method", "le", "reason", "where",
            "direction", "result", "src", "dst", "class", "codec",
        }  # fmt: skip


@in_loop
async def test_a_default_admin_port_that_is_taken_does_not_stop_a_second_user(
    tmp_path: Path,
) -> None:
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # Taken by somebody else does as well.
            taken.bind(("127.0.0.1", 9440))
            taken.listen()
        app = App(without_admin(small_config(tmp_path)))
        await app.start()
        try:
            assert app.admin_port not in (None, 9440)
        finally:
            await app.stop()
