"""Descriptors that tiers leave to others.

Every extent is one, for as long as the server runs, and the last ones are worth more than
an extent: without any, no client is let in and no probe is answered.
"""

from __future__ import annotations

import errno
import os
import resource

LEFT_AT_MOST = 1024


def leave_some(new: int) -> None:
    """Raises `OSError` (EMFILE) for a descriptor, just made, that is of the last quarter of
    those this process may have, or of the last 1024. The kernel gives out the lowest."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and new >= allowed - min(allowed // 4, LEFT_AT_MOST):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
