# Processes that bear a mark in their environment, or are in a group of users, in $found: `pid:start` words.
# MARK USERS_GROUP
find_marked() { look_until_found look_for_marks "$@"; }

# Has those in $unseen looked at until there is somebody in $found or nobody left to look at: one that was started
# meanwhile may be the heir of one that ended unseen. COMMAND ARGUMENT...
look_until_found() {
    found='' seen='' blank='' looks=50
    while find_unseen && [ "$unseen" ] && [ -z "$found" ] && [ "$looks" -gt 0 ]; do
        again='' is_in_exec='' looks=$((looks - 1))
        "$@"
        for one in $unseen; do
            case "$again " in *" $one "*) ;; *) seen="$seen $one";; esac
        done
        [ -z "$is_in_exec" ] || [ "$found" ] || nap
    done
    return 0 # also where the last one looked at had ended
}

# Directories of processes that $seen does not name, in $unseen. What looked before has ended, and is not among them.
find_unseen() {
    unseen=
    for one in /proc/[0-9]*; do
        case "$seen " in *" $one "*) ;; *) unseen="$unseen $one";; esac
    done
}

# MARK USERS_GROUP
look_for_marks() {
    statuses=''
    for one in $unseen; do statuses="$statuses $one/status"; done
    find_bearing "$1" ''
    # shellcheck disable=SC2046,SC2086 # words
    for one in $bearing $(
        [ -z "$2" ] || grep -l -s -E "^(Gid|Groups):.*[[:space:]]$2([[:space:]]|\$)" $statuses 2>/dev/null
    ); do
        pid=${one#/proc/}
        note_found "${pid%%[:/]*}"
    done
}

# PID
note_found() {
    case " $found " in *" $1:"*) return;; esac
    [ "$1" = $$ ] || start_of "$1"
    [ "$1" = $$ ] || [ -z "$started" ] || found="$found $1:$started"
}

# Those of $unseen whose environment has a variable that is a text and a tail, in $bearing: `directory:tail` words. Those
# that show nothing and are to be looked at again, in $again. Each environment is read once: one that shows nothing at that
# moment, as in the middle of an exec, must not count as looked at. TEXT TAIL as a pattern
find_bearing() {
    environs=''
    for one in $unseen; do environs="$environs $one/task/[0-9]*/environ"; done
    text=$(printf %s "$1" | sed 's/[][\.*^$]/\\&/g') between=$(printf '\001')
    if [ "$(printf 'a\0b' | grep -a -o -e b -e '^.' | tr '\n' ,)" = a,b, ]; then
        # What has a character before or after it is no whole variable. A dot is no NUL.
        # shellcheck disable=SC2086 # words and patterns
        shown=$(grep -s -a -o -H -e ".$text$2" -e ".$text$2." -e "$text$2." -e "$text$2" -e '^.' $environs 2>/dev/null)
    else
        # This grep tells the first match only.
        # shellcheck disable=SC2086 # words and patterns
        shown=$(for file in $environs; do
            tr '\0\n' '\n\1' 2>/dev/null <"$file" |
                sed -n -e "s$between^$text$2\$$between$file:&${between}p" -e t -e "1s$between^.$between$file:&${between}p"
        done 2>/dev/null)
    fi
    bearing=$(printf '%s\n' "$shown" |
        sed -n "s$between^\\(/proc/[0-9]*\\)/[^:]*:$text\\($2\\)\$$between\\1:\\2${between}p" | sort -u)
    # shellcheck disable=SC2086 # words
    for one in $(
        { printf '%s\n' $unseen; printf '%s\n' "$shown" | sed 's,^\(/proc/[0-9]*\)/.*,\1,'; } | sort | uniq -u
    ); do
        shows_nothing_for_good "$one" || again="$again $one"
    done
}

# Whether a process that shows no environment has none: a kernel thread, one that is ending, another user's, one that has
# an address for it and shows nothing once more, one without that does nothing for five looks. Notes it in $blank, and in
# $is_in_exec that it may be in the middle of one. DIRECTORY
shows_nothing_for_good() {
    { true <"$1/environ"; } 2>/dev/null && read -r line 2>/dev/null <"$1/stat" || return 0
    # shellcheck disable=SC2086 # fields
    set -f -- "$1" ${line##*) }
    set +f
    case $2 in Z | X) return 0;; esac
    [ "${50-}" ] && [ $(($8 & 0x200004)) -eq 0 ] || return 0
    if [ "${50}" != 0 ]; then
        case $blank in *"[=$1]"*) return 0;; esac
        blank="$blank[=$1]"
    else
        is_in_exec=1
        same="[$1 $9 ${13} ${14}]" # faults and times
        case $blank in *"$same"*"$same"*"$same"*"$same"*) return 0;; esac
        blank=$blank$same
    fi
    return 1
}

