"""What this machine has to give: memory and disk, as seen from inside its limits.

A container's cgroup usually allows less than the host has, and a server sized by
the host is killed by its cgroup. So memory is the least of what the host has
available and what every cgroup on the path to the root still allows, whichever
version of cgroups is mounted. All roots are parameters, so tests need no container.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine as the automatic sizes see it."""

    root: Path = Path("/")
    """Where /proc and /sys are looked for."""

    def available_memory_bytes(self) -> int:
        """Memory that could be used without pushing anybody else out."""
        limits = [_meminfo_available(self.root / "proc/meminfo")]
        limits += _cgroup_headrooms(self.root)
        return max(0, min(limits))

    def free_disk_bytes(self, path: Path) -> int:
        """Bytes free for `path`, what the files under it already take included.

        Counting its own files as free keeps the answer the same from one start
        of the server to the next.
        """
        stat = os.statvfs(_existing(path))
        return stat.f_bavail * stat.f_frsize + _bytes_under(path)

    def disk_bytes(self, path: Path) -> int:
        """The size of the file system that `path` is in, or would be."""
        stat = os.statvfs(_existing(path))
        return stat.f_blocks * stat.f_frsize


def _existing(path: Path) -> Path:
    """The nearest of a path and those above it that can be looked at."""
    while not os.path.exists(path):  # Path.exists raises where it may not look.
        path = path.parent
    return path


def _meminfo_available(path: Path) -> int:
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _cgroup_headrooms(root: Path) -> list[int]:
    """What each cgroup this process is in still allows; empty without limits."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mounts = root / "sys/fs/cgroup"
    headrooms = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            base, limit, usage = mounts / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            inactive = "total_inactive_file"
        elif controllers == "":
            base, limit, usage = mounts, "memory.max", "memory.current"
            inactive = "inactive_file"
        else:
            continue
        for directory in _group_and_parents(base, group):
            headroom = _headroom(directory, limit, usage, inactive)
            if headroom is not None:
                headrooms.append(headroom)
    return headrooms


def _group_and_parents(base: Path, group: str) -> list[Path]:
    """A cgroup's directory and those above it. A container often sees its own
    group mounted as the root while /proc names the host's path, so directories
    that are not there are skipped by the reader, not here."""
    parts = [part for part in group.split("/") if part not in ("", "..")]
    return [base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _headroom(directory: Path, limit: str, usage: str, inactive: str) -> int | None:
    try:
        limit_text = (directory / limit).read_text().strip()
        used = int((directory / usage).read_text())
        stat = (directory / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    if limit_text == "max":
        return None
    reclaimable = 0
    for line in stat:
        name, _, value = line.partition(" ")
        if name == inactive:
            reclaimable = int(value)
    return int(limit_text) - used + reclaimable


def _bytes_under(path: Path) -> int:
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
            except OSError:
                continue
    return total
