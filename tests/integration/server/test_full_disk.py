"""A real server on a disk that is smaller than it was told: a tmpfs of a fixed size."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvstore.tiers.nvme_fsck import check
from tests.integration.server.blocks import SPEC, ask, connected, find_all, kill, store
from tests.integration.server.harness import daemon

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
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill_up(file: Path) -> None:
    """To the last page."""
    for step in (MIB, 4096):
        with file.open("ab", buffering=0) as stream, suppress(OSError):
            while True:
                stream.write(bytes(step))


def test_a_disk_that_is_full_costs_blocks_and_nothing_else(
    small_disk: Path, tmp_path: Path
) -> None:
    data = small_disk / "data"
    sizes = ("--nvme-capacity", "128MiB", "--nvme-path", str(data))
    numbers = range(1, 2001)
    with connected(tmp_path, *sizes) as (server, client, layout):
        store(client, layout, numbers)
        client.flush()
        held = ask(client, layout, numbers)
        assert len(held) * SPEC.block_bytes > 10 * MIB, "the disk is used"
        nvme = client.stats().tiers[1]
        assert nvme.healthy
        assert nvme.blocks
        kill(server)
    assert check(data).sound
    with connected(tmp_path, *sizes) as (_, client, layout):
        held = ask(client, layout, numbers)
        assert len(held) * SPEC.block_bytes > 10 * MIB, "what is on disk is found"


def test_a_disk_that_others_have_filled_is_used_all_the_same(
    small_disk: Path, tmp_path: Path
) -> None:
    data = small_disk / "data"
    sizes = ("--nvme-capacity", "32MiB", "--nvme-path", str(data))
    numbers = range(1, 101)
    with connected(tmp_path, *sizes) as (_, client, layout):
        store(client, layout, numbers)
        client.flush()
    fill_up(small_disk / "others")
    assert check(data).sound
    with connected(tmp_path, *sizes) as (_, client, layout):
        find_all(client, layout, numbers)
        store(client, layout, range(201, 301))
        client.flush()
        assert client.stats().tiers[1].healthy
    assert check(data).sound


def test_no_room_for_anything_says_what_to_do(small_disk: Path, tmp_path: Path) -> None:
    fill_up(small_disk / "others")
    with daemon(tmp_path, "--nvme-path", str(small_disk / "data")) as server:
        code, said = server.end()
    assert code == os.EX_CANTCREAT
    assert "free some space" in said
