"""What single values mean: durations, sizes, pools' names and URLs, wherever they come from.

Nothing here knows of options or files.
"""

import math
import re
from typing import Any, Final

from repopool_async.config_refusals import MAX_SHOWN, shown, unexpected
from repopool_async.exceptions import ConfigError

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HELPER_OR_SCHEME: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9+.-]*)(?:::|://)")
_RESERVED_ENDINGS: Final = (".git", ".lock", ".record")
_AMOUNT: Final = r"([0-9]+(?:\.[0-9]+)?)\s*"
_SIZE: Final = re.compile(_AMOUNT + "([kmgt]?)(i?b)?", re.IGNORECASE)
_DURATION: Final = re.compile("".join(rf"(?:{_AMOUNT}{unit}\s*)?" for unit in ("d", "h", "m(?!s)", "s", "ms")))
_UNIT_SECONDS: Final = (86400, 3600, 60, 1, 0.001)

EXPECTED_DURATION: Final = 'a duration such as 30, "30s" or "5m"'
EXPECTED_SIZE: Final = 'a size such as 1048576, "500MB" or "1.5GiB"'


def parse_duration(value: object) -> float:
    """Return a duration in seconds.

    Args:
        value: seconds as a number, or text: `"30"`, `"500ms"`, `"30s"`, `"5m"`, `"1.5h"`, `"7d"`, or several of these
            from the largest unit to the smallest, such as `"1h30m"`.

    Raises:
        ConfigError: the value is none of these, negative, infinite or not a number.
    """
    seconds = math.nan
    if isinstance(value, str) and len(value) <= MAX_SHOWN:
        seconds = _seconds_of_text(value.strip())
    elif is_number(value):
        seconds = _to_float(value)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise unexpected(EXPECTED_DURATION, value)
    return seconds + 0.0  # makes minus zero plain


def is_number(value: object) -> bool:
    """Return whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _to_float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _seconds_of_text(text: str) -> float:
    if re.fullmatch(_AMOUNT, text):
        return float(text)
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        return math.nan
    parts = zip(match.groups(), _UNIT_SECONDS, strict=True)
    # Rounded, because 1.1 * 3600 is not 3960 in binary.
    return round(math.fsum(float(amount) * unit for amount, unit in parts if amount), 9)


def parse_size(value: object) -> int:
    """Return a size in bytes.

    Args:
        value: bytes as a whole number, or text: `"500MB"` and the like count in thousands, `"1.5GiB"` in steps of 1024,
            as does `"1.5G"` (git's own convention). Upper and lower case mean the same; fractions of a byte go.

    Raises:
        ConfigError: the value is none of these, negative, infinite or not a number.
    """
    if isinstance(value, str) and len(value) <= MAX_SHOWN and (match := _SIZE.fullmatch(value.strip())):
        whole, _, fraction = match[1].partition(".")
        step = 1000 if (match[3] or "").lower() == "b" else 1024
        unit: int = step ** " kmgt".index(match[2].lower() or " ")
        return int(whole + fraction) * unit // int("1" + "0" * len(fraction))
    if isinstance(value, int | float) and is_number(value) and value >= 0 and value % 1 == 0:
        return int(value)
    raise unexpected(EXPECTED_SIZE, value)


def validate_repo_name(name: object) -> str:
    """Return the name of a pool, unchanged.

    It becomes a directory and part of slot ids, so it is 1 to 100 ASCII letters, digits, dots, underscores and hyphens,
    begins with a letter or digit, and does not end in `.git`, `.lock` or `.record`; `locks`
    is reserved.

    Raises:
        ConfigError: it is not such a name.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or name.lower().endswith(_RESERVED_ENDINGS):
        endings = " or ".join(f'"{ending}"' for ending in _RESERVED_ENDINGS)
        rule = f'1 to 100 letters, digits, ".", "_" or "-", first a letter or digit, not ending in {endings}'
        raise unexpected(f"a pool name: {rule}", name)
    if name.lower() == "locks":
        raise ConfigError(f"the pool name {shown(name)} is reserved; choose another")
    return name


def without_credentials(url: str) -> str:
    """Return the URL without what may be secret: the whole user part of HTTP and FTP, the password of anything else."""
    scheme, mark, rest = url.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, host = authority.rpartition("@")
    if not (mark and at):
        return url
    is_token_possible = scheme.lower().endswith(("http", "https", "ftp", "ftps"))
    kept = "" if is_token_possible else user.partition(":")[0] + "@"
    return f"{scheme}://{kept}{host}{rest[len(authority) :]}"


def protocol_of(url: str) -> str:
    """Return the name by which git's `GIT_ALLOW_PROTOCOL` knows how the URL is reached."""
    if match := _HELPER_OR_SCHEME.match(url):
        return match[1].lower()
    return "ssh" if ":" in url.partition("/")[0] else "file"
