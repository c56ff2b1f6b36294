#!/bin/bash
# One node's DeepSpeed launcher, as on_every_node (common.sh) starts it: launch_node.sh SCRIPT [ARGUMENT...]
#
# Given a hostfile, the launcher numbers its ranks' GPUs from 0, whatever the job was given: on nodes without device
# cgroups a job would take other people's. So each rank gets back what SLURM said, by rank.sh.
set -euo pipefail
refuse() {
  echo "error: $(hostname): $*" >&2
  exit 2
}
if [ "${DS_ACCELERATOR:-}" != cpu ]; then
  given=${CUDA_VISIBLE_DEVICES-}
  number=$(tr , '\n' <<<"${given/NoDevFiles/}" | grep -c . || true)
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ] && [ "$number" -gt 0 ]; then
    [ "$number" -ge "$RANKS" ] || refuse "$RANKS ranks, and the job was given $number GPUs here" \
      "(CUDA_VISIBLE_DEVICES=$given): ask for more by --gpus-per-node, or set RANKS"
  elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ] || scontrol show node "${SLURMD_NODENAME:-}" | grep -q 'Gres=gpu'; then
    refuse "the job was given no GPU here: ask for some by --gpus-per-node, or set DS_ACCELERATOR=cpu"
  fi # where SLURM does not know of GPUs, a node's are the job's
fi
[ -z "${CUDA_VISIBLE_DEVICES+set}" ] || export GIVEN_GPUS="$CUDA_VISIBLE_DEVICES"
trap "" USR1
hosts=$(mktemp)
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$RANKS/" >"$hosts"
exec deepspeed --hostfile "$hosts" --no_ssh --node_rank "$SLURM_NODEID" \
  --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --no_python --no_local_rank cluster/slurm/rank.sh "$@"
