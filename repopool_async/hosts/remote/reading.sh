# Prints nothing where nothing is.
look() {
    is_there "$1" || return 0
    if [ "$GNU_FIND" ]; then find "$1" -maxdepth 0 -printf '%y %m %s %D %i %n %T@ %C@\0'
    else ls -dniq "$1"; fi
}

# PATH...
look_at_all() {
    for one in "$@"; do
        look "$one" || return
        printf '\001\n'
    done
}

# PATH BLOCKS of 64 KiB. Prints nothing and fails with 3 where nothing is. The tests before can be overtaken; GNU dd then
# still follows no link and waits for no fifo, elsewhere the call's time limit ends the wait.
read_file() {
    is_there "$1" || return 3
    require_regular "$1" || return
    if [ "$GNU_DD" ]; then dd if="$1" iflag=nofollow,nonblock,fullblock bs=65536 count="$2" status=none
    else dd if="$1" bs=65536 count="$2" 2>/dev/null; fi
}

# All by the shell itself: no process is started.
list_names() {
    [ -d "$1" ] || return 0
    { [ -r "$1" ] && cd "$1" 2>/dev/null; } || refuse "$1" 'Permission denied' || return
    for name in * .[!.]* ..?*; do
        if is_there "$name"; then printf '%s\0' "$name"; fi
    done
}

# The file system's own time is what a new file gets; where it MOVES_ON, once that is another than the first one got.
# DIRECTORY NAME MOVES_ON
clock() {
    if [ -z "$GNU_FIND" ]; then make_and_remove "$1/$2" && date +%s; return; fi
    first=$(time_of_new "$1/$2") || return
    now=$first
    while [ "$3" ] && [ "$now" = "$first" ]; do
        now=$(time_of_new "$1/$2") || return
        [ "$now" != "$first" ] || nap
    done
    printf '%s\n' "$now"
}

# FILE
make_and_remove() { (set -C; : >"$1") && rm -f -- "$1"; }

# FILE
time_of_new() {
    (set -C; : >"$1") || return
    find "$1" -maxdepth 0 -printf '%C@'
    status=$?
    rm -f -- "$1"
    return "$status"
}

# Where a path is, or would be, and what is mounted.
place() {
    path=$1
    until [ -d "$path" ]; do path=${path%/*}; path=${path:-/}; done
    cd -P -- "$path" && printf '%s\0' "$PWD" && cat /proc/self/mountinfo 2>/dev/null
    return 0
}
