#!/usr/bin/env bash
# A PostgreSQL server moves between two namespaces that `patchswitch attach` knows. Both have one data directory, which only
# one server may use at a time: so new connections wait while the one ends and the other begins. None is refused, and
# nothing that was committed is lost.
#
#   FROM=ns1 TO=ns2 examples/postgresql.sh NAME
#
#   DATA, CONFIG   its directory, and its configuration if that is not in there
#   SOCKET, LOG    where its socket is, and where it writes what it says
#   FINISH         so many seconds for what sessions do (2)
#   YOUNG          so many for one that has just been opened to begin (0.2)
#
# A session that does nothing, outside a transaction, is ended, as pools of connections expect it. A client that waits for a
# connection while it has a transaction open on another one would wait for ever: that is what FINISH is for.
set -euo pipefail

program=$(readlink -f "$0")
if [ "${1:-}" = --move ]; then . "$2"; fi
BIN=${BIN:-/usr/lib/postgresql/15/bin}
DATA=${DATA:-/var/lib/postgresql/15/main}
RUN_AS=${RUN_AS:-postgres}
SOCKET=${SOCKET:-/var/run/postgresql}
LOG=${LOG:-$DATA/move.log}
YOUNG=${YOUNG:-0.2}
FINISH=${FINISH:-2}
# A server that is not there by then, or does not end by then, is not going to.
LIMIT=${LIMIT:-6}
if [ -z "${CONFIG:-}" ]; then
    CONFIG=$DATA/postgresql.conf
    [ -e "$CONFIG" ] || CONFIG=/etc/postgresql/15/main/postgresql.conf
fi
export BIN DATA RUN_AS SOCKET LOG LIMIT CONFIG FROM TO
. "$(dirname "$program")/move.sh"

# Its socket is a file, which is there in every namespace.
sql() { as_owner "$BIN/psql" -XAtq -h "$SOCKET" -d postgres -c "$1"; }
control() { as_owner "$BIN/pg_ctl" -D "$DATA" "$@" >/dev/null; }

server_pid() { head -n 1 "$DATA/postmaster.pid" 2>/dev/null; }

server_start() {
    # pg_ctl itself would look ten times a second, which is a part of the pause.
    control start -W -l "$LOG" -o "-c config_file='$CONFIG'" || return 1
    local end=$((SECONDS + LIMIT))
    while ((SECONDS < end)); do
        if sql 'SELECT 1' >/dev/null 2>&1; then return 0; fi
        # From its first moments on there is a file with its number, until it ends.
        if ((SECONDS > end - LIMIT + 1)) && ! control status; then return 1; fi
        sleep 0.01
    done
    return 1
}

server_stop() { control stop -m immediate -t "$LIMIT" 2>/dev/null || true; }

server_finish() {
    local began
    began=$(($(date +%s%N) / 1000))
    end_sessions
    echo "sessions ended within $(($(date +%s%N) / 1000 - began)) us" >&2
    control stop -m fast -t "$LIMIT" || return 1
    echo "stopped within $(($(date +%s%N) / 1000 - began)) us" >&2
}

# Ends the sessions that do nothing, each as soon as it does nothing, until none is left or the time is over. Asked from
# within the server: a session with much to do does nothing for some microseconds only.
end_sessions() {
    sql "DO \$\$
    DECLARE
        sessions int;
        until timestamptz := clock_timestamp() + interval '$FINISH s';
    BEGIN
        LOOP
            PERFORM pg_stat_clear_snapshot();
            PERFORM pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
                    AND state = 'idle' AND backend_start < clock_timestamp() - interval '$YOUNG s';
            SELECT count(*) INTO sessions FROM pg_stat_activity
                WHERE backend_type = 'client backend' AND pid <> pg_backend_pid();
            EXIT WHEN sessions = 0;
            IF clock_timestamp() > until THEN
                RAISE WARNING '% sessions are ended in what they do', sessions;
                EXIT;
            END IF;
            PERFORM pg_sleep(0.001);
        END LOOP;
    END \$\$"
}

case ${1:?the name of the attachment} in
--start) server_start ;;
--move) move ;;
*)
    [ -e "$CONFIG" ] || { echo "there is no $CONFIG; CONFIG says where it is" >&2 && exit 2; }
    runs_in "$FROM" || { echo "no server with the data of $DATA runs in $FROM" >&2 && exit 1; }
    # What has to be written is written before anybody waits.
    sql CHECKPOINT
    move_by "$1" BIN DATA SOCKET LOG LIMIT CONFIG YOUNG FINISH
    ;;
esac
