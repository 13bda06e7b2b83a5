#!/bin/bash
# slurm_node.sh FOLDER nI: start the slurmd of a node of slurm_up.sh; what runs there sees FOLDER/hosts as /etc/hosts.
folder=$(realpath -m "$1")
# shellcheck disable=SC2016
exec unshare --mount sh -c 'mount --bind "$0/hosts" /etc/hosts && exec slurmd -f "$0/slurm.conf" -N "$1"' "$folder" "$2"
