#!/usr/bin/env bash
# A PostgreSQL server moves between two namespaces that `patchswitch attach` knows. Both have one data directory, which only
# one server may use at a time: so new connections wait while the one ends and the other begins. None is refused, and
# nothing that was committed is lost.
#
#   DATA=/var/lib/postgresql/15/main FROM=ns1 TO=ns2 examples/postgresql.sh NAME
#
# What a session does is finished first, for FINISH seconds; one that does nothing, outside a transaction, is ended, as pools
# of connections expect it. One that has just been opened has YOUNG seconds to begin. A client that waits for a connection
# while it has a transaction open on another one would wait for ever: that is what FINISH is for.
set -euo pipefail

program=$(readlink -f "$0")
BIN=${BIN:-/usr/lib/postgresql/15/bin}
PATCHSWITCH=${PATCHSWITCH:-patchswitch}
RUN_AS=${RUN_AS:-postgres}
HOLD=${HOLD:-30s}
SOCKET=${SOCKET:-/var/run/postgresql}
YOUNG=${YOUNG:-0.2}
FINISH=${FINISH:-2}

as_owner() { (cd / && exec setpriv --reuid="$RUN_AS" --regid="$RUN_AS" --init-groups -- "$@"); }
# Its socket is a file, which is there in every namespace.
sql() { as_owner "$BIN/psql" -XAtq -h "$SOCKET" -d postgres -c "$1"; }
said() { echo "$1: $(($(date +%s%N) / 1000 - began)) us" >&2; }

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

start_in() { nsenter --net="/run/netns/$1" -- "$program" start; }

case $1 in
start)
    # Asks ten times a second whether it has started, else: a pause that everybody would wait through.
    as_owner "$BIN/pg_ctl" start -W -D "$DATA" -l "$DATA/log" >/dev/null
    for _ in {1..3000}; do
        if sql 'SELECT 1' >/dev/null 2>&1; then exit 0; fi
        sleep 0.01
    done
    exit 1
    ;;
move)
    began=$(($(date +%s%N) / 1000))
    end_sessions
    said sessions
    as_owner "$BIN/pg_ctl" stop -D "$DATA" -m fast >/dev/null
    said stopped
    if ! start_in "$TO"; then
        start_in "$FROM"
        exit 1
    fi
    said started
    ;;
*)
    : "${DATA:?its directory}" "${FROM:?the namespace that has it}" "${TO:?the namespace that is to have it}"
    # What has to be written is written before anybody waits.
    sql CHECKPOINT
    settings=$(printf '%s=%q ' DATA "$DATA" FROM "$FROM" TO "$TO" BIN "$BIN" RUN_AS "$RUN_AS" SOCKET "$SOCKET" YOUNG "$YOUNG" FINISH "$FINISH")
    "$PATCHSWITCH" switch "$1" --to "$TO" --hold "$HOLD" --run "export $settings PATH=$PATH; exec $(printf %q "$program") move"
    ;;
esac
