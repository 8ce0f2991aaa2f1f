#!/bin/sh
# One vLLM over several ranks: examples/vllm/tensor_parallel.sh MODEL RANKS [more of vLLM's arguments]
#
# Every rank stores and loads its own part of each block, through the same server. What was
# stored with another number of ranks is not used.
#
# On the CPU build each rank needs cores of its own, named in VLLM_CPU_OMP_THREADS_BIND, such
# as "0-3|4-7" for two; core n for rank n unless it is set. Pipeline parallelism is
# --pipeline-parallel-size in place of --tensor-parallel-size, or beside it.
set -eu
model=${1:?"say examples/vllm/tensor_parallel.sh MODEL RANKS [more arguments of vLLM]"} ranks=${2:?"say examples/vllm/tensor_parallel.sh MODEL RANKS [more arguments of vLLM]"}
shift 2
cores=$(seq -s '|' 0 $((ranks - 1)))
export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-$cores}"
exec python -m vllm.entrypoints.openai.api_server --model "$model" \
    --tensor-parallel-size "$ranks" \
    --kv-transfer-config '{"kv_connector": "KVStoreConnector", "kv_role": "kv_both"}' "$@"
