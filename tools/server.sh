# Sourced by scripts that measure: `start_server SETTING...` starts a redis-server with the module on
# $port, in a directory of its own, with these arguments of the module; it ends with the script.
port=${PORT:-6399}

start_server() {
    work=$(mktemp -d)
    redis-server --port "$port" --dir "$work" --save '' \
        --loadmodule "$PWD/target/release/libflorence.so" "$@" >"$work/log" 2>&1 &
    server=$!
    trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null; rm -rf "$work"' EXIT
    until redis-cli -p "$port" ping >/dev/null 2>&1; do sleep 0.1; done
}
