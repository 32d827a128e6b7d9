"""How the pool runs git: environment, configuration, credentials, arguments, time limits, another try.

Every command starts from an empty environment, names its directories, gets its configuration and its credentials
through variables (nothing of them shows in `ps`), and fails as one of the exceptions of `_git_errors`. What the
commands are for is not this module's business, and no state is kept between them.
"""

import os
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Self
from urllib.parse import quote

import attrs

from repopool_async._git_arguments import (
    DEFAULT_PROTOCOLS,
    Credentials,
    split_credentials,
    validate_branch_name,
    validate_ref,
    validate_url,
)
from repopool_async._git_errors import (
    Diagnosis,
    Severity,
    classify,
    diagnose,
    git_failure,
    map_git_errors,
    redact,
    tidy,
)
from repopool_async.exceptions import (
    ConfigError,
    GitOperationError,
    GitTransientError,
    PlatformNotSupportedError,
    RepositoryUrlError,
)
from repopool_async.hosts.base import DEFAULT_STDOUT_LIMIT, Host, OutputCallback
from repopool_async.models import GitResult

__all__ = [
    "BASE_CONFIG",
    "DEFAULT_PROTOCOLS",
    "MINIMUM_GIT",
    "Credentials",
    "Diagnosis",
    "GitRunner",
    "Severity",
    "base_environment",
    "check_git_version",
    "classify",
    "diagnose",
    "git_failure",
    "lessee_environment",
    "map_git_errors",
    "redact",
    "split_credentials",
    "validate_branch_name",
    "validate_ref",
    "validate_url",
    "with_config",
    "with_credentials",
]

MINIMUM_GIT: Final = (2, 39)

BASE_CONFIG: Final[Mapping[str, str]] = {
    # Nothing of a repository's own choice is executed.
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.sshCommand": "ssh",  # an empty value would break ssh
    "protocol.ext.allow": "never",
    "safe.bareRepository": "explicit",
    "submodule.recurse": "false",
    "fetch.recurseSubmodules": "false",
    # What is on disk is believed, not what a configuration says of it.
    "core.fileMode": "true",
    "core.symlinks": "true",
    "core.trustctime": "true",
    "core.checkStat": "default",
    # Maintenance is the pool's, never detached; from git 2.54 on `gc.auto` alone does not stop it.
    "gc.auto": "0",
    "gc.autoDetach": "false",
    "maintenance.auto": "false",
    "maintenance.autoDetach": "false",
    # Credentials come from here only, and never through the URL.
    "credential.helper": "",
    "http.extraHeader": "",
    "http.followRedirects": "initial",
    "transfer.credentialsInUrl": "die",
    # Any commit may be asked for; packs stay packs; a lock is waited for.
    "protocol.version": "2",
    "fetch.unpackLimit": "1",
    "fetch.writeCommitGraph": "false",
    "fetch.showForcedUpdates": "false",
    "core.packedRefsTimeout": "10000",
    "core.filesRefLockTimeout": "1000",
    "advice.detachedHead": "false",
}
"""The configuration of every command of the pool, given through the environment."""

