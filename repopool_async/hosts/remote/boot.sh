# Something that changes with every boot, in $boot.
boot_id() {
    boot=
    read -r boot 2>/dev/null </proc/sys/kernel/random/boot_id && return
    boot=$(sysctl -n kern.boottime 2>/dev/null | tr -c '0-9a-zA-Z\n' _)
    [ "$boot" ] || boot=no-boot-id
}

# Prints the seconds since boot, and the nanoseconds of the wall clock, where the host tells both.
clocks() {
    { read -r since _ </proc/uptime; } 2>/dev/null && printf '%s %s\n' "$since" "$(date +%s%N)"
}
