"""Pools with submodules: what a recursive clone shows, cleaned as thoroughly as the top, dangerous ones refused.

Real git throughout; the reference is a fresh `git clone --template= --recurse-submodules`.
"""

import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from repopool_async import (
    GitAccessError,
    LeasedSlot,
    PoolConfig,
    PoolManager,
    PoolManagerError,
    SlotState,
    SubmoduleError,
    UnknownRefError,
)
from repopool_async._git_arguments import DEFAULT_PROTOCOLS
from repopool_async.workspaces.gitmodules import resolved_url
from tests.gitserver import serving

FILE = "100644"
LINK = "120000"
GITLINK = "160000"

Entries = Mapping[str, tuple[str, str] | str | None]


def git(path: Path, *args: str, env: Mapping[str, str] | None = None, input: bytes | None = None) -> str:
    done = subprocess.run(
        ["git", "-C", str(path), *args], input=input, check=True, capture_output=True, timeout=60,
        env={**os.environ, "GIT_ALLOW_PROTOCOL": "file:http", **(env or {})},
    )  # fmt: skip
    return done.stdout.decode(errors="surrogateescape").strip("\n")


@attrs.frozen
class World:
    """Bare repositories that have each other as submodules."""

    directory: Path

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.git"

    def make(self, name: str, entries: Entries, *, branch: str = "main") -> str:
        """Commit to a repository, which is made where it is missing; return the commit's id.

        Entries are contents, `(mode, content or commit)`, or None for what goes.
        """
        repository = self.path(name)
        if not repository.exists():
            subprocess.run(["git", "init", "-q", "--bare", "--template=", "-b", "main", str(repository)], check=True)
        parent = git(repository, "for-each-ref", "--format=%(objectname)", f"refs/heads/{branch}")
        stream = f"commit refs/heads/{branch}\ncommitter C <c@example.com> 1704067200 +0000\ndata 1\nx\n"
        stream += f"from {parent}\n" if parent else ""
        for path, entry in entries.items():
            mode, content = (FILE, entry) if isinstance(entry, str) else entry or ("", "")
            if not mode:
                stream += f"D {_quoted(path)}\n"
            elif mode == GITLINK:
                stream += f"M {mode} {content} {_quoted(path)}\n"
            else:
                stream += f"M {mode} inline {_quoted(path)}\ndata {len(content.encode())}\n{content}\n"
        git(repository, "fast-import", "--quiet", "--date-format=raw", input=stream.encode())
        return git(repository, "rev-parse", f"refs/heads/{branch}")

    def refs(self) -> str:
        """Say where every ref of every repository leads to, without asking git."""
        files = [*self.directory.glob("*/HEAD"), *self.directory.glob("*/packed-refs")]
        files += [path for path in self.directory.glob("*/refs/**/*") if path.is_file()]
        return "\n".join(f"{path} {path.read_text()}" for path in sorted(files))

    def head(self, name: str, branch: str = "main") -> str:
        return git(self.path(name), "rev-parse", f"refs/heads/{branch}")


def _quoted(path: str) -> str:
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"' if re.search(r'[" \\]', path) else path


