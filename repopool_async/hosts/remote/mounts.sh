# Mount points at or below a directory, in $mounts: paths relative to it, one a line. ROOT ESCAPED, the same as
# /proc/self/mountinfo would write it. Where neither /proc nor mount(8) tells, there are none.
find_mounts() {
    mounts=
    real=${1##*/}
    here=$(cd -P -- "${1%/*}/" && printf %s "$PWD") || return
    if [ "${here%/}/$real" = "$1" ]; then escaped=$2
    else escaped=$(printf %s "${here%/}/$real" | sed 's/\\/\\134/g; s/ /\\040/g; s/	/\\011/g'); fi
    if [ -r /proc/self/mountinfo ]; then
        grep -q -F -e " $escaped/" -e " $escaped " /proc/self/mountinfo || return 0
        mounts=$(printf '%b\n' "$(while read -r _ _ _ _ point _; do
            case $point in "$escaped") echo .;; "$escaped"/*) printf '%s\n' "${point#"$escaped"/}";; esac
        done </proc/self/mountinfo | sed 's/\\1/\\01/g')")
    else
        mounts=$(mount 2>/dev/null | grep -F " ${here%/}/$real/" | sed 's/.*/unknown/')
    fi
}
