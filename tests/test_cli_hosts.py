"""`repopool hosts`: what each action prints and does."""

from pathlib import Path

import pytest

from repopool_async.cli import ExitStatus, main


def test_a_host_is_added_drained_resumed_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def hosts(*arguments: str) -> list[str]:
        assert main(["hosts", *arguments, "--workspaces-dir", str(tmp_path / "pools")]) == 0
        return capsys.readouterr().out.splitlines()

    added = hosts("add", "box", "local", "--directory", str(tmp_path / "box"), "--label", "big", "--capacity", "4")
    assert added[1] == "box              active       local; 0 of 4 slots, 0 available, 0 allocated; labels big"
    assert hosts("drain", "box", "--reason", "new disk")[1].startswith("box              draining")
    assert hosts("list")[1].endswith("; new disk")
    assert hosts("resume", "box")[1].startswith("box              active")
    assert hosts("park", "box")[1].startswith("box              parked")
    assert hosts("remove", "box", "--force") == [
        "local            active       local; 0 slots, 0 available, 0 allocated"
    ]


def test_an_unknown_host_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hosts", "drain", "box", "--workspaces-dir", str(tmp_path)]) == ExitStatus.FAILURE
    assert "there is no host 'box'" in capsys.readouterr().err
