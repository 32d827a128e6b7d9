# A fence is a directory in which names only ever grow: `fence/<token>`, digits with zeros in front. Making one is
# atomic and happens once; the highest is who may run here. `run/<token>.<pid>` is a process group under a token, with
# the time its leader began and the boot. Who starts registers before it looks at the fence; who takes over raises the
# fence before it looks at what is registered: one of the two always sees the other.

# The highest of the names that tokens have, in $top; others in a fence are a lessee's. SLOT
find_top() {
    top=
    for entry in "$1/fence"/000*; do
        name=${entry##*/}
        case ${name%%"~"*} in
        *[!0-9]*) ;;
        ????????????????????) if [ -d "$entry" ]; then top=$name; fi;;
        esac
    done
}

# Removes what a lessee put in place of our directories, such as a link out of the slot. SLOT
remove_strangers() {
    for entry in "$1/fence" "$1/run"; do
        if is_there "$entry" && { [ -L "$entry" ] || [ ! -d "$entry" ]; }; then rm -f -- "$entry" || return; fi
    done
}

# Registers this very process, which `exec` keeps, then looks. Prints nothing; fails with 99 where the token is not the
# present one, or was before another boot. SLOT TOKEN
register() {
    start_of $$
    boot_id
    { printf '%s %s\n' "$started" "$boot" >"$1/run/$2.$$"; } 2>/dev/null || return 99
    find_top "$1"
    entered=
    [ "$top" = "$2" ] && read -r entered 2>/dev/null <"$1/fence/$2/boot"
    [ "$entered" = "$boot" ] && return
    rm -f -- "$1/run/$2.$$"
    return 99
}

# Likewise for the pool's own work on a slot, which goes on when the lease itself has ended: then its name is marked.
# A boot since may have lost a higher name. SLOT TOKEN
register_work() {
    start_of $$
    boot_id
    [ -d "$1/fence" ] && mkdir -p -- "$1/run" || return 98
    { printf '%s %s\n' "$started" "$boot" >"$1/run/$2.$$"; } 2>/dev/null || return 98
    find_top "$1"
    noted=
    case $top in
    "$2") read -r noted 2>/dev/null <"$1/fence/$2/boot";;
    "$2~left."*) noted=${top#*"~left."};;
    esac
    [ "$noted" = "$boot" ] && return
    rm -f -- "$1/run/$2.$$"
    return 98
}

# What is registered here under tokens up to LAST, and what bears their mark, is killed. Fails with 96 where something
# does not die. SLOT LAST KEY
kill_until() {
    boot_id
    stuck=
    remove_strangers "$1" || return
    for file in "$1/run"/*; do
        [ -f "$file" ] || continue
        name=${file##*/}
        case $name in *[!0-9.]* | .* | *.) continue;; esac
        [ "${name%%.*}" -le "$2" ] || continue
        registered='' booted=''
        read -r registered booted <"$file"
        start_of "${name##*.}"
        # One that has not finished registering has yet to look at the fence.
        [ "$booted" ] || [ -z "$started" ] || continue
        # Its leader runs, or nobody has that number. Another's number since: our group is gone.
        if [ "$booted" = "$boot" ] && { [ -z "$started" ] || [ "$started" = "$registered" ]; }; then
            kill -KILL "-${name##*.}" 2>/dev/null
            await_group "${name##*.}" 500 || { stuck="$stuck ${name##*.}"; continue; }
        fi
        rm -f -- "$file"
    done
    kill_strays "$2" "$3"
    [ -z "$stuck" ] || refuse "$1" "processes do not die:$stuck" || return 96
}

# Those that left their group: found by the mark they inherited. LAST KEY
kill_strays() {
    [ -r /proc/self/stat ] || return 0
    rounds=50
    while look_until_found look_for_strays "$@" && [ "$found" ] && [ "$rounds" -gt 0 ]; do
        rounds=$((rounds - 1))
        signal_found KILL
        await_found 500
        for one in $found; do stuck="$stuck ${one%%:*}"; done
        [ -z "$found" ] || return 0
    done
}

# LAST KEY
look_for_strays() {
    find_bearing "REPOPOOL_FENCE=$2." '[0-9]*'
    for one in $bearing; do
        pid=${one#/proc/} token=${one#*:}
        [ "$token" ] && [ "$token" -le "$1" ] || continue
        note_found "${pid%%:*}"
    done
}

# The slot is the token's from here on. 97: used before. 99: there is a higher one, which is printed. SLOT TOKEN PREVIOUS
# KEY SESSION_DIRECTORY KILLS
enter() {
    remove_strangers "$1" || return
    mkdir -p -- "$1/fence" "$1/run" || return
    find_top "$1"
    if [ "$top" ] && [ "${top%%~*}" -gt "$2" ]; then printf %s "$top"; return 99; fi
    if ! mkdir -- "$1/fence/$2" 2>/dev/null; then
        [ -d "$1/fence/$2" ] || mkdir -- "$1/fence/$2" || return 1
        printf %s "$top"
        return 97
    fi
    if [ "$6" ]; then kill_until "$1" "$3" "$4" || return; fi
    boot_id
    printf '%s\n' "$boot" >"$1/fence/$2/boot" || return
    find_top "$1"
    if [ "$top" != "$2" ]; then printf %s "$top"; return 99; fi
    # Only what is below: a higher one may have come while we were here.
    for entry in "$1/fence"/*; do
        name=${entry##*/}
        case ${name%%~*} in
        *[!0-9]* | ?????????????????????*) rmdir -- "$entry" 2>/dev/null; continue;;
        esac
        if [ "${name%%~*}" -lt "$2" ]; then rm -f -- "$entry/boot" && rmdir -- "$entry" 2>/dev/null; fi
    done
    [ -z "$5" ] || join_session "$5" "$1" "$2" "$4"
}

# Nothing starts under the token any more: the name is above its own and below the next one's. SLOT TOKEN KEY
leave() {
    remove_strangers "$1" || return
    find_top "$1"
    if [ "$top" ] && [ "${top%%~*}" -gt "$2" ]; then printf %s "$top"; return 99; fi
    # The boot is part of the name: on a full disk, which this lease may have filled, nothing more can be written.
    boot_id
    mkdir -p -- "$1/fence/$2~left.$boot" || return
    kill_until "$1" "$2" "$3" || return
    # Who was overtaken meanwhile must not take the slot for its own.
    find_top "$1"
    if [ "${top%%~*}" -gt "$2" ]; then printf %s "$top"; return 99; fi
}

# Notes that a session has entered a slot, for the watchdog. SESSION_DIRECTORY SLOT TOKEN KEY
join_session() {
    mkdir -p -- "$1/slots" && printf '%s\n%s' "$3" "$2" >"$1/slots/.$4.$$" && mv -f -- "$1/slots/.$4.$$" "$1/slots/$4"
}
