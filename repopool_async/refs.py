"""What refs a mirror has at one moment, and what a name means among them. No I/O, no git.

A snapshot is also the text of a slot's `packed-refs`: the origin's branches as remote-tracking refs, its tags, and the
remote-tracking refs of further remotes.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Final, Self

import attrs

from repopool_async.models import ResolvedRef

REMOTE_HEAD: Final = "refs/repopool/remote-head"
"""Where a mirror keeps what the remote's HEAD was at the last fetch."""

FULL_ID: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@attrs.frozen
class RefsSnapshot:
    """The mirror's refs at one moment.

    Attributes:
        generation: a digest of what the refs are; equal refs have an equal generation.
        packed_refs: path of a file with these refs as a slot's `packed-refs`.
        branches, tags: name to commit (tags peeled; a tag of something else than a commit maps to "").
        default_branch: the remote's, None where its HEAD is detached or absent.
        head: the commit of the remote's HEAD.
        object_format: `sha1` or `sha256`.
        build: names the mirror; one made anew, after damage, has another.
        boot_id, spawned_boottime: when the fetch that brought them was begun, on the clock of that boot.
    """

    generation: str
    packed_refs: str
    branches: Mapping[str, str]
    tags: Mapping[str, str]
    default_branch: str | None
    head: str | None
    object_format: str
    build: str = ""
    boot_id: str = ""
    spawned_boottime: float = 0.0

    def has_commit(self, commit: str) -> bool:
        """Return whether a branch or tag is at a commit; one that it has otherwise is not known here."""
        return commit in self.branches.values() or commit in self.tags.values()


def packed_refs(listing: str) -> tuple[str, dict[str, str]]:
    """Turn `for-each-ref` output into a slot's `packed-refs` text and a map of refs to objects."""
    refs: dict[str, str] = {}
    lines: list[tuple[str, str]] = []
    for line in listing.splitlines():
        # Refnames hold no spaces; the peeled columns are empty for anything but an annotated tag.
        name, _, peeled, ref = line.split(" ", 3)
        refs[ref] = name
        if ref in (REMOTE_HEAD, "refs/heads/HEAD"):  # as origin/HEAD the latter would hide the default branch
            continue
        shown = "refs/remotes/origin/" + ref.removeprefix("refs/heads/") if ref.startswith("refs/heads/") else ref
        lines.append((shown, f"{name} {shown}\n" + (f"^{peeled}\n" if peeled else "")))
    lines.sort(key=lambda item: item[0].encode(errors="surrogateescape"))
    return "# pack-refs with: peeled fully-peeled sorted \n" + "".join(text for _, text in lines), refs


def parse_packed_refs(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the origin's branches and the tags (peeled) of a slot's `packed-refs`, name to object."""
    branches: dict[str, str] = {}
    tags: dict[str, str] = {}
    last_tag = ""
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if line.startswith("^"):
            tags[last_tag] = line[1:]
            continue
        name, _, ref = line.partition(" ")
        if ref.startswith("refs/remotes/origin/"):
            branches[ref.removeprefix("refs/remotes/origin/")] = name
        elif ref.startswith("refs/tags/"):
            last_tag = ref.removeprefix("refs/tags/")
            tags[last_tag] = name
    return branches, tags


@attrs.frozen
class Advertised:
    """What a remote says it has.

    Attributes:
        refs: full name to object, tags not peeled. head: what its HEAD is. default_branch: where its HEAD points.
    """

    refs: Mapping[str, str]
    head: str | None
    default_branch: str | None

    @classmethod
    def parsed(cls, listing: str) -> Self:
        """Read what `git ls-remote --symref` printed."""
        lines = [line.partition("\t") for line in listing.splitlines() if not line.endswith("^{}")]
        names = {name: value for value, _, name in lines if not value.startswith("ref: ")}
        pointer = re.search(r"^ref: refs/heads/(\S+)\tHEAD$", listing, re.MULTILINE)
        refs = {name: value for name, value in names.items() if name.startswith("refs/")}
        return cls(refs=refs, head=names.get("HEAD"), default_branch=pointer[1] if pointer else None)

    @property
    def foreign_refs(self) -> int:
        """How many refs are neither branches nor tags."""
        return sum(not name.startswith(("refs/heads/", "refs/tags/")) for name in self.refs)

    def fingerprint(self, *, branches_only: bool) -> str:
        """Return a digest of what a fetch brings: equal where there is nothing to fetch.

        Args:
            branches_only: whether tags and HEAD are not fetched.
        """
        fetched = ("refs/heads/",) if branches_only else ("refs/heads/", "refs/tags/")
        lines = [f"{name} {self.refs[name]}" for name in sorted(self.refs) if name.startswith(fetched)]
        text = "\n".join(lines if branches_only else [*lines, f"HEAD {self.head} {self.default_branch}"])
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:20]


def look_up(ref: str, snapshot: RefsSnapshot) -> ResolvedRef | None:
    """Find a full name, a branch or a tag in the snapshot; forty hexadecimal digits are always a commit."""
    if FULL_ID.fullmatch(ref):
        return None
    branch = ref.removeprefix("refs/heads/")
    if (ref.startswith("refs/heads/") or not ref.startswith("refs/")) and branch in snapshot.branches:
        return ResolvedRef(asked=ref, commit=snapshot.branches[branch], branch=branch)
    tag = ref.removeprefix("refs/tags/")
    if (ref.startswith("refs/tags/") or not ref.startswith("refs/")) and tag in snapshot.tags:
        return ResolvedRef(asked=ref, commit=snapshot.tags[tag])
    return None
