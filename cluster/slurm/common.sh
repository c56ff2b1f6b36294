# What the job scripts share: the environment, and one DeepSpeed launcher a node that finds the others by SLURM's variables.
# shellcheck shell=bash
AGAIN=75 # a run that saved and wants to go on (platform/emcl/train/preemption.py)

cd "${EMCL_HOME:-$SLURM_SUBMIT_DIR}"
if [ -f .venv/bin/activate ]; then
  # shellcheck source=/dev/null
  source .venv/bin/activate
fi
if [ -n "${STAGE:-}" ]; then
  export EMCL_CACHE="$STAGE"
fi

# count LIST: how many entries a list such as CUDA_VISIBLE_DEVICES has
count() {
  tr , '\n' <<<"$1" | grep -c .
}

# on_every_node SCRIPT [ARGUMENT...]: ends with the first status that is not 0
on_every_node() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR MASTER_PORT RANKS
  MASTER_ADDR=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2)
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
  RANKS=${RANKS:-${SLURM_GPUS_ON_NODE:-$(count "${CUDA_VISIBLE_DEVICES:-one}")}}
  # A step does not inherit the job's CPUs by itself: its one task a node, the launcher, would share a core with all its
  # ranks and their loaders. SLURM takes either this or CPUs a GPU.
  export SRUN_CPUS_PER_TASK
  SRUN_CPUS_PER_TASK=$(tr , '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
  unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK
  # the launchers ignore the signal that the training processes wait for
  # all end with the same status if the run saved; where one node failed, the others are ended after a minute
  srun --kill-on-bad-exit=0 --wait=60 bash cluster/slurm/launch_node.sh "$@"
}