# Those of $found that still run, in $found.
keep_living() {
    living=
    for one in $found; do
        start_of "${one%%:*}"
        [ "$started" = "${one#*:}" ] && living="$living $one"
    done
    found=$living
}

signal_found() {
    keep_living
    for one in $found; do kill "-$1" "${one%%:*}" 2>/dev/null; done
}

await_found() {
    left=$1 waited=0
    keep_living
    while [ "$found" ] && [ "$left" -gt 0 ]; do
        wait_a_moment
        keep_living
    done
}

# Ends what bears a mark, and what that starts meanwhile. MARK USERS_GROUP, times 20 ms. Prints `k` for each pid that is
# gone, `v` for each that stays.
end_marked() {
    [ -r /proc/self/stat ] || return 0
    grace=$3 rounds=50 gone=
    while find_marked "$1" "$2" && [ "$found" ] && [ "$rounds" -gt 0 ]; do
        targets=$found
        signal_found TERM
        signal_found CONT
        await_found "$grace"
        signal_found KILL
        await_found 150
        for one in $targets; do
            case " $found " in *" $one "*) ;; *) gone="$gone ${one%%:*}";; esac
        done
        [ -z "$found" ] || [ "$found" != "$targets" ] || break
        grace=0 rounds=$((rounds - 1))
    done
    for one in $gone; do printf 'k %s\0' "$one"; done
    for one in $found; do printf 'v %s\0' "${one%%:*}"; done
}

# Fails, printing the way to a tree that leads through no link, where the one given does. TREE
require_real() {
    here=$(cd -P -- "${1%/*}/" 2>/dev/null && printf %s "$PWD") || return 0
    [ "${here%/}/${1##*/}" = "$1" ] || { printf '\0%s/%s' "${here%/}" "${1##*/}"; return 1; }
}

# Whoever else stands in a tree, a `t` each. A thread may stand elsewhere, and hold other files, than its process does.
# TREE GLOB MAPS_PATTERN
find_bystanders() {
    [ -r /proc/self/stat ] || return 0
    if [ "$GNU_FIND" ]; then
        find /proc/[0-9]*/task/[0-9]*/cwd /proc/[0-9]*/task/[0-9]*/root /proc/[0-9]*/task/[0-9]*/fd -maxdepth 1 -type l \
            '(' -lname "$2" -o -lname "$2/*" ')' ! -lname '* (deleted)' -printf '%p\n' \
            -o -type l -lname "$2/* (deleted)" -printf '%p %l\n' 2>/dev/null
    else
        for file in /proc/[0-9]*/task/[0-9]*/cwd /proc/[0-9]*/task/[0-9]*/root /proc/[0-9]*/task/[0-9]*/fd/*; do
            case $(ls -l "$file" 2>/dev/null) in *" -> $1" | *" -> $1"/*) printf '%s\n' "$file";; esac
        done
    fi | while IFS= read -r file; do
        # What has been deleted is no longer part of the tree; a name may end like that, too.
        case $file in *\ *) is_there "${file#* }" || continue;; esac
        tell "$file"
    done
    for file in $(grep -l -s -a -E "$3" /proc/[0-9]*/maps 2>/dev/null); do tell "$file"; done
}

# PATH below /proc
tell() {
    file=${1#/proc/}
    printf 't %s\0' "${file%%/*}"
}

# Those that have the tree's place mounted in a container of some kind. PATTERN of a line of mountinfo
find_mounted() {
    own=$(ls -l /proc/self/ns/mnt 2>/dev/null) || return 0
    for file in $(grep -l -s -E "$1" /proc/[0-9]*/mountinfo 2>/dev/null); do
        other=$(ls -l "${file%/*}/ns/mnt" 2>/dev/null)
        [ "${other##*-> }" = "${own##*-> }" ] || tell "$file"
    done
}

# Processes that began later and may hold what nobody sees: those of our own user that show nothing, and those of which a
# descriptor is on its way through a socket, or known to an io_uring only. START, as /proc tells it
find_hidden() {
    me=$(id -u)
    for file in /proc/[0-9]*; do
        start_of "${file#/proc/}"
        [ "$started" ] && [ "$started" -ge "$1" ] || continue
        if ls "$file/fd" >/dev/null 2>&1; then
            grep -q -s -E '^(scm_fds|UserFiles):[[:space:]]+[1-9]' "$file"/task/[0-9]*/fdinfo/* 2>/dev/null
        else
            grep -q -s -E "^Uid:.*[[:space:]]$me([[:space:]]|\$)" "$file/status"
        fi && tell "$file"
    done
    return 0
}

# SECONDS
find_hidden_of_last() {
    IFS=' .' read -r up rest </proc/uptime 2>/dev/null || return 0
    find_hidden "$(((up - $1) * 100))"
}

# Names of all processes, last.
name_found() {
    printf '\0n '
    grep -H -s -a '' /proc/[0-9]*/comm 2>/dev/null | sed 's,^/proc/\([0-9]*\)/comm:,\1 ,'
    return 0
}
