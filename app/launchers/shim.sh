# The shim: owns one local runner from its start to its end, also while the service is down.
#
#   setsid sh shim.sh RUN_DIR DEADLINE GRACE FILES SETSID SLEEP COMMAND...    stdout: a pipe to the service   stderr: the log
#
# SETSID and SLEEP are paths, because the PATH here is the runner's.
#
# What others read in RUN_DIR:
#   alive   a fifo that this process alone keeps open; no reader means: the shim is dead and starts nothing any more
#           (true across pid namespaces, reboots and reused pids, because the kernel keeps it)
#   claim   "PID STARTTIME" of the shim, created exclusively: of several shims started for one runner, one goes on
#   cgroups lines of a name and a directory: the control groups that the runner, and not its shim, is in
#   pid     "PID STARTTIME" of the runner's main process
#   exit    "exit CODE UPTIME" or "signal NUMBER UPTIME", written last, over what keeps the room for it on the
#           disk; the time, in seconds since boot, is that of the end
#   deadline  created when this shim, and not the service, ended the runner because DEADLINE seconds had passed
#
# POSIX shell for its size: 0.1 MB of private memory each. In a function, so that all of it is read before it runs
# and a new version may replace this file at any time.
identify() { # print "PID STARTTIME" of a process; the time is in clock ticks since boot
  pid=$1
  read -r stat <"/proc/$pid/stat" && set -- ${stat##*) } && echo "$pid ${20}"
}

kill_groups() { # whatever the runner left behind, in any session
  while read -r _ group; do
    if [ -e "$group/cgroup.kill" ]; then echo 1 >"$group/cgroup.kill"; fi
  done <"$1/cgroups"
}

main() {
  dir=$1 deadline=$2 grace=$3 files=$4 setsid=$5 sleep=$6
  shift 6
  [ -p "$dir/alive" ] && exec 9<>"$dir/alive" || exit 1
  set -C
  { identify $$ >"$dir/claim"; } 2>/dev/null || exit 0
  set +C
  trap '' HUP INT QUIT TERM PIPE
  # Where `wait` leaves no trace of the job (bash), keep the trace as it ends.
  [ -z "${BASH_VERSION-}" ] || trap 'jobs -l %1 >"$dir/how"' CHLD

  (
    trap - HUP TERM CHLD
    while read -r _ group; do
      join=$group/tasks # of version 1, and joined ten times as fast as cgroup.procs
      [ -e "$join" ] || join=$group/cgroup.procs
      echo 0 >"$join" || exit 125
    done <"$dir/cgroups"
    exec 9<&- # only now: once nobody holds the fifo, all that lives is in the groups
    read -r self _ </proc/self/stat
    identify "$self" >"$dir/pid"
    echo started 2>/dev/null # the service may be dead: this must not be what kills the runner
    trap - PIPE
    ulimit -S -n "$files" # the service has raised its own
    exec "$setsid" "$@" >&2
  ) </dev/null &
  pid=$!
  exec >/dev/null 2>&1

  timer=
  if [ "$deadline" != - ]; then
    "$setsid" /bin/sh -c '
      lives() { # and nobody else has its number, should this shim have been killed
        read -r _ start <"$2/pid" && read -r stat <"/proc/$1/stat" && set -- ${stat##*) } && [ "${20}" = "$start" ]
      }
      "$5" "$1"; lives "$3" "$4" || exit
      : >"$4/deadline"; kill -15 "-$3"; "$5" "$2"; lives "$3" "$4" && kill -9 "-$3"
    ' timer "$deadline" "$grace" "$pid" "$dir" "$sleep" 9<&- &
    timer=$!
  fi

  # `wait` alone tells of the end without a race. It says 137 for a kill and for `exit 137` alike; `jobs` knows which.
  wait "$pid"
  code=$?
  read -r ended _ </proc/uptime
  LC_ALL=C
  [ -s "$dir/how" ] || jobs -l %1 >"$dir/how"
  kill -9 "-$pid"
  kill_groups "$dir"
  [ -z "$timer" ] || kill -9 "-$timer"
  read -r how <"$dir/how"
  case $how in
    *Done* | *Exit*) signal=0 ;;
    *) signal=$((code - 128)) ;; # not above 0 where a full disk swallowed the trace: then it was an exit after all
  esac
  if [ "$signal" -gt 0 ]; then end="signal $signal"; else end="exit $code"; fi
  echo "$end $ended" 1<>"$dir/exit"
}

main "$@"
