"""What git says is understood: every class of failure, in the words of git, curl, ssh and the forges."""

import time

import pytest

from repopool_async._git_errors import Severity, classify, diagnose, git_failure, map_git_errors, redact, tidy
from repopool_async.exceptions import (
    CommandTimeoutError,
    GitAccessError,
    GitContentionError,
    GitDiskFullError,
    GitMirrorDamagedError,
    GitOperationError,
    GitRefMissingError,
    GitSlotDamagedError,
    GitTransientError,
)

HUNG_UP = "fatal: Could not read from remote repository.\n\nPlease make sure you have the correct access rights"
BROKEN_OFF = "fatal: early EOF\nfatal: fetch-pack: invalid index-pack output"

TRANSIENT = [
    "fatal: unable to access 'https://x/': The requested URL returned error: 503",
    "fatal: unable to access 'https://x/': The requested URL returned error: 429",
    "fatal: unable to access 'https://x/': Could not resolve host: x",
    "fatal: unable to access 'https://x/': Couldn't resolve proxy name",
    "fatal: unable to access 'https://x/': Failed to connect to x port 443 after 2 ms: Couldn't connect to server",
    "fatal: unable to access 'https://x/': OpenSSL SSL_connect: SSL_ERROR_SYSCALL in connection to x:443",
    "fatal: unable to access 'https://x/': gnutls_handshake() failed: The TLS connection was non-properly terminated.",
    "fatal: unable to access 'https://x/': GnuTLS recv error (-110): The TLS connection was non-properly terminated.",
    "fatal: unable to access 'https://x/': Operation too slow. Less than 1000 bytes/sec transferred",
    "fatal: unable to access 'https://x/': Empty reply from server",
    "fatal: unable to access 'https://x/': Recv failure: Connection reset by peer",
    "error: RPC failed; curl 92 HTTP/2 stream 5 was not closed cleanly: CANCEL (err 8)\n" + BROKEN_OFF,
    "error: RPC failed; curl 18 transfer closed with outstanding read data remaining\n" + BROKEN_OFF,
    "error: RPC failed; HTTP 502 curl 22 The requested URL returned error: 502\nfatal: expected 'packfile'",
    "error: RPC failed; result=22, HTTP code = 500",
    "remote: Internal Server Error\nfatal: protocol error",
    "fatal: remote error: Internal Server Error",
    "fetch-pack: unexpected disconnect while reading sideband packet\n" + BROKEN_OFF,
    "fatal: the remote end hung up unexpectedly",
    "fatal: git fetch-pack: expected ACK/NAK, got 'ERR upload-pack'",
    "fatal: protocol error: bad line length character: <htm",
    "fatal: protocol error: bad pack header",
    "ssh: connect to host x port 22: Connection refused\n" + HUNG_UP,
    "ssh: connect to host x port 22: Connection timed out\n" + HUNG_UP,
    "ssh: connect to host x port 22: No route to host\n" + HUNG_UP,
    "ssh: Could not resolve hostname x: Temporary failure in name resolution\n" + HUNG_UP,
    "kex_exchange_identification: Connection closed by remote host\n" + HUNG_UP,
    "Connection closed by 192.0.2.1 port 22\n" + HUNG_UP,
    "Connection timed out during banner exchange\n" + HUNG_UP,
    "fatal: Unable to look up x (port 9418) (Name or service not known)",
    "fatal: unable to connect to x:\nx[0: 192.0.2.1]: errno=Connection refused",
    HUNG_UP,
    "! [remote rejected] main -> main (failed to lock)",
]
CONTENTION = [
    "fatal: Unable to create '/m/shallow.lock': File exists.\n\nAnother git process seems to be running",
    "error: could not lock config file .git/config: File exists",
    "error: cannot lock ref 'refs/heads/x': is at 1234 but expected 5678",
    "error: cannot lock ref 'refs/heads/a/b': 'refs/heads/a' exists; cannot create 'refs/heads/a/b'",
    "error: cannot lock ref 'refs/tags/v1': reference already exists",
    "error: some local refs could not be updated; try running\n 'git remote prune origin'",
    "fatal: shallow file has changed since we read it",
]
ACCESS = [
    "remote: Invalid username or token.\nfatal: Authentication failed for 'https://x/'",
    "fatal: could not read Username for 'https://x': terminal prompts disabled",
    "fatal: could not read Password for 'https://x': No such device or address",
    "fatal: unable to access 'https://x/': The requested URL returned error: 403",
    "git@x: Permission denied (publickey).\n" + HUNG_UP,
    "git@x: Permission denied (publickey,password).\n" + HUNG_UP,
    "No ED25519 host key is known for x and you have requested strict checking.\nHost key verification failed.\n"
    + HUNG_UP,
    "fatal: unable to access 'https://x/': SSL certificate problem: self-signed certificate",
    "fatal: unable to access 'https://x/': server certificate verification failed. CAfile: none CRLfile: none",
    "fatal: repository 'https://x/y.git/' not found",
    "ERROR: Repository not found.\n" + HUNG_UP,
    "remote: The project you were looking for could not be found or you don't have permission to view it.\n" + HUNG_UP,
    "fatal: '/x' does not appear to be a git repository\n" + HUNG_UP,
    "fatal: repository '/x' does not exist",
    "error: No such remote 'x'",
    "fatal: remote error: access denied or repository not exported: /x",
    "fatal: detected dubious ownership in repository at '/x'",
    "fatal: URL 'https://a:<redacted>@x/' uses plaintext credentials",
]
MISSING = [
    "fatal: couldn't find remote ref refs/heads/x",
    "fatal: Remote branch x not found in upstream origin",
    "fatal: remote error: upload-pack: not our ref 1234",
    "error: Server does not allow request for unadvertised object 1234",
    "fatal: reference is not a tree: 1234",
    "error: pathspec 'x' did not match any file(s) known to git",
    "fatal: invalid reference: x",
    "fatal: ambiguous argument 'x': unknown revision or path not in the working tree.",
    "fatal: Needed a single revision",
    "fatal: Failed to resolve 'x' as a valid revision.",
    "fatal: Not a valid object name x",
    "fatal: bad revision 'x'",
]
DISK = [
    "error: file write error: No space left on device\nfatal: unable to write file\n" + BROKEN_OFF,
    "fatal: write error: Disk quota exceeded\nfatal: index-pack failed",
    "fatal: Unable to create '/m/index.lock': No space left on device",
]
SLOT = [
    "fatal: bad object HEAD",
    "fatal: not a git repository: '/s/tree/.git'",
    "fatal: invalid gitfile format: /s/tree/.git",
    "fatal: no path in gitfile: /s/tree/.git",
    "fatal: bad config line 3 in file .git/config",
    "error: bad signature 0x00000000\nfatal: index file corrupt",
    "fatal: .git/index: index file smaller than expected",
    "fatal: unable to read tree 1234",
    "error: unable to read sha1 file of x (1234)",
    "error: unable to normalize alternate object path: /m/objects",
    "error: object directory /m/objects does not exist; check .git/objects/info/alternates",
    "error: Entry 'x' not uptodate. Cannot merge.",
    "error: cannot lock ref 'HEAD': unable to resolve reference 'refs/heads/x': reference broken",
]
MIRROR = [
    "error: object file .git/objects/12/34 is empty\nfatal: loose object 1234 (stored in objects/12/34) is corrupt",
    "fatal: packed object 1234 (stored in .git/objects/pack/pack-1.pack) is corrupt",
    "error: packfile .git/objects/pack/pack-1.pack does not match index",
    "error: packfile .git/objects/pack/pack-1.pack cannot be accessed",
    "error: refs/heads/x does not point to a valid object!",
    "error: github.com:x/y did not send all necessary objects",
    "fatal: missing blob object '1234'",
    "fatal: pack has 12 unresolved deltas\nfatal: index-pack failed",
    "error: Could not read 1234\nfatal: revision walk setup failed",
    "fatal: commit-graph requires overflow generation data but has none",
    "fatal: commit 1234 exists in the commit-graph file but not in the object database",
    "warning: unable to find all commit-graph files",
    "fatal: unable to parse commit 1234",
    # The other end hears of our trouble by our hanging up.
    "fatal: loose object 1234 (stored in objects/12/34) is corrupt\nfatal: the remote end hung up unexpectedly",
]
NEVER = [
    "error: Your local changes to the following files would be overwritten by checkout:\n\tx\nAborting",
    'error: open("x"): Permission denied\nfatal: adding files failed',
    "fatal: Unable to create '/m/index.lock': Permission denied",
    "fatal: could not create work tree dir 'x': Read-only file system",
    "fatal: transport 'ext' not allowed",
]
UNKNOWN = ["", "fatal: something nobody has seen", "error: could not lock config file .git/config: Invalid argument"]

