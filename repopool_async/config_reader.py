"""Turning mappings into the values of options, key by key, while collecting everything that is wrong.

Every refusal names the key and, where there is a file, the line. Which options there are is not known here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from repopool_async.config_fields import Field, Table, accepted
from repopool_async.config_refusals import KeyPath, inside, located, shown
from repopool_async.config_yaml import parse_yaml
from repopool_async.exceptions import ConfigError

_MAX_PROBLEMS: Final = 20


class Reader:
    """Turns a mapping or the text of a file into values; collects what is wrong instead of stopping at the first.

    Args:
        homes: where a key that is unknown at one place belongs.
    """

    def __init__(self, homes: Mapping[str, str], source: Path | None = None) -> None:
        self.source = source
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[ConfigError] = []
        self._homes = homes

    def parse(self, text: str) -> object:
        """Return the plain value of YAML text, noting the line of every key."""
        return parse_yaml(text, self.lines, source=self.source)

    def refuse(self, path: KeyPath, text: str) -> None:
        """Note a refusal of what stands at a path."""
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        self.problems.append(located(text, path, line=self.lines.get(known), source=self.source))

    def finish(self) -> None:
        """Raise what was refused, if anything was, as one error."""
        if not self.problems:
            return
        problems = sorted(self.problems, key=lambda problem: problem.line or 0)
        texts = [problem.message for problem in problems[:_MAX_PROBLEMS]]
        if len(problems) > len(texts):
            texts.append(f"and {len(problems) - len(texts)} more")
        first = problems[0]
        raise ConfigError("\n".join(texts), key=first.key, line=first.line, source=first.source)

    def section(self, value: object, path: KeyPath) -> Mapping[str, Any]:
        """Return a mapping; an empty one, and a refusal, where it is something else."""
        if not isinstance(value, Mapping | None):
            self.refuse(path, f"expected a mapping, found {shown(value)}")
            return {}
        return value or {}

    def values(self, section: Mapping[str, Any], path: KeyPath, table: Table, *also: str) -> dict[str, Any]:
        """Return the section's values in their final form, by field name; `also` names keys read elsewhere."""
        result: dict[str, Any] = {}
        for key, value in section.items():
            here = (*path, str(key))
            entry = table.get(key)
            if isinstance(entry, Mapping):
                inner = self.section(value, here)
                for name in inner.keys() & section.keys() & entry.keys():
                    self.refuse((*here, name), f"given twice: it also stands outside {key}")
                result |= self.values(inner, here, entry)
            elif entry is not None:
                self._accept(value, here, entry, result)
            elif key not in also:
                self.refuse(here, self._unknown(key, [*table, *also]))
        return result

    def _accept(self, value: object, path: KeyPath, field: Field, into: dict[str, Any]) -> None:
        try:
            into[field.name] = accepted(value, field)
        except ConfigError as refusal:
            self.refuse(inside(path, refusal), refusal.message)

    def _unknown(self, key: object, known: Sequence[str]) -> str:
        import difflib  # noqa: PLC0415 - importing this module must stay cheap

        text = f"unknown key {shown(str(key))}"
        home = self._homes.get(str(key))
        if home is not None:
            return f"{text} here; it belongs to {home}"
        close = difflib.get_close_matches(str(key), known, 1)
        return f'{text}; did you mean "{close[0]}"?' if close else text
