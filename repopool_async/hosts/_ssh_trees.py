"""What a host prints of trees and processes, read: inspections, listings, the process table.

Pure functions over bytes that somebody hostile had a part in: names may be anything but NUL. How the host comes by them
is written in `remote/inspection.sh` and `remote/marked.sh`.
"""

import io
import os
import re
import tarfile
from collections.abc import Sequence
from typing import Any, Final

from repopool_async._mounts import parse_mounts
from repopool_async.hosts._scripts import Answer, mount_name, os_error
from repopool_async.hosts.base import EndedProcesses, FileKind, FileStat, Settled, TreeInspection

NAME_LIMIT: Final = 4096
"""Characters of a name worth reporting, as on the local host."""
_CUT: Final = 4352
_NEVER_NS: Final = 2**62
"""A change time where a host cannot tell any: later than every mark."""
_KINDS: Final = {"f": FileKind.FILE, "d": FileKind.DIRECTORY, "l": FileKind.LINK}
_LS_KINDS: Final = {"-": "f", "d": "d", "l": "l"}
_HARMLESS: Final = ("No such file or directory", "Not a directory", "Too many levels of symbolic links")
_Particulars = tuple[int, int, int, tuple[tuple[str, str], ...]]


def nanoseconds(text: str) -> int:
    """Return a time that find printed in seconds, with ten digits behind the point."""
    seconds, _, fraction = text.partition(".")
    return int(seconds) * 1_000_000_000 + int((fraction + "0" * 9)[:9])


def parse_stat(data: bytes, *, is_exact: bool) -> FileStat | None:
    """Read what `look` printed; nothing is None."""
    if not data:
        return None
    if not is_exact:
        return _parse_ls(data.decode(errors="surrogateescape").split())
    kind, mode, size, device, inode, links, modified, changed = data.rstrip(b"\0").decode().split(" ")
    return FileStat(
        kind=_KINDS.get(kind, FileKind.SPECIAL),
        mode=int(mode, 8),
        size=int(size),
        device=int(device),
        inode=int(inode),
        links=int(links),
        mtime_ns=nanoseconds(modified),
        ctime_ns=nanoseconds(changed),
    )


def _parse_ls(fields: Sequence[str]) -> FileStat:
    """Read a line of `ls -dni`: times are not told exactly enough, so it has always just changed."""
    inode, mode, links = fields[:3]
    bits = sum(1 << (8 - place) for place, letter in enumerate(mode[1:10]) if letter not in "-ST")
    kind = _KINDS.get(_LS_KINDS.get(mode[0], ""), FileKind.SPECIAL)
    size = int(fields[5]) if kind is not FileKind.SPECIAL else 0
    return FileStat(
        kind=kind, mode=bits, size=size, device=0, inode=int(inode), links=int(links), mtime_ns=0, ctime_ns=_NEVER_NS
    )


def deep_pattern(root: str) -> str:
    """Return the regular expression of paths so far below a root that their names may be beyond the limit."""
    return f"(/[^/]*){{{root.count('/') + NAME_LIMIT // 256},}}"


def read_inspection(
    answer: Answer, root: str, fresh: str, *, since_ns: int | None, settled: Settled | None, is_exact: bool
) -> TreeInspection:
    """Read what `inspect_gnu` or `inspect_posix` printed.

    Raises:
        OSError: the tree could not be looked at, or not all of it.
    """
    records, separator, rest = answer.stdout.rpartition(b"\0s ") if not is_exact else _split_archive(answer.stdout)
    status, _, archive = rest.partition(b"\0")
    if answer.status != 0 or not separator or (status != b"0" and not _is_harmless(answer.stderr)):
        raise os_error(answer.stderr, root)
    return _Reader(root, since_ns, settled or Settled(0, frozenset())).read(
        records, _irregular(archive, fresh, root) if archive else None, is_exact=is_exact
    )


def _split_archive(data: bytes) -> tuple[bytes, bytes, bytes]:
    # A name cannot hold the NUL before the mark, and the records come first.
    match = re.search(rb"(?:\A|\0)s (?=[0-9]+\0)", data)
    return (data[: match.start()], match[0], data[match.end() :]) if match else (data, b"", b"")


def _is_harmless(errors: bytes) -> bool:
    """Return whether nothing but entries that went or were replaced meanwhile was the matter."""
    lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
    return bool(lines) and all(line.endswith(_HARMLESS) for line in lines)


