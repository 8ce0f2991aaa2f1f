"""A real server on a disk that is smaller than it was told: a tmpfs of a fixed size."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client.lease import Layout
from kvstore.client.sync import Client
from kvstore.tiers.nvme_fsck import check
from tests.integration.server.harness import daemon
from tests.integration.server.test_killed import SPEC, content, key

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """48 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m,mode=0700", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def ask(client: Client, layout: Layout, numbers: range) -> list[int]:
    """Which blocks are there; each as it was stored."""
    held = []
    for start in range(0, len(numbers), 40):
        part = numbers[start : start + 40]
        for number, got in zip(part, client.get_many(layout, [key(n) for n in part]), strict=True):
            if got is not None:
                assert bytes(got) == content(number)
                held.append(number)
    return held


def test_a_disk_that_is_full_costs_blocks_and_nothing_else(
    small_disk: Path, tmp_path: Path
) -> None:
    data = small_disk / "data"
    sizes = ("--nvme-capacity", "128MiB", "--nvme-path", str(data))
    numbers = range(1, 2001)
    with daemon(tmp_path, *sizes) as server:
        server.wait_ready()
        with Client(str(server.socket_path)) as client:
            layout = client.register_layout(SPEC)
            for start in range(1, 2001, 40):
                part = numbers[start - 1 : start + 39]
                client.put_many(layout, [key(n) for n in part], [content(n) for n in part])
            client.flush()
            held = ask(client, layout, numbers)
            assert len(held) * SPEC.block_bytes > 10 * MIB, "the disk is used"
            nvme = client.stats().tiers[1]
            assert nvme.healthy
            assert nvme.blocks
        server.process.kill()
        server.process.wait()
        Path(f"{server.socket_path}.json").unlink()
    assert check(data).sound
    with daemon(tmp_path, *sizes) as server:
        server.wait_ready()
        with Client(str(server.socket_path)) as client:
            layout = client.register_layout(SPEC)
            held = ask(client, layout, numbers)
            assert len(held) * SPEC.block_bytes > 10 * MIB, "what is on disk is found"


def test_no_room_for_anything_says_what_to_do(small_disk: Path, tmp_path: Path) -> None:
    with (small_disk / "others").open("wb") as stream:
        try:
            while True:
                stream.write(bytes(MIB))
                stream.flush()
        except OSError:
            pass
    with daemon(tmp_path, "--nvme-path", str(small_disk / "data")) as server:
        code, said = server.end()
    assert code == os.EX_CANTCREAT
    assert "free some space" in said
