"""Lists of file names as git gives and takes them with `-z`: each ends with a NUL, and need be no text."""

from collections.abc import Iterable


def split_names(data: bytes) -> list[str]:
    """Return the names; bytes that are no text are kept as surrogates."""
    return [name.decode(errors="surrogateescape") for name in data.split(b"\0") if name]


def join_names(names: Iterable[str]) -> bytes:
    """Return what `split_names` reads back."""
    return b"".join(name.encode(errors="surrogateescape") + b"\0" for name in names)
