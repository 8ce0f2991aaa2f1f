"""What a command has started ends with it."""

from __future__ import annotations

import os
import signal

import pytest

from kvstore.cli.ending import ending_what_was_started


def test_a_command_that_is_told_to_end_leaves_nothing_behind() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []
    with pytest.raises(SystemExit) as ended, ending_what_was_started():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)
    assert (cleaned, ended.value.code) == ([True], 128 + signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
