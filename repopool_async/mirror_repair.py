"""What is wrong with a bare repository, and what of a damaged one can be saved into its successor.

Damage is what git's own full check finds in objects, packs and refs; what a project's history always looked like is
none. Nothing of the damaged repository is believed: what is carried over is packed anew, indexed by its own content and
checked to be complete. When this is done, and under which lock, is the mirror's business.
"""

import re
import secrets
from collections.abc import Collection, Iterable
from typing import Final

import attrs

from repopool_async._git import GitRunner
from repopool_async.exceptions import GitOperationError
from repopool_async.hosts.base import FileKind, Host, MakeDirectory, RemoveFile, Rename

_ID: Final = rb"[0-9a-f]{40}(?:[0-9a-f]{24})?"
_PACKED_REF: Final = re.compile(rb"^(" + _ID + rb") (refs/repopool/[^\s]+)$", re.MULTILINE)
_LISTED_ID: Final = re.compile(rb"^(" + _ID + rb") ", re.MULTILINE)
_LOOSE_REF: Final = re.compile(rb"(" + _ID + rb")\n?")
_NO_DAMAGE: Final = re.compile(r"(error|warning) in |notice: |dangling |hint: ", re.IGNORECASE)
"""fsck's opinion on how a commit or tree was written by whoever made it: many an old history has such objects."""
_TEXT_LIMIT: Final = 512 * 1024 * 1024
_LINES_TOLD: Final = 20
_DEPTH: Final = 8
_TRIED_ALONE: Final = 256


async def find_damage(git: GitRunner, directory: str) -> list[str]:
    """Read every object of a bare repository and return what is wrong with it, a line each (slow).

    Found are truncated packs, bytes that changed in a pack or a loose object, objects that are missing, refs that lead
    nowhere and files that git cannot read.
    """
    result = await git.run(
        "fsck", "--full", "--no-dangling", "--no-progress", "--no-reflogs", git_dir=directory, ok_codes=range(256)
    )
    said = [*result.text.splitlines(), *result.stderr.splitlines()]
    lines = [line for line in dict.fromkeys(said) if line.strip() and not _NO_DAMAGE.match(line)]
    # Bit 1 alone also stands for objects that were written oddly.
    if not lines and result.exit_code not in (0, 1):
        lines = [f"git fsck exited with {result.exit_code}"]
    more = len(lines) - _LINES_TOLD
    return [*lines[:_LINES_TOLD], *([f"and {more} more"] if more > 0 else [])]


@attrs.frozen
class Carried:
    """What came of saving a damaged repository's own objects.

    Attributes:
        saved, lost: commits that only the old repository had.
    """

    saved: int
    lost: int


async def carry_over(git: GitRunner, host: Host, *, old: str, new: str) -> Carried:
    """Give `new` the pool's own refs of `old` and every commit that a slot of `old` may show, as far as they are whole.

    Args:
        old: the damaged repository; it is only read. new: its successor, which nobody uses yet.
    """
    refs = await _own_refs(host, old)
    wanted = await _missing(git, new, {*refs.values(), *await _shown_ids(host, old)})
    if wanted and not await _carry(git, host, wanted, old=old, new=new):
        for one in sorted(wanted)[:_TRIED_ALONE]:
            await _carry(git, host, {one}, old=old, new=new)
    lost = await _missing(git, new, wanted) if wanted else set()
    kept = {name: commit for name, commit in refs.items() if commit not in lost}
    if kept:
        commands = "".join(f"update {name} {commit}\n" for name, commit in kept.items())
        await git.run("update-ref", "--stdin", git_dir=new, input=commands.encode(errors="surrogateescape"))
    return Carried(saved=len(wanted) - len(lost), lost=len(lost))


async def _own_refs(host: Host, directory: str) -> dict[str, str]:
    """Read `refs/repopool/*` as text: git may be unable to."""
    packed = await _read(host, f"{directory}/packed-refs")
    refs = {_text(name): commit.decode() for commit, name in _PACKED_REF.findall(packed)}
    refs |= await _loose_refs(host, directory, "refs/repopool", _DEPTH)
    refs.pop("refs/repopool/remote-head", None)
    return refs


