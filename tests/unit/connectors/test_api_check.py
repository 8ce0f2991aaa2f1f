"""`make check-vllm-api` tells what matters from what does not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "requirements/check_vllm_api.py"


@pytest.fixture(scope="module")
def check() -> Any:
    spec = importlib.util.spec_from_file_location("check_vllm_api", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def breaking(check: Any, old: str, new: str) -> list[bool]:
    """Of each difference, whether a connector with the hook `mine` must follow."""
    name = check.BASE
    before, after = (check.members(f"class {name}:\n    {text}", name) for text in (old, new))
    hooks = dict.fromkeys(["mine"]).keys()
    return [breaks for _, breaks in check.differences(name, before, after, hooks)]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("def mine(self, x: int): ...", "def mine(self, x: 'int'): ...", []),
        ("def mine(self, x): ...", "def mine(self, x, y): ...", [True]),
        ("def mine(self, x): ...", "size: int = 1", [True, False]),
        ("def other(self, x): ...", "def other(self): ...", [False]),
        ("size: int = 1", "@abstractmethod\n    def new(self): ...", [True, False]),
    ],
)
def test_what_a_connector_must_follow(check: Any, old: str, new: str, expected: list[bool]) -> None:
    found = breaking(check, old, new)
    assert sorted(found, reverse=True) == expected


def test_all_that_is_leaned_on_is_there(check: Any) -> None:
    """A class that was misspelt would never be said to have changed."""
    texts = check.texts_of_installed()
    for path, names in check.LEANED_ON.items():
        for name in names:
            assert check.members(texts[path], name), name
    assert "take_events" in check.members(check.CONNECTOR.read_text(), "KVStoreConnector")
