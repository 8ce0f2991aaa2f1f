"""What a machine has to give, under every kind of limit."""

from __future__ import annotations

from pathlib import Path

from kvstore.machine import Machine

GIB = 1 << 30


def fake_root(tmp_path: Path, files: dict[str, str]) -> Machine:
    files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {32 * GIB // 1024} kB\n"} | files
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(tmp_path)


def v2(directory: str, limit: str, used: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"{directory}/memory.max": limit,
        f"{directory}/memory.current": str(used),
        f"{directory}/memory.stat": f"anon 1\ninactive_file {inactive}\n",
    }


def v1(directory: str, limit: int, used: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"{directory}/memory.limit_in_bytes": str(limit),
        f"{directory}/memory.usage_in_bytes": str(used),
        f"{directory}/memory.stat": f"inactive_file 7\ntotal_inactive_file {inactive}\n",
    }


def test_without_limits_it_is_what_the_host_has(tmp_path: Path) -> None:
    assert fake_root(tmp_path, {}).available_memory_bytes() == 32 * GIB


def test_a_v2_limit_counts_and_reclaimable_cache_is_free(tmp_path: Path) -> None:
    group = v2("sys/fs/cgroup/a/b", str(8 * GIB), 5 * GIB, inactive=GIB)
    machine = fake_root(tmp_path, {"proc/self/cgroup": "0::/a/b\n", **group})
    assert machine.available_memory_bytes() == 4 * GIB


def test_a_limit_of_a_parent_counts(tmp_path: Path) -> None:
    group = v2("sys/fs/cgroup/a/b", "max", GIB) | v2("sys/fs/cgroup/a", str(2 * GIB), GIB)
    machine = fake_root(tmp_path, {"proc/self/cgroup": "0::/a/b\n", **group})
    assert machine.available_memory_bytes() == GIB


def test_a_v1_limit_counts(tmp_path: Path) -> None:
    group = v1("sys/fs/cgroup/memory/x", 6 * GIB, 3 * GIB, inactive=GIB)
    lines = "9:name=systemd:/\n4:cpu,memory:/x\n0::/\n"
    machine = fake_root(tmp_path, {"proc/self/cgroup": lines, **group})
    assert machine.available_memory_bytes() == 4 * GIB


def test_in_a_container_the_own_group_is_mounted_as_the_root(tmp_path: Path) -> None:
    group = v1("sys/fs/cgroup/memory", 3 * GIB, GIB)
    machine = fake_root(tmp_path, {"proc/self/cgroup": "4:memory:/docker/abc\n", **group})
    assert machine.available_memory_bytes() == 2 * GIB


def test_a_group_over_its_limit_has_nothing_to_give(tmp_path: Path) -> None:
    group = v2("sys/fs/cgroup", str(GIB), 2 * GIB)
    machine = fake_root(tmp_path, {"proc/self/cgroup": "0::/\n", **group})
    assert machine.available_memory_bytes() == 0


def test_its_own_files_do_not_shrink_the_disk(tmp_path: Path) -> None:
    data = tmp_path / "not" / "there" / "yet"
    before = Machine().free_disk_bytes(data)
    data.mkdir(parents=True)
    (data / "file").write_bytes(b"x" * (64 << 20))
    after = Machine().free_disk_bytes(data)
    # Others write to this disk too while the test runs.
    assert abs(after - before) < 48 << 20


def test_the_disk_of_a_place_that_cannot_be_looked_at_is_that_above_it(tmp_path: Path) -> None:
    # As below a directory of another user: looking fails with more than "not there".
    hidden = tmp_path / ("x" * 300) / "data"
    assert Machine().disk_bytes(hidden) == Machine().disk_bytes(tmp_path)
