probe() {
    printf 'user %s\numask %s\n' "$(id -u)" "$(umask)"
    [ -r /proc/self/stat ] && [ -r /proc/self/mountinfo ] && echo proc
    find / -maxdepth 0 -newerct @1.5 -printf '%C@' >/dev/null 2>&1 && echo gnu_find
    mv --help 2>&1 | grep -q -e --no-target-directory && cp --help 2>&1 | grep -q -e --preserve && echo gnu_mv
    dd if=/dev/null iflag=nofollow,nonblock,fullblock count=0 2>/dev/null && echo gnu_dd
    tar --help 2>/dev/null | grep -q -e --xattrs-include && [ -e /dev/fd/2 ] && echo gnu_tar
    boot_id
    printf 'boot %s\n\0' "$boot"
    cat /proc/self/mountinfo 2>/dev/null
    return 0
}
