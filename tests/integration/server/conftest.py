"""Servers in the tests' own process have patience with a machine that stands still."""

from __future__ import annotations

import pytest

import kvstore_server.admin
import kvstore_server.attach
from kvstore_server import limits
from tests.integration.server.harness import PATIENCE_S


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a limit itself is tried, the test sets it."""
    monkeypatch.setattr(kvstore_server.attach, "ATTACH_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(kvstore_server.admin, "ADMIN_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(kvstore_server.admin, "STALLED_AFTER_S", PATIENCE_S)
    monkeypatch.setattr(limits, "CALL_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(limits, "WRITE_IDLE_S", PATIENCE_S)
    monkeypatch.setattr(limits, "HANDSHAKE_MS", int(1000 * PATIENCE_S))
    monkeypatch.setattr(limits, "KEEPALIVE_TIMEOUT_MS", int(1000 * PATIENCE_S))
