# What there is for running commands as a user, each ended by NUL: who we are, our umask, two programs, the user's entry
# in the password database, its groups. NAME PATH of the system's own programs
look_for_user() {
    entry=$(find_entry passwd "$1")
    printf '%s\0' "$(id -u)" "$(umask)" "$(PATH=$2 find_program setpriv)" "$(find_program python3)" "$entry"
    [ -z "$entry" ] || id -G -- "$1"
    printf '\0'
}

# NAME
find_program() {
    rest=$PATH:
    while [ "$rest" ]; do
        program=${rest%%:*}/$1
        rest=${rest#*:}
        case $program in /*) if [ -f "$program" ] && [ -x "$program" ]; then printf %s "$program"; return; fi;; esac
    done
}

# The entry of a user's name or a group's number; a name of digits only would be taken for a number. DATABASE KEY
find_entry() {
    if command -v getent >/dev/null 2>&1 && { [ "$1" = group ] || ! is_number "$2"; }; then
        getent "$1" "$2"
        return
    fi
    while IFS= read -r line; do
        case $1:$line in passwd:"$2":* | group:*:*:"$2":*) printf '%s\n' "$line"; return;; esac
    done <"/etc/$1"
}

is_number() { case $1 in '' | *[!0-9]*) return 1;; esac; }

# NUMBER
look_for_group() { find_entry group "$1"; }
