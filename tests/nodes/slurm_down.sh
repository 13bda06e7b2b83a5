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
# What is left names the folder: daemons in their arguments, steps and what they started in their environment.
for process in /proc/[0-9]*; do
  pid=${process#/proc/}
  [ "$pid" != $$ ] && [ "$pid" != "$PPID" ] || continue
  case "$({ tr '\0' ' ' <"$process/cmdline"; } 2>/dev/null)" in
    slurmctld*"$folder"* | slurmd*"$folder"* | *slurmstepd*"$folder"* | munged*"$folder"*) kill -KILL "$pid" 2>/dev/null ;;
    *) grep -qz "^SLURM_CONF=$SLURM_CONF\$" "$process/environ" 2>/dev/null &&
       grep -qz "^SLURM_JOB_ID=" "$process/environ" 2>/dev/null && kill -KILL "$pid" 2>/dev/null ;;
  esac
done
rm -rf "$folder"
