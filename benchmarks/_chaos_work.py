"""The work of lessees that are killed: made, written down once it is there, and looked for where it must be saved.

Each lease makes a commit, changes a tracked file and leaves an untracked one, all with content that only it has. A line
in a file beside the workspaces says what is there by now, and another that the lessee is done with it. What a lease had
made must be saved when the lease did not end by being given back, in a pool with `salvage: always` in any case.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from repopool_async import LeasedSlot, PoolManager, SlotNotFoundError

WHO: Final = ("-c", "user.name=chaos", "-c", "user.email=chaos@localhost")
KILL_POINT: Final = "REPOPOOL_CHAOS_KILL_POINT"
"""Environment variable that says where the process is to die, for whoever reads what it had made."""


async def make_work(root: Path, slot: LeasedSlot, *, commits: bool) -> None:
    """Leave work in a lease, and write down what is there as soon as it is."""
    if commits:
        committed = f"committed in {slot.lease_id}\n"
        (slot.path / "file-0").write_text(committed)
        await slot.run("git", *WHO, "commit", "-q", "-a", "-m", slot.lease_id)
        _note(root, slot, {"^1:file-0": committed, ":file-0": committed}, has_ended=False)
    files = {"README": f"changed in {slot.lease_id}\n", "untracked/deep/file": f"made in {slot.lease_id}\n"}
    (slot.path / "untracked/deep").mkdir(parents=True)
    for name, text in files.items():
        (slot.path / name).write_text(text)
    _note(root, slot, {f":{name}": text for name, text in files.items()}, has_ended=False)


def end_work(root: Path, slot: LeasedSlot) -> None:
    """Write down that a lessee is done with its work: from now on the lease may end by being given back."""
    _note(root, slot, {}, has_ended=True)


def _note(root: Path, slot: LeasedSlot, files: Mapping[str, str], *, has_ended: bool) -> None:
    entry = {
        "lease_id": slot.lease_id, "repo_name": slot.repo_name, "slot_id": slot.slot_id,
        "files": files, "has_ended": has_ended, "where": os.environ.get(KILL_POINT, "a random moment"),
    }  # fmt: skip
    with (root / "work").open("a") as file:
        file.write(json.dumps(entry) + "\n")


async def missing_work(manager: PoolManager, root: Path, always_saved: Iterable[str]) -> tuple[int, list[str]]:
    """Return how many leases left work that must be saved, and what of it is not.

    Args:
        always_saved: the pools with `salvage: always`.
    """
    leases = _leases(root)
    taken_away = await _taken_away(manager, {(lease["repo_name"], lease["slot_id"]) for lease in leases.values()})
    due = {
        lease_id: lease
        for lease_id, lease in leases.items()
        if not lease["has_ended"] or lease["repo_name"] in always_saved or lease_id in taken_away
    }
    lost = []
    for name in sorted({lease["repo_name"] for lease in due.values()}):
        ours = {lease_id: lease for lease_id, lease in due.items() if lease["repo_name"] == name}
        lost += _missing_in(root / "pools" / name / "salvage.git", ours)
    return len(due), lost


def _leases(root: Path) -> dict[str, dict[str, Any]]:
    leases: dict[str, dict[str, Any]] = {}
    with suppress(FileNotFoundError):
        for line in (root / "work").read_text().splitlines():
            entry = json.loads(line)
            files = leases.get(entry["lease_id"], {}).get("files", {}) | entry["files"]
            leases[entry["lease_id"]] = {**entry, "files": files}
    return leases


async def _taken_away(manager: PoolManager, slots: set[tuple[str, str]]) -> set[str]:
    """Return the leases of which history says that somebody else ended them; slots that are gone have none."""
    found = set()
    for _, slot_id in slots:
        with suppress(SlotNotFoundError):
            for record in await manager.get_allocation_history(slot_id):
                if record.event in ("recovered", "expired", "forced") and record.held_seconds is not None:
                    found.add(record.lease_id)
    return found


def _missing_in(repository: Path, leases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    wanted = [(lease_id, lease, name) for lease_id, lease in leases.items() for name in lease["files"]]
    asked = "".join(f"refs/salvage/{lease_id}{name}\n" for lease_id, _, name in wanted)
    found = _git(repository, "cat-file", "--batch-check=%(objectname)", input=asked) if repository.is_dir() else []
    found += ["missing"] * (len(wanted) - len(found))
    lost = []
    for (lease_id, lease, name), answer in zip(wanted, found, strict=True):
        if answer != _blob_id(lease["files"][name]):
            lost.append(f"{name} of {lease['slot_id']}, lease {lease_id}, killed at {lease['where']}: {answer}")
    return lost


def _git(repository: Path, *args: str, input: str) -> list[str]:
    done = subprocess.run(
        ["git", "-C", str(repository), *args], input=input, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def _blob_id(text: str) -> str:
    data = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
