"""What `.gitmodules` says, checked: which submodules a commit has, and from where each may come.

Everything here is data from a commit that anybody may have written. Names that would leave `.git/modules`, paths that
links or letter case could lead elsewhere, URLs and update commands that run something are refused, never passed over.
No I/O; reading the commit and making the submodules is the business of `submodules`.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Self
from urllib.parse import unquote

import attrs

from repopool_async._git_arguments import validate_url

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_SEPARATOR: Final = re.compile(r"[/\\]")
_IGNORABLE: Final = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\u206a-\u206f\ufeff]")
"""Characters that some file systems do not tell names apart by."""
_LEADING_DOTS: Final = re.compile(r"((?:\.\.?/)+)[:/]")
_DOT_GIT: Final = re.compile(r"\.git|git~[0-9]+")
_UPDATES: Final = frozenset(("checkout", "rebase", "merge", "none"))
"""What a new submodule is updated by: checked out, but for `none`, which leaves it empty."""
_COMPONENT_LIMIT: Final = 255
_NAME_LIMIT: Final = 1024


@attrs.frozen
class Commit:
    """What of a commit's tree matters for submodules.

    Attributes:
        gitlinks: the places of submodules and the commits they stand at, in order. links: paths of symbolic links.
        gitmodules: the object that `.gitmodules` is, None where there is none.
    """

    gitlinks: Mapping[str, str]
    links: frozenset[str]
    gitmodules: str | None


@attrs.frozen
class Declared:
    """A submodule as `.gitmodules` has it: checked, but for the URL, which is still as it is written there."""

    name: str
    path: str
    url: str
    update: str | None


def read_tree(listing: bytes) -> Commit:
    """Read the output of `ls-tree -r -z`.

    Raises:
        ValueError: `.gitmodules` is a link.
    """
    gitlinks: dict[str, str] = {}
    links: set[str] = set()
    gitmodules: str | None = None
    for entry in listing.split(b"\0"):
        described, _, raw = entry.partition(b"\t")
        if not described.startswith((b"160000 ", b"120000 ")) and raw != b".gitmodules":
            continue
        mode, _, identity = described.decode().split(" ")
        name = raw.decode(errors="surrogateescape")
        if mode == "160000":
            gitlinks[name] = identity
        elif mode == "120000":
            links.add(name)
        else:
            gitmodules = identity
    if ".gitmodules" in links:
        raise ValueError("its .gitmodules is a symbolic link")
    return Commit(gitlinks, frozenset(links), gitmodules)


def declared(listing: bytes | None, commit: Commit) -> list[Declared]:
    """Read the output of `config -z --list` for `.gitmodules`; return what belongs to a gitlink, in order of path.

    Args:
        listing: None where git could not read it.

    Gitlinks that it does not name, and names without a gitlink, are passed over, as git does.

    Raises:
        RefusedError: a submodule is refused. ValueError: nothing of it can be read.
    """
    if listing is None:
        raise ValueError("its .gitmodules cannot be read as configuration")
    by_path, values = _assignments(listing)
    used = {path: by_path[path] for path in commit.gitlinks if path in by_path}
    rules = _Rules.of(used, commit.links)
    found = []
    for path, name in used.items():
        try:
            rules.check(path, name)
            found.append(_declared(path, name, values[name]))
        except ValueError as error:
            raise RefusedError(path, name, str(error)) from None
    return found


def _assignments(listing: bytes) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return the names by path and the values by name; what comes later wins, as it does for git."""
    values: dict[str, dict[str, str]] = {}
    by_path: dict[str, str] = {}
    for item in listing.decode(errors="surrogateescape").split("\0"):
        key, _, value = item.partition("\n")
        section, _, variable = key.rpartition(".")
        if not section.startswith("submodule."):
            continue
        name = section.removeprefix("submodule.")
        known = values.setdefault(name, {})
        if variable == "path":
            if by_path.get(known.get("path", "")) == name:
                del by_path[known["path"]]
            by_path[value] = name
        known[variable] = value
    return by_path, values


