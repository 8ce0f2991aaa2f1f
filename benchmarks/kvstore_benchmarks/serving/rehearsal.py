"""`python -m kvstore_benchmarks.serving.rehearsal`: what the connector's hooks cost, without
an engine.

Both halves of the connector, on a server of their own, are driven through the steps that a
vLLM would make of the requests that `hooks` sends to one, with vLLM's own requests and block
pool. Where a vLLM would compute, as much memory is read as a processor's caches hold, and more.
It takes seconds and needs no model; a vLLM's figures are about twice as high, for its steps
drive more out of the caches.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import KVConnectorBlockState
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from kvstore_benchmarks.figures import finite, percentile
from kvstore_benchmarks.server import Server
from kvstore_benchmarks.serving.hooks import (
    AIM_US,
    ANSWER,
    FILE,
    HOOKS,
    REQUESTS,
    TOKENS,
    HookTimes,
    median_of,
)
from kvstore_benchmarks.serving.timed import TimedConnector
from kvstore_benchmarks.serving.workloads import CLIENTS
from kvstore_connectors.vllm.connector import KVStoreConnector

BLOCK = 32
POOL = 512
LAYERS = ("one", "two")
BLOCKS_A_REQUEST = (TOKENS + ANSWER) // BLOCK + 1
CACHES_BYTES = 48 << 20
ROUNDS = 6


class _Rehearsed(TimedConnector):
    """Keeps what each call took, nanoseconds at work."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, config: KVCacheConfig) -> None:
        self.calls: dict[str, list[int]] = {name: [] for name in HOOKS}
        super().__init__(vllm_config, role, config)

    def book(self, name: str, busy_ns: int, taken_ns: int) -> None:
        super().book(name, busy_ns, taken_ns)
        self.calls[name].append(busy_ns)

    def take_calls(self) -> dict[str, list[int]]:
        """Since the last time."""
        taken, self.calls = self.calls, {name: [] for name in HOOKS}
        return taken


@dataclass(slots=True, eq=False)
class _Running:
    """`next`: tokens of its next step. `left`: steps."""

    request: Any
    blocks: list[Any]
    next: int = TOKENS
    left: int = ANSWER


class Rehearsal:
    """One engine's worth of connector. A request is admitted as soon as the connector lets
    it, prefilled in one step and then decoded."""

    def __init__(self, endpoint: str) -> None:
        config, memory = _kv_cache()
        vllm_config = _configuration(endpoint)
        self._worker = KVStoreConnector(vllm_config, KVConnectorRole.WORKER, config)
        self._worker.register_kv_caches(dict(zip(LAYERS, memory, strict=True)))
        self._scheduler = _Rehearsed(vllm_config, KVConnectorRole.SCHEDULER, config)
        self._pool = BlockPool(POOL, True, BLOCK)
        self._scheduler.bind_gpu_block_pool(self._pool)
        self._caches = np.ones(CACHES_BYTES // 8)
        self._running: dict[str, _Running] = {}

    def close(self) -> None:
        self._scheduler.shutdown()
        self._worker.shutdown()

    def take_calls(self) -> dict[str, list[int]]:
        """Of each hook, what its calls took since the last time: nanoseconds at work."""
        return self._scheduler.take_calls()

    def serve(self, requests: Sequence[Any]) -> None:
        """All at once, to the end."""
        for request in requests:
            self._scheduler.on_new_request(request)
        waiting, loading = list(requests), dict[str, _Running]()
        while waiting or loading or self._running:
            scheduled = {each: running.next for each, running in self._running.items()}
            for request in list(waiting):
                tokens, _ = self._scheduler.get_num_new_matched_tokens(request, 0)
                if tokens is None:
                    continue
                waiting.remove(request)
                admitted = _Running(request, self._pool.get_new_blocks(BLOCKS_A_REQUEST))
                blocks = KVCacheBlocks((admitted.blocks,))
                self._scheduler.update_state_after_alloc(request, blocks, tokens)
                if tokens:
                    self._scheduler.get_external_cache_hit_sources(request, tokens)
                    request.num_computed_tokens, admitted.next = tokens, TOKENS - tokens
                    loading[request.request_id] = admitted
                else:
                    self._running[request.request_id] = admitted
                    scheduled[request.request_id] = TOKENS
            for request_id in self._step(scheduled):
                self._running[request_id] = loading.pop(request_id)
        while self._scheduler.has_pending_push_work():
            self._step({})

    def _step(self, scheduled: dict[str, int]) -> set[str]:
        """The requests whose loads have ended."""
        state = KVConnectorBlockState(
            req_ids=set(scheduled),
            resolve_block_ids=lambda each: KVCacheBlocks(
                (self._running[each].blocks,)
            ).get_block_ids(),
            boundary_state_offloads={},
        )
        output: Any = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            preempted_req_ids=set(),
            kv_connector_block_state=state,
        )
        done = self._compute(self._scheduler.build_connector_meta(output), bool(scheduled))
        for request_id, tokens in scheduled.items():
            running = self._running[request_id]
            running.request.num_computed_tokens += tokens
            running.next, running.left = 1, running.left - 1
            if not running.left:
                self._finish(self._running.pop(request_id))
        self._scheduler.update_connector_output(done)
        self._scheduler.get_kv_connector_stats()
        self._scheduler.take_events()
        return set(done.finished_recving or ())

    def _compute(self, meta: Any, computes: bool) -> Any:
        worker: Any = self._worker
        worker.handle_preemptions(meta)
        worker.bind_connector_metadata(meta)
        worker.start_load_kv(None)
        if computes:
            float(self._caches.sum())
        worker.wait_for_save()
        results = worker.get_transfer_results(set())
        output = KVConnectorOutput(
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving,
            invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_stats=worker.get_kv_connector_stats(),
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )
        worker.clear_connector_metadata()
        return output

    def _finish(self, running: _Running) -> None:
        block_ids = [block.block_id for block in running.blocks]
        self._scheduler.request_finished_all_groups(running.request, (block_ids,))
        self._pool.free_blocks(reversed(running.blocks))


