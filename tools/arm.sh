#!/usr/bin/env bash
# The engine's tests on 64-bit Arm: built by Debian's cross compilers, run by QEMU. Arguments go
# to `cargo test`.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(uname -m)" = x86_64 ] || { echo "a machine of another kind runs 'make unit' itself"; exit 1; }

# A Rust compiler with the standard library of both architectures, unpacked rather than installed:
# the system's packages stay those of one architecture.
rust=$PWD/.arm/usr
if [ ! -x .arm/rustc ]; then
    rm -rf .arm
    mkdir -p .arm/packages .arm/lists/partial .arm/cache/archives/partial
    apt=(-o "Dir::State::lists=$PWD/.arm/lists" -o "Dir::Cache=$PWD/.arm/cache" -o APT::Sandbox::User=
        -o APT::Architecture=amd64 -o APT::Architectures::=amd64 -o APT::Architectures::=arm64)
    apt-get "${apt[@]}" update -qq
    libraries=$(apt-cache "${apt[@]}" depends --recurse --important rustc-web | grep -E '^lib(std-rust-web-[0-9]|llvm)')
    (cd .arm/packages && apt-get "${apt[@]}" download -qq \
        rustc-web libstd-rust-web-dev:amd64 libstd-rust-web-dev:arm64 $libraries)
    for package in .arm/packages/*.deb; do dpkg-deb -x "$package" .arm; done
    rm -rf .arm/packages .arm/lists .arm/cache
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$rust/lib/x86_64-linux-gnu" "$rust/bin/rustc" > .arm/rustc
    chmod +x .arm/rustc
fi

export RUSTC=$PWD/.arm/rustc
# Optimizing each part of a crate once is enough for tests.
export CARGO_PROFILE_RELEASE_LTO=off
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
export CXX_aarch64_unknown_linux_gnu=aarch64-linux-gnu-g++
cargo test --release --locked --target-dir target/arm --target aarch64-unknown-linux-gnu -p florence-engine "$@"
