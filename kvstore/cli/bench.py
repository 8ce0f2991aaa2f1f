"""`kvstore bench`: measurements of this machine and of the store on it.

What a benchmark needs is loaded when it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kvstore.cli.arguments import count, counts, names, number, positive, whole
from kvstore.cli.demo import require_vllm
from kvstore.cli.ending import ending_what_was_started
from kvstore.cli.main import COMMANDS, Subparsers
from kvstore.config import default_data_path


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("bench", help=COMMANDS["bench"].summary)
    which = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, benchmark in BENCHMARKS.items():
        own = which.add_parser(name, help=benchmark.summary)
        benchmark.add_options(own)
        if benchmark.draws:
            own.add_argument(
                "--plots", type=Path, metavar="DIR", help="draw the figures there, as PNG"
            )
        own.add_argument("--json", action="store_true", help="print one object")
        own.add_argument("--quick", action="store_true", help="a try-out, not a measurement")
        if benchmark.writes:
            own.add_argument(
                "--dir",
                type=Path,
                metavar="DIR",
                help="where the data may lie while it runs; default: this user's cache",
            )
    return parser


def run(args: argparse.Namespace) -> int:
    with ending_what_was_started():
        return BENCHMARKS[args.benchmark].run(args)


class Benchmark(NamedTuple):
    """`draws`: it has plots. `writes`: it needs a folder for data."""

    summary: str
    add_options: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], int]
    draws: bool = False
    writes: bool = False


def _local_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--endpoint",
        metavar="WHERE",
        help="measure this server, leaving out NVMe; default: start one for the measurement",
    )
    parser.add_argument("--dram-only", action="store_true", help="leave out NVMe")
    parser.add_argument(
        "--peers",
        nargs="?",
        type=Path,
        const=Path(".venv-peers"),
        metavar="DIR",
        help="measure other stores beside ours, those that `make bench-peers` has set up;"
        " default: in .venv-peers",
    )
    parser.add_argument("--rounds", type=whole(1000), metavar="N", help="default: 7")


def _local(args: argparse.Namespace) -> int:
    from kvstore_benchmarks.local.main import Options, run

    options = Options(
        endpoint=args.endpoint,
        folder=args.dir,
        nvme=not args.dram_only,
        peers=args.peers,
        rounds=args.rounds,
        quick=args.quick,
    )
    return run(options, as_object=args.json, plots=args.plots)


def _clients_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clients",
        type=counts,
        default=(1, 4, 16, 64),
        metavar="N,N",
        help="how many, one measurement each; default: 1,4,16,64",
    )
    parser.add_argument(
        "--seconds", type=positive, default=5.0, metavar="S", help="each measurement; default: 5"
    )


def _clients(args: argparse.Namespace) -> int:
    from kvstore_benchmarks.clients.main import QUICK, Options, run

    options = Options(counts=args.clients, seconds=args.seconds, folder=args.dir)
    if args.quick:
        options = replace(QUICK, folder=args.dir)
    return run(options, as_object=args.json, plots=args.plots)


def _index_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--blocks",
        type=counts,
        default=(10_000, 100_000, 1_000_000),
        metavar="N,N",
        help="how many, one measurement each, up to 10000000; default: 10000,100000,1000000",
    )
    parser.add_argument(
        "--policy", metavar="NAME", help="docs/policies.md; default: what a server has by default"
    )
    parser.add_argument(
        "--dram-blocks",
        type=whole(1_000_000),
        default=8192,
        metavar="N",
        help="in DRAM, which are acquired, up to 1000000; default: 8192",
    )


def _index(args: argparse.Namespace) -> int:
    from kvstore_benchmarks.scale.main import QUICK, run

    sizes = QUICK if args.quick else args.blocks
    return run(args.dir, sizes, args.policy, args.dram_blocks, as_object=args.json)


def _evictions_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy",
        type=names,
        default=("worth", "lru"),
        metavar="NAME,NAME",
        help="policies (docs/policies.md); default: worth,lru",
    )
    parser.add_argument(
        "--blocks", type=count, default=1_000_000, metavar="N", help="in DRAM; default: 1000000"
    )


def _evictions(args: argparse.Namespace) -> int:
    from kvstore_benchmarks.policies.evictions import QUICK, Options, run

    options = Options(args.policy, args.blocks)
    if args.quick:
        options = replace(QUICK, policies=args.policy)
    return run(options, as_object=args.json)


def _priorities_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace",
        nargs="?",
        type=Path,
        metavar="TRACE",
        help="requests of high priority, in a format of docs/simulator.md; those of low priority"
        " are copies of it; default: both are made up",
    )
    parser.add_argument(
        "--policy",
        type=names,
        default=("worth", "priority-lru", "lru"),
        metavar="NAME,NAME",
        help="policies (docs/policies.md); default: worth,priority-lru,lru",
    )
    parser.add_argument(
        "--capacity-blocks",
        type=counts,
        default=(1500,),
        metavar="N,N",
        help="sizes of the tier; default: 1500",
    )
    parser.add_argument(
        "--loads",
        type=counts,
        default=(1, 3, 10),
        metavar="N,N",
        help="of low priority, as parts of the requests of high priority; default: 1,3,10",
    )
    parser.add_argument(
        "--requests", type=count, default=1200, metavar="N",
        help="of high priority, made up or a trace's first ones; default: 1200",
    )  # fmt: skip


def _priorities(args: argparse.Namespace) -> int:
    from kvstore_benchmarks.policies.priorities import QUICK, Options, run

    options = Options(args.policy, args.capacity_blocks, args.loads, args.requests, args.trace)
    if args.quick:
        options = replace(QUICK, policies=args.policy, loads=args.loads, trace=args.trace)
    return run(options, as_object=args.json, plots=args.plots)


_part = number(0, 2, "a number above 0 and up to 2", above=True)


def _parts(text: str) -> tuple[float, ...]:
    return tuple(_part(word) for word in text.split(","))


def _transfers_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--drive",
        choices=("both", "modelled", "real"),
        default="both",
        help="one that is calculated, in virtual time, or the one that is there; default: both",
    )
    parser.add_argument(
        "--loads",
        type=_parts,
        metavar="X,X",
        help="demand, as parts of what a drive reads; default: 0.3,0.6,0.8,0.9,0.95,1.05",
    )


def _transfers(args: argparse.Namespace) -> int:
    from kvstore_benchmarks.transfers.main import QUICK, Options, run

    options = QUICK if args.quick else Options()
    options = replace(options, folder=args.dir, drive=args.drive)
    if args.loads:
        options = replace(options, loads=args.loads, real_loads=args.loads)
    return run(options, as_object=args.json, plots=args.plots)


def _prefetch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace", type=Path, metavar="TRACE", help="sessions, in a format of docs/simulator.md"
    )
    parser.add_argument(
        "--dram-gib",
        type=positive,
        default=32.0,
        metavar="N",
        help="memory for blocks; default: 32",
    )
    parser.add_argument(
        "--session-rate", type=positive, default=0.02, metavar="R",
        help="sessions that begin a second; default: 0.02",
    )  # fmt: skip
    parser.add_argument(
        "--requests", type=count, default=1500, metavar="N", help="the first so many; default: 1500"
    )


def _prefetch(args: argparse.Namespace) -> int:
    from kvstore_benchmarks.prefetch.main import Options, run

    requests = 100 if args.quick else args.requests
    options = Options(args.trace, args.dram_gib, args.session_rate, requests)
    return run(options, as_object=args.json)


def _gpu_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gigabytes",
        type=positive,
        default=16.0,
        metavar="N",
        help="random bytes to move and compare; default: 16",
    )


def _gpu(args: argparse.Namespace) -> int:
    from kvstore_benchmarks.gpu.main import run
    from kvstore_benchmarks.gpu.measure import QUICK, Options

    options = QUICK if args.quick else Options(moved=int(args.gigabytes * 1e9))
    directory = args.dir or default_data_path().parent
    directory.mkdir(parents=True, exist_ok=True)
    return run(options._replace(directory=directory), as_object=args.json)


def _vllm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=whole(1000), default=7, metavar="N", help="default: 7")
    parser.add_argument(
        "--tokens", type=count, default=8192, metavar="N", help="a prompt; default: 8192"
    )


def _vllm(args: argparse.Namespace) -> int:
    from kvstore_benchmarks.end_to_end.bench import run

    return run(args.dir, args.rounds, args.tokens, quick=args.quick, as_object=args.json)


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=whole(1000), default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="replay requests of this trace, in Mooncake's format",
    )


def _serve(args: argparse.Namespace) -> int:
    from kvstore_benchmarks.serving.bench import Options, run

    require_vllm()
    if args.trace is not None:
        args.trace.open("rb").close()  # Minutes of starting engines should not end in an error.
    options = Options(1 if args.quick else args.rounds, args.dir, args.trace, args.quick)
    return run(options, as_object=args.json)


BENCHMARKS = {
    "local": Benchmark(
        "put, get and lookup against memcpy and O_DIRECT",
        _local_options, _local, draws=True, writes=True,
    ),
    "clients": Benchmark(
        "many clients at once, and rude ones", _clients_options, _clients, draws=True, writes=True
    ),
    "index": Benchmark(
        "what a block costs where there are millions", _index_options, _index, writes=True
    ),
    "evictions": Benchmark(
        "room for a block where DRAM is full", _evictions_options, _evictions
    ),
    "priorities": Benchmark(
        "hits of what matters, while more is asked for that does not",
        _priorities_options, _priorities, draws=True,
    ),
    "transfers": Benchmark(
        "loads by NVMe's queue, under load",
        _transfers_options, _transfers, draws=True, writes=True,
    ),
    "prefetch": Benchmark(
        "what prefetches do for agents' sessions", _prefetch_options, _prefetch
    ),
    "gpu": Benchmark(
        "copies to and from a GPU against plain pinned ones", _gpu_options, _gpu, writes=True
    ),
    "vllm": Benchmark(
        "time to first token with and without the store", _vllm_options, _vllm, writes=True
    ),
    "serve": Benchmark(
        "an OpenAI server under load, with and without it", _serve_options, _serve, writes=True
    ),
}  # fmt: skip
