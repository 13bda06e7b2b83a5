#!/bin/bash
# hosts_down.sh FOLDER: end every process on the hosts that hosts_up.sh made, and only those; remove the hosts and FOLDER.
folder=$(realpath -m "$1")
[ -s "$folder/switch" ] || exit 0
name=$(cat "$folder/switch")
for host in $(ip netns list | cut -d' ' -f1 | grep -E "^$name(-h[0-9]+)?\$"); do
  for signal in TERM KILL; do
    pids=$(ip netns pids "$host")
    # shellcheck disable=SC2086
    [ -z "$pids" ] || { kill -"$signal" $pids 2>/dev/null; sleep 0.2; }
  done
  ip netns del "$host"
done
rm -rf "$folder"
