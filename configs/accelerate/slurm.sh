#!/usr/bin/env bash
# A run on several nodes under SLURM, submitted from the checkout with clipdistill's environment activated:
#
#     sbatch --nodes 4 configs/accelerate/slurm.sh configs/cc12m-captions-vit-b16-to-vit-s16.yaml [KEY=VALUE ...]
#
# GPUs a node: GPUS_PER_NODE, 8 by default; say the same in --gpus-per-node. `output`, `data.cache` and local shards must
# be on a file system that all nodes share.
#
# The job may be stopped at any time. Two minutes before its time limit it asks the run to stop, which finishes its step
# and saves, and puts itself back into the queue; at a preemption, where the partition's GraceTime leaves time for it, the
# run stops in the same way, and SLURM requeues the job. After a node's failure it resumes from its newest complete
# checkpoint, losing at most train.save_every steps. scancel ends it for good. A run resumes with any number of GPUs.
#
#SBATCH --job-name=clipdistill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

config=${1:?usage: sbatch slurm.sh CONFIG [KEY=VALUE ...]}
shift
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
gpus=${GPUS_PER_NODE:-8}
# Where nodes have several networks, name the one between them (`ip -brief address`); gloo carries the watchdog's and the
# checkpoints' small messages, NCCL the gradients:
#     export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-64}  # since SLURM 22.05, srun does not take it over from the batch job
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -un)}  # not the home folder: all ranks write into it
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # seconds that the launcher leaves a run to finish its step and to save; torch before 2.11 leaves 30

launch=
stop() {
    trap "" TERM USR1  # a second signal would end the run before it has saved
    kill -TERM "$launch" 2> /dev/null || true
    wait
}
requeue() {
    echo "time limit near: stop, and back into the queue"
    stop
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
terminate() {
    echo "terminated"
    stop
    exit 143
}
trap requeue USR1
trap terminate TERM

srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config_file configs/accelerate/multi_node.yaml \
    --num_machines "$SLURM_NNODES" \
    --num_processes "$((SLURM_NNODES * gpus))" \
    --main_process_ip "${hosts[0]}" \
    --main_process_port "$((20000 + SLURM_JOB_ID % 10000))" \
    scripts/train.py --config "$config" --resume auto "$@" &
launch=$!
wait "$launch"
