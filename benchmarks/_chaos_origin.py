"""The repository that `benchmarks.chaos` makes pools of: every file of it tells which commit it is of."""

import subprocess
from pathlib import Path
from typing import Final

_FILES: Final = 20


def make_repository(root: Path) -> None:
    """Make a bare repository with branches `main` and `feature` and a tag `first`."""
    path = root / "origin"
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(path)], check=True)
    make_commit(str(path), 1)
    subprocess.run(["git", "-C", str(path), "tag", "first", "main"], check=True)


def make_commit(url: str, serial: int) -> None:
    """Commit to both branches; every file tells which commit it is of, so that a mixture shows."""
    stream = ""
    for branch, text in (("main", f"main {serial}\n"), ("feature", f"feature {serial}\n")):
        stream += f"commit refs/heads/{branch}\ncommitter chaos <chaos@localhost> {1700000000 + serial} +0000\n"
        stream += f"data <<.\n{serial}\n.\n" + (f"from refs/heads/{branch}^0\n" if serial > 1 else "") + "deleteall\n"
        files = {"README": "a repository\n", "SERIAL": text} | {f"file-{n}": text * 20 for n in range(_FILES)}
        stream += "".join(f"M 644 inline {name}\ndata {len(data)}\n{data}\n" for name, data in files.items())
    subprocess.run(["git", "-C", url, "fast-import", "--quiet", "--force"], input=stream.encode(), check=True)
