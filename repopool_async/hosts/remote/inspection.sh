# One pass of GNU find, one record an entry, ended by NUL: empty for what there is nothing to say of, `e` for what changed
# or is special, `k` for what is passed over, `g` for a .git, `u` for a directory that was opened up, `m` for a mount. Then
# `s` and find's status, then an archive without contents of a new directory beside the root, the root, what was passed
# over, and the directories that changed: it tells modes, owners, attributes and access lists. Names are cut where nobody
# could use them; a directory many levels down is always told of, so that the caller sees which are.
# ROOT ESCAPED GLOB SINCE DEEP FRESH INODE, if it has to be that one, and NAME... of directories that are passed over
inspect_gnu() {
    require_directory "$1" || return
    [ -z "$7" ] || [ "$7" = "$(find "$1" -maxdepth 0 -printf '%D %i')" ] || refuse "$1" 'Stale file handle' || return
    find_mounts "$1" "$2" || return
    root=$1 glob=$3 since=${4:+-newerct $4} deep=$5 fresh=$6
    shift 7
    tell_mounts_inside "$@"
    for name; do
        shift
        set -- "$@" -type d -path "$glob/$(as_pattern "$name")" -printf 'k %P\0' -fprintf "$fresh.changed" '%p\0' -prune -o
    done
    while IFS= read -r mount; do
        case $mount in '' | .) continue;; esac
        set -- -path "$glob/$(as_pattern "$mount")" -printf 'm %P\0' -prune -o "$@"
    done <<EOF
$mounts
EOF
    mkdir -- "$fresh" && printf '%s\0' "$fresh" "$root" >"$fresh.names" || return
    # shellcheck disable=SC2086 # two words, or none
    find "$root" -ignore_readdir_race -xdev -regextype posix-extended \
        "$@" \
        -name .git ! -path "$glob" -printf 'g %d %.4352P\0' -prune -o \
        -type d '(' \
            ! -perm -u=rwx -execdir chmod u+rwx '{}' ';' -printf 'u %.4352P\0' -false -o \
            ${since:--true} -printf 'e d %n %C@ %.4352P\0' -fprintf "$fresh.changed" '%.4352p\0' -o \
            -regex "$deep" -printf 'e d %n %C@ %.4352P\0' -o \
            -printf '\0' \
        ')' -o \
        ! -type d '(' ${since:--true} -o ! -type f ! -type l -o -type f -links +1 ')' \
            -printf 'e %y %n %C@ %.4352P\0' -o \
        ! -type d -printf '\0'
    status=$?
    have_flags_like "$fresh.changed" "$fresh" || printf 'i\0'
    printf 's %s\0' $status
    if [ "$GNU_TAR" ]; then
        cat "$fresh.changed" >>"$fresh.names"
        tar --xattrs --xattrs-include='*' --acls --numeric-owner --format=pax -P --no-recursion -b 1 \
            --null -T "$fresh.names" -cf - 2>/dev/null
    fi
    rm -f -- "$fresh.names" "$fresh.changed"
    rmdir -- "$fresh"
}

as_pattern() { printf %s "$1" | sed 's/[][*?\\]/\\&/g'; }

# NAME... of directories that are not entered
tell_mounts_inside() {
    while IFS= read -r mount; do
        for name; do case $mount in "$name"/*) printf 'm %s\0' "$mount";; esac; done
    done <<EOF
$mounts
EOF
}

# The same with what POSIX has, where every entry counts as changed. ROOT ESCAPED GLOB INODE
inspect_posix() {
    require_directory "$1" || return
    [ -z "$4" ] || { ls -di "$1" | grep -q "^ *$4 "; } || refuse "$1" 'Stale file handle' || return
    find_mounts "$1" "$2"
    [ -z "$mounts" ] || { printf 'm %s\0' "$mounts"; return; }
    list='r=$1 k=$2; shift 2; for f; do printf "$k %s\0" "${f#"$r"/}"; done'
    find "$1" -xdev -type d ! -perm -700 -exec chmod u+rwx {} \; -exec sh -c "$list" sh "$1" u {} \;
    far=9000000000.0
    find "$1" -xdev ! -path "$3" -name .git -prune -exec sh -c "$list" sh "$1" 'g 2' {} +
    find "$1" -xdev ! -path "$3" -name .git -prune -o -type d ! -path "$3" -exec sh -c "$list" sh "$1" "e d 1 $far" {} +
    find "$1" -xdev ! -path "$3" -name .git -prune -o -type l -exec sh -c "$list" sh "$1" "e l 1 $far" {} +
    find "$1" -xdev ! -path "$3" -name .git -prune -o -type f -links 1 -exec sh -c "$list" sh "$1" "e f 1 $far" {} +
    find "$1" -xdev ! -path "$3" -name .git -prune -o -type f ! -links 1 -exec sh -c "$list" sh "$1" "e f 2 $far" {} +
    find "$1" -xdev ! -path "$3" -name .git -prune -o ! -type f ! -type l ! -type d -exec sh -c "$list" sh "$1" \
        "e p 1 $far" {} +
    printf '\0s 0\0'
}
