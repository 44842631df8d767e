#!/usr/bin/env bash
# Two namespaces of `ip netns`, with a program in each: the service moves from `old` to `new`.
#
#   UPLINK=eth0 ADDRESS=192.0.2.80 examples/netns.sh python3 -m http.server 80
#
# The word {} in the command becomes the name of the namespace.
set -euo pipefail
. "$(dirname "$0")/switch.sh"

pids=()
clean_up() {
    for pid in "${pids[@]}"; do kill "$pid" || true; done
    wait
    for name in example-old example-new; do ip netns delete "$name" || true; done
}
trap clean_up EXIT

for name in example-old example-new; do
    ip netns add "$name"
    ip -n "$name" link set lo up
    ip netns exec "$name" "${@//\{\}/$name}" &
    pids+=($!)
    wait_for_listener "/run/netns/$name"
done
switch_between example example-old example-new
