# Moves ordinary directories from one directory to the same places in another, and prints which, each ended by NUL. What
# is not so, or does not move, stays. Needs the GNU tools: only they tell attributes, and move without copying.
# SOURCE ESCAPED TARGET FRESH NAME...
move_directories() {
    [ -d "$1" ] && [ ! -L "$1" ] || return 0
    find_mounts "$1" "$2" || return
    printf '%s\n' "$mounts" | grep -q -x -F . && return # what is mounted on it is somebody else's
    open_up "$1"
    source=$1 target=$3 fresh=$4
    shift 4
    mkdir -- "$fresh" || return
    mode=$(find "$fresh" -maxdepth 0 -printf %m)
    like=$(particulars "$fresh")
    for name; do
        if ! holds_mount "$name" && (move_one "$name"); then printf '%s\0' "$name"; fi
    done
    rmdir -- "$fresh"
}

holds_mount() {
    while IFS= read -r mount; do
        case $mount/ in "$1"/*) return 0;; esac
    done <<EOF
$mounts
EOF
    return 1
}

# What a directory carries besides its mode, as a few words. PATH
particulars() {
    printf '%s\0' "$1" | owners_flags | sed 1q
    tar --xattrs --xattrs-include='*' --acls --numeric-owner --format=pax --no-recursion --mtime=@0 --mode=0 \
        --pax-option=exthdr.name=x,delete=atime,delete=ctime --transform='s,.*,x,' -P -cf - -- "$1" 2>/dev/null | cksum
}

# NAME
move_one() {
    last=${1##*/}
    case $1 in */*) parent=${1%/*};; *) parent=;; esac
    enter_parent "$source" "$parent" || return
    [ -d "./$last" ] && [ ! -L "./$last" ] || return
    origin=$PWD
    device=$(find . -maxdepth 0 -printf %D)
    [ "$(find "./$last" -maxdepth 0 -printf %D)" = "$device" ] && [ "$(particulars "$origin/$last")" = "$like" ] || return
    make_parent "$target" "$parent" || return
    [ "$(find . -maxdepth 0 -printf %D)" = "$device" ] && ! is_there "./$last" || return
    chmod "$mode" "$origin/$last" && open_up "$origin" && mv -n -T -- "$origin/$last" "./$last" 2>/dev/null || return
    [ -d "./$last" ] && ! is_there "$origin/$last"
}

# Goes into a directory inside a root, making what is missing on the way; fails where something else is. ROOT PARENT
make_parent() {
    mkdir -p -- "$1" && cd -P -- "$1" || return
    rest=$2
    while [ "$rest" ]; do
        step=${rest%%/*}
        case $rest in */*) rest=${rest#*/};; *) rest=;; esac
        mkdir -- "./$step" 2>/dev/null
        [ ! -L "./$step" ] && cd -P -- "./$step" 2>/dev/null || return
    done
}
