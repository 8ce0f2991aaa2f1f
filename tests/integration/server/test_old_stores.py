"""Stores that servers left behind, kept as they were: of this version each opens, of an
earlier one it says what to do.

`stores/` has the data directories, `data-VERSION...`; in those of version 3 a server has
stored and flushed the blocks 1 to 20 and was stopped, or stored more and was killed.
Whoever changes the version keeps a store of it here.
"""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path

import pytest

from kvstore.cli.main import main
from kvstore.tiers.nvme_fsck import check
from kvstore.tiers.nvme_home import DATA_VERSION
from tests.integration.server.blocks import connected, find_all
from tests.integration.server.harness import daemon

STORES = sorted((Path(__file__).parent / "stores").iterdir())
SIZES = ("--nvme-capacity", "32MiB")
FLUSHED = range(1, 21)


def version_of(store: Path) -> int:
    found = re.match(r"data-(\d+)", store.name)
    assert found is not None
    return int(found[1])


def unpack(store: Path, target: Path) -> Path:
    with tarfile.open(store) as archive:
        if hasattr(tarfile, "data_filter"):  # Early releases of Python 3.11 have none.
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(target / "data")
    return target / "data"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "LOCK")
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "store", [s for s in STORES if version_of(s) == DATA_VERSION], ids=lambda s: s.name
)
def test_a_store_of_this_version_is_served_as_it_was_left(store: Path, tmp_path: Path) -> None:
    data = unpack(store, tmp_path)
    assert check(data).sound
    with connected(tmp_path, *SIZES) as (_, client, layout):
        find_all(client, layout, FLUSHED)


@pytest.mark.parametrize(
    "store", [s for s in STORES if version_of(s) < DATA_VERSION], ids=lambda s: s.name
)
def test_a_store_of_an_earlier_version_is_left_alone_and_says_what_to_do(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = unpack(store, tmp_path)
    before = contents(data)
    with daemon(tmp_path, *SIZES) as server:
        code, said = server.end()
    assert code == os.EX_DATAERR
    assert main(["fsck", "--nvme-path", str(data)]) == os.EX_DATAERR
    for line in (said, capsys.readouterr().err):
        assert f"has version '{version_of(store)}', this server needs {DATA_VERSION}" in line
        assert "use the server that wrote it, or another directory, or, as it is a cache, " in line
        assert line.endswith(f"start over: rm -r {data}\n")
        assert line.count("\n") == 1
    assert contents(data) == before


def test_there_is_a_store_of_this_version() -> None:
    assert DATA_VERSION in map(version_of, STORES)
