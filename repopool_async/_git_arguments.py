"""What may be passed to git: repository URLs, refs and branch names, checked before any command sees them.

Whatever git could take for an option, a command or another place is refused here, with a message that says what is
allowed and shows no secret. Credentials are taken out of web URLs. Nothing here runs git or touches a file.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

import attrs

from repopool_async._git_errors import redact
from repopool_async.exceptions import RefError, RepositoryUrlError

DEFAULT_PROTOCOLS: Final = ("file", "git", "http", "https", "ssh")

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_SCHEME: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
_HELPER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.-]*::")
_SCP_LIKE: Final = re.compile(
    r"(?:(?P<user>[^\s@:/-][^\s@:/]*)@)?(?P<host>[A-Za-z0-9_][\w.-]*|\[[0-9A-Fa-f:.%]+\]):(?P<path>[^\s:-][^\n]*)"
)
_HOST: Final = re.compile(r"[A-Za-z0-9_][\w.-]*|\[[0-9A-Fa-f:.%]+\]")
_PORT: Final = re.compile(r":[0-9]*$")
_USER: Final = re.compile(r"[^\s@:/-][^\s@:/]*")
_FORBIDDEN_IN_REF: Final = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(/|$)")
_LOOKS_LIKE_ID: Final = re.compile(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")
_REF_LIMIT: Final = 1000


@attrs.frozen
class Credentials:
    """A user name and a password or token for one web server; neither shows in the repr.

    Attributes:
        scope: `https://host` or `https://host:port`; they are offered nowhere else.
        password: "" where the URL had none (a token may stand as the user name).
    """

    scope: str
    username: str = attrs.field(repr=False)
    password: str = attrs.field(repr=False)


def split_credentials(url: str) -> tuple[str, Credentials | None]:
    """Return a web URL without its credentials, and these; any other URL comes back as it is.

    Raises:
        RepositoryUrlError: the credentials contain a line break, or the URL cannot be read.
    """
    if not url.lower().startswith(("http://", "https://")):
        return url, None
    try:
        parts = _split(url)
    except ValueError as error:
        raise RepositoryUrlError(f"{_shown(url)} is no repository URL: {error}") from None
    userinfo, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None
    username, _, password = (unquote(part) for part in userinfo.partition(":"))
    if _CONTROL.search(username + password):
        raise RepositoryUrlError(f"the credentials of {_shown(url)} contain control characters")
    clean = parts._replace(netloc=host).geturl()
    if not username and not password:
        return clean, None
    return clean, Credentials(f"{parts.scheme}://{host.lower()}", username, password)


def validate_url(url: str, allow_protocols: Sequence[str] = DEFAULT_PROTOCOLS) -> str:
    """Return a repository URL that git may be given; a local path is made absolute.

    Allowed are `https`, `http`, `ssh`, `git` and `file` URLs, `user@host:path`, and local paths that begin with
    `/`, `./`, `../` or `~`, as far as their protocol is among `allow_protocols`. Credentials in a web URL stay in it:
    take them out with `split_credentials` before git sees it.

    Raises:
        RepositoryUrlError: it is none of these, or could be taken for an option or a command.
    """
    checked = _absolute(url) if _is_path(url) else url
    try:
        protocol = _checked_protocol(checked)
    except ValueError as error:
        raise _refused(url, str(error), allow_protocols) from None
    if protocol not in allow_protocols:
        raise _refused(url, f"the protocol {protocol} is not allowed", allow_protocols)
    return checked


def _absolute(path: str) -> str:
    expanded = Path(path).expanduser()
    return os.path.normpath(expanded if expanded.is_absolute() else Path.cwd() / expanded)


def _is_path(url: str) -> bool:
    return url.startswith(("/", "./", "../", "~")) or url in (".", "..")


def _checked_protocol(url: str) -> str:
    """Return the protocol by which git would reach a URL; raise ValueError with the reason why it must not."""
    if not url or url.startswith("-") or _CONTROL.search(url):
        raise ValueError("it is empty, begins with '-' or has control characters")
    if _HELPER.match(url):
        raise ValueError("remote helpers run commands")
    if url.startswith("/"):
        return "file"
    if match := _SCHEME.match(url):
        return _check_parts(url, match["scheme"].lower())
    match = _SCP_LIKE.fullmatch(url)
    if match is None:
        raise ValueError("it is neither a URL nor a path (a relative path begins with './')")
    if "@" in match["path"].partition("/")[0]:
        raise ValueError("ssh takes no password from a URL")
    return "ssh"


def _check_parts(url: str, protocol: str) -> str:
    if protocol not in DEFAULT_PROTOCOLS:
        raise ValueError(f"the scheme {protocol!r} is unknown")
    if re.search(r"[\s\\]", url) or _CONTROL.search(unquote(url)):
        raise ValueError("it contains spaces, backslashes or control characters")
    parts = _split(url)
    if protocol == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise ValueError("a file URL has three slashes and an absolute path")
        return protocol
    userinfo, at, host = parts.netloc.rpartition("@")
    if _HOST.fullmatch(_PORT.sub("", host)) is None:
        raise ValueError("it names no proper host")
    if parts.query and redact(f"?{parts.query}") != f"?{parts.query}":
        raise ValueError("a token in the query would show in lists of processes; write https://user:token@host/")
    if at and not protocol.startswith("http") and not _USER.fullmatch(userinfo):
        raise ValueError("only web URLs may hold a password; ssh uses keys")
    return protocol


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("host or port cannot be read") from None  # the reason given quotes what may be a password
    return parts


def _shown(url: str) -> str:
    # What is refused may be mistyped, so that a secret stands where redact does not look for one.
    return repr(re.sub(r"(://|^).*@", r"\1***@", redact(_CONTROL.sub("?", url))))


def _refused(url: str, reason: str, allow_protocols: Sequence[str]) -> RepositoryUrlError:
    allowed = ", ".join(name for name in allow_protocols if name != "file")
    paths = ", and local paths" if "file" in allow_protocols else ""
    return RepositoryUrlError(f"{_shown(url)} is no repository URL: {reason}; allowed are {allowed} URLs{paths}")


def validate_ref(ref: str) -> str:
    """Return a name that git may be given as branch, tag, full ref or commit id.

    Raises:
        RefError: git's rules for names forbid it, or it could be taken for an option.
    """
    if (
        not ref
        or ref == "@"
        or len(ref) > _REF_LIMIT
        or ref.startswith(("-", "/", "."))
        or ref.endswith(("/", "."))
        or _FORBIDDEN_IN_REF.search(ref)
    ):
        raise RefError(
            f"{_CONTROL.sub('?', ref[:200])!r} cannot be a ref: give a branch, a tag, a full name or a commit id,"
            " without spaces, '..', '~', '^', ':', '?', '*', '[', '\\', '@{', a leading '-' or an ending '.lock'"
        )
    return ref


def validate_branch_name(name: str) -> str:
    """Return a name that a new branch may have.

    Raises:
        RefError: see `validate_ref`; or it is `HEAD`, begins with `refs/`, or looks like a commit id.
    """
    validate_ref(name)
    if name == "HEAD" or name.startswith("refs/") or _LOOKS_LIKE_ID.fullmatch(name):
        raise RefError(f"{name!r} cannot name a branch: it would be taken for something else")
    return name
