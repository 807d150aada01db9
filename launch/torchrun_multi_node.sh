#!/usr/bin/env bash
# Several machines without a scheduler: start this script, with the same words, on every one of them.
#
#   FIRST_NODE=node1 NODES=2 launch/torchrun_multi_node.sh [words of syncbn fit]
#
# FIRST_NODE  name or address of the node that keeps the rendezvous; the run cannot go on without it.
# NODES       how many take part, or as few and as many as may: NODES=1:2 goes on with one where the other dies, and with
#             both when this script is started there again. The global batch stays the same.
set -eo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
use_network
[[ $# -gt 0 ]] || set -- --config configs/fashion_mnist.yaml

# EDIT: the port of the rendezvous, free on FIRST_NODE and open between the nodes.
port="${RENDEZVOUS_PORT:-29400}"

# EDIT: how many seconds the others wait for a node that went, before they give up.
join_timeout="${JOIN_TIMEOUT:-600}"

launch() {
    local name="$1" # of the rendezvous: that of the doctor is closed for good when the run opens its own
    shift
    "${container[@]}" torchrun --nnodes="${NODES:?how many nodes, such as 2 or 1:2}" \
        --nproc-per-node="${RANKS_PER_NODE:-auto}" --rdzv-backend=c10d --rdzv-id="syncbn-$name" \
        --rdzv-endpoint="${FIRST_NODE:?name of the node that keeps the rendezvous}:$port" \
        --rdzv-conf="join_timeout=$join_timeout" "$@"
}

launch doctor -m syncbn doctor "$@"
launch fit --max-restarts=3 -m syncbn fit "$@"
