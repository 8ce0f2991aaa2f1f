"""The child process that puts load on servers: vLLM's own `vllm bench serve`.

It takes its command line's arguments as a line of JSON, and answers with the object that
it would have written to a file. One process for all measurements, for its start takes
longer than most of them.

    {"arguments": ["--dataset-name", "random", ...]}
        -> {"completed", "request_throughput", "ttfts": [...], "itls": [[...], ...], ...}
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any


def result(parser: argparse.ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    from vllm.benchmarks.serve import main as bench_serve

    answer: dict[str, Any] = bench_serve(parser.parse_args(arguments))
    return answer


def main() -> int:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(result(parser, request["arguments"])), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
