"""`python -m kvstore_server`, which is `kvstore serve`."""

from __future__ import annotations

import sys

from kvstore.cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
