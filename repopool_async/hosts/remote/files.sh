# UMASK PATH...
make_directories() {
    umask "$1"
    shift
    mkdir -p -- "$@"
}

# UMASK PATH TEMPORARY DATA [MODE]: DATA is escaped for printf %b. The temporary name is new (noclobber is O_EXCL).
write_file() {
    umask "$1"
    set -C
    if { printf %b "$4" >"$3"; } 2>/dev/null; then
        set +C
    else
        set +C
        # Once more by way of cat, which says what was wrong: some shells know only `I/O error`.
        { printf %b "$4" | cat >"$3"; } || { rm -f -- "$3"; return 1; }
    fi
    { [ -z "${5-}" ] || chmod "$5" "$3"; } && rename_to "$3" "$2" || { rm -f -- "$3"; return 1; }
}

# Files that must survive a loss of power. PATH DIRECTORY
sync_file() { sync -- "$1" "$2" 2>/dev/null || sync; }

# Only regular files, not links to them. A source exchanged for something else between test and copy is possible: both
# sides are ours where this is used.
require_regular() {
    if [ -L "$1" ]; then refuse "$1" 'Too many levels of symbolic links'
    elif [ -d "$1" ]; then refuse "$1" 'Is a directory'
    elif [ -f "$1" ]; then return 0
    elif [ -e "$1" ]; then refuse "$1" 'Invalid argument'
    else refuse "$1" 'No such file or directory'; fi
}

# SOURCE TARGET TEMPORARY [optional]: time kept to the nanosecond, set-id bits dropped.
copy_file() {
    if [ "${4-}" ] && ! is_there "$1"; then return 0; fi
    require_regular "$1" || return
    if [ "$GNU_MV" ]; then cp --preserve=mode,timestamps -- "$1" "$3"
    else cp -- "$1" "$3" && touch -r "$1" -- "$3"; fi || { rm -f -- "$3"; return 1; }
    { [ -u "$3" ] || [ -g "$3" ]; } && chmod ug-s "$3"
    rename_to "$3" "$2" || { rm -f -- "$3"; return 1; }
}

# rename(2), which replaces a file or an empty directory and never moves into one. SOURCE TARGET
rename_to() {
    if [ "$GNU_MV" ]; then
        mv -f -T -- "$1" "$2"
        return
    fi
    if [ -d "$2" ] && [ ! -L "$2" ]; then
        if [ -d "$1" ] && [ ! -L "$1" ]; then rmdir -- "$2" || return
        else refuse "$2" 'Is a directory' || return; fi
    elif [ -L "$2" ]; then rm -f -- "$2" || return; fi
    mv -f -- "$1" "$2"
}

# A directory that changes its parent must be writable itself, because its `..` changes.
open_up() { if [ -d "$1" ] && [ ! -L "$1" ]; then chmod u+rwx "$1"; fi; }

# PATH TRASH NAME
discard() {
    is_there "$1" || return 0
    said=$(rename_to "$1" "$2/$3" 2>&1) && return
    is_there "$1" || return 0
    mkdir -p -- "$2" || return
    # Of what is mounted there, which is busy, the mode is somebody else's.
    case $said in *busy*) ;; *) open_up "$1" 2>/dev/null;; esac
    rename_to "$1" "$2/$3"
}

remove_file() {
    is_there "$1" || return 0
    if [ -d "$1" ] && [ ! -L "$1" ]; then refuse "$1" 'Is a directory'; else rm -f -- "$1"; fi
}

# UID GID MODE PATH [optional]
set_access() {
    if [ "${5-}" ] && ! is_there "$4"; then return 0; fi
    [ ! -L "$4" ] || refuse "$4" 'Too many levels of symbolic links' || return
    chown "$1:$2" "$4" && chmod "$3" "$4"
}

# Only what is not so yet is changed; what went meanwhile is no longer there when it is looked at again. DIRECTORY PATTERN...
# of names that are spared
close_entries() {
    cd -P -- "$1" || return
    shift
    for name; do shift; set -- "$@" ! -name "$name"; done
    close_kind d 700 "$@" && close_kind f 600 "$@"
}

# KIND MODE CONDITION... of find
close_kind() {
    kind=$1 mode=$2
    shift 2
    for look in first again; do
        find . ! -name . -prune "$@" -type "$kind" '(' ! -user 0 -o ! -group 0 -o ! -perm "$mode" ')' \
            -exec chown -h 0:0 '{}' + -exec chmod "$mode" '{}' + && return
    done
}

# UID GID PATH
give_tree() { [ ! -L "$3" ] && [ -d "$3" ] || refuse "$3" 'Not a directory' && chown -R -h -P "$1:$2" "$3"; }
