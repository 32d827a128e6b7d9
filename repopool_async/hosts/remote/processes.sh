# When a process began, in $started; empty where it has ended: a zombie has, unless other threads of it go on. PID
start_of() {
    started=
    if [ -r /proc/self/stat ]; then
        read -r line 2>/dev/null <"/proc/$1/stat" || return 0
        parse_stat "${line##*) }" && return
        # Its name has a newline in it.
        line=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
        parse_stat "${line##*) }"
    else
        kill -0 "$1" 2>/dev/null && started=$(ps -o lstart= -p "$1" 2>/dev/null | tr -c '0-9a-zA-Z\n' _)
    fi
    return 0
}

parse_stat() {
    # shellcheck disable=SC2086 # fields
    set -f -- $1
    set +f
    [ "${20-}" ] || return 1
    case $1${18} in Z1 | Z0 | X*) ;; *) started=${20};; esac
}

# Whether a group has members that are more than zombies. GROUP
group_lives() {
    kill -0 "-$1" 2>/dev/null || return 1
    [ ! -r /proc/self/stat ] || cat /proc/[0-9]*/stat 2>/dev/null | grep -q -E "\) [^ZX] [0-9]+ $1 "
}

# Waits for a moment, and counts it off what is $left of times 20 ms: short ones first, because most end at once.
wait_a_moment() {
    waited=$((waited + 1))
    if [ "$waited" -lt 10 ]; then nap && left=$((left - 1)); else sleep 0.1 2>/dev/null || sleep 1; left=$((left - 5)); fi
}

# Waits for a group to end. GROUP, times 20 ms
await_group() {
    left=$2 waited=0
    while group_lives "$1"; do
        [ "$left" -gt 0 ] || return 1
        wait_a_moment
    done
}

# TERM, a grace period, KILL. GROUP, times 20 ms
end_group() {
    kill -TERM "-$1" 2>/dev/null || { group_lives "$1" || return 0; }
    kill -CONT "-$1" 2>/dev/null # the stopped do not see the one without the other
    await_group "$1" "$2" && return
    kill -KILL "-$1" 2>/dev/null
    await_group "$1" 500
}

# SIGNAL GROUP...
signal_group() { kill "-$1" "-$2" 2>/dev/null || :; }
