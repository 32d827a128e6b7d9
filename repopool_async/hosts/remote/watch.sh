# A sign of life; starts the watchdog where none runs. SESSION_DIRECTORY WORD TICK TICKS
beat() {
    mkdir -p -- "$1/slots" && printf '%s\n' "$2" >"$1/beat.new" && mv -f -- "$1/beat.new" "$1/beat" || return
    pid='' began=''
    read -r pid began 2>/dev/null <"$1/watch"
    if [ "$pid" ]; then
        start_of "$pid"
        [ "$started" = "$began" ] && return
    fi
    (trap '' HUP; cd /; watch "$1" "$3" "$4") </dev/null >/dev/null 2>&1 &
    start_of $!
    printf '%s %s\n' $! "$started" >"$1/watch"
}

# Counts ticks of its own without a new sign of life, compares no clocks. After so many it raises the fences of the
# session's slots, so that a manager that was only paused is refused, and kills what runs there. A session that has
# ended has no directory. SESSION_DIRECTORY TICK TICKS
watch() {
    seen='' missed=0
    while sleep "$2" && [ -d "$1/slots" ]; do
        word=
        read -r word 2>/dev/null <"$1/beat"
        if [ "$word" = "$seen" ]; then missed=$((missed + 1)); else missed=0 seen=$word; fi
        [ "$missed" -ge "$3" ] || continue
        for file in "$1/slots"/*; do
            [ -f "$file" ] || continue
            { IFS= read -r token; slot=$(cat; echo .); } <"$file"
            slot=${slot%.}
            expire "$slot" "$token" "${file##*/}"
        done
        rm -rf -- "$1"
    done
}

# SLOT TOKEN KEY
expire() {
    find_top "$1"
    [ "$top" = "$2" ] || return 0
    mkdir -- "$1/fence/$2~expired" 2>/dev/null
    kill_until "$1" "$2" "$3"
}
