"""Directories, files and listeners of other users are told from one's own."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from kvstore.errors import Unavailable, Untrusted
from kvstore.local.attachment import Attachment
from kvstore.local.ownership import check_directory, make_directory, open_file
from tests.unit.local.attach_server import AttachServer

ANOTHER = 1001
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.mark.parametrize(("socket_mode", "mode"), [(0o600, 0o700), (0o660, 0o710), (0o666, 0o711)])
def test_a_directory_lets_in_whom_its_sockets_do(
    tmp_path: Path, socket_mode: int, mode: int
) -> None:
    make_directory(tmp_path / "a" / "b", socket_mode)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == mode


def test_a_directory_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o2775)
    make_directory(tmp_path / "a")
    assert (tmp_path / "a").stat().st_mode & 0o7777 == 0o2775
    check_directory(tmp_path / "a")


@as_root
def test_a_directory_of_another_user_is_left_alone(tmp_path: Path) -> None:
    os.chown(tmp_path, ANOTHER, ANOTHER)
    for look in (check_directory, make_directory):
        with pytest.raises(Untrusted, match="another user"):
            look(tmp_path)


@as_root
def test_a_link_that_another_user_can_turn_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    check_directory(tmp_path / "link")
    os.chown(tmp_path / "link", ANOTHER, ANOTHER, follow_symlinks=False)
    with pytest.raises(Untrusted, match="another user"):
        check_directory(tmp_path / "link")


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_where_others_can_write_nothing_is_private(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    check_directory(tmp_path)
    with pytest.raises(Untrusted, match="others can write"):
        check_directory(tmp_path, private=True)


def test_no_directory_is_no_server(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file") as raised:
        check_directory(tmp_path / "none")
    assert not isinstance(raised.value, Untrusted)


def test_a_file_is_made_for_its_user_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "f")
    for _ in range(2):
        os.close(open_file(path, os.O_WRONLY | os.O_CREAT))
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_what_is_put_in_a_files_place_is_neither_written_nor_waited_for(tmp_path: Path) -> None:
    """A link, a second name of a file of ours, a pipe with and without a reader."""
    mine = tmp_path / "mine"
    mine.touch()
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "name").hardlink_to(mine)
    os.mkfifo(tmp_path / "silent")
    os.mkfifo(tmp_path / "heard")
    reader = os.open(tmp_path / "heard", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "name", "silent", "heard"):
        with pytest.raises((OSError, Untrusted)):
            open_file(str(tmp_path / name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.close(reader)


@as_root
def test_another_users_file_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    os.chown(tmp_path / "f", ANOTHER, ANOTHER)
    with pytest.raises(Untrusted, match="not a file of this user's"):
        open_file(str(tmp_path / "f"), os.O_RDONLY)


def listen_as_another(listener: socket.socket) -> None:
    """The kernel keeps who listened last."""
    os.seteuid(ANOTHER)
    try:
        listener.listen(4)
    finally:
        os.seteuid(0)


@as_root
def test_a_listener_of_another_user_is_not_ones_own_server(tmp_path: Path) -> None:
    """Named, it may be anybody's, such as a service account's."""
    with AttachServer(str(tmp_path / "a")) as server:
        Attachment.connect(server.path, 5, own=True).close()
        listen_as_another(server._listener)
        with pytest.raises(Untrusted, match=f"user {ANOTHER}'s"):
            Attachment.connect(server.path, 5, own=True)
        Attachment.connect(server.path, 30).close()
