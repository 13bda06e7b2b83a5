#!/bin/bash
# deepspeed_node.sh PROCS CONFIG...: DeepSpeed's launcher for this node of a Slurm job, without ssh. train.sbatch starts it.
#
# DeepSpeed's launchers end their processes when they get TERM, and give them 30 s. So TERM and USR1 are blocked for the
# launchers, launch/train.py lets them through, and this script passes them on for as long as processes start and save.
set -uo pipefail
procs=$1
shift
hostfile=$(mktemp)
told=
trap 'told=1' USR1 TERM
trap 'rm -f "$hostfile"' EXIT
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$procs/" >"$hostfile"

block='import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
os.execvp(sys.argv[1], sys.argv[1:])'
"${PYTHON:-python}" -c "$block" deepspeed --hostfile "$hostfile" --no_ssh --node_rank="$SLURM_NODEID" \
  --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" launch/train.py "$@" &
child=$!
teller=
while :; do
  status=0
  wait "$child" || status=$?
  kill -0 "$child" 2>/dev/null || break
  if [ -n "$told" ] && [ -z "$teller" ]; then
    (trap '' USR1 TERM && while kill -USR1 0; do sleep 2; done) & # 0: all that this script started
    teller=$!
  fi
done
[ -z "$teller" ] || { kill -KILL "$teller" && wait "$teller"; } 2>/dev/null
if [ -n "$told" ]; then
  wait "$child" && status=0 || status=$? # a signal may have ended the last wait
fi
if [ -n "$told" ]; then
  case "$status" in 241 | 246) status=138 ;; esac # how the launcher tells that TERM or USR1 ended a process
fi
exit "$status"
