#!/usr/bin/env bash
# A Redis server moves between two namespaces that `patchswitch attach` knows, with the file in which it keeps everything.
# New connections wait while the one ends and the other begins.
#
#   FROM=ns1 TO=ns2 examples/redis.sh NAME
#
#   CONF           its configuration, with `appendonly yes`, a `unixsocket`, and `daemonize yes`
#   SOCKET         that socket
#
# What a client has asked when the server ends is not answered, as ever when a server ends; its next connection is to the other
# one.
set -euo pipefail

program=$(readlink -f "$0")
if [ "${1:-}" = --move ]; then . "$2"; fi
CONF=$(readlink -f "${CONF:-/etc/redis/redis.conf}")
SERVER=${SERVER:-redis-server}
SOCKET=${SOCKET:-/run/redis/redis-server.sock}
RUN_AS=${RUN_AS:-redis}
# A server that does not answer by then, or does not end by then, is not going to.
LIMIT=${LIMIT:-6}
export CONF SERVER SOCKET RUN_AS LIMIT FROM TO
. "$(dirname "$program")/move.sh"

# Its socket is a file, which is there in every namespace.
ask() { redis-cli -e -s "$SOCKET" "$@"; }

server_pid() { ask INFO server 2>/dev/null | sed -n 's/^process_id:\([0-9]*\).*/\1/p'; }

server_start() {
    as_owner "$SERVER" "$CONF" || return 1
    local end=$((SECONDS + LIMIT))
    while ((SECONDS < end)); do
        # Answers only when it has read its file.
        if [ "$(ask PING 2>/dev/null)" = PONG ]; then return 0; fi
        sleep 0.01
    done
    return 1
}

# Asks it to end, and waits for that: its directory is its alone until then.
end_by() {
    local pid end=$((SECONDS + LIMIT))
    pid=$(server_pid) || true
    if [ -z "$pid" ]; then return 0; fi
    ask "$@" || true
    # Of one that has ended, whose parent has not noticed yet, this file is gone as well.
    while [ -e "/proc/$pid/exe" ]; do
        if ((SECONDS >= end)); then kill -KILL "$pid"; fi
        sleep 0.01
    done
}

server_finish() { end_by SHUTDOWN; }
server_stop() { end_by SHUTDOWN NOSAVE; }

case ${1:?the name of the attachment} in
--start) server_start ;;
--move) move ;;
*)
    runs_in "$FROM" || { echo "no server that answers at $SOCKET runs in $FROM" >&2 && exit 1; }
    move_by "$1" CONF SERVER SOCKET LIMIT
    ;;
esac