def measure(rounds: int) -> dict[str, Any]:
    """Microseconds a request by hook, as `hooks.measure`, and of its single calls."""
    hasher = _hasher()
    taken: dict[str, list[dict[str, tuple[float, float]]]] = {"miss": [], "hit": []}
    calls: dict[str, dict[str, list[int]]] = {kind: {name: [] for name in HOOKS} for kind in taken}
    with Server(dram="256MiB", nvme="0") as server, HookTimes() as times:
        os.environ[FILE] = times.path
        rehearsal = Rehearsal(server.endpoint)
        try:
            for number in range(-1, rounds):
                prompts = _prompts(number)
                for kind, samples in taken.items():
                    times.take()
                    rehearsal.take_calls()
                    for first in range(0, REQUESTS, CLIENTS):
                        few = prompts[first : first + CLIENTS]
                        rehearsal.serve([_request(prompt, hasher) for prompt in few])
                    if number >= 0:
                        samples.append(times.take_for(REQUESTS))
                        for name, each in rehearsal.take_calls().items():
                            calls[kind][name] += each
        finally:
            rehearsal.close()
    return {
        "tokens": TOKENS,
        "rounds": rounds,
        "most_us": AIM_US,
        **{
            kind: median_of(samples) | {"calls": _calls_of(calls[kind], rounds * REQUESTS)}
            for kind, samples in taken.items()
        },
    }


def _calls_of(calls: dict[str, list[int]], requests: int) -> dict[str, dict[str, float | None]]:
    """Of each hook that was called: how often a request, and what a call takes."""
    return {
        name: {
            "a_request": finite(len(each) / requests, 2),
            "p50_us": finite(percentile(each, 50) / 1e3, 1),
            "p99_us": finite(percentile(each, 99) / 1e3, 1),
        }
        for name, each in calls.items()
        if each
    }


def _prompts(number: int) -> list[list[int]]:
    # Of a number below 0 that would be the sequence of the one above.
    rng = random.Random(f"prompts {number}")
    return [[rng.randrange(30_000) for _ in range(TOKENS)] for _ in range(REQUESTS)]


def _hasher() -> Any:
    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    return get_request_block_hasher(BLOCK, hash_function)


def _request(prompt: list[int], hasher: Any) -> Any:
    name = f"rehearsal-{random.random()}"
    return Request(name, prompt, SamplingParams(max_tokens=ANSWER), None, block_hasher=hasher)


def _kv_cache() -> tuple[Any, list[torch.Tensor]]:
    """vLLM's configuration of a small one, and each layer's tensor."""
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=4, head_size=128, dtype=torch.bfloat16)
    page = spec.page_size_bytes
    tensor = KVCacheTensor(
        size=page * POOL * len(LAYERS),
        layers=list(LAYERS),
        layer_stride=page * POOL,
        block_stride=page,
    )
    config = KVCacheConfig(
        num_blocks=POOL,
        kv_cache_tensors=[tensor],
        kv_cache_groups=[KVCacheGroupSpec(list(LAYERS), spec)],
        kv_cache_layout="LBHNC",
        hash_block_size=BLOCK,
    )
    memory = torch.zeros((len(LAYERS), POOL, page), dtype=torch.int8)
    return config, list(memory)


def _configuration(endpoint: str) -> Any:
    """What the connector reads of vLLM's."""
    transfer = KVTransferConfig(
        kv_connector="KVStoreConnector",
        kv_connector_module_path="kvstore_connectors.vllm",
        kv_role="kv_both",
        kv_connector_extra_config={"endpoint": endpoint},
    )
    model = SimpleNamespace(
        model="rehearsal",
        dtype=torch.bfloat16,
        revision=None,
        quantization=None,
        seed=0,
        hf_config=SimpleNamespace(to_dict=dict),
    )
    parallel = SimpleNamespace(
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
        rank=0,
        world_size=1,
    )
    return SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        cache_config=SimpleNamespace(cache_dtype="auto", prefix_caching_hash_algo="sha256"),
        load_config=SimpleNamespace(load_format="auto"),
        device_config=SimpleNamespace(device_type="cpu"),
        attention_config=SimpleNamespace(backend=None),
        speculative_config=None,
        lora_config=None,
        kv_events_config=None,
        kv_transfer_config=transfer,
    )


def main() -> int:
    """Print the figures, a table for people and an object for programs. `IDLE` is no part of
    the totals."""
    parser = argparse.ArgumentParser(description="the connector's hooks without an engine")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    figures = measure(parser.parse_args().rounds)
    for kind in ("miss", "hit"):
        one = figures[kind]
        print(f"{kind}: {one['total_us']} us a request, {one['total_us'] / AIM_US:.1f}x of the aim")
        for name, call in one["calls"].items():
            print(
                f"  {name:34} {one['hooks_us'][name]:6} us in {call['a_request']:5} calls,"
                f" p50 {call['p50_us']} us, p99 {call['p99_us']} us"
            )
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
