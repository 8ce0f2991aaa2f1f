"""Verify a data directory that no server uses, and drop what is damaged.

Every block is read and compared with its checksums; what the index, the summaries and
the headers say is compared with each other. Nothing is changed unless that is asked
for, and then only by dropping: a cache has nothing to mend a block with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    strange_blocks: int = 0
    """Of those, what is in layouts that nobody told of; a server's start drops them."""
    untold_blocks: int = 0
    """Of those, what the index does not tell of; a server's start reads them."""
    quarantined_pages: int = 0
    half_summaries: int = 0
    """Segments of whose summary one copy is not whole: the power failed, or it is damaged.
    Nothing is lost by it."""
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
    try:
        if not (path / "VERSION").is_file():
            raise DataUnusable(f"{path} is not a data directory: it has no VERSION; name another")
    except OSError as error:
        raise unusable(path, error) from error
    home = DataHome.open(path)
    try:
        return _Check(home, Report(str(path)), repair=repair).all()
    except OSError as error:
        raise unusable(path, error) from error
    finally:
        home.close()


class _Check:
    def __init__(self, home: DataHome, report: Report, *, repair: bool) -> None:
        self._home = home
        self._report = report
        self._repair = repair
        self._disk = Directory(home.segments, direct=direct_io_works(home.segments))
        self._index: Index | None = None
        """None where there is none that can be read."""

    def all(self) -> Report:
        home, report = self._home, self._report
        report.no_secret = not (home.path / "secret").exists()
        if not report.no_secret:
            home.secret()
        report.damaged_layouts = (home.path / "layouts").exists() and not home.layouts_sound()
        self._layouts = home.read_layouts()
        numbers = numbers_of(self._disk)
        sizes = [(home.segments / file_name(number)).stat().st_size for number in numbers]
        self._geometry = _geometry(sizes)
        with self._open_index():
            for number in numbers:
                self._segment(number)
        if self._repair and not report.sound:
            if report.damaged_index:
                start_over(home.index, "the index is damaged")
            if report.damaged_layouts:
                (home.path / "layouts").unlink()
            report.repaired = True
        return report

    @contextmanager
    def _open_index(self) -> Iterator[None]:
        path = self._home.index
        self._report.no_index = not is_there(path)
        self._report.damaged_index = not self._report.no_index and not sound(path)
        if self._report.no_index or self._report.damaged_index:
            yield
            return
        index = Index.open_trusted(path, (path / "data.mdb").stat().st_size + (4 << 20))
        self._index = index
        try:
            yield
            index.sync()
            with suppress(OSError):  # It only makes the next start faster.
                index.vouch()
        finally:
            index.close()

    def _segment(self, number: int) -> None:
        name = file_name(number)
        file = self._disk.open(name)
        self._report.segments += 1
        try:
            segment = self._load(number, file)
        except CorruptBlock as error:
            self._report.damaged_segments.append(f"{name}: {error}")
            file.close()
            if self._repair:
                self._disk.remove(name)
                if self._index is not None:
                    self._index.drop_segment(number)
            return
        self._report.quarantined_pages += len(segment.bad)
        damaged = self._slots(segment)
        if self._repair and damaged:
            self._drop(segment, damaged)
        file.close()

    def _load(self, number: int, file: DiskFile) -> Segment:
        """Raises `CorruptBlock` where it holds nothing that can be told."""
        geometry = self._geometry
        if geometry is None or file.nbytes != geometry.file_bytes:
            than = "" if geometry is None else f"; others have {geometry.file_bytes}"
            raise CorruptBlock(f"no segment has {file.nbytes} bytes{than}")
        segment = Segment(number, file, geometry)
        self._report.half_summaries += not load_summary(segment, geometry)
        return segment

    def _slots(self, segment: Segment) -> list[int]:
        """The damaged slots: those that the index tells of, or without it those with a
        header of this life, and that hold no whole block."""
        report, index = self._report, self._index
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
            try:
                stored = read_slot(segment, slot, header, payload)
            except CorruptBlock as error:
                why = str(error)
            except OSError as error:
                why = error.strerror or str(error)
            else:
                report.blocks += 1
                report.block_bytes += stored.header.length
                report.untold_blocks += index is not None and slot not in told
                layout = stored.header.tenant, stored.header.layout_id
                report.strange_blocks += layout not in self._layouts
                continue
            if slot in told or (index is None and slot < segment.settled and any(header)):
                damaged.append(slot)
                report.damaged_blocks.append(f"{file_name(segment.number)} slot {slot}: {why}")
        return damaged

    def _drop(self, segment: Segment, damaged: list[int]) -> None:
        for slot in damaged:
            segment.spoil(slot)
            segment.strike(slot)
        summary, offset = segment.encode()
        page = nvme_slot.aligned(len(summary))
        page[:] = summary
        write_all(segment.file, [page], offset)
        segment.file.fdatasync()
        if self._index is not None:
            self._index.apply(Batch(blocks={(segment.number, slot): None for slot in damaged}))


def _geometry(sizes: list[int]) -> Geometry | None:
    """Of most of the segments, whose files are so large: one cut short may look like a
    smaller one. None where that is no segment's size."""
    file_bytes = max(sizes, key=lambda size: (sizes.count(size), size), default=0)
    for pages in range(1, _SUMMARY_PAGES):
        data_bytes = file_bytes - 2 * pages * ALIGNMENT
        if data_bytes > 0 and Geometry(data_bytes).file_bytes == file_bytes:
            return Geometry(data_bytes)
    return None
