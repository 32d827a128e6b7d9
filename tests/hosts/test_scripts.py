"""The library of shell functions that is sent to hosts, as a text."""

import re
from collections import Counter
from pathlib import Path

import repopool_async.hosts


def test_no_two_functions_have_one_name() -> None:
    """Sections are sent in any combination: of two functions with one name the later would be both."""
    sections = sorted(Path(repopool_async.hosts.__file__).parent.glob("remote/*.sh"))
    names = [name for section in sections for name in re.findall(r"(?m)^(\w+)\(\)", section.read_text())]
    assert len(names) > 50
    assert [name for name, count in Counter(names).items() if count > 1] == []
