"""`kvstore bench prefetch`, small: agents in turn, whose blocks do not all fit into DRAM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.cli.main import main
from kvstore.sim.readers import read_trace
from kvstore_benchmarks.prefetch.main import Options, measure
from kvstore_benchmarks.prefetch.sessions import asked_of

AGENTS, TURNS = 12, 12
TOKENS = 4096
BLOCKS = 8


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    lines: list[dict[str, object]] = [
        {"format": "kvstore-trace", "version": 1, "block_tokens": TOKENS}
    ]
    for turn in range(TURNS):
        for agent in range(AGENTS):
            blocks = [f"{agent}-{number}" for number in range(BLOCKS + turn // 4)]
            lines.append(
                {
                    "time_ms": 60_000 * turn + 5_000 * agent,
                    "tokens": TOKENS * len(blocks),
                    "blocks": blocks,
                    "output_tokens": 60,
                    "session": agent,
                    "then": "waiting",
                }
            )
    path = tmp_path / "agents.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_what_is_said_of_sessions_is_prefetched_and_costs_loads_nothing(trace: Path) -> None:
    options = Options(trace, dram_gib=9.0)
    asked = asked_of(read_trace(trace, session_rate=1.0, seed=1), 1)
    off = measure(options, asked, TOKENS, "off")
    told = measure(options, asked, TOKENS, "all +-25 %")
    assert off["prefetched_gb"] == 0
    assert off["found"] == told["found"], "NVMe holds it all"
    assert told["prefetched_gb"] > 1
    assert told["used"] > 0.8
    assert told["found_in_dram"] > off["found_in_dram"]
    # What is left to load are others: of fewer, the p99 is that of a longer one.
    assert told["load_mean_ms"] < off["load_mean_ms"]


def test_it_prints_one_object(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "prefetch", str(trace), "--quick", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["requests"] == 100
    assert set(figures["modes"]) >= {"off", "queue"}
    assert main(["bench", "prefetch", str(trace) + "x", "--quick"]) == 1
