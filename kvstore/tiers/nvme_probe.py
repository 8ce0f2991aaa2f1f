"""Read all of an LMDB environment, in a process that may die of it.

    python -I nvme_probe.py DIRECTORY

LMDB maps its file and follows the page numbers it finds there: a file that is cut
short or has rotted may end the process that reads it, or keep it for ever. So an
index that nobody vouches for is read here first. Exit status 0 when it can be read.
"""

from __future__ import annotations

import sys

import lmdb

NAMES = (b"meta", b"segments", b"blocks")


def read_all(path: str) -> None:
    """Raises `lmdb.Error`, or worse."""
    with (
        lmdb.open(
            path, readonly=True, lock=False, create=False, max_dbs=len(NAMES), lib_version=0
        ) as env,
        env.begin() as txn,
    ):
        for name in NAMES:
            table = env.open_db(name, txn, create=False)
            entries = txn.stat(table)["entries"]
            if entries != sum(1 for _ in txn.cursor(table)):
                raise lmdb.CorruptedError(f"{name!r} has not as many entries as it says")


if __name__ == "__main__":
    try:
        read_all(sys.argv[1])
    except (lmdb.Error, OSError) as error:
        sys.exit(str(error))
