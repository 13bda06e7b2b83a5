#!/bin/bash
# slurm_up.sh FOLDER N: a real Slurm on this machine: a controller, and N nodes n1 to nN, which are N slurmd.
# Needs root and the packages slurm-wlm and munge. All its files lie in FOLDER; nothing in /etc is used or changed.
# Then: export SLURM_CONF=FOLDER/slurm.conf, and sbatch. slurm_down.sh ends it. Variables: CPUS of a node (2), GRACE
# seconds between being preempted and being killed (60; 0: at once), KILL_WAIT seconds between TERM and KILL (15),
# LOST_AFTER seconds without a sign of a node until it counts as lost (30).
# Partitions: main, whose jobs are requeued when preempted, and high, whose jobs preempt them.
set -euo pipefail
folder=$(realpath -m "$1")
count=$2
here=$(dirname "$(realpath "$0")")
host=$(hostname -s)
port=${PORT:-17000}
[ ! -e "$folder/slurm.conf" ] || { echo "$folder has a Slurm already: slurm_down.sh $folder" >&2; exit 1; }
mkdir -p "$folder"/{munge,state,log}
chmod 755 "$folder" "$folder/munge"
touch "$folder/slurm.conf" # from here on slurm_down.sh knows what to end
trap '[ $? = 0 ] || "$here/slurm_down.sh" "$folder"' EXIT

(umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
  --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
cat >"$folder/slurm.conf" <<CONF
ClusterName=nodes
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CryptoType=crypto/munge
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/log/slurmd-%n.log
SlurmdSpoolDir=$folder/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0,default_queue_depth=20
ReturnToService=2
KillWait=${KILL_WAIT:-15}
MinJobAge=600
SlurmdTimeout=${LOST_AFTER:-30}
InactiveLimit=0
BatchStartTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
echo "127.0.0.1 localhost $host" >"$folder/hosts"
for i in $(seq "$count"); do
  echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=${CPUS:-2} RealMemory=8000" \
    >>"$folder/slurm.conf"
  echo "127.0.0.1 n$i" >>"$folder/hosts" # the processes of a job meet at a node's name
  mkdir -p "$folder/spool-n$i"
done
nodes="Nodes=n[1-$count] State=UP MaxTime=INFINITE"
echo "PartitionName=main $nodes Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE:-60}" >>"$folder/slurm.conf"
echo "PartitionName=high $nodes PriorityTier=10 PreemptMode=OFF" >>"$folder/slurm.conf"

export SLURM_CONF=$folder/slurm.conf
slurmctld -f "$SLURM_CONF"
for i in $(seq "$count"); do "$here/slurm_node.sh" "$folder" "n$i"; done
for _ in $(seq 100); do
  [ "$(sinfo --noheader -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = "$count" ] && exit 0
  sleep 0.2
done
echo "the nodes did not come up:" >&2
sinfo -N >&2
tail -5 "$folder"/log/*.log >&2
exit 1
