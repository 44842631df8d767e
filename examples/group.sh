#!/usr/bin/env bash
# Two services that move as one: nobody sees the one new and the other one old. Each has its own address; one store moves
# both from `old` to `new`.
#
#   UPLINK=eth0 ADDRESS=192.0.2.80 OTHER_ADDRESS=192.0.2.81 examples/group.sh python3 -m http.server 80
#
# The services are in the same two namespaces here, as a shop and its payments might be. They can be in namespaces of their
# own, and on different uplinks. The word {} in the command becomes the name of the namespace.
set -euo pipefail
. "$(dirname "$0")/switch.sh"
: "${OTHER_ADDRESS:?the address of the second service}"

pids=()
clean_up() {
    for name in example-pay example-shop; do "$PATCHSWITCH" detach "$name" --force || true; done
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
"$PATCHSWITCH" attach example-shop example-old example-new --address "$ADDRESS" --uplink "$UPLINK"
"$PATCHSWITCH" attach example-pay example-old example-new --address "$OTHER_ADDRESS" --uplink "$UPLINK" \
    --with example-shop
echo "before: $(ask) and $(ADDRESS=$OTHER_ADDRESS ask)"
# Either name will do.
"$PATCHSWITCH" switch example-shop
echo "after: $(ask) and $(ADDRESS=$OTHER_ADDRESS ask)"
"$PATCHSWITCH" drain example-shop --deadline 60
