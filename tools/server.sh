# Sourced by scripts that measure: servers on $port, in a directory of their own, that end with the
# script. `start_server SETTING...` starts a redis-server with the module and these arguments of it,
# `start_redis` one without, and `start_worker` a Celery worker of loadtests/baseline beside it.
port=${PORT:-6399}
work=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; wait "${pids[@]}" 2>/dev/null; rm -rf "$work"' EXIT

start_redis() {
    redis-server --port "$port" --dir "$work" --save '' "$@" >"$work/log" 2>&1 &
    pids+=($!)
    until redis-cli -p "$port" ping >/dev/null 2>&1; do
        kill -0 "${pids[-1]}" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
        sleep 0.1
    done
}

start_server() {
    start_redis --loadmodule "$PWD/target/release/libflorence.so" "$@"
}

start_worker() {
    (cd loadtests/baseline && REDIS_URL="redis://127.0.0.1:$port/9" exec ../../.venv-baseline/bin/celery \
        -A tasks worker --pool=solo -n "${#pids[@]}@%h" >>"$work/workers" 2>&1) &
    pids+=($!)
}
