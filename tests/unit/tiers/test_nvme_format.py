"""What is on disk is of the version it says: who changes the format changes the version.

A directory of this version is opened by every server of this version. So where one of these
digests changes, `DATA_VERSION` has to; or else a server misreads what an earlier one wrote,
which costs its blocks, or takes it for damage.
"""

from __future__ import annotations

from pathlib import Path

import xxhash

from kvstore.tiers.base import BlockHeader
from kvstore.tiers.faulty import MemoryFile
from kvstore.tiers.nvme_home import DATA_VERSION, DataHome
from kvstore.tiers.nvme_index import encode_record
from kvstore.tiers.nvme_segment import Geometry, Segment, file_name
from kvstore.tiers.nvme_slot import Place, Scratch, Stored, encode_header, slot_bytes

STORED = Stored(
    BlockHeader(b"k" * 16, b"p" * 16, b"l" * 16, "alice", 123_456, (1 << 64) - 1),
    sequence=7,
    place=Place(3, 17, (1 << 41) + 5),
)

DIGESTS = {
    "header": "62563b295b1e897a",
    "summary": "938faf59b5bfe7bd",
    "record": "9c848be2b524a9f8",
    "layouts": "061f8f7cd5cbd1ce",
    "sizes": "3eae948250ff9e5a",
}


def header() -> bytes:
    page = Scratch().header
    encode_header(page, STORED)
    return bytes(page)


def summary() -> bytes:
    segment = Segment(3, MemoryFile(0), Geometry(1 << 20))
    segment.begin(77, 1 << 16)
    for slot in (5, 9):
        segment.strike(slot)
    segment.spoil(9)
    page, offset = segment.encode()
    return page + bytes([offset // len(page)])


def layouts(home: Path) -> bytes:
    opened = DataHome.open(home)
    opened.write_layouts({("alice", b"l" * 16): {"model": "m", "block_bytes": 123_456}})
    opened.close()
    return (home / "layouts").read_bytes() + (home / "VERSION").read_bytes()


def test_the_format_changes_with_its_version_only(tmp_path: Path) -> None:
    geometry = Geometry(1 << 20)
    sizes = (slot_bytes(123_456), geometry.data_offset, geometry.file_bytes)
    parts = {
        "header": header(),
        "summary": summary(),
        "record": encode_record(STORED),
        "layouts": layouts(tmp_path / "home"),
        "sizes": repr((*sizes, file_name(3))).encode(),
    }
    found = {name: xxhash.xxh3_64_hexdigest(part) for name, part in parts.items()}
    assert (DATA_VERSION, found) == (3, DIGESTS)