def module(name: str, *, path: str, url: str, **more: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    lines = "".join(f'\t{key} = "{value}"\n' for key, value in {"path": path, "url": url, **more}.items())
    return f'[submodule "{escaped}"]\n{lines}'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the worlds of this module's tests lie, one after the other: they name their own path."""
    place = tmp_path_factory.mktemp("worlds")
    for repository in make_world(place / "origins").directory.iterdir():
        git(repository, "repack", "-a", "-d", "-q")  # every directory is made, and deleted, with every copy
    shutil.copytree(place / "origins", place / "template")
    return place


@pytest.fixture
def world(place: Path) -> World:
    """A world of one's own, see `make_world`."""
    shutil.rmtree(place / "origins")
    shutil.copytree(place / "template", place / "origins")
    return World(place / "origins")


def make_world(directory: Path) -> World:
    """Make one: `top` has `vendor/lib` (relative URL) with `deep/inner` inside, and another by an absolute URL."""
    directory.mkdir()
    world = World(directory)
    world.make("inner", {"inner.txt": "inner\n"})
    world.make("lib", {"lib.txt": "lib 1\n"})
    git(world.path("lib"), "tag", "-a", "-m", "t", "v1", "main")
    git(world.path("lib"), "branch", "other", "main")
    world.make(
        "lib",
        {
            ".gitignore": "*.o\n",
            ".gitmodules": module("deep/inner", path="deep/inner", url="../inner.git"),
            "deep/inner": (GITLINK, world.head("inner")),
            "bin/run": ("100755", "#!/bin/sh\n"),
            "link": (LINK, "lib.txt"),
        },
    )
    world.make("plain", {"plain.txt": "plain\n"})
    world.make(
        "top",
        {
            "README": "top\n",
            ".gitmodules": module("vendor/lib", path="vendor/lib", url="../lib.git", branch="main")
            + module('odd "na\\me', path="pl ain", url=str(world.path("plain")), update="rebase"),
            "vendor/lib": (GITLINK, world.head("lib")),
            "pl ain": (GITLINK, world.head("plain")),
        },
    )
    return world


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        yield manager


@attrs.frozen
class Used:
    """A world that nobody changes, and a pool of it that many tests use."""

    directory: Path
    world: World

    @asynccontextmanager
    async def manager(self) -> AsyncIterator[PoolManager]:
        """Open the pool; whoever fails leaves none."""
        try:
            async with PoolManager(PoolConfig(workspaces_dir=self.directory / "pools")) as manager:
                await make_pool(manager, self.world)
                yield manager
        except BaseException:
            shutil.rmtree(self.directory / "pools")
            raise


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Used:
    """A used pool, whose repository has the branches `changed` and `removed`."""
    directory = tmp_path_factory.mktemp("used")
    world = make_world(directory / "origins")
    make_branches(world, "changed", "removed")
    return Used(directory, world)


async def make_pool(manager: PoolManager, world: World, **options: Any) -> None:
    await manager.create_pool("web", str(world.path("top")), **{"submodules": True, "cleanup": "inline", **options})


# -- what can be seen ----------------------------------------------------------------------------------------------


def seen(tree: Path) -> dict[str, str]:
    """Return everything of a clone that a lessee could tell it by, objects aside.

    Refs, configuration and HEAD are there byte for byte, so git is asked only what it makes of index, tree and objects.
    """
    found = {}
    for path in sorted(tree.rglob("*")):
        name = str(path.relative_to(tree))
        if re.search(r"(^|/)objects/.|(^|/)index$", name) and name.startswith(".git/"):
            continue
        if path.is_symlink():
            found[name] = f"link {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "directory"
        else:
            found[name] = f"{path.stat().st_mode:o} {_text(path, name)}"
    for directory in (tree, *(path.parent for path in tree.rglob(".git") if path.is_file())):
        found |= {f"{directory.relative_to(tree)} {args}": _answer(directory, *args) for args in _QUESTIONS}
    return found


def _answer(directory: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=directory, capture_output=True, check=False, timeout=60)
    return f"{done.returncode} {done.stdout.decode()}"


# Checking the objects, git would start two more for each place where some are, for files that are not there.
_ONLY_OBJECTS = ("-c", "core.commitGraph=false", "-c", "core.multiPackIndex=false")
_QUESTIONS = (
    ("status", "--porcelain=v2", "--branch", "--ignored"),
    ("ls-files", "--stage"),
    (*_ONLY_OBJECTS, "fsck", "--no-dangling"),
)


def _text(path: Path, name: str) -> str:
    text = path.read_text()
    if name.startswith(".git/") and "/logs/" in f"/{name}":
        return re.sub(r" [^<\n]*<[^>]*> \d+ \S+\t", "\t", text)
    if name.startswith(".git/") and name.endswith("config"):
        return text.replace("[gc]\n\tauto = 0\n[maintenance]\n\tauto = false\n", "")
    return text


def fresh(world: World, directory: Path, *, branch: str = "main", name: str = "top") -> dict[str, str]:
    """Return what a fresh recursive clone shows, its submodules made without templates too."""
    key = (branch, name, world.refs())
    if key not in _FRESH:
        _FRESH[key] = _cloned(world, directory, branch, name)
    return _FRESH[key]


_FRESH: dict[tuple[str, str, str], dict[str, str]] = {}


def _cloned(world: World, directory: Path, branch: str, name: str) -> dict[str, str]:
    clone = directory / f"fresh-{branch.replace('/', '-')}"
    empty = directory / "no-templates"
    empty.mkdir(exist_ok=True)
    shutil.rmtree(clone, ignore_errors=True)
    git(
        directory, "clone", "-q", "--template=", "--recurse-submodules", "-b", branch, str(world.path(name)),
        str(clone), env={"GIT_TEMPLATE_DIR": str(empty)},
    )  # fmt: skip
    return seen(clone)


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    return [
        f"{name}: {expected.get(name)!r} != {found.get(name)!r}"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]


async def steps(manager: PoolManager) -> list[str]:
    """Return the steps of the last clean-up."""
    return list((await manager.get_cleanup_log("workspace-web-slot1"))[-1].steps)


# -- what a lessee gets --------------------------------------------------------------------------------------------


async def test_a_slot_is_what_a_recursive_clone_is(manager: PoolManager, world: World, tmp_path: Path) -> None:
    await make_pool(manager, world)
    async with manager.lease("web") as slot:
        assert differences(fresh(world, tmp_path), seen(slot.path)) == []
        assert (slot.path / "vendor/lib/deep/inner/inner.txt").read_text() == "inner\n"
        assert (slot.path / "vendor/lib/.git").read_text() == "gitdir: ../../.git/modules/vendor/lib\n"
        assert git(slot.path, "submodule", "status", "--recursive").count("\n") == 2


async def test_a_slot_still_is_after_it_was_used(manager: PoolManager, world: World, tmp_path: Path) -> None:
    await make_pool(manager, world)
    async with manager.lease("web") as slot:
        (slot.path / "vendor/lib/lib.txt").write_text("changed")
    async with manager.lease("web") as slot:
        assert differences(fresh(world, tmp_path), seen(slot.path)) == []


async def test_a_lessee_can_work_in_a_submodule(manager: PoolManager, world: World) -> None:
    await make_pool(manager, world)
    async with manager.lease("web") as slot:
        lib = slot.path / "vendor/lib"
        git(lib, "checkout", "-q", "-b", "work", "origin/main")
        (lib / "new").write_text("x")
        git(lib, "add", "new")
        git(lib, "commit", "-q", "-m", "new")
        git(lib, "push", "-q", "origin", "work")
        assert git(slot.path, "status", "--porcelain") == " M vendor/lib"
        assert git(world.path("lib"), "rev-parse", "work") == git(lib, "rev-parse", "HEAD")
        git(slot.path, "submodule", "update", "--recursive")
        assert git(slot.path, "status", "--porcelain") == ""


async def test_without_the_option_the_places_are_empty(manager: PoolManager, world: World, tmp_path: Path) -> None:
    await make_pool(manager, world, submodules=False)
    async with manager.lease("web") as slot:
        assert list((slot.path / "vendor/lib").iterdir()) == []
        assert not (slot.path / ".git/modules").exists()
        assert "submodule" not in (slot.path / ".git/config").read_text()
    assert not (tmp_path / "pools/web/submodules").exists()


async def test_a_repository_without_submodules_is_no_exception(
    manager: PoolManager, world: World, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(world.path("plain")), submodules=True)
    async with manager.lease("web") as slot:
        assert differences(fresh(world, tmp_path, name="plain"), seen(slot.path)) == []


async def test_one_that_is_not_to_be_updated_and_one_that_is_not_named_stay_empty(
    manager: PoolManager, world: World, tmp_path: Path
) -> None:
    world.make(
        "top",
        {
            ".gitmodules": module("none", path="none", url="../lib.git", update="none"),
            "none": (GITLINK, world.head("lib")),
            "vendor/lib": None,
            "pl ain": None,
        },
    )
    world.make("top", {"unnamed": (GITLINK, world.head("lib"))}, branch="unnamed")
    await make_pool(manager, world)
    async with manager.lease("web") as slot:
        assert differences(fresh(world, tmp_path), seen(slot.path)) == []
        assert list((slot.path / "none").iterdir()) == []
    async with manager.lease("web", ref="unnamed") as slot:
        assert list((slot.path / "unnamed").iterdir()) == []


async def test_a_submodule_whose_remote_has_no_branch_checked_out_is_detached_from_what_it_has(
    manager: PoolManager, world: World, tmp_path: Path
) -> None:
    git(world.path("plain"), "update-ref", "--no-deref", "HEAD", world.head("plain"))
    await make_pool(manager, world)
    async with manager.lease("web") as slot:
        assert differences(fresh(world, tmp_path), seen(slot.path)) == []


# -- another commit ------------------------------------------------------------------------------------------------


def make_branches(world: World, *only: str) -> list[str]:
    """Make branches of `top` that each change its submodules in another way, all where none is named."""
    old, new = git(world.path("lib"), "rev-parse", "v1^{commit}"), world.head("lib")
    start = world.head("top")
    lib = module("vendor/lib", path="vendor/lib", url="../lib.git")
    plain = module('odd "na\\me', path="pl ain", url=str(world.path("plain")), update="rebase")
    changes: dict[str, Entries] = {
        "changed": {"vendor/lib": (GITLINK, old)},
        "removed": {"vendor/lib": None, ".gitmodules": plain},
        "added": {
            ".gitmodules": lib + plain + module("more", path="m/o/re", url="./../lib.git"),
            "m/o/re": (GITLINK, new),
        },
        "moved": {
            ".gitmodules": module("vendor/lib", path="moved", url="../lib.git") + plain,
            "moved": (GITLINK, new),
            "vendor/lib": None,
        },
        "renamed": {".gitmodules": module("other", path="vendor/lib", url="../lib.git") + plain},
        "elsewhere": {
            ".gitmodules": module("vendor/lib", path="vendor/lib", url="../plain.git") + plain,
            "vendor/lib": (GITLINK, world.head("plain")),
        },
        "a-file": {"vendor/lib": "a file\n", ".gitmodules": plain},
        "a-directory": {"vendor/lib": None, "vendor/lib/lib.txt": "tracked here\n", ".gitmodules": plain},
        "a-link": {"vendor/lib": (LINK, "../README"), ".gitmodules": plain},
        "swapped": {"vendor/lib": (GITLINK, world.head("plain")), "pl ain": (GITLINK, new), ".gitmodules":
            module("vendor/lib", path="pl ain", url="../lib.git") + module("p", path="vendor/lib", url="../plain.git")},
        "none": {"vendor/lib": None, "pl ain": None, ".gitmodules": None},
    }  # fmt: skip
    names = only or tuple(changes)
    for branch in names:
        git(world.path("top"), "branch", branch, start)
        world.make("top", changes[branch], branch=branch)
    return ["main", *names]


async def test_every_change_of_ref_shows_what_a_fresh_clone_shows(
    manager: PoolManager, world: World, tmp_path: Path
) -> None:
    branches = make_branches(world)
    references = {branch: fresh(world, tmp_path, branch=branch) for branch in branches}
    # A fresh clone of another branch has only that one as its local branch; a slot has no other either.
    await make_pool(manager, world)
    for branch in [name for other in branches[1:] for name in (other, "main")] + branches[1:]:
        async with manager.lease("web", ref=branch, timeout=60) as slot:
            assert differences(references[branch], seen(slot.path)) == [], branch
        assert not any("failed" in step for step in await steps(manager)), branch


async def test_a_slot_that_was_not_touched_after_a_change_of_ref_counts_as_untouched(
    manager: PoolManager, world: World
) -> None:
    branches = make_branches(world)
    await make_pool(manager, world)
    for branch in branches:
        async with manager.lease("web", ref=branch, timeout=60):
            pass
        assert (await steps(manager))[0] == "untouched", branch


async def test_looking_leaves_a_slot_untouched(manager: PoolManager, world: World) -> None:
    await make_pool(manager, world)
    for _ in range(2):
        async with manager.lease("web") as slot:
            git(slot.path, "status")
            git(slot.path, "submodule", "status", "--recursive")
        assert (await steps(manager))[0] == "untouched"


async def test_new_refs_of_a_submodule_reach_slots_that_stand_at_the_same_commit(
    manager: PoolManager, world: World, tmp_path: Path
) -> None:
    await make_pool(manager, world, num_slots=2)
    newer = world.make("lib", {"lib.txt": "lib 3\n"})
    git(world.path("top"), "branch", "newer", "main")
    world.make("top", {"vendor/lib": (GITLINK, newer)}, branch="newer")
    async with manager.lease("web", ref="newer") as slot, manager.lease("web", ref="main") as other:
        assert git(slot.path / "vendor/lib", "rev-parse", "HEAD") == newer
        assert git(other.path / "vendor/lib", "rev-parse", "origin/main") == newer
        assert differences(fresh(world, tmp_path), seen(other.path)) == []


async def test_the_option_may_be_changed_later(manager: PoolManager, world: World, tmp_path: Path) -> None:
    await make_pool(manager, world, submodules=False)
    for wanted in (True, False, True):
        await make_pool(manager, world, submodules=wanted)
        async with manager.lease("web") as slot:
            assert any((slot.path / "vendor/lib").iterdir()) == wanted
            assert git(slot.path, "status", "--porcelain", "--ignored") == ""
            if wanted:
                assert differences(fresh(world, tmp_path), seen(slot.path)) == []


# -- what lessees leave --------------------------------------------------------------------------------------------

Contamination = Callable[[LeasedSlot, Path], None]
CONTAMINATIONS: dict[str, Contamination] = {}


ONLY_IN_GIT_DIRECTORIES = ("hooks", "modules_replaced_by_a_link_outside")
"""Those that leave the tree alone; what they change is replaced whatever it is."""


def contamination(act: Contamination) -> Contamination:
    CONTAMINATIONS[act.__name__] = act
    return act


def payload(canary: Path) -> str:
    return f"touch {canary}; cat"


@contamination
def dirt(slot: LeasedSlot, canary: Path) -> None:
    lib = slot.path / "vendor/lib"
    (lib / "lib.txt").write_text("LIB 2\n")
    (lib / "ignored.o").write_text("x")
    (lib / "deep/inner/more/and/more").mkdir(parents=True)
    (lib / "deep/inner/inner.txt").unlink()
    (lib / "bin/run").chmod(0o644)
    (lib / "empty").mkdir()


@contamination
def commits(slot: LeasedSlot, canary: Path) -> None:
    for path in ("vendor/lib/deep/inner", "vendor/lib", "."):
        git(slot.path / path, "checkout", "-q", "-b", "mine")
        (slot.path / path / "mine").write_text("x")
        git(slot.path / path, "add", "-A")
        git(slot.path / path, "commit", "-q", "-m", "mine")


@contamination
def configuration_that_executes(slot: LeasedSlot, canary: Path) -> None:
    for path in ("vendor/lib/deep/inner", "vendor/lib", "pl ain"):
        directory = slot.path / path
        for key in ("filter.x.clean", "filter.x.smudge", "diff.external", "core.sshCommand"):
            git(directory, "config", key, payload(canary))
        git(directory, "config", "core.fsmonitor", f"touch {canary}; false")
        (directory / ".gitattributes").write_text("* filter=x\n")
        # fsmonitor and filters would run for the lessee's own git as well; from here on nothing may run.
    canary.unlink(missing_ok=True)


@contamination
def hooks(slot: LeasedSlot, canary: Path) -> None:
    for name in ("post-checkout", "post-index-change", "reference-transaction"):
        hook = slot.path / ".git/modules/vendor/lib/hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\ntouch {canary}\n")
        hook.chmod(0o755)


