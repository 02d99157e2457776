#!/usr/bin/env bash
# Puts what `make build` has built where the system looks for it: install.sh PREFIX SYSCONFDIR
# DESTDIR. A configuration file that is there stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
prefix=$1 sysconfdir=$2 destdir=$3
moduledir=$prefix/lib/florence-redis

for built in target/release/{libflorence.so,florence}; do
    [ -e "$built" ] || { echo "there is no $built: make build" >&2; exit 1; }
done
fill() { sed -e "s|@MODULEDIR@|$moduledir|g" -e "s|@SYSCONFDIR@|$sysconfdir|g" "$1"; }

install -D -m 755 target/release/florence "$destdir$prefix/bin/florence"
install -D -m 755 target/release/libflorence.so "$destdir$moduledir/libflorence.so"
install -D -m 644 <(fill packaging/florence-redis.service) \
    "$destdir$prefix/lib/systemd/system/florence-redis.service"
configuration=$destdir$sysconfdir/florence-redis/redis.conf
if [ -e "$configuration" ]; then
    echo "$configuration stays as it is"
else
    install -D -m 640 <(fill packaging/redis.conf) "$configuration"
    # Only the service may read it: it may hold a password.
    [ -n "$destdir" ] || chgrp redis "$configuration"
fi
cat <<END
installed below $destdir$prefix, settings in $configuration
start it: systemctl daemon-reload; systemctl enable --now florence-redis
It listens on port 6380: 6379 is that of Debian's own redis-server.
END
