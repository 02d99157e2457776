#!/usr/bin/env bash
# Measures the module through a redis-server of its own; prints the tables of docs/SPEED.md.
#   tools/serving.sh [checkpoint directory] [f32|auto]
set -euo pipefail
cd "$(dirname "$0")/.."

model=${1:-}
precision=${2:-f32}
. tools/server.sh
start_server model "$model" precision "$precision" threads "${THREADS:-0}"

load() { target/release/florence-load --flush --url "redis://127.0.0.1:$port/9" "$@"; echo; }
samples=(models/tiny/samples/*.png)
if [[ -n $model ]]; then
    # Made-up weights never end an answer: the number of tokens decides how much is decoded.
    load throughput --jobs 16 --in-flight "${IN_FLIGHT:-1,16}" --max-tokens "${TOKENS:-400}" "${samples[@]}"
    exit
fi
load throughput --jobs 128 "${samples[@]}"
load ping "${samples[0]}"
load wake "${samples[0]}"
load queue --jobs "${JOBS:-1000000}"