TABLE = [
    *[(text, GitTransientError, Severity.TRANSIENT) for text in TRANSIENT],
    *[(text, GitContentionError, Severity.CONTENTION) for text in CONTENTION],
    *[(text, GitAccessError, Severity.NEVER) for text in ACCESS],
    *[(text, GitRefMissingError, Severity.MISSING) for text in MISSING],
    *[(text, GitDiskFullError, Severity.NEVER) for text in DISK],
    *[(text, GitSlotDamagedError, Severity.SLOT_DAMAGE) for text in SLOT],
    *[(text, GitMirrorDamagedError, Severity.MIRROR_DAMAGE) for text in MIRROR],
    *[(text, GitOperationError, Severity.NEVER) for text in NEVER],
    *[(text, GitOperationError, Severity.UNKNOWN) for text in UNKNOWN],
]


@pytest.mark.parametrize(("stderr", "kind", "severity"), TABLE)
def test_failures_are_told_apart(stderr: str, kind: type[GitOperationError], severity: Severity) -> None:
    diagnosis = diagnose(stderr, 128)
    assert (diagnosis.kind, diagnosis.severity) == (kind, severity)
    assert classify(stderr.upper(), 128) is classify(stderr, 128)
    assert bool(diagnosis.remedy) is (severity is not Severity.UNKNOWN)


