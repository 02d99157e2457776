#!/usr/bin/env bash
# Runs the scenarios of loadtests/scenarios, or the given ones, through a redis-server of its own;
# prints their tables and leaves load.html and load.json in target.
set -euo pipefail
cd "$(dirname "$0")/.."

. tools/server.sh
start_server allow-networks 127.0.0.0/8 max-queue 2000

[ $# -gt 0 ] || set -- loadtests/scenarios/*.toml
target/release/florence-load --flush --url "redis://127.0.0.1:$port/9" scenario \
    --html target/load.html --json target/load.json "$@"
echo "plots: target/load.html"
