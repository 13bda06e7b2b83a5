#!/bin/bash
# slurm_down.sh FOLDER: end what slurm_up.sh started there, daemons and job steps, and only that; remove FOLDER.
folder=$(realpath -m "$1")
[ -e "$folder/slurm.conf" ] || exit 0
export SLURM_CONF=$folder/slurm.conf
timeout 5 scancel --full --signal=KILL --user "$(id -un)" 2>/dev/null
timeout 5 scancel --user "$(id -un)" 2>/dev/null
sleep 0.5
for file in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/munge/pid"; do
  [ -s "$file" ] && kill "$(cat "$file")" 2>/dev/null
done
sleep 1
# What is left, daemons, steps and what those started, has the folder's slurm.conf in its environment or its arguments.
for process in /proc/[0-9]*; do
  pid=${process#/proc/}
  [ "$pid" != $$ ] && [ "$pid" != "$PPID" ] || continue
  words=$({ tr '\0' '\n' <"$process/cmdline"; } 2>/dev/null)
  if grep -qx "$SLURM_CONF" <<<"$words" || { grep -qz "^SLURM_CONF=$SLURM_CONF\$" "$process/environ" &&
    { [[ "$words" == slurmstepd:* ]] || grep -qz '^SLURM_JOB_ID=' "$process/environ"; }; } 2>/dev/null; then
    kill -KILL "$pid" 2>/dev/null
  fi
done
for _ in 1 2; do # munged has its key file as an argument
  [ ! -s "$folder/munge/pid" ] || { kill "$(cat "$folder/munge/pid")" 2>/dev/null && sleep 0.2; }
done
rm -rf "$folder"
