#!/bin/sh
# One vLLM with the store: examples/vllm/serve.sh MODEL [more of vLLM's arguments]
#
# No server of the store need run: the connector starts one, which ends when it is idle.
# `kvstore status` shows what it holds.
set -eu
model=${1:?"say examples/vllm/serve.sh MODEL [more arguments of vLLM]"}
shift
exec python -m vllm.entrypoints.openai.api_server --model "$model" \
    --kv-transfer-config '{"kv_connector": "KVStoreConnector", "kv_role": "kv_both"}' "$@"
