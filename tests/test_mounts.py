"""Which file system a path lies on, by the kernel's table of mounts."""

import os
import sys
from pathlib import Path

import pytest

from repopool_async import _mounts

LINUX_ONLY = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")

MOUNTS = rb"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
22 21 0:5 / /proc rw - proc proc rw
23 21 0:40 / /home rw,relatime shared:5 master:2 - nfs4 server:/home rw
24 23 8:2 / /home/local rw - xfs /dev/sdb1 rw
25 21 0:41 / /mnt/with\040space\134 rw - fuse.sshfs user@host:/ rw
26 21 0:42 / /data rw - cifs //server/data rw
27 21 8:3 / /data rw - btrfs /dev/sdc1 rw
28 21 0:43 / /p9 rw - 9p share rw
29 21 0:44 / /mnt/loop rw - fuseblk /dev/sdd1 rw
garbage
30 21 0:45 / /caf\351 rw - lustre mgs:/fs rw
"""


class TestNetworkFileSystems:
    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            ("/", "ext4"),
            ("/homework", "ext4"),
            ("/home", "nfs4"),
            ("/home/me/.repopool", "nfs4"),
            ("/home/local/pool", "xfs"),
            ("/home/localhost", "nfs4"),
            ("/mnt/with space\\/pool", "fuse.sshfs"),
            ("/mnt", "ext4"),
            ("/data/x", "btrfs"),
            ("/p9/x", "9p"),
            ("/mnt/loop", "fuseblk"),
            (os.fsdecode(b"/caf\xe9/x"), "lustre"),
        ],
    )
    def test_the_longest_and_last_mount_point_counts(self, path: str, kind: str) -> None:
        assert _mounts.type_among(path, _mounts.parse_mounts(MOUNTS)) == kind

    def test_without_a_mount_table_nobody_can_say(self) -> None:
        assert _mounts.type_among("/home", []) is None

    @pytest.mark.parametrize(
        "kind",
        ["nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "ceph", "lustre", "glusterfs", "afs", "9p", "fuse.s3fs"],
    )
    def test_these_are_network_file_systems(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_mounts, "mount_table", lambda: [("/", kind)])
        assert _mounts.is_network_file_system("/anywhere")

    @pytest.mark.parametrize(
        "kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuseblk", "fuse.fuse-overlayfs"]
    )
    def test_these_are_not(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_mounts, "mount_table", lambda: [("/", kind)])
        assert not _mounts.is_network_file_system("/anywhere")

    def test_a_path_that_does_not_exist_yet_can_be_asked_about(self, tmp_path: Path) -> None:
        there = _mounts.is_network_file_system(str(tmp_path))
        assert _mounts.is_network_file_system(str(tmp_path / "not" / "yet")) is there

    @LINUX_ONLY
    def test_links_are_followed_to_where_the_files_are(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("/proc")
        mounts = _mounts.mount_table()
        assert _mounts.type_among(os.path.realpath(tmp_path / "link"), mounts) == "proc"
        assert not _mounts.is_network_file_system(str(tmp_path / "link"))
