"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# The same examples on every run: a failure that comes and goes is no proof.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
