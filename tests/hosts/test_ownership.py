"""Giving files to a user and taking them from all others, on hosts of every kind. Only root can."""

import os
import stat
from pathlib import Path

import pytest

from repopool_async.hosts.base import CloseEntries, Command, GiveTree, Host, SetAccess

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")

SOMEBODY = 12345


def access(path: Path) -> tuple[int, int, int]:
    status = os.lstat(path)
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


async def test_access_is_set_and_no_link_followed(host: Host, tree: Path) -> None:
    (tree / "file").touch()
    (tree / "link").symlink_to("file")
    await host.apply([SetAccess(str(tree / "file"), SOMEBODY, 7, 0o640)])
    assert access(tree / "file") == (SOMEBODY, 7, 0o640)
    with pytest.raises(OSError, match="Too many levels"):
        await host.apply([SetAccess(str(tree / "link"), 1, 1, 0o600)])
    assert access(tree / "file") == (SOMEBODY, 7, 0o640)


async def test_what_is_absent_is_passed_over_only_where_that_is_said(host: Host, tree: Path) -> None:
    await host.apply([SetAccess(str(tree / "absent"), 0, 0, 0o700, is_optional=True)])
    with pytest.raises(FileNotFoundError):
        await host.apply([SetAccess(str(tree / "absent"), 0, 0, 0o700)])


async def test_entries_are_closed_but_not_what_is_in_them(host: Host, tree: Path) -> None:
    for name in ("open", "-e", ".hidden", "spared*", "spared"):
        (tree / name).mkdir(mode=0o755)
        (tree / name / "inside").touch(mode=0o644)
        os.chown(tree / name, SOMEBODY, SOMEBODY)
    for name in ("a file", "with\na line", "executable"):
        (tree / name).touch(mode=0o755)
    outside = tree.parent / "outside"
    outside.mkdir(mode=0o755)
    (tree / "link").symlink_to(outside)
    os.mkfifo(tree / "fifo", 0o666)
    os.chmod(tree / "fifo", 0o666)
    await host.apply([CloseEntries(str(tree), ("spared*", "absent"))])
    for name in ("open", "-e", ".hidden", "spared"):
        assert access(tree / name) == (0, 0, 0o700), name
        assert access(tree / name / "inside")[2] == 0o644
    for name in ("a file", "with\na line", "executable"):
        assert access(tree / name) == (0, 0, 0o600), name
    assert access(tree / "spared*") == (SOMEBODY, SOMEBODY, 0o755)
    assert access(outside)[2] == 0o755
    assert access(tree / "fifo")[2] == 0o666
    times = {name: os.lstat(tree / name).st_ctime_ns for name in os.listdir(tree)}
    await host.apply([CloseEntries(str(tree), ("spared*",))])
    assert times == {name: os.lstat(tree / name).st_ctime_ns for name in os.listdir(tree)}


async def test_a_tree_is_given_with_its_links_and_not_what_they_lead_to(host: Host, tree: Path) -> None:
    (tree / "inner").mkdir()
    (tree / "inner/file").touch()
    outside = tree.parent / "outside"
    outside.touch()
    (tree / "inner/link").symlink_to(outside)
    await host.apply([GiveTree(str(tree), SOMEBODY, 7)])
    for path in (tree, tree / "inner", tree / "inner/file", tree / "inner/link"):
        assert access(path)[:2] == (SOMEBODY, 7), path
    assert access(outside)[:2] == (0, 0)


async def test_what_starts_a_command_is_not_what_is_looked_for(host: Host, tree: Path) -> None:
    env = {"PATH": os.environ["PATH"], "MINE": "yes"}
    via = ("/usr/bin/env", "GIVEN=too")
    done = await host.run(["sh", "-c", "echo $MINE $GIVEN; pwd"], env=env, cwd=str(tree), via=via)
    assert done.text.splitlines() == ["yes too", str(tree)]
    async with host.open_process(["sh", "-c", "echo $GIVEN"], env=env, via=via) as process:
        assert await process.read() == b"too\n"
    (one,) = await host.batch([Command(("sh", "-c", "echo $GIVEN"), env, via=via)])
    assert one.text == "too\n"
    async with host.joined() as joined:
        result = joined(host.run(["sh", "-c", "echo $GIVEN"], env=env, via=via))
    assert result.result().text == "too\n"
    for name in ("no-such-command", "./no-such-command"):
        with pytest.raises(FileNotFoundError):
            await host.run([name], env=env, cwd=str(tree), via=via)
        with pytest.raises(FileNotFoundError):
            await host.batch([Command((name,), env, str(tree), via=via)])
        with pytest.raises(FileNotFoundError):
            async with host.open_process([name], env=env, cwd=str(tree), via=via):
                pass
