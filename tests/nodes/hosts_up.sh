#!/bin/bash
# hosts_up.sh FOLDER N: N hosts on this machine, h1 to hN, as network namespaces on one switch that is a namespace too.
# Each has its own network, host name, /etc/hosts, /etc/ssh and sshd, and reaches the others by ssh without a password.
# Needs root and the packages iproute2, openssh-server and openssh-client. Nothing is reachable from outside them, and
# what they see as /etc/hosts, /etc/ssh and /run lies in FOLDER. on_host.sh runs a command there; hosts_down.sh ends all.
set -euo pipefail
folder=$(realpath -m "$1")
count=$2
here=$(dirname "$(realpath "$0")")
[ ! -e "$folder/switch" ] || { echo "$folder has hosts already: hosts_down.sh $folder" >&2; exit 1; }
mkdir -p "$folder"
echo "ps$$" >"$folder/switch" # the namespaces' names begin with it, so that two sets do not clash
name=$(cat "$folder/switch")
trap '[ $? = 0 ] || "$here/hosts_down.sh" "$folder"' EXIT

ip netns add "$name"
ip -n "$name" link add br0 type bridge
ip -n "$name" link set br0 up
ssh-keygen -q -t ed25519 -N '' -C hosts -f "$folder/id"
echo "127.0.0.1 localhost" >"$folder/hosts"
for i in $(seq "$count"); do
  echo "10.77.0.$i h$i" >>"$folder/hosts"
  ssh-keygen -q -t ed25519 -N '' -C "h$i" -f "$folder/key$i"
  echo "h$i,10.77.0.$i $(cut -d' ' -f1,2 "$folder/key$i.pub")" >>"$folder/known_hosts"
done
for i in $(seq "$count"); do
  ssh=$folder/h$i/ssh
  mkdir -p "$ssh"
  cp "$folder/known_hosts" "$folder/id" "$ssh"
  cp "$folder/id.pub" "$ssh/authorized_keys"
  cp "$folder/key$i" "$ssh/hostkey"
  chmod 600 "$ssh/id" "$ssh/hostkey"
  printf '%s\n' 'Host *' 'IdentityFile /etc/ssh/id' 'IdentitiesOnly yes' 'GlobalKnownHostsFile /etc/ssh/known_hosts' \
    'UserKnownHostsFile /dev/null' 'BatchMode yes' 'ConnectTimeout 5' >"$ssh/ssh_config"
  printf '%s\n' 'Port 22' 'HostKey /etc/ssh/hostkey' 'AuthorizedKeysFile /etc/ssh/authorized_keys' \
    'PermitRootLogin prohibit-password' 'PasswordAuthentication no' 'UsePAM no' 'MaxStartups 100' 'StrictModes no' \
    'PidFile none' >"$ssh/sshd_config"
  ip netns add "$name-h$i"
  ip -n "$name-h$i" link set lo up
  ip link add "$name-$i" netns "$name" type veth peer name eth0 netns "$name-h$i"
  ip -n "$name" link set "$name-$i" master br0 up
  ip -n "$name-h$i" addr add "10.77.0.$i/24" dev eth0
  ip -n "$name-h$i" link set eth0 up
  setsid "$here/on_host.sh" "$folder" "h$i" /usr/sbin/sshd -D -e -f /etc/ssh/sshd_config \
    </dev/null >"$folder/sshd-h$i.log" 2>&1 &
done
for i in $(seq "$count"); do
  for _ in $(seq 100); do
    "$here/on_host.sh" "$folder" h1 ssh "h$i" true 2>/dev/null && continue 2
    sleep 0.1
  done
  echo "h$i does not answer to ssh:" >&2
  cat "$folder/sshd-h$i.log" >&2
  exit 1
done
