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
#   deadline  created when this shim, and not the service, sent TERM because DEADLINE seconds had passed
#
# And what the service leaves there for the shim:
#   stop    there before the service sends TERM or KILL; once TERM has gone out it holds the time, in whole seconds since
#           boot, at which the service kills. Then DEADLINE brings no second TERM, which many a program takes for "at
#           once"; the kill comes then from here if the service has died meanwhile
#
# What is set here, and was in the environment, the runner would be told. So all names begin with _shim.
#
# POSIX shell for its size: 0.1 MB of private memory each. In a function, so that all of it is read before it runs
# and a new version may replace this file at any time.
identify() { # print "PID STARTTIME" of a process; the time is in clock ticks since boot
  _shim_pid=$1
  read -r _shim_stat <"/proc/$_shim_pid/stat" && set -- ${_shim_stat##*) } && echo "$_shim_pid ${20}"
}

kill_groups() { # whatever the runner left behind, in any session
  while read -r _shim_rest _shim_group; do
    if [ -e "$_shim_group/cgroup.kill" ]; then echo 1 >"$_shim_group/cgroup.kill"; fi
  done <"$1/cgroups"
}

main() {
  _shim_dir=$1 _shim_deadline=$2 _shim_grace=$3 _shim_files=$4 _shim_setsid=$5 _shim_sleep=$6
  shift 6
  [ -p "$_shim_dir/alive" ] && exec 9<>"$_shim_dir/alive" || exit 1
  set -C
  { identify $$ >"$_shim_dir/claim"; } 2>/dev/null || exit 0
  set +C
  trap '' HUP INT QUIT TERM PIPE
  # Where `wait` leaves no trace of the job (bash), keep the trace as it ends, in a language that is known: the runner
  # was forked with the caller's. Added to what is there, for the end of the timer comes here too.
  [ -z "${BASH_VERSION-}" ] || trap 'LC_ALL=C; jobs -l %1 >>"$_shim_dir/how"' CHLD

  (
    trap - HUP TERM CHLD
    while read -r _shim_rest _shim_group; do
      _shim_join=$_shim_group/tasks # of version 1, and joined ten times as fast as cgroup.procs
      [ -e "$_shim_join" ] || _shim_join=$_shim_group/cgroup.procs
      echo 0 >"$_shim_join" || exit 125
    done <"$_shim_dir/cgroups"
    exec 9<&- # only now: once nobody holds the fifo, all that lives is in the groups
    read -r _shim_self _shim_rest </proc/self/stat
    identify "$_shim_self" >"$_shim_dir/pid" || exit 125 # who cannot be named cannot be stopped
    echo started 2>/dev/null # the service may be dead: this must not be what kills the runner
    trap - PIPE
    ulimit -S -n "$_shim_files" # the service has raised its own
    exec "$_shim_setsid" "$@" >&2
  ) </dev/null &
  _shim_main=$!
  exec >/dev/null 2>&1
  [ -z "${BASH_VERSION-}" ] || set +o posix # in which that trap would end `wait`; only now, for it takes a variable away

  _shim_timer=
  if [ "$_shim_deadline" != - ]; then
    "$_shim_setsid" /bin/sh -c '
      lives() { # and nobody else has its number, should this shim have been killed
        read -r _ start <"$2/pid" && read -r stat <"/proc/$1/stat" && set -- ${stat##*) } && [ "${20}" = "$start" ]
      }
      "$5" "$1"; lives "$3" "$4" || exit
      if read -r kill_at <"$4/stop"; then
        read -r now _ </proc/uptime
        set -- "$1" "$((kill_at - ${now%.*}))" "$3" "$4" "$5" # `sleep` refuses what is below 0 at once
      else
        true >"$4/deadline" # and not `:`, with which a full disk would end this shell
        kill -15 "-$3"
      fi
      "$5" "$2"; lives "$3" "$4" && kill -9 "-$3"
    ' timer "$_shim_deadline" "$_shim_grace" "$_shim_main" "$_shim_dir" "$_shim_sleep" 9<&- &
    _shim_timer=$!
  fi

  # `wait` alone tells of the end without a race. It says 137 for a kill and for `exit 137` alike; `jobs` knows which.
  wait "$_shim_main"
  _shim_code=$?
  read -r _shim_ended _shim_rest </proc/uptime
  LC_ALL=C
  [ -s "$_shim_dir/how" ] || jobs -l %1 >"$_shim_dir/how"
  kill -9 "-$_shim_main"
  kill_groups "$_shim_dir"
  [ -z "$_shim_timer" ] || kill -9 "-$_shim_timer"
  _shim_how=
  while read -r _shim_rest; do
    case $_shim_rest in '[1]'*) _shim_how=$_shim_rest ;; esac # the last one; more lines are the command's
  done <"$_shim_dir/how"
  case $_shim_how in
    *Done* | *Exit*) _shim_signal=0 ;;
    *) _shim_signal=$((_shim_code - 128)) ;; # not above 0 where a full disk swallowed the trace: then it was an exit after all
  esac
  if [ "$_shim_signal" -gt 0 ]; then _shim_end="signal $_shim_signal"; else _shim_end="exit $_shim_code"; fi
  echo "$_shim_end $_shim_ended" 1<>"$_shim_dir/exit"
}

main "$@"
