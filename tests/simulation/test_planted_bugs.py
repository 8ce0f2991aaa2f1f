"""Bugs, planted one at a time into a copy of the project: the tests named beside each
must find it. A test that lets one live proves less than it says.

The text that a bug replaces must be there exactly once; where the code has changed, so
must the bug.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
COPIED = ("kvstore", "server", "connectors", "benchmarks", "tests", "docs", "proto")

NVME = "tests/unit/tiers/test_nvme.py"
SLOT = "tests/unit/tiers/test_nvme_slot.py"
TIER_CRASHES = "tests/simulation/test_tier_crashes.py"
NTH_CALL = "tests/simulation/test_nth_call.py"
CRASHES = "tests/simulation/test_crashes.py"
STRAIGHT = "tests/unit/core/test_straight.py"
CORE = "tests/simulation/test_random_lives.py tests/unit/core"


class Bug(NamedTuple):
    file: str
    right: str
    wrong: str
    killed_by: str


BUGS = {
    "a sync is skipped": Bug(
        "kvstore/tiers/nvme.py",
        "                for segment, _, _ in todo.segments:\n"
        "                    segment.file.fdatasync()\n",
        "",
        TIER_CRASHES,
    ),
    "the index is told before the data is synced": Bug(
        "kvstore/tiers/nvme.py",
        "            self._check_usable()\n            todo = self._log.take_flushed()\n",
        "            self._check_usable()\n            todo = self._log.take_flushed()\n"
        "            self._tell_index(todo.batch)\n",
        NVME,
    ),
    "a failed sync is asked again": Bug(
        "kvstore/tiers/nvme.py",
        "        except TierFailed as error:\n            self._failed = error\n            raise\n"
        "        finally:",
        "        except TierFailed as error:\n            raise\n        finally:",
        NVME,
    ),
    "the payload's checksum is not compared": Bug(
        "kvstore/tiers/nvme.py",
        "if xxhash.xxh3_64_intdigest(into[:length]) != header.checksum:",
        "if xxhash.xxh3_64_intdigest(into[:length]) is None:",
        NVME,
    ),
    "the header's checksum is not compared": Bug(
        "kvstore/tiers/nvme_slot.py",
        "if google_crc32c.value(bytes(page)) != crc:",
        "if google_crc32c.value(bytes(page)) is None:",
        SLOT,
    ),
    "a slot does not say where it is": Bug(
        "kvstore/tiers/nvme_slot.py", "if stored.place != place:", "if False:", SLOT
    ),
    "a damaged place is used again": Bug(
        "kvstore/tiers/nvme_log.py", "            segment.spoil(place.slot)\n", "", NVME
    ),
    "what is forgotten is not marked so": Bug(
        "kvstore/tiers/nvme_segment.py",
        "        self.dead[slot >> 3] |= 1 << (slot & 7)\n",
        "",
        NVME,
    ),
    "an emptied segment is used before its blocks are safe": Bug(
        "kvstore/tiers/nvme_log.py",
        "            self._emptied.append(victim)\n",
        "            self._free.append(victim)\n            return\n",
        TIER_CRASHES,
    ),
    "blocks are given up before their copies are safe": Bug(
        "kvstore/tiers/nvme_log.py",
        "(not moved or s.life != s.durable_life)",
        "True",
        TIER_CRASHES,
    ),
    "one copy of the summary is always the one overwritten": Bug(
        "kvstore/tiers/nvme_segment.py",
        "self.generation % 2 * geometry.summary_bytes",
        "0 * geometry.summary_bytes",
        "tests/unit/tiers/test_nvme_segment.py",
    ),
    "half of a block is taken for all of it after a crash": Bug(
        "kvstore/tiers/nvme_recovery.py",
        "            if slot >= segment.settled:\n"
        "                check_payload(stored.header, payload)\n",
        "",
        "tests/unit/tiers/test_nvme_recovery.py",
    ),
    "the earlier of two blocks of one name is kept": Bug(
        "kvstore/tiers/nvme_recovery.py",
        "for row in table[earlier]}",
        "for row in table[earlier + 1]}",
        NVME,
    ),
    "an index that was not closed is believed": Bug(
        "kvstore/tiers/nvme.py", "known if clean else {}", "known", NVME
    ),
    "slots without a block are taken for blocks": Bug(
        "kvstore/tiers/nvme_recovery.py",
        "        log.blank(segment, np.flatnonzero(kept).tolist())\n",
        "",
        "tests/unit/tiers/test_nvme_recovery.py",
    ),
    "what was forgotten is found at a clean start": Bug(
        "kvstore/tiers/nvme_recovery.py",
        "            there = np.flatnonzero(kept[:mark])\n",
        "            there = np.arange(mark)\n",
        NVME,
    ),
    "two blocks are found in one slot": Bug(
        "kvstore/core/space.py",
        "                or slots[index] is not None\n",
        "",
        "tests/unit/core/test_restore.py",
    ),
    "more segments than the capacity allows": Bug(
        "kvstore/tiers/nvme_log.py",
        "wanted = min(self.most_segments, extents + spare_segments(self.most_segments))",
        "wanted = extents + 2 * spare_segments(self.most_segments)",
        NVME,
    ),
    "a reader does not look where its block went": Bug(
        "kvstore/tiers/nvme.py", "            if where == before:\n", "            if True:\n", NVME
    ),
    "a tenant is left out of the name": Bug(
        "kvstore/naming.py",
        "blake2b(layout_id, key=secret, digest_size=32)",
        'blake2b(layout_id, key=b"everybody", digest_size=32)',
        CRASHES + " tests/unit/test_naming.py",
    ),
    "a lease is not released": Bug(
        "kvstore/core/calls/leases.py", "        self.let_go(lease.replicas)\n", "", CORE
    ),
    "a slot is used again under a lease": Bug(
        "kvstore/core/places/dram_room.py",
        "        if replica.pins:\n            return Verdict.IN_USE\n",
        "",
        CORE,
    ),
    "a clear is answered before it is durable": Bug(
        "kvstore/store/calls.py",
        "        await self._movement.all_forgotten()\n        await self._movement.sync()\n",
        "        await self._movement.all_forgotten()\n",
        CRASHES,
    ),
    "what a client spoiled is made durable": Bug(
        "kvstore/store/movement.py",
        "if xxhash.xxh3_64_intdigest(slot[: layout.block_bytes]) != block.checksum:",
        "if False:",
        "tests/unit/test_store.py",
    ),
    "a client's word that a block is damaged is believed": Bug(
        "kvstore/store/suspicions.py",
        "damaged = xxhash.xxh3_64_intdigest(view) != block.checksum",
        "damaged = True",
        "tests/unit/test_store_suspicions.py",
    ),
    "what was decoded goes by the checksum of what was put": Bug(
        "kvstore/core/planner.py",
        "            else:\n                block.checksum = checksum\n",
        "",
        "tests/unit/test_store_coded.py",
    ),
    "what was coded goes by the checksum of what was put": Bug(
        "kvstore/core/planner.py",
        "                block.stored_checksum = checksum\n",
        "                pass\n",
        "tests/unit/test_store_coded.py",
    ),
    "layouts of two codecs are one": Bug(
        "kvstore/types.py",
        "        if not self.codec:\n            del fields",
        "        if True:\n            del fields",
        "tests/unit/test_store_coded.py",
    ),
    "what NVMe has no more is found on a GPU": Bug(
        "kvstore/core/places/holdings.py",
        "        for mirrors in self.mirrors:\n            mirrors.goes(replica)\n",
        "        for mirrors in self.mirrors if replica.tier is Tier.DRAM else ():\n"
        "            mirrors.goes(replica)\n",
        STRAIGHT,
    ),
    "what two GPUs read under one name is read straight": Bug(
        "kvstore/core/places/straight.py", "len(named) == 1", "named", STRAIGHT
    ),
    "a place is another's while a drive is being read for it": Bug(
        "kvstore/core/places/vram_room.py",
        "            mirror.apply(Event.ABANDON)\n            return\n",
        "            mirror.apply(Event.ABANDON)\n            self._free(mirror)\n"
        "            mirror.address = NO_PLACE\n            return\n",
        STRAIGHT,
    ),
    "what arrives after its memory went is named": Bug(
        "kvstore/core/places/vram_room.py",
        "        if mirror.state is State.FILLING:\n            self.drop(mirror)\n",
        "",
        STRAIGHT,
    ),
    "memory of a GPU goes back under a copy": Bug(
        "kvstore/tiers/vram.py",
        "            self._changed.wait_for(lambda: extent not in self._copying)\n",
        "",
        CRASHES,
    ),
    "what DRAM has no more is found on a GPU": Bug(
        "kvstore/core/places/holdings.py",
        "        for mirrors in self.mirrors:\n            mirrors.goes(replica)\n",
        "        for mirrors in self.mirrors if replica.tier is Tier.NVME else ():\n"
        "            mirrors.goes(replica)\n",
        CRASHES,
    ),
    "a copy to a GPU that failed counts as made": Bug(
        "kvstore/store/vram.py",
        '            copied = set()\n            log.warning("blocks were not',
        '            log.warning("blocks were not',
        CRASHES,
    ),
    "who is gone reads on a GPU for ever": Bug(
        "kvstore/store/vram.py",
        "            gpu.mirrors.reads_no_more(layout, session)\n",
        "            pass\n",
        CRASHES,
    ),
    "slots stay on a GPU that nobody reads on": Bug(
        "kvstore/store/slots.py",
        "            self._wanted = wanted\n",
        "            self._wanted |= wanted\n",
        CRASHES,
    ),
    "slots that went back are counted on": Bug(
        "kvstore/store/slots.py",
        "                self._there -= 1\n",
        "                pass\n",
        CRASHES,
    ),
    "a slot in which a read failed is used again": Bug(
        "kvstore/store/straight.py",
        "                self._slots.keep(slot)\n                slot = None\n",
        "                pass\n",
        CRASHES,
    ),
    "a lease outlives its session": Bug(
        "kvstore/core/calls/leases.py",
        "        for lease in list(session.leases.values()):\n            self.end(lease)\n",
        "        pass\n",
        CRASHES,
    ),
    "what is damaged in memory is given out again": Bug(
        "kvstore/core/calls/suspects.py",
        "        elif is_ready(replica):\n            self._holdings.damaged(replica)\n",
        "",
        CRASHES,
    ),
}


def copy_of_the_project(target: Path) -> Path:
    for name in COPIED:
        shutil.copytree(
            ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.png")
        )
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def run_tests(project: Path, tests: str) -> subprocess.CompletedProcess[str]:
    paths = (str(project / part) for part in ("", "server", "connectors", "benchmarks"))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()],
        cwd=project,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_bug_the_tests_pass(tmp_path: Path) -> None:
    project = copy_of_the_project(tmp_path / "project")
    tests = " ".join(sorted({test for bug in BUGS.values() for test in bug.killed_by.split()}))
    ran = run_tests(project, tests)
    assert ran.returncode == 0, ran.stdout[-3000:]


@pytest.mark.parametrize("name", BUGS)
def test_the_bug_is_found(name: str, tmp_path: Path) -> None:
    bug = BUGS[name]
    project = copy_of_the_project(tmp_path / "project")
    file = project / bug.file
    text = file.read_text()
    assert text.count(bug.right) == 1, "the bug does not fit the code any more"
    file.write_text(text.replace(bug.right, bug.wrong))
    ran = run_tests(project, bug.killed_by)
    assert ran.returncode == 1, f"it lives: {ran.stdout[-2000:]}"
