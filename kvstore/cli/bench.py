"""`kvstore bench local`, `clients`, `index`, `evictions`, `gpu`, `transfers`, `prefetch`, `vllm`
and `serve`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from kvstore.cli.demo import require_vllm
from kvstore.cli.main import COMMANDS, Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("bench", help=COMMANDS["bench"].summary)
    which = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    local = which.add_parser("local", help="put, get and lookup against memcpy and O_DIRECT")
    local.add_argument(
        "--endpoint",
        metavar="WHERE",
        help="measure this server, leaving out NVMe; default: start one for the measurement",
    )
    local.add_argument("--dram-only", action="store_true", help="leave out NVMe")
    local.add_argument(
        "--peers",
        nargs="?",
        type=Path,
        const=Path(".venv-peers"),
        metavar="DIR",
        help="measure other stores beside ours, those that `make bench-peers` has set up;"
        " default: in .venv-peers",
    )
    local.add_argument("--rounds", type=int, metavar="N", help="default: 7")
    clients = which.add_parser("clients", help="many clients at once, and rude ones")
    clients.add_argument(
        "--clients",
        type=_counts,
        default=(1, 4, 16, 64),
        metavar="N,N",
        help="how many, one measurement each; default: 1,4,16,64",
    )
    clients.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="each measurement; default: 5"
    )
    index = which.add_parser("index", help="what a block costs where there are millions")
    index.add_argument(
        "--blocks",
        type=_counts,
        default=(10_000, 100_000, 1_000_000),
        metavar="N,N",
        help="how many, one measurement each, up to 10000000; default: 10000,100000,1000000",
    )
    evictions = which.add_parser("evictions", help="room for a block where DRAM is full")
    evictions.add_argument(
        "--policy",
        type=_names,
        default=("worth", "lru"),
        metavar="NAME,NAME",
        help="policies (docs/policies.md); default: worth,lru",
    )
    evictions.add_argument(
        "--blocks", type=int, default=1_000_000, metavar="N", help="in DRAM; default: 1000000"
    )
    transfers = which.add_parser("transfers", help="loads by NVMe's queue, under load")
    transfers.add_argument(
        "--drive",
        choices=("both", "modelled", "real"),
        default="both",
        help="one that is calculated, in virtual time, or the one that is there; default: both",
    )
    transfers.add_argument(
        "--loads",
        type=_parts,
        metavar="X,X",
        help="demand, as parts of what a drive reads; default: 0.3,0.6,0.8,0.9,0.95,1.05",
    )
    prefetch = which.add_parser("prefetch", help="what prefetches do for agents' sessions")
    prefetch.add_argument(
        "trace", type=Path, metavar="TRACE", help="sessions, in a format of docs/simulator.md"
    )
    prefetch.add_argument(
        "--dram-gib", type=float, default=32.0, metavar="N", help="memory for blocks; default: 32"
    )
    prefetch.add_argument(
        "--session-rate", type=float, default=0.02, metavar="R",
        help="sessions that begin a second; default: 0.02",
    )  # fmt: skip
    prefetch.add_argument(
        "--requests", type=int, default=1500, metavar="N", help="the first so many; default: 1500"
    )
    gpu = which.add_parser("gpu", help="copies to and from a GPU against plain pinned ones")
    gpu.add_argument(
        "--gigabytes",
        type=float,
        default=16.0,
        metavar="N",
        help="random bytes to move and compare; default: 16",
    )
    vllm = which.add_parser("vllm", help="time to first token with and without the store")
    vllm.add_argument("--rounds", type=int, default=7, metavar="N", help="default: 7")
    vllm.add_argument("--tokens", type=int, default=8192, metavar="N", help="a prompt; 8192")
    serve = which.add_parser("serve", help="an OpenAI server under load, with and without it")
    serve.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    serve.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="replay requests of this trace, in Mooncake's format",
    )
    for benchmark in (local, clients, transfers):
        benchmark.add_argument(
            "--plots", type=Path, metavar="DIR", help="draw the figures there, as PNG"
        )
    for benchmark in (local, clients, index, evictions, transfers, prefetch, gpu, vllm, serve):
        benchmark.add_argument("--json", action="store_true", help="print one object")
        benchmark.add_argument("--quick", action="store_true", help="a try-out, not a measurement")
    for benchmark in (local, clients, index, transfers, vllm, serve):
        benchmark.add_argument(
            "--dir",
            type=Path,
            metavar="DIR",
            help="where the data may lie while it runs; default: this user's cache",
        )
    return parser


def run(args: argparse.Namespace) -> int:
    if args.benchmark == "local":
        from kvstore_benchmarks.local.main import Options
        from kvstore_benchmarks.local.main import run as run_local

        options = Options(
            endpoint=args.endpoint,
            folder=args.dir,
            nvme=not args.dram_only,
            peers=args.peers,
            rounds=args.rounds,
            quick=args.quick,
        )
        return run_local(options, as_object=args.json, plots=args.plots)
    if args.benchmark == "clients":
        from kvstore_benchmarks.clients.main import QUICK
        from kvstore_benchmarks.clients.main import Options as Crowds
        from kvstore_benchmarks.clients.main import run as run_clients

        crowds = Crowds(counts=args.clients, seconds=args.seconds, folder=args.dir)
        if args.quick:
            crowds = replace(QUICK, folder=args.dir)
        return run_clients(crowds, as_object=args.json, plots=args.plots)
    if args.benchmark == "index":
        from kvstore_benchmarks.scale.main import QUICK as FEW
        from kvstore_benchmarks.scale.main import run as run_index

        return run_index(args.dir, FEW if args.quick else args.blocks, as_object=args.json)
    if args.benchmark == "evictions":
        from kvstore_benchmarks.policies.evictions import QUICK as SOME
        from kvstore_benchmarks.policies.evictions import Options as Room
        from kvstore_benchmarks.policies.evictions import run as run_evictions

        room = Room(args.policy, args.blocks)
        if args.quick:
            room = replace(SOME, policies=args.policy)
        return run_evictions(room, as_object=args.json)
    if args.benchmark == "transfers":
        from kvstore_benchmarks.transfers.main import QUICK as TRY_OUT
        from kvstore_benchmarks.transfers.main import Options as Orders
        from kvstore_benchmarks.transfers.main import run as run_transfers

        orders = TRY_OUT if args.quick else Orders()
        orders = replace(orders, folder=args.dir, drive=args.drive)
        if args.loads:
            orders = replace(orders, loads=args.loads, real_loads=args.loads)
        return run_transfers(orders, as_object=args.json, plots=args.plots)
    if args.benchmark == "prefetch":
        from kvstore_benchmarks.prefetch.main import Options as Agents
        from kvstore_benchmarks.prefetch.main import run as run_prefetch

        requests = 100 if args.quick else args.requests
        agents = Agents(args.trace, args.dram_gib, args.session_rate, requests)
        return run_prefetch(agents, as_object=args.json)
    if args.benchmark == "gpu":
        from kvstore_benchmarks.gpu.main import run as run_gpu
        from kvstore_benchmarks.gpu.measure import QUICK as SMALL
        from kvstore_benchmarks.gpu.measure import Options as Copies

        copies = SMALL if args.quick else Copies(moved=int(args.gigabytes * 1e9))
        return run_gpu(copies, as_object=args.json)
    if args.benchmark == "serve":
        from kvstore_benchmarks.serving.bench import Options as Serving
        from kvstore_benchmarks.serving.bench import run as run_serving

        require_vllm()
        rounds = 1 if args.quick else args.rounds
        serving = Serving(rounds, args.dir, args.trace, args.quick)
        return run_serving(serving, as_object=args.json)
    from kvstore_benchmarks.end_to_end.bench import run as run_vllm

    return run_vllm(args.dir, args.rounds, args.tokens, quick=args.quick, as_object=args.json)


def _parts(text: str) -> tuple[float, ...]:
    parts = tuple(float(word) for word in text.split(","))
    if not all(0 < part < 2 for part in parts):
        raise ValueError
    return parts


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(word) for word in text.split(","))
    if min(counts) < 1:
        raise ValueError
    return counts
