"""What is told by files that remain: git's configuration of a mirror, read without git. More in `test_slot_store`."""

import subprocess
from pathlib import Path

import pytest

from repopool_async.record_guesses import origin_url


@pytest.mark.parametrize(
    ("config", "url"),
    [
        ('[remote "origin"]\nurl=/srv/a b.git', "/srv/a b.git"),
        ('[REMOTE "origin"]\n  URL = "/srv/a;b#c.git"  ; comment', "/srv/a;b#c.git"),
        ('[remote "origin"]\n\turl = /srv/x.git # comment', "/srv/x.git"),
        ('[remote "origin"] url = /srv/x.git\n', "/srv/x.git"),
        ('[remote "origin"]\n\turl = "/srv/a\\"b\\\\c\\td.git"\n', '/srv/a"b\\c\td.git'),
        ('[remote "other"]\n\turl = /no\n[remote "origin"]\n\tpushurl = /no\n\turl = /yes\n', "/yes"),
        ('[remote "Origin"]\n\turl = /no\n', ""),
        ('[remote "origin"]\n[branch "main"]\n\turl = /no\n', ""),
        ("", ""),
    ],
)
def test_the_configuration_is_read_as_git_reads_it(tmp_path: Path, config: str, url: str) -> None:
    path = tmp_path / "config"
    path.write_text(config)
    assert origin_url(str(path)) == url
    said = subprocess.run(["git", "config", "-f", str(path), "remote.origin.url"], capture_output=True, check=False)
    assert said.stdout.decode().removesuffix("\n") == url
