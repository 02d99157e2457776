#!/usr/bin/env bash
# Measures the module through a redis-server of its own; prints the tables of docs/SPEED.md.
#   tools/serving.sh [checkpoint directory] [f32|auto]
set -euo pipefail
cd "$(dirname "$0")/.."

model=${1:-}
precision=${2:-f32}
port=${PORT:-6399}
work=$(mktemp -d)
redis-server --port "$port" --dir "$work" --save '' --loadmodule "$PWD/target/release/libflorence.so" \
    model "$model" precision "$precision" threads "${THREADS:-0}" >"$work/log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null; rm -rf "$work"' EXIT
until redis-cli -p "$port" ping >/dev/null 2>&1; do sleep 0.1; done

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
