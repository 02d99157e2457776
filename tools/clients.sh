#!/usr/bin/env bash
# Builds the typed clients' packages, and tests both on the server that FLORENCE_SERVER names; side
# by side, since they mostly wait.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv-clients/bin/python

rm -rf clients/python/dist
"$python" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation \
    -w clients/python/dist clients/python
"$python" -m pip install -q --disable-pip-version-check --no-deps --force-reinstall \
    clients/python/dist/*.whl

node_log=$(mktemp)
trap 'rm -f "$node_log"' EXIT
(cd clients/node && timeout 300 npm test --silent) > "$node_log" 2>&1 &
node=$!
failed=0
(cd clients/python && timeout 300 "$python" -m pytest -q -n 3 -p no:cacheprovider tests) || failed=1
wait $node || failed=1
cat "$node_log"
exit $failed
