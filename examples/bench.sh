#!/usr/bin/env bash
# vLLM's own benchmark against a stock server and one that evicts, with the same requests:
#   examples/bench.sh MODEL http://127.0.0.1:8001 http://127.0.0.1:8000
# Both serve MODEL by its own name. The number of requests and their length: REQUESTS, INPUT_LEN, OUTPUT_LEN.
set -euo pipefail
model=$1
for url in "${@:2}"; do
    echo "== $url"
    vllm bench serve --backend openai --base-url "$url" --model "$model" --seed 0 --disable-tqdm \
        --dataset-name random --num-prompts "${REQUESTS:-32}" \
        --random-input-len "${INPUT_LEN:-2048}" --random-output-len "${OUTPUT_LEN:-64}" --ignore-eos
    echo "Blocks that evictions freed: $(curl -s "$url/metrics" | awk '/^vllm:kv_eviction_freed_blocks_total/ { n += $2 } END { print n + 0 }')"
done
