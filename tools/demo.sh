#!/usr/bin/env bash
# Starts redis-server with the module on a free port, asks it about the sample pictures through
# redis-cli, draws what it located, and leaves it running until interrupted.
# `DEMO_ONCE=1 make demo` ends after the answers.
set -euo pipefail
cd "$(dirname "$0")/.."

# Below the ports that the system gives to outgoing connections.
port=$((10000 + RANDOM % 20000))
while (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done
data=$(mktemp -d)
redis-server redis.conf --port "$port" --appendonly no --save "" --florence.file-roots "$PWD" > "$data/log" 2>&1 &
server=$!
trap 'kill $server 2> /dev/null || true; wait $server 2> /dev/null || true; rm -rf "$data"' EXIT
trap 'exit 0' INT TERM

cli() { redis-cli -p "$port" "$@"; }
for _ in $(seq 100); do
    cli PING 2> /dev/null | grep -q PONG && break
    kill -0 $server 2> /dev/null || { cat "$data/log"; exit 1; }
    sleep 0.1
done

echo
echo "redis-server with FLORENCE.* runs on port $port"
mkdir -p demo-out
samples=$PWD/models/tiny/samples
ask() {
    local picture=$1 prompt=$2 key answer out
    echo
    echo "> FLORENCE.SUBMIT * $samples/$picture '$prompt'"
    key=$(cli FLORENCE.SUBMIT '*' "$samples/$picture" "$prompt")
    echo "> FLORENCE.WAIT $key 60"
    cli FLORENCE.WAIT "$key" 60 > /dev/null
    answer=$(cli FLORENCE.GET "$key" RESULT)
    echo "$answer"
    if [[ $answer == *boxes* || $answer == *polygons* ]]; then
        out=demo-out/${picture%.*}-$(tr -d '<' <<< "${prompt%%>*}").png
        target/release/florence draw "$samples/$picture" "$answer" "$out"
    fi
}
ask shapes.png '<CAPTION>'
ask shapes.png '<OD>'
ask shapes.png '<REFERRING_EXPRESSION_SEGMENTATION>a black triangle'
ask sign.png '<OCR_WITH_REGION>'
ask sign.png '<DETAILED_CAPTION>'
ask poster.jpg '<OCR>'
ask poster.jpg '<DENSE_REGION_CAPTION>'
ask tall.png '<OPEN_VOCABULARY_DETECTION>purple circle'
ask tall.png '<CAPTION_TO_PHRASE_GROUNDING>a green circle and the word TEA'

echo
echo "Pictures with the boxes drawn are in demo-out/. Go on with: redis-cli -p $port"
[ -z "${DEMO_ONCE:-}" ] || exit 0
echo "Ctrl-C stops the server."
wait $server