_FIXED: Final[Mapping[str, str]] = {
    "LC_ALL": "C",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ATTR_NOSYSTEM": "1",
    "XDG_CONFIG_HOME": "/dev/null",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "true",
    "SSH_ASKPASS": "true",
    "SSH_ASKPASS_REQUIRE": "never",
    "GCM_INTERACTIVE": "Never",
    # Whether unknown hosts are accepted is left to ~/.ssh/config; in batch mode they are refused where it is silent.
    "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=15 -o ServerAliveCountMax=4",
    # Ten seconds would cut off servers that think for long before the first byte.
    "GIT_HTTP_LOW_SPEED_LIMIT": "1000",
    "GIT_HTTP_LOW_SPEED_TIME": "60",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_LFS_SKIP_SMUDGE": "1",
    # Nothing is fetched unasked, object by object; older gits are kept from it by not being told where from.
    "GIT_NO_LAZY_FETCH": "1",
}
_PASSED_ON: Final = (
    *("PATH", "TMPDIR", "USER", "LOGNAME", "SSH_AUTH_SOCK", "KRB5CCNAME", "KRB5_CONFIG"),
    *("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "GIT_SSL_CAPATH"),
    *("GIT_SSL_CERT", "GIT_SSL_KEY", "GIT_PROXY_SSL_CAINFO"),
)
_DEFAULT_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
LOCATION_VARIABLES: Final = frozenset(
    {
        *("GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_CONFIG", "GIT_CONFIG_PARAMETERS", "GIT_OBJECT_DIRECTORY", "GIT_DIR"),
        *("GIT_WORK_TREE", "GIT_IMPLICIT_WORK_TREE", "GIT_GRAFT_FILE", "GIT_INDEX_FILE", "GIT_NO_REPLACE_OBJECTS"),
        *("GIT_REPLACE_REF_BASE", "GIT_PREFIX", "GIT_INTERNAL_SUPER_PREFIX", "GIT_SHALLOW_FILE", "GIT_COMMON_DIR"),
        *("GIT_NAMESPACE", "GIT_QUARANTINE_PATH"),
    }
)
"""What git sets for hooks; inherited, it would point git at another repository.

These are the variables of `git rev-parse --local-env-vars`, less GIT_CONFIG_COUNT, by which people configure git on
purpose, and GIT_QUARANTINE_PATH, under which git refuses to move any ref.
"""

_CONFIG_KEY: Final = re.compile(r"[A-Za-z0-9.-]+\.([^\n\0]*\.)?[A-Za-z][A-Za-z0-9-]*")
_USERNAME_VARIABLE: Final = "REPOPOOL_GIT_USERNAME"
_PASSWORD_VARIABLE: Final = "REPOPOOL_GIT_PASSWORD"  # noqa: S105 - a name

ConfigValues = Mapping[str, str | Sequence[str]]
"""Configuration by key; a sequence gives a key several values."""


# -- environment -------------------------------------------------------------------------------------------------


def base_environment(
    source: Mapping[str, str] | None = None,
    *,
    home: str = "/dev/null",
    allow_protocols: Sequence[str] = DEFAULT_PROTOCOLS,
    credentials: Credentials | Sequence[Credentials] | None = None,
    git_config: ConfigValues | None = None,
    ssh_command: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the complete environment of the pool's git: nothing of the user's configuration, no prompts, no hooks.

    Args:
        source: where PATH, the ssh agent, proxies and certificate authorities come from; this process's by default.
        home: a directory without `.netrc`; ssh goes by the password database and still finds the user's keys.
        allow_protocols: what URLs, also those a server redirects to, may use.
        credentials: offered to the hosts they belong to only.
        git_config: the operator's own keys (proxy, `url.<base>.insteadOf`, helpers); they win over `BASE_CONFIG`.
        ssh_command: instead of plain ssh in batch mode.
        extra: further variables; they win over everything else.

    Raises:
        ConfigError: a key of `git_config` is none.
    """
    source = os.environ if source is None else source
    environment = {"PATH": _DEFAULT_PATH} | {name: source[name] for name in _PASSED_ON if name in source}
    environment |= {**_FIXED, "HOME": home, "GIT_ALLOW_PROTOCOL": ":".join(allow_protocols)}
    if ssh_command is not None:
        environment["GIT_SSH_COMMAND"] = ssh_command
    configured = with_config(with_config(environment, BASE_CONFIG), git_config or {})
    return with_credentials(configured, credentials) | dict(extra or {})


def lessee_environment(source: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment in which git acts as the user's own would, but asks nothing and speaks English.

    The user's configuration, hooks, helpers and keys are in force. What would point git at another repository (the
    variables that git sets for hooks) is left out.
    """
    source = os.environ if source is None else source
    environment = {name: value for name, value in source.items() if name not in LOCATION_VARIABLES}
    environment.pop("SSH_ASKPASS", None)
    # Only messages change language: file names and what hooks print stay as they were.
    character_type = environment.pop("LC_ALL", None) or environment.get("LC_CTYPE") or environment.get("LANG")
    if character_type:
        environment["LC_CTYPE"] = character_type
    return environment | {
        "LC_MESSAGES": "C",
        "GIT_TERMINAL_PROMPT": "0",
        "SSH_ASKPASS_REQUIRE": "never",
        "GCM_INTERACTIVE": "Never",
    }


def with_config(environment: Mapping[str, str], config: ConfigValues | Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the environment with configuration added after what it has; children of git see it too.

    Raises:
        ConfigError: a key is none.
    """
    extended = dict(environment)
    given = extended.get("GIT_CONFIG_COUNT", "")
    count = int(given) if given.isdecimal() else 0
    for key, value in _pairs(config) if isinstance(config, Mapping) else config:
        if _CONFIG_KEY.fullmatch(key) is None or "\0" in value:
            raise ConfigError(f"{key!r} is no git configuration; keys look like 'http.proxy'", key=key)
        extended |= {f"GIT_CONFIG_KEY_{count}": key, f"GIT_CONFIG_VALUE_{count}": value}
        count += 1
    return extended | {"GIT_CONFIG_COUNT": str(count)}


def _pairs(config: ConfigValues) -> Iterator[tuple[str, str]]:
    for key, values in config.items():
        for value in [values] if isinstance(values, str) else values:
            yield key, value


# -- credentials -------------------------------------------------------------------------------------------------

_HELPER: Final = r"""!f() { test "$1" = get && printf 'username=%s\npassword=%s\n' "$NAME" "$SECRET"; }; f"""


def with_credentials(
    environment: Mapping[str, str], credentials: Credentials | Sequence[Credentials] | None
) -> dict[str, str]:
    """Return the environment with credentials added, offered to the servers they belong to only.

    A helper per server reads them from variables, whose names are all that its command line shows. A password replaces
    what other helpers know of that server; a user name alone is completed by them, where they know its password.
    """
    known = [credentials] if isinstance(credentials, Credentials) else list(credentials or ())
    variables: dict[str, str] = {}
    config: list[tuple[str, str]] = []
    taken = sum(name.startswith(_PASSWORD_VARIABLE) for name in environment)
    for index, one in enumerate(known, start=taken):
        suffix = f"_{index}" if index else ""
        name, secret = f"{_USERNAME_VARIABLE}{suffix}", f"{_PASSWORD_VARIABLE}{suffix}"
        variables |= {name: one.username, secret: one.password}
        scope = f"credential.{one.scope}"
        config.append((f"{scope}.helper", "") if one.password else (f"{scope}.username", one.username))
        config.append((f"{scope}.helper", _HELPER.replace("NAME", name).replace("SECRET", secret)))
    return with_config({**environment, **variables}, config) if config else dict(environment)


# -- running -----------------------------------------------------------------------------------------------------

RetryCallback = Callable[[GitOperationError, float], None]
"""Called with what failed and the seconds until the next try."""

_FIRST_PAUSE: Final[Mapping[Severity, tuple[float, float]]] = {
    Severity.TRANSIENT: (0.2, 1.0),
    Severity.CONTENTION: (0.05, 0.2),
}
_LONGEST_PAUSE: Final = 30.0
_TALKATIVE: Final = frozenset({"clone", "fetch", "ls-remote", "pull", "push", "remote", "submodule", "lfs"})
"""Commands on the network, which show progress (given `--progress`) while they get on."""
_SECRET_LENGTH: Final = 4
WORK_MARK: Final = "REPOPOOL_GIT_WORKS_ON"
"""Environment variable of the pool's own git: the slot's tree or the mirror it changes. Who takes that over from a dead
process ends what bears it first."""


@attrs.define
class _Call:
    """One call of `GitRunner.run`, whatever the number of its tries."""

    args: tuple[str, ...]
    argv: list[str]
    environment: Mapping[str, str]
    cwd: str | None
    input: bytes | None
    timeout: float | None
    idle_timeout: float | None
    stdout_limit: int
    on_output: OutputCallback | None
    ok_codes: Collection[int]
    remove_before_retry: str | None
    result: GitResult | None = None

    @property
    def operation(self) -> str:
        return self.args[0] if self.args else ""


@attrs.frozen(eq=False)
class GitRunner:
    """Runs git on a host, always in the same environment and with the same limits.

    Attributes:
        environment: the complete environment, see `base_environment`.
        timeout: seconds for one try in all. idle_timeout: seconds without any output, of commands on the network.
        attempts: how often a call that asks for it is tried.
        on_retry: told before each pause.
    """

    host: Host
    environment: Mapping[str, str] = attrs.field(kw_only=True, repr=False)
    binary: str = attrs.field(default="git", kw_only=True)
    timeout: float | None = attrs.field(default=3600.0, kw_only=True)
    idle_timeout: float | None = attrs.field(default=300.0, kw_only=True)
    attempts: int = attrs.field(default=3, kw_only=True)
    on_retry: RetryCallback | None = attrs.field(default=None, kw_only=True)

    def bind(self, **changes: Any) -> Self:
        """Return a runner that differs in the attributes named."""
        return attrs.evolve(self, **changes)

    def with_environment(self, **variables: str) -> Self:
        """Return a runner whose environment has further variables."""
        return self.bind(environment={**self.environment, **variables})

    async def run(
        self,
        *args: str,
        git_dir: str | None = None,
        work_tree: str | None = None,
        cwd: str | None = None,
        input: bytes | None = None,
        check: bool = True,
        ok_codes: Collection[int] = (0,),
        retry: bool = False,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        config: ConfigValues | None = None,
        repo_name: str | None = None,
        slot_id: str | None = None,
        on_output: OutputCallback | None = None,
        stdout_limit: int = DEFAULT_STDOUT_LIMIT,
        remove_before_retry: str | None = None,
    ) -> GitResult:
        """Run one git command to its end.

        Args:
            args: the command and its arguments, already validated.
            git_dir, work_tree: named to git explicitly. Without `git_dir` a repository is looked for in `cwd` itself,
                never above it.
            input: given on standard input, which is otherwise empty.
            check: raise where the exit code is not among `ok_codes`.
            retry: try again, after a pause, where the network or a lock was the matter.
            timeout, idle_timeout: seconds, for this call instead of the runner's.
            env: further variables. config: further configuration, for this call.
            repo_name, slot_id: whom an error is about.
            stdout_limit: bytes; more output than this is an error, never cut.
            remove_before_retry: a path to delete before each further try, where a killed one may have left a part.

        Raises:
            GitOperationError: the subclass says what kind of failure it is.
            PlatformNotSupportedError: there is no git. RepositoryUrlError: an argument holds credentials.

        Cancelling ends git and all it started, and is never answered by another try.
        """
        call = _Call(
            args=_without_credentials(args),
            argv=[self.binary, *_directories(git_dir, work_tree), *args],
            environment=self._call_environment(git_dir, work_tree, cwd, env, config),
            cwd=cwd,
            input=input,
            timeout=self.timeout if timeout is None else timeout,
            idle_timeout=self._idle_limit(args) if idle_timeout is None else idle_timeout,
            stdout_limit=stdout_limit,
            on_output=on_output,
            ok_codes=ok_codes,
            remove_before_retry=remove_before_retry,
        )
        try:
            return await self._try(call, self.attempts if retry else 1)
        except GitOperationError as error:
            if not check and call.result is not None:
                return call.result
            error.about(repo_name=repo_name, slot_id=slot_id)
            raise

    async def _try(self, call: _Call, attempts: int) -> GitResult:
        try:
            return await self._once(call, 1)
        except GitOperationError as error:
            if attempts <= 1 or _pause(error) is None:
                raise
            failure = error
        return await self._try_again(call, attempts, failure)

    async def _try_again(self, call: _Call, attempts: int, failure: GitOperationError) -> GitResult:
        # Imported only once something failed: it costs some 50 ms, which a command that works should not pay.
        import stamina  # noqa: PLC0415

        def pause(error: Exception) -> bool | float:
            seconds = _pause(error)
            if seconds is None or not isinstance(error, GitOperationError):
                return False
            if self.on_retry is not None and error.attempts < attempts:
                self.on_retry(error, seconds)
            return seconds

        async for attempt in stamina.retry_context(on=pause, attempts=attempts, timeout=None):
            with attempt:
                if attempt.num == 1:
                    raise failure
                return await self._once(call, attempt.num)
        raise failure

    async def _once(self, call: _Call, attempt: int) -> GitResult:
        call.result = None
        secrets = self._secrets()
        with map_git_errors(call.operation, binary=self.binary, attempts=attempt, secrets=secrets):
            if attempt > 1 and call.remove_before_retry is not None:
                await self.host.remove_tree(call.remove_before_retry)
            done = await self.host.run(
                call.argv,
                env=call.environment,
                cwd=call.cwd,
                input=call.input,
                timeout=call.timeout,
                idle_timeout=call.idle_timeout,
                stdout_limit=call.stdout_limit,
                on_output=call.on_output,
            )
        stderr = tidy(done.stderr, secrets)
        if done.is_truncated and len(done.stdout) >= call.stdout_limit:
            raise GitOperationError(
                f"git {call.operation} printed more than {call.stdout_limit} bytes",
                operation=call.operation,
                attempts=attempt,
            )
        call.result = GitResult(call.args, done.exit_code, done.stdout, stderr, done.duration_seconds, attempt)
        if done.exit_code not in call.ok_codes:
            raise git_failure(call.operation, exit_code=done.exit_code, stderr=stderr, attempts=attempt)
        return call.result

    def _call_environment(
        self,
        git_dir: str | None,
        work_tree: str | None,
        cwd: str | None,
        env: Mapping[str, str] | None,
        config: ConfigValues | None,
    ) -> Mapping[str, str]:
        environment = {**self.environment, **(env or {})}
        pairs: list[tuple[str, str]] = []
        if git_dir is not None:
            # Honoured in this scope only, and only for what the caller named.
            pairs += [("safe.directory", path) for path in (git_dir, work_tree) if path is not None]
        elif cwd is not None:
            # `..` behind a link is the real parent, which git compares with.
            environment["GIT_CEILING_DIRECTORIES"] = f"{cwd}/.."
        pairs += _pairs(config or {})
        return with_config(environment, pairs) if pairs else environment

    def _idle_limit(self, args: Sequence[str]) -> float | None:
        # The others may rightly be silent for long, on a big repository.
        return self.idle_timeout if args and args[0] in _TALKATIVE else None

    def _secrets(self) -> tuple[str, ...]:
        """Return what must not be told: passwords, and user names without one, which may be tokens."""
        found: list[str] = []
        for name, value in self.environment.items():
            if name.startswith(_PASSWORD_VARIABLE):
                secret = value or self.environment.get(name.replace(_PASSWORD_VARIABLE, _USERNAME_VARIABLE), "")
                found += {secret, quote(secret, safe="")} if len(secret) >= _SECRET_LENGTH else ()
        return tuple(found)


def _without_credentials(args: tuple[str, ...]) -> tuple[str, ...]:
    """Return the arguments, refusing those that would show a secret to whoever lists processes."""
    shown = tuple(redact(argument) if "://" in argument else argument for argument in args)
    if shown != args:
        raise RepositoryUrlError(f"git {' '.join(shown)}: credentials must not be among the arguments")
    return args


def _directories(git_dir: str | None, work_tree: str | None) -> list[str]:
    named = {"--git-dir": git_dir, "--work-tree": work_tree}
    return [f"{option}={path}" for option, path in named.items() if path is not None]


def _pause(error: BaseException) -> float | None:
    """Return the seconds to wait before another try, doubling with each and jittered; None where it makes no sense."""
    if not isinstance(error, GitOperationError):
        return None
    # Without an exit code it was a time limit or git did not start: only silence passes.
    is_silence = error.exit_code is None and isinstance(error, GitTransientError)
    severity = Severity.TRANSIENT if is_silence else diagnose(error.stderr, error.exit_code or 0).severity
    if severity not in _FIRST_PAUSE or (error.exit_code is None and not is_silence):
        return None
    return min(_LONGEST_PAUSE, random.uniform(*_FIRST_PAUSE[severity]) * 2.0 ** (error.attempts - 1))  # noqa: S311


async def check_git_version(
    host: Host, *, environment: Mapping[str, str] | None = None, binary: str = "git"
) -> tuple[int, ...]:
    """Return the version of a host's git.

    Raises:
        PlatformNotSupportedError: there is none, it is older than `MINIMUM_GIT`, or says something unexpected.
    """
    runner = GitRunner(
        host, environment=environment or base_environment(), binary=binary, timeout=30.0, idle_timeout=None
    )
    said = (await runner.run("--version")).text
    match = re.match(r"git version (\d+(?:\.\d+)+)", said)
    if match is None:
        raise PlatformNotSupportedError(f"{binary} on {host.id} does not tell its version, but {said[:80]!r}")
    version = tuple(int(part) for part in match[1].split("."))
    if version < MINIMUM_GIT:
        wanted = ".".join(map(str, MINIMUM_GIT))
        raise PlatformNotSupportedError(f"git {match[1]} on {host.id} is too old: install git {wanted} or newer")
    return version
