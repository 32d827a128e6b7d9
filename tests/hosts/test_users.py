"""Users as another machine knows them, which is this one here, and what there is for running commands as one."""

import grp
import os
import pwd
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from repopool_async._users import Ground, group_name_here, look_here
from repopool_async.hosts.ssh import SshHost
from repopool_async.hosts.users import group_name_on, look_on
from tests.hosts import sshd
from tests.hosts.conftest import reach
from tests.hosts.sshd import Keys

USERS = ("root", "daemon", "nobody", "no-such-user", "0", "1", "*", "-a", "da*", "", "two words")


def without_environment(ground: Ground) -> Ground:
    return Ground(ground.own_uid, ground.umask, ground.user, ground.setpriv, "", {})


@pytest.mark.parametrize("name", USERS)
async def test_another_machine_says_of_a_user_what_this_one_does(ssh_host: SshHost, name: str) -> None:
    there, here = await look_on(ssh_host, name), look_here(name)
    assert without_environment(there) == without_environment(here)
    assert there.python == shutil.which("python3")
    assert there.environment["PATH"] == os.environ["PATH"]


async def test_groups_have_names_or_none(ssh_host: SshHost) -> None:
    for number in (0, 1, grp.getgrall()[-1].gr_gid, 0x7123_4567):
        assert await group_name_on(ssh_host, number) == group_name_here(number)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A PATH with little in it; nothing asks the databases there."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "id", "env", "git", "cat", "grep", "find", "mv", "cp", "dd", "tar"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    return programs


@pytest.fixture
def bare_server(tmp_path: Path, bare: Path) -> Iterator[sshd.Server]:
    (tmp_path / "keys").mkdir()
    env = {"PATH": str(bare), "HOME": str(tmp_path)}
    with sshd.asyncssh_server(Keys.make(tmp_path / "keys"), shell=("/bin/sh", "-c"), env=env) as server:
        yield server


async def test_a_machine_without_getent_reads_its_files(
    bare_server: sshd.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repopool_async._users.SYSTEM_PATH", "/nowhere")
    async with reach(bare_server, tmp_path) as host:
        for name in ("daemon", "root", "no-such-user", "d*", "1"):
            ground = await look_on(host, name)
            assert ground.user == look_here(name).user, name
            assert (ground.setpriv, ground.python) == ("", "")
        group = grp.getgrgid(pwd.getpwnam("daemon").pw_gid)
        assert await group_name_on(host, group.gr_gid) == group.gr_name
        assert await group_name_on(host, 0x7123_4567) == ""
