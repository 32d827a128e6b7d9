"""What went wrong, read from what git said: one table of patterns, one place where failures become exceptions.

The order of the table matters: the first rule that matches decides, so that a full disk is not taken for a broken
transfer. Texts come from git run with English messages. Nothing here runs git or decides how often to try again.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Final

import attrs

from repopool_async.exceptions import (
    CommandTimeoutError,
    GitAccessError,
    GitContentionError,
    GitDiskFullError,
    GitMirrorDamagedError,
    GitOperationError,
    GitRefMissingError,
    GitSlotDamagedError,
    GitTimeoutError,
    GitTransientError,
    PlatformNotSupportedError,
)


class Severity(StrEnum):
    """What a failure means for whoever decides what to do next."""

    TRANSIENT = "transient"
    """The network or the server; worth another try after a pause."""
    CONTENTION = "contention"
    """Another git process on the same repository; worth another try soon."""
    MISSING = "missing"
    """No such ref or object; fetch more, or ask again where it may only just have been made."""
    NEVER = "never"
    """Trying again changes nothing."""
    SLOT_DAMAGE = "slot damage"
    """The git directory is unusable; replace it."""
    MIRROR_DAMAGE = "mirror damage"
    """Objects are missing or corrupt; repair the repository they are borrowed from."""
    UNKNOWN = "unknown"
    """git said something that is not in the table."""


@attrs.frozen
class Diagnosis:
    """What a failure is: its severity, the exception that tells of it, and what to do next ("" where unknown)."""

    severity: Severity
    kind: type[GitOperationError]
    remedy: str


@attrs.frozen
class _Rule:
    """A row of the table; `hears_remote` also looks at what the server said, which proves nothing of our own files."""

    diagnosis: Diagnosis
    pattern: re.Pattern[str]
    hears_remote: bool


def _rule(
    severity: Severity, kind: type[GitOperationError], remedy: str, *patterns: str, hears_remote: bool = False
) -> _Rule:
    return _Rule(Diagnosis(severity, kind, remedy), re.compile("|".join(patterns), re.IGNORECASE), hears_remote)


_NETWORK: Final = "the network or the server failed in a way that usually passes; try again later"

_RULES: Final = (
    _rule(
        Severity.NEVER,
        GitDiskFullError,
        "free some disk space, then call repair_slot or wait for recovery",
        r"No space left on device",
        r"Disk quota exceeded",
        r"couldn't write '.*\.lock'",  # git does not say why: it had been made, so what failed is the disk
    ),
    _rule(
        Severity.NEVER,
        GitAccessError,
        "check the credentials: user name and token in the URL, or the key in the ssh agent",
        r"authentication failed",
        r"could not read (Username|Password)",
        r"terminal prompts disabled",
        r"Permission denied \((publickey|password|keyboard|gssapi|hostbased|none)",
        r"access denied",
        r"returned error: (401|403|407)",
        r"RPC failed; HTTP (401|403|407)",
        r"uses plaintext credentials",
    ),
    _rule(
        Severity.NEVER,
        GitAccessError,
        "the host's key is not the known one or not known yet: compare it, then connect once by hand with ssh",
        r"Host key verification failed",
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
    ),
    _rule(
        Severity.NEVER,
        GitAccessError,
        "name the file of the certificate authority in SSL_CERT_FILE or GIT_SSL_CAINFO",
        r"SSL certificate problem",
        r"server certificate verification failed",
        r"SSL: (no alternative )?certificate subject name",
    ),
    _rule(
        Severity.NEVER,
        GitAccessError,
        "the repository belongs to another user: run as its owner, or reach it over ssh or https",
        r"dubious ownership",
    ),
    _rule(
        Severity.NEVER,
        GitOperationError,
        "the URL's protocol is not allowed here, or git was built without it",
        r"transport '.*' not allowed",
        r"Unable to find remote helper",
    ),
    _rule(
        Severity.NEVER,
        GitAccessError,
        "check the URL, and that these credentials may read the repository",
        r"does not appear to be a git repository",
        r"repository '.*' (not found|does not exist)",
        r"Repository not found",
        r"No such remote",
        r"project you were looking for could not be found",
        r"access denied or repository not exported",
        r"returned error: (404|410)",
        hears_remote=True,
    ),
    _rule(
        Severity.TRANSIENT,
        GitTransientError,
        _NETWORK,
        r"returned error: (408|429|5\d\d)",
        r"RPC failed; (result=\d+|HTTP|curl (5|6|7|16|18|28|35|52|55|56|92) )",
        r"Operation too slow",
        r"Connection (timed out|reset|refused|closed)",
        r"(Operation|Read) timed out",
        r"Failed to connect to",
        r"Couldn't connect to server",
        r"Network is unreachable",
        r"No route to host",
        r"(Couldn't|Could not) resolve (host|proxy)",
        r"Unable to look up",
        r"Temporary failure in name resolution",
        r"Name or service not known",
        r"kex_exchange_identification",
        r"banner exchange",
        r"ssh: connect to host",
        r"TLS packet with unexpected length",
        r"GnuTLS recv error",
        r"gnutls_handshake\(\) failed",
        r"SSL connection timeout",
        r"SSL_ERROR_SYSCALL",
        r"Empty reply from server",
        r"(Recv|Send) failure",
        r"HTTP/2 stream \d+ was not closed cleanly",
        r"Internal Server Error",
        r"\[remote rejected\].*\((error in hook|failed to lock|error in Gerrit backend)\)",
        hears_remote=True,
    ),
    _rule(
        Severity.MIRROR_DAMAGE,
        GitMirrorDamagedError,
        "objects are missing or corrupt: the pool repairs its mirror by itself; run git fsck in any other repository",
        r"object file .* is empty",
        r"loose object .* is corrupt",
        r"packed object .* is corrupt",
        r"packfile .* (does not match index|is far too short|cannot be accessed)",
        r"does not point to a valid object",
        r"did not send all necessary objects",
        r"missing blob object",
        r"pack has \d+ unresolved deltas",
        r"error: (Could not read|packfile) ",
        r"commit-graph requires overflow generation data",
        r"in the commit[- ]graph file but not in the object database",
        r"unable to find all commit-graph files",
        r"unable to parse commit",
    ),
    _rule(
        Severity.CONTENTION,
        GitContentionError,
        "another git process works in this repository; when none does, a killed one left its lock file behind",
        r"Unable to create '.*\.lock': File exists",
        r"could not lock config file .*: File exists",
        r"cannot lock ref '.*': (is at .* but expected|.* exists|reference already exists)",
        r"some local refs could not be updated",
        r"shallow file has changed since we read it",
        r"Another git process seems to be running",
    ),
    _rule(
        Severity.MISSING,
        GitRefMissingError,
        "check the name, or fetch first",
        r"couldn't find remote ref",
        r"Remote branch .* not found in upstream",
        r"not our ref",
        r"does not allow request for unadvertised object",
        r"reference is not a tree",
        r"pathspec '.*' did not match any file",
        r"invalid reference: ",
        r"unknown revision or path",
        r"Needed a single revision",
        r"Failed to resolve '.*' as a valid",
        r"bad revision",
        r"not a valid object name",
    ),
    _rule(
        Severity.SLOT_DAMAGE,
        GitSlotDamagedError,
        "the git directory is unusable: the pool replaces a slot's by itself; clone any other anew",
        r"bad object",
        r"not a git repository",
        r"invalid gitfile format",
        r"no path in gitfile",
        r"bad (numeric )?config",
        r"index file (corrupt|smaller than expected)",
        r"bad (signature 0x|index version)",
        r"failed to unpack tree object",
        r"(unexpected|unterminated) line in .*packed-refs",
        r"unable to read (tree|sha1 file)",
        r"unable to normalize alternate object path",
        r"object directory .* does not exist; check",
        r"Entry '.+' not uptodate",
        r"reference broken",
    ),
    _rule(
        Severity.NEVER,
        GitOperationError,
        "commit, stash or discard what is in the way, or use force",
        r"would be overwritten by",
        r"untracked working tree file",
    ),
    _rule(
        Severity.NEVER,
        GitOperationError,
        "check owner and mode of the directory and how its file system is mounted",
        r"Permission denied",
        r"Read-only file system",
        r"Operation not permitted",
    ),
    # Last, because git says these after every failure on either end.
    _rule(
        Severity.TRANSIENT,
        GitTransientError,
        _NETWORK,
        r"The remote end hung up",
        r"early EOF",
        r"unexpected disconnect while reading sideband packet",
        r"expected ACK/NAK, got",
        r"protocol error: bad (pack header|line length)",
        r"Could not read from remote repository",
    ),
)

_UNKNOWN: Final = Diagnosis(Severity.UNKNOWN, GitOperationError, "")
# Bounded, and cut lines below: a server chooses these texts, and must not choose how long they are searched.
_AUTHORITY: Final = re.compile(r"\b(?P<scheme>[a-z][a-z0-9+.-]{0,15}://)(?P<userinfo>[^\s/?#'\"<>]*)@", re.IGNORECASE)
_LINE_LIMIT: Final = 500
_QUERY_TOKEN: Final = re.compile(r"([?&](?:[a-z_-]*token|password|key|sig(?:nature)?)=)[^&\s'\"]+", re.IGNORECASE)
_PROGRESS: Final = re.compile(r"(remote: )?[A-Z][A-Za-z -]+: +\d+% \(|(remote: )?(Enumerating|Counting) objects: \d+")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CULPRIT: Final = re.compile(r"(fatal|error|ERROR|ssh|remote error|remote: (fatal|error|ERROR)): ")
_CHATTER: Final = re.compile(
    r"(Cloning into|From |hint:|Please make sure you have|and the repository exists|remote:\s*$| [*+!=t -] \[?)"
)
_HUNG_UP: Final = "Could not read from remote repository"
_LINES_TOLD: Final = 3


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text without the user names and passwords of its URLs, without tokens and without the secrets named.

    A bare user name stays where it is no secret (`ssh://git@host`); in web URLs it may be a token and goes.
    """
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return _QUERY_TOKEN.sub(r"\1***", _AUTHORITY.sub(_hide_user, text))


