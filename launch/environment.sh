# Settings of every launch script, which sources this file: what the processes run in, and how they talk.
# shellcheck shell=bash

# EDIT: how a shell on a node gets the `syncbn` command; nothing where a container brings it.
source .venv/bin/activate

# EDIT: the container to run in, as the words before a command; empty for none. See README.md.
# shellcheck disable=SC2034  # the scripts use it
container=()

# The ranks of a node share its cores: with torch's default each would start a thread for every one of them.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# What a rank printed before it was killed is in the log, and a crash in native code leaves a stack there.
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

# NCCL says why it fails; by default it fails without a word.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# At a timeout NCCL's last 2,000 collectives are written to a file for each rank, which tells the rank that stayed away.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}" TORCH_NCCL_DUMP_ON_TIMEOUT=1

# torchrun: let every restart open a key-value store of its own. Sharing the rendezvous's, torch 2.13's default, ranks of
# the new attempt find the addresses of the dead ones there, and most restarts fail as they connect, or hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# torchrun: how long ranks may take, after a signal to stop, to end their step and to write a checkpoint (30 s by default).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-90}"

# Settings of several nodes: `use_network` is called by the scripts that have them.
use_network() {
    # EDIT: the interface between the nodes (`ip -brief address`). By default gloo takes the address that the host name
    # stands for, on Debian 127.0.1.1, and NCCL the first interface that is up.
    local interface=eth0
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"
    # EDIT: with InfiniBand, name its adapters, since NCCL would use slower Ethernet ones (RoCE) beside them.
    # export NCCL_IB_HCA=mlx5
}

# For sbatch scripts: ends the job with a status, but where SLURM is pre-empting it sends it back to the queue. SLURM does so
# itself after the partition's GraceTime, unless the job has ended by then: told to stop, its ranks do within seconds.
end_job() {
    local status="$1"
    if [[ $status -ne 0 && $(scontrol show job "$SLURM_JOB_ID") =~ PreemptTime=[0-9] ]]; then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    exit "$status"
}
