"""Connections that say nothing, or too many of them, cost no descriptors for long."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import grpc
import grpc.aio
import pytest

from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore_server import limits
from kvstore_server.app import App
from tests.integration.server.harness import (
    PATIENCE_S,
    eventually,
    in_loop,
    serving,
    stub_for,
    tcp_target,
)


def ended(connection: socket.socket) -> bool:
    """The server has closed it."""
    try:
        while data := connection.recv(4096):
            del data
        return True
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def connect(stack: ExitStack, app: App) -> socket.socket:
    assert app.tcp_port is not None
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", app.tcp_port)))
    connection.setblocking(False)
    return connection


@in_loop
async def test_a_connection_that_says_nothing_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_MS", 300)
    async with serving(tmp_path) as app:
        with ExitStack() as stack:
            silent = [connect(stack, app) for _ in range(20)]
            await eventually(lambda: all(map(ended, silent)))


@in_loop
async def test_there_are_no_more_connections_than_sessions_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SPARE_CONNECTIONS", 4)
    async with serving(tmp_path, server__max_sessions="4") as app:
        with ExitStack() as stack:
            many = [connect(stack, app) for _ in range(50)]
            await eventually(lambda: sum(map(ended, many)) >= 38)
        async with stub_for(tcp_target(app)) as stub:
            info = pb.GetServerInfoRequest()
            await stub.GetServerInfo(info, wait_for_ready=True, timeout=PATIENCE_S)


@in_loop
async def test_a_connection_that_is_idle_ends_and_its_client_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONNECTION_IDLE_MS", 300)
    async with (
        serving(tmp_path) as app,
        grpc.aio.insecure_channel(tcp_target(app)) as channel,
        stub_for(tcp_target(app)) as stub,
    ):
        await stub.GetServerInfo(pb.GetServerInfoRequest())
        state = channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            await channel.wait_for_state_change(state)
            # It may have ended for being idle again.
            state = channel.get_state(try_to_connect=True)
        await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        await stub.GetServerInfo(pb.GetServerInfoRequest())
