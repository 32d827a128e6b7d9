# What a host does for repopool over SSH: POSIX sh (dash, busybox, bash), no other shell's extensions.
#
# This is a library of functions. The sections that a call needs are sent with it, on standard input, without comments;
# nothing is installed. Arguments are data always: they arrive quoted, and nothing here evaluates them. Paths are
# absolute. $N is a random word that separates output from output and from whatever a login shell prints.
#
# Whoever calls says which tools there are (`probe`). Functions that end in _gnu need GNU find; the others make do with
# POSIX and then say less: what they cannot tell counts as changed.

LC_ALL=C
export LC_ALL

# Frames of one call on both streams; whatever comes before the first is noise.
begin() { printf '\n%s\n' "$N"; printf '\n%s\n' "$N" >&2; }
end() { printf '\n%s %s\n' "$N" "$1"; printf '\n%s\n' "$N" >&2; }

# Fails with a reason in the words of strerror, by which the caller finds the error number. PATH REASON
refuse() { printf 'repopool: %s: %s\n' "$1" "$2" >&2; return 1; }

# Ends the steps of a call, saying which failed.
at() { printf 'repopool: step %s\n' "$1" >&2; exit 1; }

is_there() { [ -e "$1" ] || [ -L "$1" ]; }

# A fraction of a second where sleep knows such a thing.
nap() { sleep 0.02 2>/dev/null || sleep 1; }

# The first word on standard output says what became of the command; what follows is its own.
started_as() { printf '\n%s started %s\n' "$N" $$; printf '\n%s\n' "$N" >&2; }
refused() { printf '\n%s %s\n' "$N" "$1"; exit 0; }
