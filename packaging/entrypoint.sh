#!/bin/sh
# The container's entry point: redis-server with the module, data in the working directory.
# Arguments are settings that are added, such as `--florence.model /models/base-ft --appendonly no`;
# another command (`redis-cli`, `florence doctor`) is run instead. FLORENCE_PASSWORD, or the file
# that FLORENCE_PASSWORD_FILE names, is the password; without one Redis refuses all clients from
# outside of the container. `is-ready`, for health checks, says whether the model is loaded, on the
# port that `--port` named.
set -eu

password=${FLORENCE_PASSWORD:-}
[ -z "${FLORENCE_PASSWORD_FILE:-}" ] || password=$(cat "$FLORENCE_PASSWORD_FILE")

case ${1:-} in
    "" | -*) ;;
    is-ready)
        [ -z "$password" ] || export REDISCLI_AUTH="$password"
        port=${2:-$(cat packed/port 2> /dev/null || true)}
        redis-cli -p "${port:-6379}" INFO florence | grep -q florence_model:ready
        exit
        ;;
    *) exec "$@" ;;
esac

# For `is-ready`, which does not get these arguments.
port=6379 previous=""
for argument in "$@"; do
    [ "$previous" != --port ] || port=$argument
    previous=$argument
done
mkdir -p packed
echo "$port" > packed/port || true
if [ -n "$password" ]; then
    requirepass="requirepass \"$(printf %s "$password" | sed 's/[\\"]/\\&/g')\""
else
    requirepass="protected-mode yes"
    echo "no FLORENCE_PASSWORD: clients from outside of the container are refused" >&2
fi
# Not as arguments: those can be seen in the list of processes.
exec redis-server - "$@" <<END
loadmodule ${FLORENCE_MODULE:-/usr/lib/redis/modules/libflorence.so}
florence.packed-directory "$PWD/packed"
appendonly yes
maxmemory-policy noeviction
$requirepass
END
