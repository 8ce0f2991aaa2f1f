"""A server for tests of engines, which are told nothing by a drive that is slow for a while: it
waits for one as long as they do."""

from __future__ import annotations

import sys

from kvstore.cli.serve import main
from kvstore.tiers import nvme_calls

PATIENCE_NS = 300_000_000_000

if __name__ == "__main__":
    nvme_calls.DATA_NS = nvme_calls.UPKEEP_NS = PATIENCE_NS
    sys.exit(main())