def evil_repository(directory: Path, canary: Path) -> Path:
    git(directory.parent, "init", "-q", str(directory))
    git(directory, "config", "core.fsmonitor", f"touch {canary}; false")
    git(directory, "config", "filter.x.smudge", payload(canary))
    git(directory, "config", "core.worktree", str(directory))
    return directory / ".git"


@contamination
def gitfile_that_points_elsewhere(slot: LeasedSlot, canary: Path) -> None:
    evil = evil_repository(canary.parent / "evil", canary)
    (slot.path / "vendor/lib/.git").write_text(f"gitdir: {evil}\n")


@contamination
def gitfile_replaced_by_a_directory(slot: LeasedSlot, canary: Path) -> None:
    evil = evil_repository(canary.parent / "evil", canary)
    (slot.path / "vendor/lib/.git").unlink()
    shutil.copytree(evil, slot.path / "vendor/lib/.git")


@contamination
def gitfile_replaced_by_a_link(slot: LeasedSlot, canary: Path) -> None:
    evil = evil_repository(canary.parent / "evil", canary)
    (slot.path / "vendor/lib/.git").unlink()
    (slot.path / "vendor/lib/.git").symlink_to(evil)


@contamination
def gitfile_replaced_by_a_fifo(slot: LeasedSlot, canary: Path) -> None:
    (slot.path / "vendor/lib/.git").unlink()
    os.mkfifo(slot.path / "vendor/lib/.git")


