#!/usr/bin/env bash
# Runs a server with the module under valgrind: jobs are answered, cancelled and retried, and
# memcheck must find no error. The kernels run on AVX2: valgrind knows no AVX-512.
set -euo pipefail
cd "$(dirname "$0")/.."

port=${PORT:-6398}
work=$(mktemp -d)
valgrind --error-exitcode=9 --fair-sched=yes redis-server --port "$port" --dir "$work" --save '' \
    --loadmodule "$PWD/target/release/libflorence.so" threads 1 \
    --florence.file-roots "$PWD/models/tiny/samples" >"$work/server" 2>"$work/memcheck" &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
ask() { redis-cli -p "$port" "$@"; }
for _ in $(seq 120); do ask ping 2>/dev/null | grep -q PONG && break; sleep 1; done

shapes=$PWD/models/tiny/samples/shapes.png
for task in CAPTION OD OCR_WITH_REGION OCR; do
    ask FLORENCE.SUBMIT "job:$task" "$shapes" "<$task>" TIMEOUT 600000 >/dev/null
done
ask -x SET picture <"$shapes" >/dev/null
ask FLORENCE.SUBMIT job:several KEY picture PROMPTS 2 '<OD>' '<CAPTION>' NOCACHE >/dev/null
ask FLORENCE.SUBMIT job:none KEY picture '<OCR>' DELAY 600000 >/dev/null
ask FLORENCE.CANCEL job:none >/dev/null
ask FLORENCE.RETRY job:none >/dev/null
ask FLORENCE.CANCEL job:OCR >/dev/null
for task in CAPTION OD OCR_WITH_REGION several none; do
    ask FLORENCE.WAIT "job:$task" 300 >/dev/null
    state=$(ask HGET "job:$task" state)
    [[ $state == done ]] || { echo "job:$task is $state"; exit 1; }
done
ask SHUTDOWN NOSAVE
code=0
wait "$server" || code=$?
trap 'rm -rf "$work"' EXIT
tail -1 "$work/memcheck"
exit "$code"