def _hide_user(match: re.Match[str]) -> str:
    is_secret = ":" in match["userinfo"] or match["scheme"].lower().startswith("http")
    return f"{match['scheme']}***@" if is_secret else match[0]


def tidy(stderr: bytes, secrets: Iterable[str] = ()) -> str:
    """Return standard error as text for people: no progress, no credentials, no control characters of a terminal."""
    text = redact(stderr.decode(errors="replace"), secrets)
    lines = (line.rstrip().split("\r")[-1][:_LINE_LIMIT] for line in text.split("\n"))
    return "\n".join(_CONTROL.sub("?", line) for line in lines if line and not _PROGRESS.match(line))


def diagnose(stderr: str, exit_code: int) -> Diagnosis:
    """Say what a failure is, from git's standard error and its exit code (-N for a death by signal N)."""
    own = "\n".join(line for line in stderr.splitlines() if not line.startswith("remote: "))
    for rule in _RULES:
        if rule.pattern.search(stderr if rule.hears_remote else own):
            return rule.diagnosis
    if exit_code < 0:
        remedy = f"git was killed by signal {-exit_code}; for 9, see whether memory ran out"
        return Diagnosis(Severity.UNKNOWN, GitOperationError, remedy)
    return _UNKNOWN


def classify(stderr: str, exit_code: int) -> type[GitOperationError]:
    """Return the exception that tells of a failure; see `diagnose`."""
    return diagnose(stderr, exit_code).kind