def resolved_url(url: str, base: str, allow_protocols: Sequence[str]) -> str:
    """Return the URL that a submodule's URL means in a repository that came from `base`.

    Local paths are allowed only to a repository that is itself local: others would name what is on this machine.

    Raises:
        ValueError: it is refused. RepositoryUrlError (a ValueError): likewise; no credentials are shown.
    """
    is_local = base.startswith(("/", "file:"))
    allowed = [name for name in allow_protocols if name != "file" or is_local]
    if url.startswith(("./", "../")):
        leading = _LEADING_DOTS.match(url)
        if _CONTROL.search(unquote(url)) or (leading and "../" in leading[1]):
            raise ValueError("its relative URL could be taken for another host")
        url = _relative(url, base)
    if url.startswith((".", "~")):
        raise ValueError(
            "its URL is neither absolute nor relative to the repository's (those begin with './' or '../')"
        )
    validate_url(url, allowed)
    return url


def _relative(url: str, base: str) -> str:
    """Do what git's `relative_url` does, including what it makes of too many `../`."""
    base = base.removesuffix("/")
    separator = "/"
    while url.startswith(("./", "../")):
        if url.startswith("../"):
            base, cut, _ = base.rpartition("/") if "/" in base else base.rpartition(":")
            separator = ":" if cut == ":" or separator == ":" else "/"
            base = base if cut else "."
        url = url.partition("/")[2]
    joined = f"{base}{separator}{url}"
    return (joined[:-1] if url.endswith("/") else joined).removeprefix("./")


# -- checks ----------------------------------------------------------------------------------------------------------


class RefusedError(ValueError):
    """A submodule is refused.

    Attributes:
        path: where it is. name: what it is called. reason: why.
    """

    def __init__(self, path: str, name: str, reason: str) -> None:
        super().__init__(path, name, reason)
        self.path = path
        self.name = name
        self.reason = reason


def _declared(path: str, name: str, values: Mapping[str, str]) -> Declared:
    update = values.get("update")
    if update is not None and update not in _UPDATES:
        what = "is a command" if update.startswith("!") else "is unknown"
        raise ValueError(f"its update method {what}; allowed are {', '.join(sorted(_UPDATES))}")
    if not values.get("url"):
        raise ValueError("it has no URL in .gitmodules")
    return Declared(name, path, values["url"], update)


@attrs.frozen
class _Rules:
    """What names and paths are checked against; folded, because on some file systems letter case does not count.

    Attributes:
        links: paths of links. paths, names: of all submodules, with how many have each.
    """

    links: frozenset[str]
    paths: Counter[str]
    names: Counter[str]

    @classmethod
    def of(cls, used: Mapping[str, str], links: Iterable[str]) -> Self:
        folded = frozenset(map(_folded, links)) if used else frozenset[str]()
        return cls(folded, Counter(map(_folded, used)), Counter(map(_folded, used.values())))

    def check(self, path: str, name: str) -> None:
        """Raise ValueError with the reason why a submodule is refused."""
        _check_components(name, "name", "out of .git/modules")
        _check_components(path, "path", "out of the tree")
        if path.startswith("-"):
            raise ValueError("its path could be taken for an option")
        if not self.links.isdisjoint(_prefixes(_folded(path))):
            raise ValueError("its path leads through a symbolic link where letter case does not count")
        if _is_inside_another(_folded(path), self.paths):
            raise ValueError("its path lies in another submodule's where letter case does not count")
        if _is_inside_another(_folded(name), self.names):
            raise ValueError("its name lies in another submodule's, and so would its git directory")


def _is_inside_another(text: str, all_of_them: Counter[str]) -> bool:
    return all_of_them[text] > 1 or any(prefix in all_of_them for prefix in _prefixes(text) - {text})


def _check_components(text: str, what: str, escape: str) -> None:
    components = text.split("/")
    if ".." in _SEPARATOR.split(text) or text.startswith("/"):
        raise ValueError(f"its {what} leads {escape}")
    if not text or _CONTROL.search(text) or not {"", "."}.isdisjoint(components):
        raise ValueError(f"its {what} is empty, or has empty components or control characters")
    if any(_DOT_GIT.fullmatch(_folded(component).rstrip(". ")) for component in _SEPARATOR.split(text)):
        raise ValueError(f"its {what} contains '.git'")
    lengths = [len(component.encode(errors="surrogateescape")) for component in components]
    if max(lengths) > _COMPONENT_LIMIT or sum(lengths) > _NAME_LIMIT:
        raise ValueError(f"its {what} is too long")


def _prefixes(path: str) -> set[str]:
    parts = path.split("/")
    return {"/".join(parts[:count]) for count in range(1, len(parts) + 1)}


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", _IGNORABLE.sub("", text)).casefold()
