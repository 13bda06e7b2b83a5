# shellcheck shell=bash
# Sourced by the batch scripts: what happens to a job that is told to stop.
#
#   told                          how                                     what follows here
#   before the time limit         --signal=B:USR1@120, to the script      passed on; saved (status 75); queued again
#   preempted, with GraceTime     TERM to the processes, not the script   saved (status 75); queued again
#   preempted, without; scancel   TERM to all, KILL after KillWait        saved if KillWait allows; Slurm decides alone
#   a node is lost                nothing until SlurmdTimeout             Slurm queues it again
#
# A process that has not begun to train ends at once, by the signal: nothing is lost, and the job is queued again too.

told=
trap 'told=USR1' USR1
trap 'told=TERM' TERM

# Run a command to its end, passing on what the script is told, again and again, as processes may still be starting.
# Leaves its status in `status`.
run() {
  local child teller=
  "$@" &
  child=$!
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
    if [ -n "$told" ] && [ -z "$teller" ]; then # a signal ended the wait
      (trap '' TERM && while kill -USR1 "$child" 2>/dev/null; do sleep 2; done) &
      teller=$!
    fi
  done
  [ -z "$teller" ] || { kill -KILL "$teller" && wait "$teller"; } 2>/dev/null || true
  if [ -n "$told" ]; then
    wait "$child" && status=0 || status=$? # a signal may have ended the last wait
  fi
}

# End the script with `status`, or queue the job again if it was told to stop and not to end.
finish() {
  local what state
  state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | tr ' ' '\n')
  # A process that fails is no reason to start again, though srun ends the others by TERM then (143): it takes a sign.
  if [ "$status" = 0 ] || { [ "$status" != 75 ] && [ "$status" != 138 ] && [ -z "$told" ] &&
    ! grep -q '^PreemptTime=[0-9]' <<<"$state"; }; then
    exit "$status"
  fi
  case "$status" in
    75) what="it saved itself" ;;
    138 | 143) what="a process was stopped before it could save" ;; # 128 + USR1, 128 + TERM
    *) what="nothing tells that it saved itself" ;;
  esac
  what="told to stop: ended with status $status, $what"
  # A job that is cancelled, preempted without grace or out of time is no longer RUNNING, and Slurm decides what follows.
  if ! grep -qx JobState=RUNNING <<<"$state"; then
    echo "$what; Slurm ends the job itself, and queues it again if it was preempted or lost a node" >&2
    exit "$status"
  fi
  echo "$what; queueing again, to go on from the last checkpoint there is" >&2
  exec scontrol requeue "$SLURM_JOB_ID"
}
