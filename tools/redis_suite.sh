#!/usr/bin/env bash
# Runs Redis' own tests, of Debian's source package, on Debian's redis-server without and with the
# module: `redis_suite.sh short` what is near to what the module does, `redis_suite.sh full` all of
# it, `redis_suite.sh UNIT...` these. Fails if a test fails only with the module.
# Logs of the tests are left in target/redis-suite.
set -euo pipefail
cd "$(dirname "$0")/.."

module=${FLORENCE_MODULE:-target/release/libflorence.so}

# Tests that may fail only with the module, as UNIT|TEST|WHY.
shared="wants a ratio of free to used memory; in Debian's build the module's 21 MB are in the same allocator and count too"
expected=(
    "unit/introspection|CONFIG sanity|sets every setting to its own value but for Redis' immutable ones, which it knows by name; it does not know ours"
    "unit/memefficiency|Active defrag eval scripts|$shared"
    "unit/memefficiency|Active defrag big keys|$shared"
    "unit/memefficiency|Active defrag big list|$shared"
)

# What `short` runs: UNIT, or UNIT|TEXT for those of its top-level blocks that have this text.
short=(
    unit/dump unit/keyspace unit/expire unit/multi unit/scripting unit/pubsub unit/introspection unit/info
    unit/type/hash unit/type/string integration/corrupt-dump integration/convert-ziplist-hash-on-load
    "integration/replication|swapdb (async_loading)"
)

case ${1:-} in
short) units=("${short[@]}") limit=300 arguments=(--tags -slow --skiptest /^MIGRATE) ;;
full) units=() limit=1500 arguments=() ;;
"" | -*) sed -n '2,5s/^# //p' "$0"; exit 2 ;;
*) units=("$@") limit=1500 arguments=() ;;
esac

# prepare: Redis' source of the version that is installed, into .servers/redis-source/VERSION.
prepare() {
    local version store=$PWD/.servers/redis-source file
    version=$(dpkg-query -W -f '${source:Version}' redis-server)
    source=$store/${version#*:}
    [ ! -d "$source" ] || return 0
    echo "downloading the source of redis $version"
    rm -rf "$store"
    mkdir -p "$store"/{parts,lists/partial,cache/archives/partial}
    # The system's sources and keys, asked for source packages; the system's own lists stay as they
    # are. apt checks what it downloads against the signed lists.
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ ! -r "$file" ] || sed -n 's/^deb /deb-src /p' "$file" > "$store/parts/$(basename "$file" .list).list"
    done
    for file in /etc/apt/sources.list.d/*.sources; do
        [ ! -r "$file" ] || sed 's/^Types:.*/Types: deb-src/' "$file" > "$store/parts/$(basename "$file")"
    done
    (
        cd "$store/cache"
        apt=(-o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$store/parts" -o APT::Sandbox::User=
            -o "Dir::State::lists=$store/lists" -o "Dir::Cache=$store/cache" -o Acquire::Retries=3 -q)
        # A list that cannot be had may be one that is not needed.
        apt-get "${apt[@]}" update || true
        # Of an older update the archive has no source any more; the newest one's tests do.
        apt-get "${apt[@]}" source --download-only "redis=$version" || apt-get "${apt[@]}" source --download-only redis
        dpkg-source -x redis_*.dsc redis
    ) > "$store/log" 2>&1 || { cat "$store/log"; exit 1; }
    # It appears by a move, so that a run that is cut short leaves no half of one.
    mv "$store/cache/redis" "$source"
    rm -rf "$store"/{parts,lists,cache,log}
}

# Ends what tests have left running: all that works below this directory, and nothing else.
sweep() {
    local processes
    for _ in $(seq 50); do
        processes=$(find /proc/[0-9]*/cwd -maxdepth 0 \( -lname "$1" -o -lname "$1/*" \) -printf '%h ' 2> /dev/null || true)
        [ -n "$processes" ] || return 0
        # shellcheck disable=SC2086
        kill -KILL ${processes//\/proc\//} 2> /dev/null || true
        sleep 0.1
    done
}

# blocks TEXT FILE: the file without its blocks of tests that lack the text. Tests of a block need
# each other, so that Redis' own selection by their names breaks off.
blocks() {
    awk -v text="$1" '
        /^[^ \t}#]/ && block == "" && /{$/ { block = $0; next }
        block == "" { print; next }
        { block = block "\n" $0 }
        /^}/ { if (block ~ /^proc / || index(block, text)) print block; block = "" }
    ' "$2"
}

# run UNIT SIDE LOG: runs a unit's tests; what went wrong is found in the log.
run() {
    local unit=${1%%|*} tree=$work/$2 side=() first=$port
    [[ $2 == without ]] || { side+=(--config loadmodule "$work/module.so"); first=$((port + 500)); }
    rm -rf "$tree"
    mkdir -p "$tree"
    cp -r "$source/tests" "$work/src" "$tree"
    [[ $1 != *"|"* ]] || blocks "${1#*|}" "$source/tests/$unit.tcl" > "$tree/tests/$unit.tcl"
    # One client, which ends with the unit if a test breaks off; the next unit is not hurt.
    (
        cd "$tree"
        TERM=dumb exec timeout -k 10 "$limit" tclsh tests/test_helper.tcl --single "$unit" --clients 1 --durable \
            --timeout $((limit / 2)) --baseport "$first" --portcount 460 "${side[@]}" "${arguments[@]}"
    ) > "$3" 2>&1 < /dev/null || true
    sweep "$tree"
}

