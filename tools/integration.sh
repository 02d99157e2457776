#!/usr/bin/env bash
# Runs the integration tests, those of `florence web` and those of the typed clients on Debian's
# redis-server, Redis 7.4, Redis 8.2 and Valkey 9. A server that is missing is a failure, not a silent
# pass.
set -uo pipefail
cd "$(dirname "$0")/.."

failed=0
# The suite mostly waits: four tests at once keep two cores busy.
for server in redis-server "$PWD"/.servers/{redis-7.4,redis-8.2,valkey-9}; do
    libraries=""
    [[ $server == */redis-7.4 ]] && libraries="$PWD/.servers/libs"
    echo "== $(LD_LIBRARY_PATH=$libraries $server --version)"
    FLORENCE_SERVER=$server FLORENCE_SERVER_LIBS=$libraries FLORENCE_PYTHON="$PWD/.venv/bin/python" \
        cargo test --release --locked --workspace --test tests -- --test-threads=4 || failed=1
    FLORENCE_SERVER=$server FLORENCE_SERVER_LIBS=$libraries \
        cargo test --release --locked --workspace --test web -- --test-threads=2 || failed=1
    FLORENCE_SERVER=$server FLORENCE_SERVER_LIBS=$libraries tools/clients.sh || failed=1
done
echo "== README.md and docs/CLIENTS.md"
.venv-clients/bin/python tools/readme.py || failed=1
exit $failed
