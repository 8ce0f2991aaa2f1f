"""Pictures are drawn from the JSON alone, whatever of it is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvstore_benchmarks.clients.crowd import Shift
from kvstore_benchmarks.clients.polite import Tally
from kvstore_benchmarks.clients.report import shift_figures
from kvstore_benchmarks.local.report import as_json
from kvstore_benchmarks.local.samples import Bandwidth, PeerSamples, Samples
from kvstore_benchmarks.plots import NoPlots, Plots, main

PNG = b"\x89PNG"


def samples(*, peers: bool) -> Samples:
    figures = Samples(local=True)
    figures.bandwidth[1 << 20] = Bandwidth(memcpy=[10.0], put=[5.0], get=[6.0])
    for kind in ("hit", "miss"):
        figures.latency.lookup[kind] = {1: [1.0], 256: [2.0]}
    if peers:
        figures.peers["lmcache"] = PeerSamples(
            version="1",
            bandwidth={1 << 20: Bandwidth(put=[1.0], get=[1.0])},
            lookup={"hit": {1: [100.0], 256: [200.0]}},
        )
        figures.peers["mooncake"] = PeerSamples(reason="not set up")
    return figures


@pytest.mark.parametrize("peers", [False, True])
def test_pictures_are_drawn_with_and_without_peers(tmp_path: Path, peers: bool) -> None:
    pytest.importorskip("matplotlib")
    figures = as_json(samples(peers=peers))
    Plots(tmp_path / "plots").local(figures)
    for name in ("bandwidth.png", "lookup.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(PNG)
    assert json.loads((tmp_path / "plots" / "local.json").read_text()) == figures
    (tmp_path / "plots" / "lookup.png").unlink()
    assert main(tmp_path / "plots") == 0
    assert (tmp_path / "plots" / "lookup.png").exists()


def test_pictures_of_many_clients_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tally = Tally(steps=1, bytes_in=1, lookup_us=[1.0], get_us=[2.0], put_us=[])
    one = shift_figures([Shift(1.0, [tally], 0.5)])
    rude = {"crowd": 1, "scenarios": {"nobody else": one, "flood": one}}
    counts = {"1": one, "4": one}
    figures = {"memcpy_gbps": 5.0, "clients": counts, "apart": counts, "rude": rude}
    Plots(tmp_path).clients(figures)
    for name in ("clients.png", "rude.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(NoPlots, match="pip install"):
        Plots(tmp_path)
