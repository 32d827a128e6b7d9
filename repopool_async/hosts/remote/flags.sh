# The inode flags that owners set (chattr), a line for each path of a list on standard input, each ended by NUL; nothing
# where no lsattr tells. A name with a newline makes further lines.
owners_flags() { xargs -0 lsattr -d -- 2>/dev/null | sed 's/ .*//' | tr -cd 'suScidaAtDTFPx\n'; }

# Whether all paths of a list have the flags that a new directory has. LIST DIRECTORY
have_flags_like() {
    command -v lsattr >/dev/null 2>&1 && [ -s "$1" ] || return 0
    ! owners_flags <"$1" | grep -q -v -x -F -e "$(printf '%s\0' "$2" | owners_flags)"
}