class _Reader:
    """The records of one pass."""

    def __init__(self, root: str, since_ns: int | None, settled: Settled) -> None:
        self._root = root
        self._since_ns = since_ns
        self._settled = settled
        self._entries = -1  # the root itself is among them
        self._found: dict[str, list[str]] = {
            "changed": [],
            "changed_directories": [],
            "special": [],
            "repositories": [],
            "multiply_linked": [],
            "unlocked": [],
            "mounts": [],
            "passed_over": [],
        }
        self._has_root_changed = False
        self._are_flags_odd = False

    def read(self, records: bytes, irregular: "_Irregular | None", *, is_exact: bool) -> TreeInspection:
        for record in records.split(b"\0"):
            self._note(record.decode(errors="surrogateescape"))
        if not is_exact:
            self._entries = sum(map(len, (self._found[k] for k in ("changed", "changed_directories", "repositories"))))
            self._has_root_changed = True
        directories = [*self._found["changed_directories"], *self._found.pop("passed_over")]
        candidates = [*(["."] if self._has_root_changed or irregular else []), *directories]
        odd = [name for name in candidates if irregular is None or irregular.is_odd(name)]
        if self._are_flags_odd and "." not in odd:
            odd.insert(0, ".")  # whose they are is not told
        lists: dict[str, Any] = {name: tuple(found) for name, found in self._found.items()}
        return TreeInspection(entries=self._entries, irregular=tuple(odd), **lists)

    def _note(self, record: str) -> None:
        kind, _, rest = record.partition(" ")
        match kind:
            case "u":
                self._found["unlocked"].append(self._named(rest) or ".")
                return
            case "i":
                self._are_flags_odd = True
                return
            case "g":
                depth, _, name = rest.partition(" ")
                if int(depth) == 1:
                    return
                self._found["repositories"].append(name)
            case "m":
                self._found["mounts"].append(rest)
            case "k":
                self._found["passed_over"].append(rest)
            case "e":
                self._note_entry(*rest.split(" ", 3))
        self._entries += 1

    def _note_entry(self, kind: str, links: str, changed: str, name: str) -> None:
        if not name:
            self._has_root_changed = self._has_changed("", nanoseconds(changed))
        elif len(name) > NAME_LIMIT:
            last = self._named(name)
            if last not in self._found["changed_directories"][-1:]:
                self._found["changed_directories"].append(last)
        else:
            if self._has_changed(name, nanoseconds(changed)):
                self._found["changed_directories" if kind == "d" else "changed"].append(name)
            if kind not in "dlf":
                self._found["special"].append(name)
            elif kind == "f" and int(links) > 1:
                self._found["multiply_linked"].append(name)

    def _named(self, name: str) -> str:
        """Return a name, or of one that is too long the last directory that is not."""
        return name if len(name) <= NAME_LIMIT else name[: NAME_LIMIT + 1].rpartition("/")[0]

    def _has_changed(self, name: str, changed_ns: int) -> bool:
        if self._since_ns is None:
            return True
        is_late = changed_ns >= self._settled.since_ns or name not in self._settled.names
        return changed_ns >= self._since_ns and is_late


class _Irregular:
    """What directories carry, against a new one."""

    def __init__(self, root: str, particulars: dict[str, _Particulars], fresh: _Particulars | None) -> None:
        self._root = root
        self._particulars = particulars
        self._fresh = fresh

    def is_odd(self, name: str) -> bool:
        """Return whether a directory is not as a new one would be; one that could not be looked at counts."""
        path = self._root if name == "." else f"{self._root}/{name}"
        return self._fresh is None or self._particulars.get(path) != self._fresh


def _irregular(archive: bytes, fresh: str, root: str) -> _Irregular | None:
    found: dict[str, _Particulars] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), errors="surrogateescape") as members:
            for member in members:
                found[f"/{member.name.lstrip('/')}"] = _particulars(member)
    except tarfile.TarError:
        return None
    return _Irregular(root, found, found.get(fresh))


def _particulars(member: tarfile.TarInfo) -> _Particulars:
    attributes = sorted(item for item in member.pax_headers.items() if item[0].startswith("SCHILY."))
    return member.mode, member.uid, member.gid, tuple(attributes)


def mounts_of(data: bytes) -> tuple[str, list[tuple[str, str]]]:
    """Read what `place` printed: the real directory, and mount points with the types of their file systems."""
    directory, _, text = data.partition(b"\0")
    return os.fsdecode(directory), parse_mounts(text)


def place_pattern(tree: str, mounts: bytes) -> str:
    """Return the extended regular expression of the mountinfo lines that show a tree, or a part, somewhere else.

    Args:
        mounts: the mountinfo of the host. "" is returned where that does not say.
    """
    path = mount_name(tree)
    found, length = "", -1
    for line in mounts.splitlines():
        fields = line.split(b" ", 5)
        prefix = fields[4].rstrip(b"/") if len(fields) > 5 else b"\0"
        if len(prefix) >= length and (path + b"/").startswith(prefix + b"/"):
            source = ere_literal(os.fsdecode(fields[3].rstrip(b"/") + path[len(prefix) :]))
            found, length = f"^[0-9]+ [0-9]+ {fields[2].decode()} {source}(/[^ ]*)? ", len(prefix)
    return found


def maps_pattern(root: str) -> str:
    """Return the extended regular expression of the lines of /proc/<pid>/maps that share memory with files below."""
    path = root.replace("\n", r"\012")
    return rf"^[0-9a-f]+-[0-9a-f]+ ...s [^/]*{ere_literal(path)}/"


def ere_literal(text: str) -> str:
    """Return the extended regular expression that matches a text only."""
    return re.sub(r"([.^$*+?()\[\]{}|\\])", r"\\\1", text)


def read_processes(data: bytes) -> EndedProcesses:
    """Read what `end_marked`, those that look for bystanders, and `name_found` printed."""
    killed: set[int] = set()
    survivors: set[int] = set()
    standing: set[int] = set()
    listing, _, names = data.rpartition(b"\0n ")
    for record in listing.split(b"\0"):
        kind, _, pid = record.partition(b" ")
        found = {b"k": killed, b"v": survivors, b"t": standing}.get(kind)
        if found is not None:
            found.add(int(pid))
    lines = (text.decode(errors="replace").partition(" ") for text in names.splitlines())
    comm = {int(pid): name for pid, _, name in lines if pid.isdecimal()}
    named = tuple(f"{pid} {comm[pid]}" for pid in sorted(standing | survivors) if pid in comm)
    return EndedProcesses(tuple(sorted(killed - survivors)), named, tuple(sorted(survivors)))