# failures LOG: the tests that failed, each with what the log says about it after a tab.
failures() {
    awk '
        function outside() { if (lost != "") print "(outside of the tests) " lost "\t"; lost = "" }
        # A broken test is told first without its name and with its first letters cut off, then whole.
        unnamed { lost = $0; gsub(/[0-9]+/, "0", lost); unnamed = 0 }
        test != "" { print test "\t" (lost != "" ? lost : substr($0, 1, 300)); test = lost = "" }
        /^\[err\]: .* in tests\/[^ ]*\.tcl$/ { sub(/^\[err\]: /, ""); sub(/ in tests\/[^ ]*$/, ""); test = $0; next }
        /^\[err\]: / { outside(); unnamed = 1; next }
        /^\[(ok|[0-9])/ { outside() }
        /^ +The End$/ { ended = 1; exit }
        /^\[TIMEOUT\]/ { exit }
        END { outside(); if (!ended) print "(the unit did not come to its end)\t" }
    ' "$1" | LC_ALL=C sort -u -t $'\t' -k 1,1
}

passed() { grep -c '^\[ok\]: ' "$1" || true; }

prepare
work=$(mktemp -d /tmp/florence-redis-suite.XXXXXX)
trap 'sweep "$work"; rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP
logs=target/redis-suite
rm -rf "$logs"
mkdir -p "$logs" "$work/src"
for program in server cli benchmark check-aof check-rdb; do
    ln -s "$(command -v "redis-$program")" "$work/src/"
done
# A build may replace the module while this runs.
cp "$module" "$work/module.so"

# Ports of our own, below those that the system gives to outgoing connections: a thousand for the
# servers, and those 10,000 above them for cluster buses. The suite passes over ports in use.
for slot in $(shuf -i 0-9); do
    { exec {lock}> "/tmp/florence-redis-suite-$slot.lock"; } 2> /dev/null || continue
    ! flock -n "$lock" || break
    exec {lock}>&-
done
port=$((11040 + slot * 1000))

[ ${#units[@]} -gt 0 ] || mapfile -t units < <(cd "$source" && tclsh tests/test_helper.tcl --list-tests)
both=() planned=() repeated=() different=() total=(0 0)
for unit in "${units[@]}"; do
    name=${unit%%|*} log=$logs/${unit%%|*} start=$SECONDS
    mkdir -p "$(dirname "$log")"
    # In the background, so that a signal to this script is heard at once.
    run "$unit" without "$log.without" &
    run "$unit" with "$log.with" &
    wait
    for side in without with; do failures "$log.$side" > "$work/$side.failed"; done
    counts=("$(passed "$log.without")" "$(passed "$log.with")")
    total=($((total[0] + counts[0])) $((total[1] + counts[1])))
    printf '%-40s passed %4d without, %4d with, failed %2d, %2d; %d s\n' "$name" "${counts[@]}" \
        "$(wc -l < "$work/without.failed")" "$(wc -l < "$work/with.failed")" $((SECONDS - start))

    declare -A known=() again=()
    while IFS=$'\t' read -r test why; do
        both+=("$name: $test")
        known[$test]=yes
    done < "$work/without.failed"
    for entry in "${expected[@]}"; do
        [[ $entry != "$name|"* ]] || known[$(cut -d '|' -f 2 <<< "$entry")]=${entry##*|}
    done
    new=()
    while IFS=$'\t' read -r test why; do
        case ${known[$test]:-} in
        "") new+=("$test") ;;
        yes) ;;
        *) planned+=("$name: $test" "    ${known[$test]}") ;;
        esac
    done < "$work/with.failed"
    [ ${#new[@]} -gt 0 ] || continue

    # Some tests look at the clock: what is due to the module is so again, with nothing beside it.
    run "$unit" with "$log.again" &
    wait
    while IFS=$'\t' read -r test why; do again[$test]=" $why"; done < <(failures "$log.again")
    for test in "${new[@]}"; do
        if [ -n "${again[$test]:-}" ]; then different+=("$name: $test" "   ${again[$test]}"); else repeated+=("$name: $test"); fi
    done
done

# list TITLE LINE...
list() {
    [ $# -gt 1 ] || return 0
    echo "$1:"
    printf '  %s\n' "${@:2}"
}
echo "== ${source##*/}: ${#units[@]} units in $SECONDS s"
echo "tests passed: ${total[0]} without, ${total[1]} with the module"
list "Failed on this machine without the module too" "${both[@]}"
list "Failed only with the module, as they may" "${planned[@]}"
list "Failed with the module once, but not when they were repeated" "${repeated[@]}"
list "FAILED ONLY WITH THE MODULE" "${different[@]}"
[ ${#different[@]} = 0 ] && [ "${total[1]}" -gt 0 ]