async def _loose_refs(host: Host, directory: str, prefix: str, depth: int) -> dict[str, str]:
    refs: dict[str, str] = {}
    for entry in await host.list_directory(f"{directory}/{prefix}") if depth else ():
        name = f"{prefix}/{entry}"
        stat = await host.stat(f"{directory}/{name}")
        if stat is not None and stat.kind is FileKind.DIRECTORY:
            refs |= await _loose_refs(host, directory, name, depth - 1)
        elif match := _LOOSE_REF.fullmatch(await _read(host, f"{directory}/{name}")):
            refs[name] = match[1].decode()
    return refs


async def _shown_ids(host: Host, directory: str) -> set[str]:
    """Return what the refs of slots lead to: those of every snapshot that is still kept."""
    own = f"{directory}/repopool"
    names = [name for name in await host.list_directory(own) if name.startswith("refs-")]
    return {name.decode() for file in names for name in _LISTED_ID.findall(await _read(host, f"{own}/{file}"))}


async def _read(host: Host, path: str) -> bytes:
    try:
        return await host.read_bytes(path, limit=_TEXT_LIMIT) or b""
    except OSError:
        return b""


def _text(name: bytes) -> str:
    """Return a name as text that can be turned back."""
    return name.decode(errors="surrogateescape")


async def _missing(git: GitRunner, directory: str, ids: Iterable[str]) -> set[str]:
    asked = "".join(f"{one}\n" for one in sorted(ids))
    if not asked:
        return set()
    answer = await git.run("cat-file", "--batch-check", git_dir=directory, input=asked.encode())
    return {line.partition(" ")[0] for line in answer.text.splitlines() if line.endswith(" missing")}


async def _carry(git: GitRunner, host: Host, tips: Collection[str], *, old: str, new: str) -> bool:
    """Pack what `new` lacks of these commits, from both repositories, into `new`; return whether they are whole."""
    work = f"{new}/carried-{secrets.token_hex(4)}"
    await host.apply([MakeDirectory(work)])
    try:
        pack = await _pack(git, tips, old=old, new=new, base=f"{work}/pack")
        # Its index is made from what the objects are, not from what the old repository called them.
        await host.apply([RemoveFile(f"{pack}.idx")])
        await git.run("index-pack", f"{pack}.pack", git_dir=new)
        return await _adopt(git, host, tips, pack=pack, new=new)
    except (GitOperationError, OSError):
        return False
    finally:
        await host.remove_tree(work)


async def _pack(git: GitRunner, tips: Collection[str], *, old: str, new: str, base: str) -> str:
    present = (await git.run("for-each-ref", "--format=^%(objectname)", git_dir=new)).text.splitlines()
    objects = f"{old}/objects".replace("\\", "\\\\").replace('"', '\\"')
    done = await git.run(
        *("pack-objects", "--revs", "--quiet", "--no-reuse-object", base),
        git_dir=new,
        input="".join(f"{line}\n" for line in [*sorted(tips), *present]).encode(),
        env={"GIT_ALTERNATE_OBJECT_DIRECTORIES": f'"{objects}"'},
    )
    return f"{base}-{done.text}"


async def _adopt(git: GitRunner, host: Host, tips: Collection[str], *, pack: str, new: str) -> bool:
    place = f"{new}/objects/pack/{pack.rpartition('/')[2]}"
    await host.apply([Rename(f"{pack}.pack", f"{place}.pack"), Rename(f"{pack}.idx", f"{place}.idx")])
    whole = await git.run(
        *("rev-list", "--objects", "--quiet", "--stdin", "--not", "--all"),
        git_dir=new,
        input="".join(f"{tip}\n" for tip in sorted(tips)).encode(),
        ok_codes=range(256),
    )
    if not whole.success:
        await host.apply([RemoveFile(f"{place}.idx"), RemoveFile(f"{place}.pack")])
    return whole.success
