#!/bin/bash
# on_host.sh FOLDER hI COMMAND...: run a command on a host of hosts_up.sh, as if logged in there.
folder=$(realpath -m "$1")
host=$2
shift 2
# `ip netns exec` gives the command mounts of its own, so that these are seen by nobody else.
# shellcheck disable=SC2016
exec ip netns exec "$(cat "$folder/switch")-$host" unshare --uts sh -c '
  hostname "$1" && mount --bind "$0/hosts" /etc/hosts && mount --bind "$0/$1/ssh" /etc/ssh || exit 1
  mount -t tmpfs none /run && mkdir /run/sshd || exit 1
  shift; exec "$@"' "$folder" "$host" "$@"
