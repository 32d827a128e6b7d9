# What a command needs before it can be started, in the words of strerror. NAME PATH DIRECTORY
find_command() {
    if [ ! -d "$3" ]; then
        if [ -e "$3" ]; then refusal="$3: Not a directory"; else refusal="$3: No such file or directory"; fi
        return 1
    fi
    cd "$3" 2>/dev/null || { refusal="$3: Permission denied"; return 1; }
    refusal="$1: No such file or directory"
    case $1 in
    */*) if [ -e "$1" ]; then refusal="$1: Permission denied"; [ ! -d "$1" ] && [ -x "$1" ]; else return 1; fi;;
    *)
        rest=$2:
        while [ "$rest" ]; do
            entry=${rest%%:*}/$1
            rest=${rest#*:}
            [ -f "$entry" ] && [ -x "$entry" ] && return
        done
        return 1
        ;;
    esac
}
