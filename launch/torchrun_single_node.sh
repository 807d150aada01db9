#!/usr/bin/env bash
# All GPUs of one machine (without GPUs: all cores), restarted up to three times where a rank dies.
#
#   launch/torchrun_single_node.sh                                          # trains configs/fashion_mnist.yaml
#   launch/torchrun_single_node.sh --config configs/imagenet/bn_x30.yaml --data SHARDS
#
# The words are those of `syncbn fit`. Ends with torchrun's status, not 0 where a rank has failed for good.
set -eo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
[[ $# -gt 0 ]] || set -- --config configs/fashion_mnist.yaml

launch=("${container[@]}" torchrun --standalone --nproc-per-node="${RANKS_PER_NODE:-auto}")
"${launch[@]}" -m syncbn doctor "$@"
"${launch[@]}" --max-restarts=3 -m syncbn fit "$@"
