#!/bin/sh
# Two vLLMs on one host, each with a store of its own, behind vllm-router on port 8100. It sends
# a prompt to the one that has its beginning, in vLLM's own cache or in the store:
#
#     pip install vllm-router
#     examples/vllm/router.sh MODEL [more of vLLM's arguments]
#
# With one store for both there is less to route for: either can load what the other stored.
# On the CPU build each of them needs cores of its own; cores 0 and 1 unless CORES_A and
# CORES_B name others, such as 0-3 and 4-7.
set -eu
model=${1:?"say examples/vllm/router.sh MODEL [more arguments of vLLM]"}
shift
command -v vllm-router > /dev/null || { echo "vllm-router is not there: pip install vllm-router" >&2; exit 1; }
block=128
stores=$(mktemp -d)

serve() { # number, cores, more arguments
    number=$1 cores=$2
    shift 2
    # A socket of its own is a server of its own.
    XDG_RUNTIME_DIR=$stores/$number VLLM_CPU_OMP_THREADS_BIND=$cores \
        python -m vllm.entrypoints.openai.api_server \
        --model "$model" --port "810$number" --block-size "$block" \
        --kv-transfer-config '{"kv_connector": "KVStoreConnector", "kv_role": "kv_both"}' \
        --kv-events-config \
        "{\"enable_kv_cache_events\": true, \"endpoint\": \"tcp://*:555$number\"}" "$@" &
}

trap 'trap "" INT TERM; trap - EXIT; kill 0; wait; rm -rf "$stores"' INT TERM EXIT
mkdir -m 700 "$stores/1" "$stores/2"
serve 1 "${CORES_A:-0}" "$@"
serve 2 "${CORES_B:-1}" "$@"
vllm-router --policy kv_aware --port 8100 \
    --worker-urls http://127.0.0.1:8101 http://127.0.0.1:8102 \
    --kv-event-source http://127.0.0.1:8101=tcp://127.0.0.1:5551 \
    --kv-event-source http://127.0.0.1:8102=tcp://127.0.0.1:5552 \
    --kv-event-block-size "$block" --kv-event-model "$model"
