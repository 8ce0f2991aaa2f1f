"""What one engine can do: what fits beside its weights, and how fast it is.

The roofline: an operation takes as long as its arithmetic at the GPU's achieved rate or
as reading what it must read from the GPU's memory, whichever is longer (S. Williams,
A. Waterman, D. Patterson, "Roofline", CACM 52(4), 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.core.cost import Prefill
from kvstore.errors import BadRequest
from kvstore.parts import Gpu, Model, Ssd


@dataclass(frozen=True, slots=True)
class Engine:
    """A model on `gpus` GPUs that share it (tensor parallelism).

    `mfu`: the share of peak arithmetic that prefill achieves; `bandwidth_share`: the share
    of peak memory bandwidth that decode achieves; `memory_share`: what the engine may use
    of each GPU; `reserve_gb`: activations and graphs, a GPU.
    """

    model: Model
    gpu: Gpu
    gpus: int
    ssd: Ssd
    ssds: int
    weight_bytes: float = 2.0
    kv_dtype_bytes: float = 2.0
    mfu: float = 0.5
    bandwidth_share: float = 0.8
    memory_share: float = 0.9
    reserve_gb: float = 2.0

    @property
    def kv_bytes(self) -> float:
        """Of one token, all layers and ranks."""
        return self.model.kv_bytes(self.kv_dtype_bytes)

    @property
    def weights_gb(self) -> float:
        return self.model.parameters_billions * self.weight_bytes

    @property
    def kv_space_gb(self) -> float:
        """What is left for KV on all its GPUs; negative where the weights do not fit."""
        return self.gpus * self.usable_gb - self.weights_gb

    @property
    def usable_gb(self) -> float:
        """Of each GPU, for weights and KV."""
        return self.gpu.memory_gb * self.memory_share - self.reserve_gb

    def check_fits(self) -> None:
        """Raises `BadRequest` where the weights leave no room: there is no such engine."""
        if self.kv_space_gb > 0:
            return
        hint = ""
        if self.usable_gb > 0:
            hint = f": say --gpus {int(self.weights_gb / self.usable_gb) + 1} or more, or"
        raise BadRequest(
            f"the weights of {self.model.name}, {self.weights_gb:.0f} GB, leave no room on"
            f" {self.gpus} x {self.gpu.name}{hint} fewer --weight-bytes"
        )

    @property
    def kv_tokens(self) -> float:
        return max(0.0, self.kv_space_gb) * 1e9 / self.kv_bytes

    def requests_at_a_time(self, context: float) -> float:
        """With so many tokens each."""
        return self.kv_tokens / max(context, 1.0)

    @property
    def prefill(self) -> Prefill:
        return Prefill(
            parameters=self.model.active,
            layers=self.model.layers,
            query_heads=self.model.query_heads,
            head_dim=self.model.head_dim,
            flops_per_second=self.gpus * self.gpu.bf16_tflops * 1e12 * self.mfu,
        )

    def decode_step_ms(self, batch: float, context: float) -> float:
        """A token for each of `batch` requests with `context` tokens each."""
        read_gb = self.weights_gb + batch * context * self.kv_bytes / 1e9
        by_memory = read_gb / (self.gpus * self.gpu.memory_gbps * self.bandwidth_share)
        by_arithmetic = 2 * self.model.active * batch / self.prefill.flops_per_second
        return 1e3 * max(by_memory, by_arithmetic)

    @property
    def dram_gbps(self) -> float:
        """From DRAM into its GPUs."""
        return self.gpus * self.gpu.host_gbps

    @property
    def nvme_gbps(self) -> float:
        """From NVMe into its GPUs."""
        return min(self.ssds * self.ssd.read_gbps, self.dram_gbps)

    def load_ms(self, tokens: float, gbps: float) -> float:
        return 1e3 * tokens * self.kv_bytes / (gbps * 1e9)

    def kappa(self, gbps: float) -> float:
        """How much longer computing a prompt's first token takes than loading it."""
        return self.prefill.ms(1) / self.load_ms(1, gbps)

    def pays_from_token(self, gbps: float) -> float:
        """The depth from which on loading a token is faster than computing it; 0 where it
        always is."""
        return max(0.0, self.prefill.doubling_tokens * (1 / self.kappa(gbps) - 1))