@contamination
def gitfile_gone(slot: LeasedSlot, canary: Path) -> None:
    (slot.path / "vendor/lib/deep/inner/.git").unlink()


@contamination
def gitfiles_exchanged(slot: LeasedSlot, canary: Path) -> None:
    first, second, spare = slot.path / "vendor/lib/.git", slot.path / "pl ain/.git", slot.path / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


@contamination
def submodules_exchanged(slot: LeasedSlot, canary: Path) -> None:
    first, second, spare = slot.path / "vendor/lib", slot.path / "pl ain", slot.path / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


@contamination
def place_gone(slot: LeasedSlot, canary: Path) -> None:
    shutil.rmtree(slot.path / "vendor")


@contamination
def place_replaced_by_a_link_outside(slot: LeasedSlot, canary: Path) -> None:
    shutil.rmtree(slot.path / "vendor/lib")
    (slot.path / "vendor/lib").symlink_to(canary.parent / "outside")


@contamination
def parent_replaced_by_a_link_outside(slot: LeasedSlot, canary: Path) -> None:
    shutil.rmtree(slot.path / "vendor")
    (canary.parent / "outside/lib").mkdir()
    (slot.path / "vendor").symlink_to(canary.parent / "outside")


@contamination
def nested_place_replaced_by_a_link_outside(slot: LeasedSlot, canary: Path) -> None:
    shutil.rmtree(slot.path / "vendor/lib/deep")
    (canary.parent / "outside/inner").mkdir()
    (slot.path / "vendor/lib/deep").symlink_to(canary.parent / "outside")


