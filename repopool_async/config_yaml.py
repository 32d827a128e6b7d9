"""The text of a `pools.yaml` as plain values, with the line of every key.

Nothing in the text is run, and what would explode is refused. What the keys mean is not known here.
"""

from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from repopool_async.config_refusals import KeyPath, located, shown
from repopool_async.exceptions import ConfigError

if TYPE_CHECKING:
    import yaml

MAX_FILE_BYTES: Final = 1 << 20
_MAX_NODES: Final = 200_000
_TAGS: Final = {
    "MappingNode": {"map"},
    "SequenceNode": {"seq"},
    "ScalarNode": {"null", "bool", "int", "float", "str", "timestamp", "value"},
}


def parse_yaml(text: str, lines: MutableMapping[KeyPath, int], *, source: Path | None) -> object:
    """Return the plain value of YAML text.

    Args:
        lines: the line of every key is noted here, also of those before something that is refused.

    Raises:
        ConfigError: it is too long, too deep or too much, not YAML, or has tags or keys that are not allowed.
    """
    if len(text) > MAX_FILE_BYTES:
        raise located(f"expected at most {MAX_FILE_BYTES} bytes of text", source=source)
    try:
        return _YamlWalk(lines, source).root(text)
    except RecursionError:
        raise located("nested too deeply", source=source) from None


def read_text(source: Path) -> str:
    """Return the text of a file; blocks on it.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        with source.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise located(f"cannot be read: {reason}", source=source) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        text = f"expected UTF-8 text, found the byte 0x{data[error.start]:02x}"
        raise located(text, line=line, source=source) from None


class _YamlWalk:
    """Turns PyYAML's nodes into plain values, and notes where each key stands.

    PyYAML's own constructor knows no lines, lets the last of two equal keys win, and turns `1:30` into 90.
    """

    def __init__(self, lines: MutableMapping[KeyPath, int], source: Path | None) -> None:
        self.lines = lines
        self.source = source
        self.nodes_left = _MAX_NODES

    def root(self, text: str) -> object:
        import yaml  # noqa: PLC0415 - importing this module must stay cheap

        try:
            node = yaml.SafeLoader(text).get_single_node()
        except yaml.YAMLError as error:
            raise self.bad_yaml(error, text) from None
        except (ValueError, OverflowError) as error:  # from escapes and numbers that PyYAML does not check
            raise located(f"not valid YAML: {error}", source=self.source) from None
        return None if node is None else self.noted(node, ())

    def bad_yaml(self, error: "yaml.YAMLError", text: str) -> ConfigError:
        mark = getattr(error, "problem_mark", None)
        line = text.count("\n", 0, getattr(error, "position", 0)) if mark is None else mark.line
        # Not str(error): it quotes the line, and with it what may be a password.
        words = (getattr(error, name, None) for name in ("context", "problem", "reason"))
        reason = ", ".join(word for word in words if word)
        return located(f"not valid YAML: {reason}", line=line + 1, source=self.source)

    def refusal(self, node: "yaml.Node", path: KeyPath, text: str) -> ConfigError:
        return located(text, path, line=node.start_mark.line + 1, source=self.source)

    def value(self, node: "yaml.Node", path: KeyPath) -> object:
        self.nodes_left -= 1  # aliases are followed each time: a few lines of them can stand for billions of nodes
        if self.nodes_left < 0:
            raise self.refusal(node, (), f"expected at most {_MAX_NODES} values, aliases followed")
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if tag not in _TAGS[type(node).__name__]:
            raise self.refusal(node, path, f"the tag {shown(node.tag)} is not allowed here")
        if tag == "map":
            return self.mapping(node, path)
        if tag == "seq":
            return [self.noted(item, (*path, f"[{index}]")) for index, item in enumerate(node.value)]
        return _scalar(tag, node.value)

    def noted(self, node: "yaml.Node", path: KeyPath) -> object:
        self.lines[path] = node.start_mark.line + 1
        return self.value(node, path)

    def mapping(self, node: "yaml.Node", path: KeyPath) -> dict[str, object]:
        own: set[str] = set()
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise self.refusal(key_node, path, "expected plain text as a key")
            if key in own:
                raise self.refusal(key_node, (*path, key), "given twice")
            own.add(key)
            if key_node.tag.endswith(":merge"):
                result = self.merged(value_node, path)
        for key_node, value_node in node.value:
            if not key_node.tag.endswith(":merge"):
                self.lines[*path, key_node.value] = key_node.start_mark.line + 1
                result[key_node.value] = self.value(value_node, (*path, key_node.value))
        return result

    def merged(self, node: "yaml.Node", path: KeyPath) -> dict[str, object]:
        """Return what `<<` brings in: a mapping, or several of which the first wins."""
        result: dict[str, object] = {}
        for part in reversed(node.value if type(node).__name__ == "SequenceNode" else [node]):
            value = self.value(part, path)
            if not isinstance(value, dict):
                raise self.refusal(part, (*path, "<<"), f"expected a mapping, found {shown(value)}")
            result |= value
        return result


def _scalar(tag: str, text: str) -> object:
    """Return a scalar's value; text that only YAML 1.1 takes for a number (`1:30`, `010`) or a date stays text."""
    if tag == "null":
        return None
    if tag == "bool":
        return {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}.get(
            text.lower(), text
        )
    try:
        if tag == "int":
            return int(text.replace("_", ""), 0)
        return float(text) if tag == "float" else text
    except ValueError:
        return text
