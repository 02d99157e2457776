#!/usr/bin/env bash
# Runs the scenarios of loadtests/scenarios, or the given ones, through a redis-server of its own;
# prints their tables and leaves load.html and load.json in target. `load.sh baseline ...` sends them
# through Celery to a worker of loadtests/baseline instead; CHECKPOINT is the directory of its model.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/server.sh

wire=()
name=load
if [ "${1:-}" = baseline ]; then
    shift
    export FLORENCE_CHECKPOINT
    FLORENCE_CHECKPOINT=$(realpath "${CHECKPOINT:-models/tiny}")
    start_redis
    start_worker
    echo "its client's first answer:"
    (cd loadtests/baseline && REDIS_URL="redis://127.0.0.1:$port/9" ../../.venv-baseline/bin/python client.py \
        "$OLDPWD/models/tiny/samples/shapes.png" '<OD>')
    wire=(--celery celery:tasks.inference_task)
    name=baseline
else
    # `second` is for the scenario of two models.
    start_server allow-networks 127.0.0.0/8 max-queue 2000 keep-packed no \
        model "$PWD/models/tiny" models "second=$PWD/models/tiny"
fi

[ $# -gt 0 ] || set -- loadtests/scenarios/*.toml
target/release/florence-load --flush --url "redis://127.0.0.1:$port/9" "${wire[@]}" scenario \
    --html "target/$name.html" --json "target/$name.json" "$@"
echo "plots: target/$name.html"
