#!/bin/bash
# A real SLURM of two virtual nodes on this machine, for tests: cluster.sh start DIR | cluster.sh stop DIR
# Each node says that it has 8 cores and 4 GPUs; device files that lead nowhere stand in for the latter. There are no
# device cgroups: a job is told its GPUs by CUDA_VISIBLE_DEVICES alone.
# Wants root, and Debian's slurm-wlm and munge. Everything it writes is in DIR; everything listens on this machine.
set -euo pipefail
action=$1
dir=$2
conf=$dir/slurm.conf
base=${BASE_PORT:-17100}

start() {
  mkdir -p "$dir/state" "$dir/n1" "$dir/n2" "$dir/log"
  chmod 755 "$dir"
  if ! munge -n >/dev/null 2>&1; then
    mkdir -p /run/munge && chown munge: /run/munge
    [ -s /etc/munge/munge.key ] || { dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
      chown munge: /etc/munge/munge.key && chmod 400 /etc/munge/munge.key; }
    su -s /bin/sh munge -c "munged --pid-file=/run/munge/test.pid"
    touch "$dir/own-munge"
  fi
  host=$(hostname -s)
  cat >"$conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MinJobAge=600
JobRequeue=1
SchedulerParameters=sched_interval=2
AuthInfo=cred_expire=10
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + 1)) CPUs=8 Gres=gpu:4 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + 2)) CPUs=8 Gres=gpu:4 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
  for gpu in 0 1 2 3; do
    [ -e "$dir/nvidia$gpu" ] || mknod "$dir/nvidia$gpu" c 1 3
  done
  for node in n1 n2; do
    echo "NodeName=$node Name=gpu File=$dir/nvidia[0-3] Flags=nvidia_gpu_env"
  done >"$dir/gres.conf"
  export SLURM_CONF=$conf
  slurmctld
  slurmd -N n1
  slurmd -N n2
  for _ in $(seq 60); do
    [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ] && return
    sleep 0.5
  done
  sinfo -N -l
  tail -n 20 "$dir"/log/*
  exit 1
}

stop() {
  for pid in "$dir"/slurmd-n1.pid "$dir"/slurmd-n2.pid "$dir"/slurmctld.pid; do
    [ -f "$pid" ] && kill "$(cat "$pid")" 2>/dev/null || true
  done
  [ ! -f "$dir/own-munge" ] || kill "$(cat /run/munge/test.pid)" || true
}

"$action"