@contamination
def place_replaced_by_a_file(slot: LeasedSlot, canary: Path) -> None:
    shutil.rmtree(slot.path / "vendor/lib")
    (slot.path / "vendor/lib").write_text("x")


@contamination
def locked_directories(slot: LeasedSlot, canary: Path) -> None:
    (slot.path / "vendor/lib/deep/inner/locked").mkdir()
    (slot.path / "vendor/lib/deep/inner/locked/file").write_text("x")
    (slot.path / "vendor/lib/deep/inner/locked").chmod(0)
    (slot.path / "vendor/lib").chmod(0o555)


@contamination
def submodule_deinitialised(slot: LeasedSlot, canary: Path) -> None:
    git(slot.path, "submodule", "deinit", "-f", "--all")
    shutil.rmtree(slot.path / ".git/modules")


@contamination
def submodule_added(slot: LeasedSlot, canary: Path) -> None:
    url = git(slot.path, "config", "submodule.vendor/lib.url")
    git(slot.path, "submodule", "--quiet", "add", url, "vendor/new")


@contamination
def modules_replaced_by_a_link_outside(slot: LeasedSlot, canary: Path) -> None:
    shutil.move(slot.path / ".git/modules", canary.parent / "outside/modules")
    (slot.path / ".git/modules").symlink_to(canary.parent / "outside/modules")


