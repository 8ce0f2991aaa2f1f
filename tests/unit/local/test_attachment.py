"""The client's half of the attach conversation, against a scripted server."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from kvstore.errors import BadRequest, InternalError, NoTenant, Unavailable
from kvstore.local.attach import (
    Attached,
    AttachRequest,
    ErrorReply,
    ExtentReply,
    MapRequest,
    Request,
    encode_reply,
)
from kvstore.local.attachment import Attachment
from tests.unit.descriptors import open_descriptors
from tests.unit.local.attach_server import EXTENT_BYTES, SESSION, AttachServer, sealed_memfd


def test_attaching_tells_session_epoch_and_tenant(tmp_path: Path) -> None:
    with AttachServer(str(tmp_path / "a")) as server:
        attachment = Attachment.connect(server.path, 30)
        assert attachment.session == SESSION
        assert attachment.epoch == b"e1"
        assert attachment.extent_bytes == EXTENT_BYTES
        assert attachment.tenant == "default"
        attachment.close()


def test_an_extent_comes_as_a_descriptor_that_is_not_inherited(tmp_path: Path) -> None:
    with AttachServer(str(tmp_path / "a")) as server:
        attachment = Attachment.connect(server.path, 30)
        descriptor, nbytes = attachment.fetch_extent(7, 30)
        assert nbytes == os.fstat(descriptor).st_size == EXTENT_BYTES
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
        attachment.close()


def test_the_connection_goes_on_after_an_error(tmp_path: Path) -> None:
    with AttachServer(str(tmp_path / "a")) as server:
        attachment = Attachment.connect(server.path, 30)
        with pytest.raises(BadRequest, match="not yours"):
            attachment.fetch_extent(13, 30)
        os.close(attachment.fetch_extent(7, 30)[0])
        attachment.close()


def test_nobody_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        Attachment.connect(str(tmp_path / "none"), 1)


def test_a_path_too_long_for_a_socket_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="107"):
        Attachment.connect("/tmp/" + "x" * 200, 1)


def test_a_refused_user_gets_the_servers_error(tmp_path: Path) -> None:
    def refuse(connection: socket.socket, request: Request) -> None:
        connection.send(encode_reply(ErrorReply("NO_TENANT", "uid 5 has no tenant")))

    before = open_descriptors()
    path = str(tmp_path / "a")
    with AttachServer(path, refuse), pytest.raises(NoTenant, match="uid 5"):
        Attachment.connect(path, 30)
    assert open_descriptors() == before


def test_a_server_that_takes_connections_and_says_nothing_costs_the_timeout(
    tmp_path: Path,
) -> None:
    with AttachServer(str(tmp_path / "a"), lambda *_: None) as server:
        started = time.monotonic()
        with pytest.raises(Unavailable):
            Attachment.connect(server.path, 0.2)
        assert time.monotonic() - started < 20


def test_a_full_backlog_costs_the_timeout(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
            first.connect(path)
            with pytest.raises(Unavailable):
                Attachment.connect(path, 0.2)


def test_a_late_reply_is_not_taken_for_the_next_ones(tmp_path: Path) -> None:
    """A hung server answers everything when it goes on; each answer must still
    meet its own question."""
    go_on = threading.Event()
    server = AttachServer(str(tmp_path / "a"))

    def hang_once(connection: socket.socket, request: Request) -> None:
        if isinstance(request, MapRequest):
            go_on.wait(60)
        server.usual(connection, request)

    server.answer = hang_once
    before = open_descriptors()
    with server:
        attachment = Attachment.connect(server.path, 30)
        for extent in (1, 2):
            with pytest.raises(Unavailable):
                attachment.fetch_extent(extent, 0.1)
        go_on.set()
        descriptor, _ = attachment.fetch_extent(3, 30)
        assert os.fstat(descriptor).st_ino == os.fstat(server.extents[3]).st_ino
        os.close(descriptor)
        attachment.close()
    assert open_descriptors() <= before, "a late reply's descriptor was kept"


@pytest.mark.parametrize("surplus", [0, 2])
def test_an_extent_without_exactly_one_descriptor_is_refused_and_nothing_leaks(
    tmp_path: Path, surplus: int
) -> None:
    extra = [sealed_memfd() for _ in range(surplus)]

    def answer(connection: socket.socket, request: Request) -> None:
        if isinstance(request, AttachRequest):
            connection.send(encode_reply(Attached(SESSION, b"e", EXTENT_BYTES, "t")))
        else:
            reply = encode_reply(ExtentReply(request.extent, EXTENT_BYTES))
            socket.send_fds(connection, [reply], extra)

    with AttachServer(str(tmp_path / "a"), answer) as server:
        attachment = Attachment.connect(server.path, 30)
        before = open_descriptors()
        with pytest.raises(InternalError):
            attachment.fetch_extent(7, 30)
        assert open_descriptors() == before
        attachment.close()
    for descriptor in extra:
        os.close(descriptor)


def test_the_loss_of_the_server_is_noticed_without_asking(tmp_path: Path) -> None:
    def hang_up(connection: socket.socket, request: Request) -> None:
        if isinstance(request, AttachRequest):
            connection.send(encode_reply(Attached(SESSION, b"e", EXTENT_BYTES, "t")))
        else:
            connection.shutdown(socket.SHUT_RDWR)

    with AttachServer(str(tmp_path / "a"), hang_up) as server:
        attachment = Attachment.connect(server.path, 30)
        assert attachment.alive()
        with pytest.raises(Unavailable):
            attachment.fetch_extent(7, 30)
        assert not attachment.alive()
        attachment.close()


def test_closing_ends_the_session_and_is_final(tmp_path: Path) -> None:
    with AttachServer(str(tmp_path / "a")) as server:
        attachment = Attachment.connect(server.path, 30)
        attachment.close()
        attachment.close()
        assert server.ended.wait(30)
        assert not attachment.alive()
        with pytest.raises(Unavailable):
            attachment.fetch_extent(7, 1)


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_keep_its_parents_session(tmp_path: Path) -> None:
    with AttachServer(str(tmp_path / "a")) as server:
        attachment = Attachment.connect(server.path, 30)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)  # Lives until the parent says so.
            os._exit(0 if not attachment.alive() else 1)
        os.close(reading)
        attachment.close()
        assert server.ended.wait(30), "the child holds the connection open"
        os.close(writing)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
