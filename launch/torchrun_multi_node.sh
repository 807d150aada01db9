#!/usr/bin/env bash
# Several machines without a scheduler: start this script, with the same words, on every one of them.
#
#   FIRST_NODE=node1 NODES=2 launch/torchrun_multi_node.sh [words of syncbn fit]
#
# FIRST_NODE  name or address of the node that keeps the rendezvous, and on which rank 0 is; the run cannot go on without
#             it.
# NODES       how many take part, or as few and as many as may: NODES=1:2 goes on with one where the other dies. The global
#             batch stays the same.
# REJOIN=1    on a node that comes back, the same line otherwise: takes part again in the run that the others have kept.
set -eo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
use_network
: "${FIRST_NODE:?name of the node that keeps the rendezvous}" "${NODES:?how many nodes, such as 2 or 1:2}"
[[ $# -gt 0 ]] || set -- --config configs/fashion_mnist.yaml

# EDIT: the port of the rendezvous; it and the next one, which is the doctor's, are free on FIRST_NODE and open between the
# nodes.
port="${RENDEZVOUS_PORT:-29400}"

# EDIT: how many seconds the others wait for a node that went, before they give up.
join_timeout="${JOIN_TIMEOUT:-600}"

is_first_node() {
    local address
    for address in $(getent ahosts "$FIRST_NODE" | cut -d ' ' -f 1); do
        [[ $address == 127.* || $address == ::1 || " $(hostname -I) " == *" $address "* ]] && return
    done
    return 1
}

# torchrun numbers nodes in the order of these words. Rank 0, which decides where a run goes on, has to stay where it was:
# ~ sorts behind all names and addresses. No one connects to another node by its word than the first.
if is_first_node; then local_addr="$FIRST_NODE"; else local_addr="~$(hostname)"; fi

launch() {
    local port="$1" # the doctor has its own: a quick node would meet the others' doctor where it looks for their run
    shift
    "${container[@]}" torchrun --nnodes="$NODES" \
        --nproc-per-node="${RANKS_PER_NODE:-auto}" --rdzv-backend=c10d --rdzv-id=syncbn \
        --rdzv-endpoint="$FIRST_NODE:$port" --local-addr="$local_addr" --rdzv-conf="join_timeout=$join_timeout" "$@"
}

# The others of a node that comes back are past the doctor.
[[ -n $REJOIN ]] || launch "$((port + 1))" -m syncbn doctor "$@"
launch "$port" --max-restarts=3 -m syncbn fit "$@"
