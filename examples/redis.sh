#!/usr/bin/env bash
# A Redis server moves between two namespaces that `patchswitch attach` knows, with the file in which it keeps everything.
# New connections wait while the one ends and the other begins.
#
#   CONF=/etc/redis/redis.conf FROM=ns1 TO=ns2 examples/redis.sh NAME
#
# The configuration has `appendonly yes`, a `unixsocket`, and `daemonize yes`. What a client has asked when the server ends is
# not answered, as ever when a server ends; its next connection is to the other one.
set -euo pipefail

program=$(readlink -f "$0")
PATCHSWITCH=${PATCHSWITCH:-patchswitch}
SERVER=${SERVER:-redis-server}
SOCKET=${SOCKET:-/run/redis/redis-server.sock}
HOLD=${HOLD:-30s}

# Its socket is a file, which is there in every namespace.
ask() { redis-cli -e -s "$SOCKET" "$@"; }

start_in() {
    nsenter --net="/run/netns/$1" -- "$SERVER" "$CONF"
    for _ in {1..3000}; do
        # Answers only when it has read its file.
        if [ "$(ask PING 2>/dev/null)" = PONG ]; then return; fi
        sleep 0.01
    done
    return 1
}

case $1 in
move)
    pid=$(ask INFO server | sed -n 's/^process_id:\([0-9]*\).*/\1/p')
    ask SHUTDOWN
    # Its directory is its alone until it has ended. (Of one that has, whose parent has not noticed yet, this file is gone.)
    while [ -e "/proc/$pid/exe" ]; do sleep 0.01; done
    if ! start_in "$TO"; then
        ask SHUTDOWN NOSAVE || true
        start_in "$FROM"
        exit 1
    fi
    ;;
*)
    : "${CONF:?its configuration}" "${FROM:?the namespace that has it}" "${TO:?the namespace that is to have it}"
    settings=$(printf '%s=%q ' CONF "$CONF" FROM "$FROM" TO "$TO" SERVER "$SERVER" SOCKET "$SOCKET")
    "$PATCHSWITCH" switch "$1" --to "$TO" --hold "$HOLD" --run "export $settings PATH=$PATH; exec $(printf %q "$program") move"
    ;;
esac
