# The part that is the same whoever made the namespaces; the examples read it.
#
#   UPLINK       the device on which the clients are
#   ADDRESS      the service address; it must belong to nobody yet
#   PORT         a TCP port on which the service speaks HTTP (default 80)
#   PATCHSWITCH  the program, if it is not in the PATH
#
# The host is a client like any other: what it asks goes where a client's request on the uplink goes.

: "${UPLINK:?the device on which the clients are}" "${ADDRESS:?the service address}"
PORT=${PORT:-80}
PATCHSWITCH=${PATCHSWITCH:-patchswitch}

# Asks the service for its first line.
ask() {
    exec 3<>"/dev/tcp/$ADDRESS/$PORT"
    printf 'GET / HTTP/1.0\r\nHost: %s\r\n\r\n' "$ADDRESS" >&3
    sed '1,/^\r$/d' <&3 | head -n 1
    exec 3>&-
}

# Waits until somebody listens in a network namespace.
wait_for_listener() {
    local tries
    for tries in $(seq 100); do
        if nsenter --net="$1" ss -Hltn "sport = :$PORT" 2> /dev/null | grep -q .; then return; fi
        sleep 0.1
    done
    echo "nobody listens on port $PORT in $1" >&2
    return 1
}

# switch_between NAME OLD NEW: the namespaces as `patchswitch attach --help` names them.
switch_between() {
    "$PATCHSWITCH" attach "$1" "$2" "$3" --address "$ADDRESS" --uplink "$UPLINK"
    trap '"$PATCHSWITCH" detach "$1" --force; clean_up' EXIT
    echo "before: $(ask)"
    "$PATCHSWITCH" switch "$1"
    echo "after: $(ask)"
    "$PATCHSWITCH" drain "$1" --deadline 60
    "$PATCHSWITCH" detach "$1"
    trap clean_up EXIT
}
