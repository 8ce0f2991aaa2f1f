"""`kvstore fsck`: what is damaged is named, nothing else is, and dropping it heals."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.cli.fsck import DAMAGED
from kvstore.cli.main import main
from kvstore.errors import CorruptBlock, DataInUse, DataUnusable, DataVersion
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_fsck import check
from kvstore.tiers.nvme_slot import HEADER_BYTES
from tests.unit.tiers.blocks import get, payload_of, recovered
from tests.unit.tiers.test_nvme import abandon, fill, open_tier, slot_file


def spoil(file: Path, offset: int, nbytes: int = 16) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        old = stream.read(nbytes)
        stream.seek(offset)
        stream.write(bytes(byte ^ 0xFF for byte in old))


def filled(path: Path, *, clean: bool = True) -> dict[str, tuple[Path, int]]:
    """30 blocks, of which 10 are forgotten; where some of them lie."""
    tier = open_tier(path)
    headers = fill(tier, 3)
    tier.remember_layout("alice", b"L" * 16, {"model": "m"})
    addresses = list(headers)
    for address in addresses[::3]:
        tier.forget(address, headers[address])
    places = {name: slot_file(tier, path, addresses[n]) for n, name in ((1, "a"), (11, "b"))}
    if clean:
        tier.close()
    else:
        tier.sync()
        abandon(tier)
    return places


@pytest.mark.parametrize("clean", [True, False])
def test_what_is_sound_is_called_so_and_left_alone(tmp_path: Path, clean: bool) -> None:
    filled(tmp_path, clean=clean)
    for repair in (False, True):
        report = check(tmp_path, repair=repair)
        assert report.sound
        assert not report.repaired
        assert (report.blocks, report.untold_blocks) == (20, 0)
    tier = open_tier(tmp_path)
    assert len(recovered(tier)) == 20
    tier.close()


Damage = Callable[[Path, dict[str, tuple[Path, int]]], None]


def payload_and_header(path: Path, places: dict[str, tuple[Path, int]]) -> None:
    spoil(places["a"][0], places["a"][1] + HEADER_BYTES + 100)
    spoil(places["b"][0], places["b"][1] + 20)


def summaries(path: Path, places: dict[str, tuple[Path, int]]) -> None:
    spoil(places["a"][0], 30)
    spoil(places["a"][0], 4096 + 30)


def index(path: Path, places: dict[str, tuple[Path, int]]) -> None:
    (path / "index" / "data.mdb").write_bytes(b"\xab" * 65536)


def cut_short(path: Path, places: dict[str, tuple[Path, int]]) -> None:
    """To what a smaller segment would have."""
    os.truncate(places["a"][0], places["a"][0].stat().st_size // 2)


def one_summary(path: Path, places: dict[str, tuple[Path, int]]) -> None:
    spoil(places["a"][0], 30)


def layouts(path: Path, places: dict[str, tuple[Path, int]]) -> None:
    spoil(path / "layouts", 40)


DAMAGE: dict[str, tuple[Damage, int]] = {
    "blocks": (payload_and_header, 18),
    "summaries": (summaries, 14),
    "size": (cut_short, 14),
    "index": (index, 20),
    "layouts": (layouts, 20),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_dropped_and_gone(name: str, tmp_path: Path) -> None:
    damage, left = DAMAGE[name]
    damage(tmp_path, filled(tmp_path))
    report = check(tmp_path)
    assert not report.sound
    assert report.blocks == left
    assert (len(report.damaged_blocks), len(report.damaged_segments)) == (
        2 if name == "blocks" else 0, 1 if name in ("summaries", "size") else 0,
    )  # fmt: skip
    assert (report.damaged_index, report.damaged_layouts) == (name == "index", name == "layouts")
    assert check(tmp_path, repair=True).repaired
    again = check(tmp_path)
    assert again.sound
    assert again.blocks == left
    tier = open_tier(tmp_path)
    found = recovered(tier)
    assert len(found) == left
    for address, header in found.items():
        number = int.from_bytes(header.stored_key, "big")
        assert get(tier, address, header) == bytes(payload_of(number))
    tier.close()


def test_without_an_index_every_whole_block_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path, clean=False)
    shutil.rmtree(tmp_path / "index")
    report = check(tmp_path)
    assert (report.blocks, report.no_index, report.sound) == (20, True, True)
    assert main(["fsck", "--nvme-path", str(tmp_path)]) == 0
    assert "there is no index; a start makes it" in capsys.readouterr().out


def test_a_secret_that_is_gone_or_damaged_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path)
    command = ["fsck", "--nvme-path", str(tmp_path)]
    assert main(command) == 0
    assert "the secret is gone" in capsys.readouterr().out
    (tmp_path / "secret").write_bytes(b"short")
    assert main(command) == 73
    assert "secret is damaged; remove the data directory" in capsys.readouterr().err


def test_what_is_left_of_a_summary_is_enough_and_told(tmp_path: Path) -> None:
    one_summary(tmp_path, filled(tmp_path))
    report = check(tmp_path)
    assert (report.blocks, report.half_summaries, report.sound) == (20, 1, True)


def test_blocks_that_a_start_drops_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path)
    assert check(tmp_path).strange_blocks == 0
    (tmp_path / "layouts").unlink()
    assert main(["fsck", "--nvme-path", str(tmp_path)]) == 0
    assert "20 blocks are of unknown layouts; a start drops them" in capsys.readouterr().out


@pytest.mark.parametrize("call", ["stat", "mkdir"])
def test_what_may_not_be_read_is_one_line(
    call: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)

    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, call, refuse)
        assert main(["fsck", "--nvme-path", str(tmp_path)]) == os.EX_CANTCREAT
    said = capsys.readouterr().err
    assert "give this user the right to read and write there" in said
    assert said.count("\n") == 1


def test_files_that_are_not_the_stores_are_no_damage(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "segments" / "notes.txt").write_text("mine")
    (tmp_path / "segments" / "lost+found").mkdir()
    assert check(tmp_path, repair=True).sound
    assert (tmp_path / "segments" / "notes.txt").exists()


def test_a_server_that_met_damage_leaves_a_sound_directory(tmp_path: Path) -> None:
    places = filled(tmp_path)
    payload_and_header(tmp_path, places)
    tier = open_tier(tmp_path)
    met = 0
    for address, header in recovered(tier).items():
        try:
            get(tier, address, header)
        except CorruptBlock:
            met += 1
    tier.close()
    assert met == 2
    report = check(tmp_path)
    assert report.sound
    assert report.quarantined_pages == 2 * 6


def test_what_is_no_data_directory_or_in_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataUnusable):
        check(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    tier: NvmeTier = open_tier(tmp_path / "data")
    with pytest.raises(DataInUse):
        check(tmp_path / "data")
    tier.close()
    (tmp_path / "data" / "VERSION").write_text("kvstore-data 2\n")
    with pytest.raises(DataVersion):
        check(tmp_path / "data")


def test_the_command_says_it_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = filled(tmp_path)
    command = ["fsck", "--nvme-path", str(tmp_path)]
    assert main(command) == 0
    assert capsys.readouterr().out.endswith("sound\n")
    payload_and_header(tmp_path, places)
    assert main([*command, "--json"]) == DAMAGED
    report = json.loads(capsys.readouterr().out)
    assert (report["sound"], len(report["damaged_blocks"])) == (False, 2)
    assert main([*command, "--repair"]) == 0
    assert "dropped" in capsys.readouterr().out
    assert main(command) == 0
    tier = open_tier(tmp_path)
    assert main(command) == 75
    tier.close()
    assert main(["fsck", "--nvme-path", str(tmp_path / "nowhere")]) == 73
