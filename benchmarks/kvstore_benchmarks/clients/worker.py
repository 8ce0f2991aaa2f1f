"""One client in a process of its own: answers a line of JSON for each that it is sent.

    python -m kvstore_benchmarks.clients.worker ENDPOINT SEED NUMBER

`fill` puts the documents, `work` is polite, and `flood`, `hoard` and `stall` are rude,
from `start_ns` on for `seconds`. It says {"ready": true} once it is attached.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from kvstore.client.sync import Client
from kvstore.errors import KVStoreError
from kvstore_benchmarks.clients.polite import Polite
from kvstore_benchmarks.clients.rude import WAYS

TIMEOUT_S = 30.0


def main(endpoint: str, seed: int, number: int) -> int:
    with Client(endpoint, timeout_s=TIMEOUT_S) as client:
        polite = Polite(client, seed, number)
        _say({"ready": True})
        for line in sys.stdin:
            request = json.loads(line)
            what = request.pop("do")
            if what == "stop":
                break
            try:
                _say(_answer(client, polite, seed, what, request))
            except KVStoreError as error:
                _say({"error": f"{type(error).__name__}: {error}"})
    return 0


def _answer(
    client: Client, polite: Polite, seed: int, what: str, request: dict[str, Any]
) -> dict[str, Any]:
    if what == "fill":
        polite.fill()
        return {}
    if what == "work":
        return polite.run(**request).as_json()
    return WAYS[what](client, seed, **request)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
