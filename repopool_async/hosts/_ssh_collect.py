"""Taking single files out of a directory on a host: listed there, chosen here, copied there, checked here.

A host without Python cannot match our patterns or check what an object's name says, so this takes two round trips, and
a third where a copy is no good. The copies, which are ours, are what is checked; not what they were made from.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from repopool_async.hosts._collect import _DEPTH, _NOTES, _ObjectCheck, _Refused
from repopool_async.hosts._scripts import command, mount_name, new_word
from repopool_async.hosts._ssh_shell import Shell
from repopool_async.hosts.base import Collected, Wanted

_BLOCK_BYTES: Final = 65536
_INFLATION: Final = 16
_PORTION_BYTES: Final = 64 * 1024 * 1024
_PORTION_FILES: Final = 1000


class Collection:
    """One collection."""

    def __init__(
        self, shell: Shell, root: str, inside: str, target: str, *, wanted: Sequence[Wanted], enter: str
    ) -> None:
        self._shell = shell
        self._root = root
        self._inside = inside
        self._target = target
        self._wanted = [(re.compile(want.pattern, re.DOTALL), want) for want in wanted]
        self._enter = re.compile(enter, re.DOTALL)
        self._skipped: list[str] = []
        self._names: list[str] = []
        self._contents: dict[str, bytes] = {}
        self._drop: list[str] = []
        self._inflated_left = 0

    async def run(self, limit_bytes: int, limit_files: int) -> Collected:
        """Collect, within limits of all together."""
        chosen = self._choose(await self._listing(), limit_bytes, limit_files)
        self._inflated_left = limit_bytes * _INFLATION
        for portion in _portions(chosen):
            await self._take(portion)
        await self._remove_dropped()
        return Collected(tuple(self._names), self._contents, tuple(self._skipped))

    def _inside_it(self) -> bytes:
        mounts = command("find_mounts", self._root, mount_name(self._root))
        return mounts + b" && " + command("enter_parent", self._root, self._inside)

    async def _listing(self) -> list[tuple[str, int, str]]:
        absent = command("is_there", f"{self._root}/{self._inside}") + b" && exit 4; exit 0"
        call = self._inside_it() + b" || { " + absent + b"; }\nlist_files"
        answer = await self._shell.call(lambda _: call, "trees", is_repeatable=True)
        if answer.status == 4:
            self._skip(".", "is no directory")
            return []
        listed = []
        for record in answer.stdout.split(b"\0"):
            kind, _, rest = record.decode(errors="surrogateescape").partition(" ")
            size, _, name = rest.partition(" ")
            if name:
                listed.append((kind, int(size), name))
        return sorted(listed, key=lambda entry: entry[2].split("/"))

    def _choose(
        self, listed: list[tuple[str, int, str]], limit_bytes: int, limit_files: int
    ) -> list[tuple[str, int, Wanted]]:
        chosen = []
        entered = {""}
        for kind, size, name in listed:
            if name.rpartition("/")[0] not in entered:
                continue
            is_entered = self._enter.fullmatch(name) is not None
            want = next((want for pattern, want in self._wanted if pattern.fullmatch(name)), None)
            if kind == "d" and is_entered:
                if name.count("/") < _DEPTH:
                    entered.add(name)
                else:
                    self._skip(name, "cannot be entered")
            elif kind == "f" and want is not None:
                if size > want.limit_bytes:
                    self._skip(name, f"has {size} bytes, more than {want.limit_bytes}")
                elif size > limit_bytes or limit_files <= 0:
                    self._skip(name, "is beyond the limit on files and bytes")
                else:
                    limit_bytes, limit_files = limit_bytes - size, limit_files - 1
                    chosen.append((name, size, want))
            elif is_entered or want is not None:
                self._skip(name, "is no directory" if is_entered else "is no regular file")
        return chosen

    async def _take(self, chosen: Sequence[tuple[str, int, Wanted]]) -> None:
        """Copy files, and bring here what was copied of those that are read or checked."""
        mark = new_word()
        lines = [self._inside_it() + b" || exit 4"]
        for name, size, want in chosen:
            parent, _, last = name.rpartition("/")
            target = f"{self._target}/{name}"
            go = command("enter_parent", f"{self._root}/{self._inside}".rstrip("/"), parent)
            copy = command("take_file", last, target, size // _BLOCK_BYTES + 1)
            show = command("cat", target) if want.is_read or want.named_by else b":"
            lines += [
                b"if " + go + b"; then " + copy + b" || exit; fi",
                b"if " + command("is_there", target) + b"; then printf x; " + show + b"; fi",
                b"printf %s " + mark.encode(),
            ]
        answer = await self._shell.call(lambda _: b"\n".join(lines), "trees")
        outputs = answer.require(self._target).split(mark.encode())
        for (name, _, want), output in zip(chosen, outputs, strict=False):
            self._note(name, want, output)

    def _note(self, name: str, want: Wanted, output: bytes) -> None:
        if not output:
            self._skip(name, "went away")
        elif want.is_read:
            self._drop.append(name)
            self._contents[name] = output[1:]
        elif want.named_by and (fault := self._fault(name, want, output[1:])):
            self._drop.append(name)
            self._skip(name, fault)
        else:
            self._names.append(name)

    def _fault(self, name: str, want: Wanted, data: bytes) -> str:
        check = _ObjectCheck(want.named_by, self._inflated_left)
        try:
            check.feed(data)
            check.finish(name)
        except _Refused as refusal:
            return str(refusal)
        finally:
            self._inflated_left -= check.inflated
        return ""

    async def _remove_dropped(self) -> None:
        if self._drop:
            calls = [command("rm", "-f", f"{self._target}/{name}") for name in self._drop]
            (await self._shell.call(lambda _: b" && ".join(calls), is_repeatable=True)).require(self._target)

    def _skip(self, name: str, reason: str) -> None:
        if len(self._skipped) < _NOTES:
            self._skipped.append(f"{name}: {reason}")


def _portions(chosen: Sequence[tuple[str, int, Wanted]]) -> Iterator[list[tuple[str, int, Wanted]]]:
    """Divide what is to be copied, so that no answer is too big to hold."""
    portion: list[tuple[str, int, Wanted]] = []
    left = _PORTION_BYTES
    for one in chosen:
        portion.append(one)
        left -= one[1]
        if left < 0 or len(portion) == _PORTION_FILES:
            yield portion
            portion, left = [], _PORTION_BYTES
    if portion:
        yield portion