@contamination
def same_size_edit_with_its_time_restored(slot: LeasedSlot, canary: Path) -> None:
    path = slot.path / "vendor/lib/lib.txt"
    before = path.stat()
    path.write_text("LIB 1\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    git(slot.path / "vendor/lib", "update-index", "--assume-unchanged", "lib.txt")


@pytest.mark.parametrize("name", sorted(CONTAMINATIONS))
async def test_nothing_of_a_lessee_in_submodules_reaches_the_next(
    used: Used, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    await play(used, tmp_path, name, "main", caplog)


@pytest.mark.sampled(one_in=4)
@pytest.mark.parametrize("then", ["changed", "removed"])
@pytest.mark.parametrize("name", sorted(CONTAMINATIONS))
async def test_nor_the_next_who_wants_other_submodules(
    used: Used, tmp_path: Path, name: str, then: str, caplog: pytest.LogCaptureFixture
) -> None:
    await play(used, tmp_path, name, then, caplog)


async def contaminated(manager: PoolManager, name: str, canary: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Contaminate a slot, and return how it was cleaned.

    Done again where a process of another test was there meanwhile of which nobody can say what it holds: such a one
    counts as standing in every tree, which is then made anew.
    """
    while True:
        caplog.clear()
        async with manager.lease("web", ref="main") as slot:
            CONTAMINATIONS[name](slot, canary)
        log = await steps(manager)
        if "slot.bystanders" not in caplog.text:
            return log


async def play(used: Used, tmp_path: Path, name: str, then: str, caplog: pytest.LogCaptureFixture) -> None:
    canary = tmp_path / "canary/ran"
    outside = canary.parent / "outside"
    outside.mkdir(parents=True)
    (outside / "precious").write_text("precious")
    async with used.manager() as manager:
        log = await contaminated(manager, name, canary, caplog)
        assert log[0] == ("untouched" if name in ONLY_IN_GIT_DIRECTORIES else "cleaned"), log
        async with manager.lease("web", ref=then) as slot:
            assert differences(fresh(used.world, tmp_path, branch=then), seen(slot.path)) == []
        assert not canary.exists()
        assert (outside / "precious").read_text() == "precious"
        assert await manager.check() == {}


async def test_a_slot_whose_owner_died_amid_a_change_of_submodules_is_recovered(
    manager: PoolManager, world: World, tmp_path: Path
) -> None:
    make_branches(world)
    await make_pool(manager, world)
    slot_directory = tmp_path / "pools/web/slots/slot1"
    for interrupted in ("pristine/submodules.json", "pristine/modules", "tree/.git/modules", "tree/vendor/lib"):
        async with manager.lease("web", ref="main") as slot:
            path = slot_directory / interrupted
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.write_text("[]")
            (slot.path / "vendor").touch()
        async with manager.lease("web", ref="changed") as slot:
            assert differences(fresh(world, tmp_path, branch="changed"), seen(slot.path)) == [], interrupted


# -- what is refused -----------------------------------------------------------------------------------------------


def dangerous(canary: Path, world: World) -> dict[str, tuple[str, str, str]]:
    """Return `.gitmodules`, the place of the gitlink, and what the refusal says, by name."""
    good = "../plain.git"
    return {
        "remote helper": (module("x", path="x", url=f"ext::sh -c touch% {canary}"), "x", "remote helpers run commands"),
        "option as URL": (module("x", path="x", url=f"--upload-pack=touch {canary}"), "x", "begins with '-'"),
        "relative option": (module("x", path="x", url="./-x"), "x", ""),
        "relative to another host": (module("x", path="x", url="..//host/x"), "x", "another host"),
        "line break in a relative URL": (module("x", path="x", url="./a%0ahost=evil"), "x", "another host"),
        "home directory": (module("x", path="x", url="~/x"), "x", "neither absolute nor relative"),
        "no protocol": (module("x", path="x", url="fd::17"), "x", "remote helpers"),
        "no URL": ('[submodule "x"]\n\tpath = x\n', "x", "has no URL"),
        "command": (module("x", path="x", url=good, update=f"!touch {canary}"), "x", "is a command"),
        "unknown update": (module("x", path="x", url=good, update="dance"), "x", "is unknown"),
        "last value counts": (module("x", path="x", url=good) + module("x", path="x", url="ext::x"), "x", "helpers"),
        "name leads out": (module("../../evil", path="x", url=good), "x", "out of .git/modules"),
        "name leads out with backslashes": (module("a\\..\\b", path="x", url=good), "x", "out of .git/modules"),
        "absolute name": (module("/etc/evil", path="x", url=good), "x", "out of .git/modules"),
        "name with an empty part": (module("a//b", path="x", url=good), "x", "empty components"),
        "name contains .git": (module("a/.GIT/hooks", path="x", url=good), "x", "contains '.git'"),
        "path as option": (module("x", path="-x", url=good), "-x", "taken for an option"),
        "not readable": ("[submodule", "x", "cannot be read"),
    }


async def test_dangerous_submodules_are_refused_and_nothing_runs(
    manager: PoolManager, world: World, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    cases = dangerous(canary, world)
    branches = {name: f"evil-{number}" for number, name in enumerate(cases)}
    for name, (gitmodules, place, _) in cases.items():
        git(world.path("top"), "branch", branches[name], "main")
        entries: Entries = {
            ".gitmodules": gitmodules,
            place: (GITLINK, world.head("plain")),
            "vendor/lib": None,
            "pl ain": None,
        }
        world.make("top", entries, branch=branches[name])
    await make_pool(manager, world)
    for name, (_, place, reason) in cases.items():
        with pytest.raises(PoolManagerError) as caught:
            async with manager.lease("web", ref=branches[name]):
                raise AssertionError(name)
        if name != "relative option":  # which is only a repository that is not there
            assert isinstance(caught.value, SubmoduleError), name
            assert caught.value.path == (place if name != "not readable" else ""), name
        assert reason in str(caught.value)
        assert "web" in str(caught.value)
        assert not canary.exists(), name
        await manager.wait_clean()
        assert (await manager.get_slot_status("workspace-web-slot1")).state is SlotState.AVAILABLE
    async with manager.lease("web", ref="main") as slot:
        assert differences(fresh(world, tmp_path), seen(slot.path)) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [(("a", "p"), ("a/hooks", "q")), (("Sub", "p"), ("sub/x", "q")), (("n1", "Place"), ("n2", "place/inside"))],
)
async def test_submodules_inside_of_each_other_are_refused(
    manager: PoolManager, world: World, first: tuple[str, str], second: tuple[str, str]
) -> None:
    both = [first, second]
    world.make(
        "top",
        {
            ".gitmodules": "".join(module(name, path=path, url="../plain.git") for name, path in both),
            **{path: (GITLINK, world.head("plain")) for _, path in both},
        },
    )
    with pytest.raises(SubmoduleError, match="lies in another submodule's"):
        await make_pool(manager, world)


async def test_a_path_through_a_link_of_another_letter_case_is_refused(manager: PoolManager, world: World) -> None:
    world.make(
        "top",
        {
            "a": (LINK, ".git"),
            "A/modules/x": (GITLINK, world.head("plain")),
            ".gitmodules": module("x/y", path="A/modules/x", url="../plain.git"),
        },
    )
    with pytest.raises(SubmoduleError, match="symbolic link where letter case does not count"):
        await make_pool(manager, world)


async def test_a_list_that_is_a_link_is_refused(manager: PoolManager, world: World) -> None:
    world.make("top", {".gitmodules": (LINK, "README")})
    with pytest.raises(SubmoduleError, match=r"its \.gitmodules is a symbolic link"):
        await make_pool(manager, world)


async def test_a_forged_tree_in_which_a_link_is_a_directory_too_writes_nothing_outside(
    manager: PoolManager, world: World, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (outside / "x").mkdir(parents=True)
    top = world.path("top")
    blob = git(top, "hash-object", "-w", "--stdin", input=str(outside).encode())
    listing = module("x", path="a/x", url="../plain.git").encode()
    modules = git(top, "hash-object", "-w", "--stdin", input=listing)
    inside = git(top, "mktree", "--missing", input=f"160000 commit {world.head('plain')}\tx\n".encode())
    for entries in (
        f"120000 blob {blob}\ta\n040000 tree {inside}\ta\n",
        f"040000 tree {inside}\ta\n120000 blob {blob}\ta\n",
    ):
        tree = git(top, "mktree", input=f"100644 blob {modules}\t.gitmodules\n{entries}".encode())
        git(top, "update-ref", "refs/heads/forged", git(top, "commit-tree", "-m", "x", tree))
        await make_pool(manager, world)
        with pytest.raises(PoolManagerError):
            async with manager.lease("web", ref="forged", timeout=60):
                raise AssertionError
        await manager.wait_clean()
        assert list((outside / "x").iterdir()) == []
        async with manager.lease("web", ref="main", timeout=60) as slot:
            assert differences(fresh(world, tmp_path), seen(slot.path)) == []


async def test_a_pool_is_not_made_where_its_default_branch_is_refused(manager: PoolManager, world: World) -> None:
    world.make("top", {".gitmodules": module("x", path="pl ain", url="ext::x")})
    with pytest.raises(SubmoduleError, match=r"web: submodule 'pl ain' \(named 'x'\) of commit .* is refused"):
        await make_pool(manager, world)
    assert await manager.list_pools() == []


async def test_submodules_of_submodules_are_checked_too(manager: PoolManager, world: World) -> None:
    world.make("lib", {".gitmodules": module("../x", path="deep/inner", url="../inner.git")})
    world.make("top", {"vendor/lib": (GITLINK, world.head("lib"))})
    with pytest.raises(SubmoduleError, match=r"vendor/lib/deep/inner.*leads out"):
        await make_pool(manager, world)


async def test_there_is_an_end_to_nesting(manager: PoolManager, world: World) -> None:
    world.make("n0", {"f": "x"})
    for number in range(12):
        world.make(
            f"n{number + 1}",
            {".gitmodules": module("n", path="n", url=f"../n{number}.git"), "n": (GITLINK, world.head(f"n{number}"))},
        )
    world.make(
        "top", {".gitmodules": module("n", path="pl ain", url="../n12.git"), "pl ain": (GITLINK, world.head("n12"))}
    )
    with pytest.raises(SubmoduleError, match="lies inside of 10 others"):
        await make_pool(manager, world)


async def test_a_branch_that_becomes_dangerous_does_not_cost_the_slot(manager: PoolManager, world: World) -> None:
    await make_pool(manager, world)
    async with manager.lease("web") as slot:
        (slot.path / "dirt").write_text("x")
        good = slot.commit
        world.make("top", {".gitmodules": module("x", path="vendor/lib", url="ext::x")})
        with pytest.raises(PoolManagerError):
            async with manager.lease("web", timeout=0):
                raise AssertionError
    status = await manager.get_slot_status("workspace-web-slot1")
    assert (status.state, status.commit) == (SlotState.AVAILABLE, good)
    with pytest.raises(SubmoduleError):
        async with manager.lease("web"):
            raise AssertionError
    await manager.wait_clean()
    async with manager.lease("web", ref=good) as slot:
        assert git(slot.path, "status", "--porcelain", "--ignored") == ""


async def test_a_commit_that_the_remote_does_not_have_is_told_clearly(manager: PoolManager, world: World) -> None:
    git(world.path("top"), "branch", "ahead", "main")
    world.make("top", {"vendor/lib": (GITLINK, "1" * 40)}, branch="ahead")
    await make_pool(manager, world)
    with pytest.raises(UnknownRefError, match=r"submodule 'vendor/lib' stands at 1{40}, which .*lib.git does not have"):
        async with manager.lease("web", ref="ahead"):
            raise AssertionError
    await manager.wait_clean()
    assert await manager.available_count("web") == 1


async def test_a_repository_that_is_not_there_is_told_with_its_submodule(manager: PoolManager, world: World) -> None:
    world.make("top", {".gitmodules": module("x", path="pl ain", url="../gone.git")})
    with pytest.raises(GitAccessError, match="submodule 'pl ain'"):
        await make_pool(manager, world)


async def test_a_commit_pushed_to_the_submodule_after_its_mirror_was_made_is_fetched(
    manager: PoolManager, world: World
) -> None:
    await make_pool(manager, world)
    hidden = world.make("lib", {"hidden": "x"}, branch="gone-again")
    git(world.path("lib"), "update-ref", "refs/changes/1", hidden)
    git(world.path("lib"), "branch", "-q", "-D", "gone-again")
    world.make("top", {"vendor/lib": (GITLINK, hidden)})
    async with manager.lease("web") as slot:
        assert git(slot.path / "vendor/lib", "rev-parse", "HEAD") == hidden


# -- the network ---------------------------------------------------------------------------------------------------


async def test_ten_slots_transfer_a_submodule_once_and_with_the_pools_credentials(tmp_path: Path, world: World) -> None:
    world.make("top", {".gitmodules": module("vendor/lib", path="vendor/lib", url="../lib.git"), "pl ain": None})
    git(world.path("top"), "update-ref", "refs/heads/main", "main")
    with serving(world.directory, credentials="user:secret") as server:
        config = PoolConfig(workspaces_dir=tmp_path / "pools")
        async with PoolManager(config) as manager:
            url = server.url("top.git", userinfo="user:secret")
            await manager.create_pool("web", url, num_slots=10, submodules=True)
            packs = [path for path, _ in server.requests if path == "/lib.git/git-upload-pack"]
            first = len(packs)
            newer = world.make("lib", {"lib.txt": "lib 9\n"})
            world.make("top", {"vendor/lib": (GITLINK, newer)})
            held = []

            async def lease() -> None:
                async with manager.lease("web", timeout=60) as slot:
                    held.append(git(slot.path / "vendor/lib", "rev-parse", "HEAD"))
                    assert "secret" not in (slot.path / ".git/modules/vendor/lib/config").read_text()

            async with anyio.create_task_group() as group:
                for _ in range(10):
                    group.start_soon(lease)
            assert held == [newer] * 10
    transfers = [path for path, authorized in server.requests if path == "/lib.git/git-upload-pack" and authorized]
    assert first <= 3  # refs and pack of one clone, one of them perhaps asked for again with credentials
    assert len(transfers) - first <= 6
    for file in (tmp_path / "pools").rglob("*"):
        if file.is_file() and file.stat().st_size < 1 << 16:
            assert b"secret" not in file.read_bytes(), file


async def test_a_local_path_is_refused_where_the_repository_came_over_the_network(
    tmp_path: Path, world: World, manager: PoolManager
) -> None:
    world.make("top", {".gitmodules": module("x", path="pl ain", url=str(world.path("plain")))})
    refused = pytest.raises(SubmoduleError, match="the protocol file is not allowed")
    with serving(world.directory) as server, refused:
        await manager.create_pool("web", server.url("top.git"), submodules=True)


async def test_protocols_that_are_not_allowed_are_not_for_submodules_either(tmp_path: Path, world: World) -> None:
    world.make("top", {".gitmodules": module("x", path="pl ain", url="http://127.0.0.1:1/plain.git")})
    config = PoolConfig(workspaces_dir=tmp_path / "pools", allow_protocols=("file",))
    async with PoolManager(config) as manager:
        with pytest.raises(SubmoduleError, match="the protocol http is not allowed"):
            await make_pool(manager, world)


# -- what relative URLs mean ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base",
    [
        "https://host/group/top.git", "https://host/top", "https://host:8443/a/b/c/", "ssh://git@host:22/a/top.git",
        "git@host:group/top.git", "git@host:top.git", "host:top", "/srv/repositories/top.git", "/top", "file:///a/b/top.git",
    ],
)  # fmt: skip
def test_relative_urls_mean_what_they_mean_to_git(tmp_path: Path, base: str) -> None:
    urls = ["../lib.git", "./lib.git", "../../x/lib", "../.././lib/", "./../lib", "../", "./", "../a b", "../../../lib"]
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "remote", "add", "origin", base)
    (tmp_path / ".gitmodules").write_text(
        "".join(module(f"m{number}", path=f"m{number}", url=url) for number, url in enumerate(urls))
    )
    for number, _ in enumerate(urls):
        git(tmp_path, "update-index", "--add", "--cacheinfo", f"{GITLINK},{'1' * 40},m{number}")
    git(tmp_path, "add", ".gitmodules")
    names = [f"m{number}" for number, _ in enumerate(urls)]
    init = ["git", "-C", str(tmp_path), "submodule", "init"]
    if subprocess.run([*init, *names], check=False, capture_output=True).returncode != 0:
        for name in names:  # it goes no further than the first that means nothing to it
            subprocess.run([*init, name], check=False, capture_output=True)
    asked = ["git", "-C", str(tmp_path), "config", "--get-regexp", r"^submodule\..*\.url$"]
    answers = dict(line.split(" ", 1) for line in subprocess.check_output(asked, text=True).splitlines())
    compared = 0
    for name, url in zip(names, urls, strict=True):
        try:
            found = resolved_url(url, base, DEFAULT_PROTOCOLS)
        except ValueError:
            continue  # what git would make of it is no URL that the pool takes
        assert found == answers.get(f"submodule.{name}.url", ""), url
        compared += 1
    assert compared >= 4
