#!/usr/bin/env bash
# DeepSpeed's launcher: started on one machine, it starts the ranks on every host of a hostfile through ssh.
#
#   launch/deepspeed.sh                               # trains configs/fashion_mnist.yaml with ZeRO stage 2
#   launch/deepspeed.sh --config configs/imagenet/bn_x30.yaml --config configs/strategy/deepspeed_zero1.yaml --data SHARDS
#
# The hostfile has a line for each host, "node1 slots=8", with as many slots as it has GPUs: nothing else says how many
# nodes and ranks there are. Needs pdsh, ssh without a password from this host to the others and to itself, and the
# checkout at the same path on all of them.
set -eo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
use_network
[[ $# -gt 0 ]] || set -- --config configs/fashion_mnist.yaml --config configs/strategy/deepspeed_zero2.yaml

# EDIT: the hosts, or set HOSTFILE.
hostfile="${HOSTFILE:-hostfile}"
[[ -r $hostfile ]] || { echo "launch/deepspeed.sh: no hostfile $hostfile: write one or set HOSTFILE" >&2; exit 1; }
first_host=$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$hostfile")

# ssh takes no variables along: DeepSpeed reads those that ranks need from this file.
DS_ENV_FILE=$(mktemp "${TMPDIR:-/tmp}/syncbn-deepspeed.XXXXXX")
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
env | grep -E '^(PATH|PYTHON[A-Z]*|OMP_NUM_THREADS|(NCCL|GLOO|TORCH|SYNCBN)_[A-Z_]*)=' >"$DS_ENV_FILE"

launch() {
    # force_multi: through ssh also where the hostfile has one host, which need not be this one. no_local_rank: the rank
    # is in the environment, and syncbn has no such option.
    deepspeed --hostfile "$hostfile" --force_multi --master_addr "$first_host" \
        --no_local_rank --module "$@"
}
launch syncbn doctor "$@"
launch syncbn fit "$@"
