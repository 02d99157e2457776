#!/usr/bin/env bash
# redis-server with redis.conf, in the foreground; arguments are settings that are added.
set -euo pipefail
cd "$(dirname "$0")/.."

port=6379 previous=""
for argument in "$@"; do
    [ "$previous" != --port ] || port=$argument
    previous=$argument
done
if (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
    cat >&2 <<END
port $port is taken: something listens there, perhaps the redis-server that Debian starts when it
is installed (sudo systemctl disable --now redis-server). Another port:
    make run ARGS="--port 6380"
END
    exit 1
fi
exec redis-server redis.conf "$@"
