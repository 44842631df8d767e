# What the examples that move a server have in common; they read it, and define
#
#   server_pid     prints the number of the server that has the data, if one runs
#   server_start   starts it in the network namespace in which it is called, and returns when it answers; fails otherwise
#   server_stop    ends it, whatever state it is in, and returns when it has ended
#   server_finish  ends it when what it does is done, and returns when it has ended
#
#   FROM, TO       the two namespaces, by their names below /run/netns
#   HOLD           how long connections may wait; what the four may take, and `server_start` twice, has to fit in
#
# No supervisor may start the server by itself meanwhile: there would be two on one directory.

: "${FROM:?the namespace that has the server}" "${TO:?the namespace that is to have it}"
PATCHSWITCH=${PATCHSWITCH:-patchswitch}
HOLD=${HOLD:-30s}
RUN_AS=${RUN_AS:?}

as_owner() { (cd / && exec setpriv --reuid="$RUN_AS" --regid="$RUN_AS" --init-groups -- "$@"); }
start_in() { nsenter --net="/run/netns/$1" -- "$program" --start; }

runs_in() {
    local pid
    pid=$(server_pid) && [ -n "$pid" ] && [ "/proc/$pid/ns/net" -ef "/run/netns/$1" ]
}

# While connections wait: a server that does not begin in TO is put back, so that they find it in FROM.
move() {
    if server_finish && start_in "$TO"; then return 0; fi
    echo "it did not end in $FROM or does not begin in $TO; it goes back to $FROM" >&2
    server_stop
    start_in "$FROM"
    exit 1
}

# move_by NAME VARIABLE…: has connections of an attachment wait for the move, which is given these variables.
move_by() {
    local name=$1 code=0
    shift
    settings=$(mktemp)
    trap 'rm -f "$settings"' EXIT
    declare -p PATH FROM TO RUN_AS "$@" >"$settings"
    "$PATCHSWITCH" switch "$name" --to "$TO" --hold "$HOLD" --run "exec bash '$program' --move '$settings'" || code=$?
    # Called off in the midst of it, or killed when its time was over.
    if [ "$code" != 0 ] && ! runs_in "$FROM"; then
        server_stop
        start_in "$FROM"
        echo "it runs in $FROM again" >&2
    fi
    return "$code"
}
