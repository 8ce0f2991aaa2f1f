"""What holds for every test."""

from __future__ import annotations

import faulthandler
import sys

from hypothesis import settings

# The same examples on every run: a failure that comes and goes is no proof.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

EXIT_S = 120.0


def pytest_unconfigure() -> None:
    """A thread that a test has left behind would be waited for, for ever: say where it is."""
    faulthandler.dump_traceback_later(EXIT_S, exit=True, file=sys.__stderr__)
