# PATH ESCAPED. Nothing is deleted where something is mounted inside: it could be another name for what is elsewhere.
remove_tree() {
    is_there "$1" || return 0
    if [ -d "$1" ] && [ ! -L "$1" ]; then
        find_mounts "$1" "$2"
        [ -z "$mounts" ] || refuse "$1" 'Device or resource busy: another file system is mounted there' || return
    fi
    rm -rf -- "$1" 2>/dev/null && return
    is_there "$1" || return 0
    find "$1" -type d ! -perm -u=rwx -exec chmod u+rwx {} \; 2>/dev/null
    rm -rf -- "$1" || { is_there "$1" && return 1; }
    return 0
}

require_directory() {
    if [ -d "$1" ] && [ ! -L "$1" ]; then return 0
    elif is_there "$1"; then refuse "$1" 'Not a directory'
    else refuse "$1" 'No such file or directory'; fi
}

# Goes into a directory inside a root. Fails where a step is a link, or no directory, or on what is mounted there. A
# shell has no openat(2); it has `cd -P`, after which $PWD says where it really is. ROOT PARENT
enter_parent() {
    cd -P -- "$1" || return
    [ "$2" ] || return 0
    top=${PWD%/}
    while IFS= read -r mount; do
        case /$2/ in "/$mount/"*) [ -z "$mount" ] || return 1;; esac
    done <<EOF
$mounts
EOF
    if [ "${#2}" -lt 3000 ]; then
        cd -P -- "./$2" 2>/dev/null && [ "$PWD" = "$top/$2" ]
        return
    fi
    # Longer than the system takes: step by step, each looked at from inside.
    rest=$2/
    while [ "$rest" ]; do
        step=${rest%%/*}
        rest=${rest#*/}
        [ ! -L "./$step" ] && cd -P -- "./$step" 2>/dev/null && [ ! -L "../$step" ] && [ "../$step" -ef . ] || return 1
    done
}

# Removes entries of the present directory; directories go to the trash. What was there counts, in $removed.
# TRASH PREFIX of names in it, NAME...
remove_here() {
    trash=$1 prefix=$2
    shift 2
    for name; do
        shift
        is_there "./$name" || continue
        if [ -d "./$name" ] && [ ! -L "./$name" ]; then
            trashed=$((trashed + 1))
            discard "./$name" "$trash" "$prefix$trashed" || return
        else
            set -- "$@" "./$name"
        fi
        removed=$((removed + 1))
    done
    [ $# -eq 0 ] && return
    rm -f -- "$@" 2>/dev/null || { chmod u+rwx . 2>/dev/null; rm -f -- "$@"; }
}

# Sizes and kinds of entries of the present directory; files are made readable to their owner. NAME...
measure_here() {
    for name; do
        if [ -f "./$name" ] && [ ! -L "./$name" ]; then
            [ -r "./$name" ] || chmod u+r "./$name"
        fi
        if [ "$GNU_FIND" ]; then find "./$name" -maxdepth 0 -printf '%y %s' 2>/dev/null
        elif [ -L "./$name" ]; then printf 'l 0'
        elif [ -f "./$name" ]; then printf 'f %s' "$(($(wc -c <"./$name")))"; fi
        printf '\0'
    done
}

# Files below the present directory: kind, size, name; not beyond a depth or the file system.
list_files() {
    if [ "$GNU_FIND" ]; then find . -ignore_readdir_race -xdev -mindepth 1 -maxdepth 33 -printf '%y %s %P\0'
    else find . -xdev -type f -exec sh -c 'for f; do printf "f %s %s\0" "$(($(wc -c <"$f")))" "${f#./}"; done' sh {} +; fi
}

# Takes a file out of the present directory, if it still is one. NAME TARGET BLOCKS
take_file() {
    [ -f "./$1" ] && [ ! -L "./$1" ] || return 0
    mkdir -p -- "${2%/*}" || return
    if [ "$GNU_DD" ]; then dd if="./$1" of="$2" iflag=nofollow,nonblock,fullblock bs=65536 count="$3" status=none
    else dd if="./$1" of="$2" bs=65536 count="$3" 2>/dev/null; fi
}
