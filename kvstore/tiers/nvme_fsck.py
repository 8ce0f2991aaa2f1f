"""Verify a data directory that no server uses, and drop what is damaged.

Every block is read and compared with its checksums; what the index, the summaries and
the headers say is compared with each other. Nothing is changed unless that is asked
for, and then only by dropping: a cache has nothing to mend a block with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.errors import CorruptBlock, DataUnusable
from kvstore.tiers import nvme_slot
from kvstore.tiers.nvme_disk import Directory, DiskFile, direct_io_works, write_all
from kvstore.tiers.nvme_home import DataHome, unusable
from kvstore.tiers.nvme_index import Batch, Index, is_there, sound, start_over
from kvstore.tiers.nvme_log import read_slot
from kvstore.tiers.nvme_recovery import load_summary
from kvstore.tiers.nvme_segment import Geometry, Segment, file_name, numbers_of
from kvstore.tiers.nvme_slot import HEADER_BYTES
from kvstore.types import ALIGNMENT

_SUMMARY_PAGES = 64


@dataclass
class Report:
    """What was found. Whatever is not sound costs misses, never wrong bytes."""

    path: str
    segments: int = 0
    blocks: int = 0
    """Whole ones, that a server would find."""
    block_bytes: int = 0
    untold_blocks: int = 0
    """Of those, what the index does not tell of; a server's start reads them."""
    quarantined_pages: int = 0
    damaged_blocks: list[str] = field(default_factory=list)
    damaged_segments: list[str] = field(default_factory=list)
    no_secret: bool = False
    """Then no server finds any of the blocks: they were named with it."""
    no_index: bool = False
    """A start makes it from the segments."""
    damaged_index: bool = False
    damaged_layouts: bool = False
    repaired: bool = False

    @property
    def sound(self) -> bool:
        return not (
            self.damaged_blocks
            or self.damaged_segments
            or self.damaged_index
            or self.damaged_layouts
        )


def check(path: Path, *, repair: bool = False) -> Report:
    """Reads all there is. With `repair` what is damaged is dropped. Raises `DataInUse`,
    `DataVersion`, `DataUnusable`."""
    path = path.absolute()
    if not (path / "VERSION").is_file():
        raise DataUnusable(f"{path} is not a data directory")
    home = DataHome.open(path)
    try:
        return _check(home, Report(str(path)), repair=repair)
    except OSError as error:
        raise unusable(path, error) from error
    finally:
        home.close()


def _check(home: DataHome, report: Report, *, repair: bool) -> Report:
    report.no_secret = not (home.path / "secret").exists()
    if not report.no_secret:
        home.secret()
    report.damaged_layouts = (home.path / "layouts").exists() and not home.layouts_sound()
    disk = Directory(home.segments, direct=direct_io_works(home.segments))
    numbers = numbers_of(disk)
    sizes = [(home.segments / file_name(number)).stat().st_size for number in numbers]
    geometry = _geometry(sizes)
    with _index_of(home, report) as index:
        for number in numbers:
            _check_segment(disk, number, geometry, index, report, repair=repair)
    if repair and not report.sound:
        if report.damaged_index:
            start_over(home.index, "the index is damaged")
        if report.damaged_layouts:
            (home.path / "layouts").unlink()
        report.repaired = True
    return report


@contextmanager
def _index_of(home: DataHome, report: Report) -> Iterator[Index | None]:
    """None where there is none that can be read."""
    if not is_there(home.index):
        report.no_index = True
        yield None
        return
    if not sound(home.index):
        report.damaged_index = True
        yield None
        return
    index = Index.open_trusted(home.index, (home.index / "data.mdb").stat().st_size + (4 << 20))
    try:
        yield index
        index.sync()
        index.vouch()
    finally:
        index.close()


def _check_segment(
    disk: Directory,
    number: int,
    geometry: Geometry | None,
    index: Index | None,
    report: Report,
    *,
    repair: bool,
) -> None:
    name = file_name(number)
    file = disk.open(name)
    report.segments += 1
    try:
        segment = _segment(number, file, geometry)
    except CorruptBlock as error:
        report.damaged_segments.append(f"{name}: {error}")
        file.close()
        if repair:
            disk.remove(name)
            if index is not None:
                index.drop_segment(number)
        return
    report.quarantined_pages += len(segment.bad)
    damaged = _check_slots(segment, index, report)
    if repair and damaged:
        for slot in damaged:
            segment.spoil(slot)
            segment.strike(slot)
        summary, offset = segment.encode()
        page = nvme_slot.aligned(len(summary))
        page[:] = summary
        write_all(file, [page], offset)
        file.fdatasync()
        if index is not None:
            index.apply(Batch(blocks={(number, slot): None for slot in damaged}))
    file.close()


def _segment(number: int, file: DiskFile, geometry: Geometry | None) -> Segment:
    """Raises `CorruptBlock` where it holds nothing that can be told."""
    if geometry is None or file.nbytes != geometry.file_bytes:
        than = "" if geometry is None else f"; others have {geometry.file_bytes}"
        raise CorruptBlock(f"no segment has {file.nbytes} bytes{than}")
    segment = Segment(number, file, geometry)
    load_summary(segment, geometry)
    return segment


def _check_slots(segment: Segment, index: Index | None, report: Report) -> list[int]:
    """The damaged slots: those that the index tells of, or without it those with a
    header of this life, and that hold no whole block."""
    told: set[int] = set()
    if index is not None:
        for slots, table in index.entries(segment.number):
            told.update(slots[table["life"] == segment.life].tolist())
    damaged: list[int] = []
    header = nvme_slot.aligned(HEADER_BYTES)
    payload = nvme_slot.aligned(max(HEADER_BYTES, segment.slot_bytes - HEADER_BYTES))
    for slot in range(segment.slots):
        if segment.is_dead(slot):
            continue
        why = ""
        try:
            stored = read_slot(segment, slot, header, payload)
            report.blocks += 1
            report.block_bytes += stored.header.length
            report.untold_blocks += index is not None and slot not in told
            continue
        except CorruptBlock as error:
            why = str(error)
        except OSError as error:
            why = error.strerror or str(error)
        if slot in told or (index is None and slot < segment.settled and any(header)):
            damaged.append(slot)
            report.damaged_blocks.append(f"{file_name(segment.number)} slot {slot}: {why}")
    return damaged


def _geometry(sizes: list[int]) -> Geometry | None:
    """Of most of the segments, whose files are so large: one cut short may look like a
    smaller one. None where that is no segment's size."""
    file_bytes = max(sizes, key=lambda size: (sizes.count(size), size), default=0)
    for pages in range(1, _SUMMARY_PAGES):
        data_bytes = file_bytes - 2 * pages * ALIGNMENT
        if data_bytes > 0 and Geometry(data_bytes).file_bytes == file_bytes:
            return Geometry(data_bytes)
    return None