def test_the_servers_troubles_are_not_ours() -> None:
    server = "remote: fatal: packed object 1234 is corrupt\nremote: error: No space left on device\nfatal: early EOF"
    assert classify(server, 128) is GitTransientError


def test_a_death_by_signal_is_named() -> None:
    assert "signal 9" in diagnose("", -9).remedy
    assert str(git_failure("fetch", exit_code=-9, stderr="")) == (
        "git fetch failed: exit status -9; git was killed by signal 9; for 9, see whether memory ran out"
    )


def test_a_message_says_operation_attempts_words_and_remedy() -> None:
    stderr = "Cloning into 'x'...\nssh: connect to host x port 22: Connection refused\n" + HUNG_UP
    error = git_failure("clone", exit_code=128, stderr=stderr, attempts=3)
    assert str(error) == (
        "git clone failed after 3 attempts: ssh: connect to host x port 22: Connection refused"
        " | fatal: Could not read from remote repository.;"
        " the network or the server failed in a way that usually passes; try again later"
    )
    assert (error.exit_code, error.attempts, error.operation, error.stderr) == (128, 3, "clone", stderr)


def test_a_message_keeps_what_ssh_says_without_a_prefix() -> None:
    error = git_failure("fetch", exit_code=128, stderr="git@x: Permission denied (publickey).\n" + HUNG_UP)
    assert "git@x: Permission denied (publickey). | fatal: Could not read from remote repository." in str(error)


def test_a_message_leaves_out_gits_advice() -> None:
    stderr = (
        "fatal: Unable to create 'x.lock': File exists.\n\nAnother git process seems to be running\nremove the file"
    )
    assert str(git_failure("reset", exit_code=128, stderr=stderr)).startswith(
        "git reset failed: fatal: Unable to create 'x.lock': File exists.; another git process works"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://ada:pw@host/x", "https://***@host/x"),
        ("'https://token@host/x'", "'https://***@host/x'"),
        ("http://ada:p@w:x@host/", "http://***@host/"),
        ("ssh://git@host/x and git@host:x", "ssh://git@host/x and git@host:x"),
        ("ssh://git:pw@host/x", "ssh://***@host/x"),
        ("HTTPS://ada:pw@HOST/x", "HTTPS://***@HOST/x"),
        ("https://host/@scope/x", "https://host/@scope/x"),
        ("https://host/x?private_token=abc&y=1", "https://host/x?private_token=***&y=1"),
        ("two https://a:b@c/ https://d:e@f/", "two https://***@c/ https://***@f/"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_texts_are_redacted(text: str, told: str) -> None:
    assert redact(text) == told


def test_named_secrets_are_redacted_wherever_they_are() -> None:
    assert redact("the token hunter2 was wrong", ["", "hunter2"]) == "the token *** was wrong"


def test_progress_and_control_characters_are_dropped() -> None:
    stderr = (
        b"remote: Enumerating objects: 5, done.\nremote: Counting objects: 100% (5/5), done.\r\n"
        b"Receiving objects:  10% (1/10)\rReceiving objects: 100% (10/10), done.\n"
        b"\nremote: \x1b[31mred\x1b[0m \xff\nfatal: at https://a:b@c/\n"
    )
    assert tidy(stderr) == "remote: ?[31mred?[0m \N{REPLACEMENT CHARACTER}\nfatal: at https://***@c/"


@pytest.mark.parametrize("piece", ["repository '", "a", "x://", "x://a:", "'.lock", "remote: ", "?a", "@", "packfile "])
def test_a_hostile_text_does_not_take_long(piece: str) -> None:
    stderr = tidy(piece.encode() * (65536 // len(piece)))
    started = time.process_time()
    classify(stderr, 128)
    tidy(piece.encode() * (65536 // len(piece)) + b"\n")
    assert time.process_time() - started < 1.0


def test_time_limits_become_errors_of_git_without_secrets() -> None:
    for is_idle, kind in ((True, "GitTransientError"), (False, "GitTimeoutError")):
        with pytest.raises(GitOperationError) as caught, map_git_errors("fetch", attempts=2, secrets=["hunter2"]):
            raise CommandTimeoutError("", timeout_seconds=5.0, is_idle=is_idle, stderr=b"hunter2\nfatal: x")
        assert type(caught.value).__name__ == kind
        assert (caught.value.attempts, caught.value.exit_code, caught.value.stderr) == (2, None, "***\nfatal: x")
