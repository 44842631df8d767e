#!/usr/bin/env bash
# Two containers of systemd-nspawn from one root directory: the service moves from `old` to `new`.
#
#   UPLINK=eth0 ADDRESS=192.0.2.80 examples/nspawn.sh /srv/rootfs nginx -g 'daemon off;'
#
# The word {} in the command becomes the name of the container. A container that `machinectl` has started is named by
# the process that `machinectl show NAME --property=Leader` tells.
set -euo pipefail
. "$(dirname "$0")/switch.sh"
root=$(realpath "$1")
shift

spawned=()
clean_up() {
    for pid in "${spawned[@]}"; do kill "$pid" || true; done
    wait
}
trap clean_up EXIT

for name in example-old example-new; do
    systemd-nspawn --quiet --register=no --keep-unit --private-network --read-only --timezone=off --resolv-conf=off \
        --machine="$name" --directory="$root" "${@//\{\}/$name}" < /dev/null &
    spawned+=($!)
    # The container's first process is a child of nspawn's: the one with a network of its own. (For a moment there is
    # another, which prepares the root directory and still has ours.)
    pid=
    for _ in $(seq 100); do
        for child in $(pgrep --parent "${spawned[-1]}"); do
            network=$(readlink "/proc/$child/ns/net") || continue
            [ "$network" = "$(readlink /proc/self/ns/net)" ] || pid=$child
        done
        [ -z "$pid" ] || break
        sleep 0.1
    done
    : "${pid:?systemd-nspawn did not start $name}"
    declare "${name#example-}=$pid"
    wait_for_listener "/proc/$pid/ns/net"
done
# shellcheck disable=SC2154 # declared in the loop
switch_between example "pid:$old" "pid:$new"
