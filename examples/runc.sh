#!/usr/bin/env bash
# Two containers of runc from one root directory: the service moves from `old` to `new`. Containers of any runtime that
# speaks OCI (crun, containerd, Podman, Docker) have a process whose namespace can be named in the same way.
#
#   UPLINK=eth0 ADDRESS=192.0.2.80 examples/runc.sh /srv/rootfs nginx -g 'daemon off;'
#
# The word {} in the command becomes the name of the container.
set -euo pipefail
. "$(dirname "$0")/switch.sh"
root=$(realpath "$1")
shift

bundles=$(mktemp -d)
clean_up() {
    for name in example-old example-new; do runc delete --force "$name" || true; done
    rm -r "$bundles"
}
trap clean_up EXIT

# The container's command as a JSON array.
arguments() {
    local word list=''
    for word in "$@"; do
        word=${word//\\/\\\\}
        list+=", \"${word//\"/\\\"}\""
    done
    printf '[%s]' "${list:2}"
}

for name in example-old example-new; do
    mkdir "$bundles/$name"
    runc spec --bundle "$bundles/$name"
    # The default of runc is a shell on a terminal in a network namespace of its own.
    words=$(arguments "${@//\{\}/$name}")
    sed -i -z -e 's|"terminal": true|"terminal": false|' \
        -e "s|\"args\": \[[^]]*\]|\"args\": ${words//&/\\&}|" \
        -e "s|\"path\": \"rootfs\"|\"path\": \"$root\"|" "$bundles/$name/config.json"
    runc run --detach --bundle "$bundles/$name" "$name" < /dev/null > "$bundles/$name/log" 2>&1
    pid=$(runc state "$name" | sed -n 's/.*"pid": \([0-9]*\).*/\1/p')
    declare "${name#example-}=$pid"
    wait_for_listener "/proc/$pid/ns/net"
done
# shellcheck disable=SC2154 # declared in the loop
switch_between example "pid:$old" "pid:$new"
