#!/usr/bin/env bash
# Runs the scenarios of loadtests/scenarios, or the given ones, through a redis-server of its own;
# prints their tables and leaves load.html and load.json in target.
set -euo pipefail
cd "$(dirname "$0")/.."

port=${PORT:-6399}
work=$(mktemp -d)
redis-server --port "$port" --dir "$work" --save '' --loadmodule "$PWD/target/release/libflorence.so" \
    allow-networks 127.0.0.0/8 max-queue 2000 >"$work/log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null; rm -rf "$work"' EXIT
until redis-cli -p "$port" ping >/dev/null 2>&1; do sleep 0.1; done

[ $# -gt 0 ] || set -- loadtests/scenarios/*.toml
target/release/florence-load --flush --url "redis://127.0.0.1:$port/9" scenario \
    --html target/load.html --json target/load.json "$@"
echo "plots: target/load.html"
