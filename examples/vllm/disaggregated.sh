#!/bin/sh
# One vLLM that prefills and one that decodes, on one host, behind vllm-router on port 8100:
#
#     pip install vllm-router
#     examples/vllm/disaggregated.sh MODEL [more of vLLM's arguments]
#     curl localhost:8100/v1/completions -H 'Content-Type: application/json' \
#         -d '{"model": "MODEL", "prompt": "Once upon a time", "max_tokens": 16}'
#
# On the CPU build each of them needs cores of its own; cores 0 and 1 unless PREFILL_CORES
# and DECODE_CORES name others, such as 0-3 and 4-7.
set -eu
model=${1:?"say examples/vllm/disaggregated.sh MODEL [more arguments of vLLM]"}
shift
command -v vllm-router > /dev/null || { echo "vllm-router is not there: pip install vllm-router" >&2; exit 1; }

config() {
    printf '{"kv_connector": "KVStoreConnector", "kv_role": "%s"}' "$1"
}

serve() { # role, port, cores, more arguments
    role=$1 port=$2 cores=$3
    shift 3
    VLLM_CPU_OMP_THREADS_BIND=$cores python -m vllm.entrypoints.openai.api_server \
        --model "$model" --port "$port" --kv-transfer-config "$(config "$role")" "$@" &
}

trap 'trap "" INT TERM; trap - EXIT; kill 0; wait' INT TERM EXIT
serve kv_producer 8101 "${PREFILL_CORES:-0}" "$@"
serve kv_consumer 8102 "${DECODE_CORES:-1}" "$@"
vllm-router --vllm-pd-disaggregation --port 8100 \
    --prefill http://127.0.0.1:8101 --decode http://127.0.0.1:8102
