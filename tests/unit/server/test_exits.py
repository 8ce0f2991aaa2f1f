"""Exit codes: each reason not to start has its own, documented, code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvstore_server.exits
from kvstore import errors
from kvstore_server.exits import exit_code

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError, 78),
        (errors.DataVersion, 65),
        (errors.DataInUse, 75),
        (errors.DataUnusable, 73),
        (errors.AddressInUse, 69),
        (errors.AddressUnusable, 73),
        (errors.TierFull, 71),
        (errors.InternalError, 70),
    ],
)
def test_each_reason_has_its_code(error: type[errors.KVStoreError], code: int) -> None:
    assert exit_code(error("x")) == code


def test_the_documentation_has_the_same_codes() -> None:
    _, _, section = OPERATIONS.read_text().partition("## Exit codes")
    documented = re.findall(r"^\| (\d+) \|", section.partition("\n## ")[0], re.MULTILINE)
    in_code = re.findall(r"^ *(\d+)  \S", kvstore_server.exits.__doc__ or "", re.MULTILINE)
    assert documented == in_code
