"""Replicas of vLLM under Ray Serve, which share the store of their host.

    pip install "ray[serve,llm]"
    python examples/vllm/ray_serve.py MODEL

The replicas of a host run as one user and so find one server, which the first of them
starts: what one has computed, the others load. Replicas on other hosts have a server of
their own each.

Ray 2.60.0 takes this configuration, and leaves a connector that it does not know to vLLM.
No replica has been run by Ray here.
"""

from __future__ import annotations

import sys

if len(sys.argv) != 2:
    sys.exit("say python examples/vllm/ray_serve.py MODEL")

from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

STORE = {
    "kv_connector": "KVStoreConnector",
    # Workers of Ray start with a bare environment: a path is found where a name may not be.
    "kv_connector_module_path": "kvstore_connectors.vllm",
    "kv_role": "kv_both",
}

config = LLMConfig(
    model_loading_config={"model_id": "model", "model_source": sys.argv[1]},
    deployment_config={"num_replicas": 2},
    # Of vLLM's CPU build. Without this Ray wants GPUs, of which see docs/vllm.md first.
    accelerator_config={"kind": "cpu"},
    engine_kwargs={"kv_transfer_config": STORE},
)
serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)
