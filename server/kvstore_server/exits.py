"""Exit codes, after sysexits.h.

 0  stopped when asked, or after `idle_exit_s` without a session
 2  the command line cannot be understood
65  EX_DATAERR      the data directory is of another version
69  EX_UNAVAILABLE  the socket or a port is in use
70  EX_SOFTWARE     a fault of the server; the log has more
71  EX_OSERR        the machine refuses memory or another resource
73  EX_CANTCREAT    a directory, socket or port cannot be used
74  EX_IOERR        stopped when asked, without a drive that did not answer
75  EX_TEMPFAIL     the data directory is in use by another server
78  EX_CONFIG       the configuration cannot be used
"""

from __future__ import annotations

import os

from kvstore.errors import (
    AddressInUse,
    AddressUnusable,
    ConfigError,
    DataInUse,
    DataUnusable,
    DataVersion,
    KVStoreError,
    TierError,
)

_CODES: tuple[tuple[type[KVStoreError], int], ...] = (
    (ConfigError, os.EX_CONFIG),
    (DataVersion, os.EX_DATAERR),
    (DataInUse, os.EX_TEMPFAIL),
    (DataUnusable, os.EX_CANTCREAT),
    (AddressInUse, os.EX_UNAVAILABLE),
    (AddressUnusable, os.EX_CANTCREAT),
    (TierError, os.EX_OSERR),
)


def exit_code(error: KVStoreError) -> int:
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return os.EX_SOFTWARE
