"""KV that went through a codec gives answers near those of exact KV.

The bounds are twice what was seen: a model of random weights, drawn wide, is no measure of
what a real one bears.
"""

from __future__ import annotations

import pytest

from kvstore import Client
from tests.e2e.conftest import BLOCK, Engine, Server, StartEngine, difference, prompt, stored

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

LONG = 700
WHOLE = LONG // BLOCK * BLOCK
PROMPTS = 6
FAR = {"fp8": 0.8, "int4": 1.5}
"""In the logarithm of a probability."""


def from_nvme(engine: Engine, server: Server, seed: int) -> float:
    """How far the answer with what comes back from NVMe is off that of vLLM's own hit."""
    text, before = prompt(seed, LONG), server.stats().tenant_blocks
    engine.generate(text, max_tokens=1)
    stored(server, before + WHOLE // BLOCK)
    (local,) = engine.generate(text, max_tokens=1)
    with Client(str(server.socket), timeout_s=60) as client:
        client.flush(drop=True)
    engine.reset()
    (warm,) = engine.generate(text, max_tokens=1)
    assert (local["cached"], warm["cached"]) == (WHOLE, WHOLE)
    return difference(local, warm)


@pytest.mark.parametrize("codec", ["none", *FAR])
def test_answers_are_near(start_engine: StartEngine, server: Server, codec: str) -> None:
    engine = start_engine({"endpoint": str(server.socket), "codec": codec}).wait_ready()
    off = [from_nvme(engine, server, seed) for seed in range(PROMPTS)]
    engine.close()
    if codec == "none":
        assert max(off) == 0
    else:
        assert 0 < max(off) <= FAR[codec]
