"""What is known of a host that is to run a pool's lessees as a user of their own. Only root can try that."""

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from repopool_async import ConfigError, HostUnreachableError, fitness
from repopool_async.fitness import Fitness
from repopool_async.run_as import RunAs
from tests._switched import SwitchedHost

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run commands as another user")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that any user may enter (pytest's own are closed), until a test closes it."""
    path = Path(tempfile.mkdtemp(prefix="fitness-"))
    path.chmod(0o755)
    yield path
    path.rmdir()


class Subject:
    """A pool on a host that can be cut off."""

    def __init__(self, directory: Path) -> None:
        self.host = SwitchedHost("box")
        self.absences = 0
        self.told: list[str] = []
        self.run_as = RunAs(
            "nobody",
            repo_name="web",
            host=self.host,
            lessee_host=self.host,
            is_here=False,
            workspaces_dir=str(directory),
            is_isolated=False,
        )
        self.fitness = Fitness(self.run_as, lambda: self.absences, lambda refusal: self.told.append(str(refusal)))


@pytest.fixture
def subject(directory: Path) -> Subject:
    return Subject(directory)


async def test_a_host_that_can_is_not_asked_again(subject: Subject, directory: Path) -> None:
    await subject.fitness.require()
    directory.chmod(0o700)
    await subject.fitness.require(is_asked=True)
    assert (subject.fitness.refusal, subject.told) == (None, [])


async def test_a_host_that_was_started_anew_is_asked_again(subject: Subject, directory: Path) -> None:
    await subject.fitness.require()
    directory.chmod(0o700)

    async def boot_id() -> str:
        return "another"

    subject.host.boot_id = boot_id  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="cannot be entered"):
        await subject.fitness.require()


async def test_a_host_that_cannot_is_asked_after_a_minute_or_for_somebody(
    subject: Subject, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = 1000.0
    monkeypatch.setattr(fitness, "boottime", lambda: time)
    directory.chmod(0o700)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"web: run_as, on host box: .* cannot be entered by 'nobody'"):
            await subject.fitness.require()
    assert "cannot be entered" in str(subject.fitness.refusal)
    directory.chmod(0o755)
    with pytest.raises(ConfigError, match="cannot be entered"):
        await subject.fitness.require()
    time += 61
    assert subject.fitness.refusal is None
    await subject.fitness.require()
    directory.chmod(0o700)
    subject.absences += 1
    with pytest.raises(ConfigError, match="cannot be entered"):
        await subject.fitness.require()
    directory.chmod(0o755)
    await subject.fitness.require(is_asked=True)
    assert subject.fitness.refusal is None
    assert len(subject.told) == 2


async def test_a_host_that_was_out_of_use_is_asked_again(subject: Subject, directory: Path) -> None:
    await subject.fitness.require()
    directory.chmod(0o700)
    subject.absences += 1
    assert subject.fitness.refusal is None  # as long as nobody has asked
    with pytest.raises(ConfigError):
        await subject.fitness.require()
    directory.chmod(0o755)
    subject.absences += 1
    assert subject.fitness.refusal is None
    await subject.fitness.require()


async def test_nothing_is_known_of_a_host_that_does_not_answer(subject: Subject) -> None:
    subject.host.is_up = False
    for _ in range(2):
        with pytest.raises(HostUnreachableError):
            await subject.fitness.require()
    assert (subject.fitness.refusal, subject.told) == (None, [])
    subject.host.is_up = True
    await subject.fitness.require()


async def test_many_ask_once(subject: Subject, directory: Path) -> None:
    directory.chmod(0o700)
    outcomes = await asyncio.gather(*[subject.fitness.require() for _ in range(20)], return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ConfigError}
    assert len({id(outcome) for outcome in outcomes}) == 1
    directory.chmod(0o755)
    await asyncio.gather(*[subject.fitness.require(is_asked=True) for _ in range(20)])


async def test_who_is_cancelled_while_asking_leaves_nothing_known(subject: Subject) -> None:
    subject.host.is_up, subject.host.is_silent = False, True
    task = asyncio.ensure_future(subject.fitness.require())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    subject.host.is_up = True
    await subject.fitness.require()