def git_failure(operation: str, *, exit_code: int, stderr: str, attempts: int = 1) -> GitOperationError:
    """Return the exception for a git command that exited with an error.

    Args:
        stderr: tidied. attempts: how often it was tried.
    """
    diagnosis = diagnose(stderr, exit_code)
    said = _last_words(stderr) or f"exit status {exit_code}"
    return diagnosis.kind(
        _message(operation, attempts, said, diagnosis.remedy),
        operation=operation,
        exit_code=exit_code,
        stderr=stderr,
        attempts=attempts,
    )


def _message(operation: str, attempts: int, said: str, remedy: str) -> str:
    times = f" after {attempts} attempts" if attempts > 1 else ""
    return f"git {operation} failed{times}: {said}" + (f"; {remedy}" if remedy else "")


def _last_words(stderr: str) -> str:
    """Return the lines that say what happened: git's and ssh's complaints, else whatever came last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not _CHATTER.match(line)]
    culprits = [line for line in lines if _CULPRIT.match(line)]
    if not culprits or (len(culprits) == 1 and _HUNG_UP in culprits[0]):
        # ssh and hooks complain without a prefix, in the lines before.
        culprits = lines
    return " | ".join(dict.fromkeys(culprits[-_LINES_TOLD:]))


@contextmanager
def map_git_errors(
    operation: str, *, binary: str = "git", attempts: int = 1, secrets: Sequence[str] = ()
) -> Iterator[None]:
    """Translate what a host raises while it runs git into the pool's exceptions.

    Raises:
        GitTransientError: git was silent for too long. GitTimeoutError: it took too long in all.
        PlatformNotSupportedError: there is no git. GitOperationError: it could not be started.
    """
    try:
        yield
    except CommandTimeoutError as error:
        raise _timed_out(operation, error, attempts, secrets) from error
    except OSError as error:
        raise _not_started(operation, error, binary, attempts) from error


def _timed_out(operation: str, error: CommandTimeoutError, attempts: int, secrets: Sequence[str]) -> GitOperationError:
    stderr = tidy(error.stderr, secrets)
    limit = (
        f"no output for {error.timeout_seconds:g} s" if error.is_idle else f"longer than {error.timeout_seconds:g} s"
    )
    said = " | ".join(filter(None, [limit, _last_words(stderr)]))
    kind = GitTransientError if error.is_idle else GitTimeoutError
    remedy = _NETWORK if error.is_idle else "allow it more time, or see why the server or disk is slow"
    failure = kind(_message(operation, attempts, said, remedy), operation=operation, stderr=stderr, attempts=attempts)
    failure.add_note(f"{limit}; git and its helpers have been ended")
    return failure


def _not_started(
    operation: str, error: OSError, binary: str, attempts: int
) -> GitOperationError | PlatformNotSupportedError:
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
    if isinstance(error, FileNotFoundError) and name == binary:
        return PlatformNotSupportedError(f"{binary} was not found; install git, or put its directory into PATH")
    said = f"cannot start git: {error.strerror or error}" + (f": {name}" if name else "")
    return GitOperationError(_message(operation, attempts, said, ""), operation=operation, attempts=attempts)
