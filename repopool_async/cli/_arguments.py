"""What can be said on the command line, and the exit statuses. Imports nothing that is slow, does nothing."""

import argparse
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NoReturn


class ExitStatus(IntEnum):
    """How `repopool` ends when it is not the command's own status; the numbers of `sysexits.h` and of shells."""

    USAGE = 64
    """The arguments make no sense."""
    FAILURE = 70
    """A pool error; standard error has it in one line."""
    TRY_LATER = 75
    """No slot within the time allowed, too many wait already, or the shared database cannot be used now."""
    CONFIG = 78
    """The configuration is refused."""
    NOT_EXECUTABLE = 126
    """The command was found but cannot be run."""
    NOT_FOUND = 127
    """The command does not exist."""
    INTERRUPTED = 130
    """128 + the signal that ended it: 129 HUP, 130 INT, 131 QUIT, 143 TERM."""
    BROKEN_PIPE = 141
    """Nobody read the output."""


_STATUSES = """\
exit statuses of `run`: the command's own; 128+N when signal N ended it; 127 when it does not exist, 126 when it cannot
be executed; 75 when no slot was free in time, 70 for other errors of the pool, 78 for a refused configuration, 64 for
wrong arguments."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage()
        self.exit(ExitStatus.USAGE, f"repopool: {message}\n")

    def print_usage(self, file: Any = None) -> None:
        # Always on standard error: standard output is the command's.
        super().print_usage(file or sys.stderr)


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Return our own arguments and, where there is a `--`, the command after the first one."""
    if "--" not in argv:
        return list(argv), None
    at = list(argv).index("--")
    return list(argv[:at]), list(argv[at + 1 :])


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; what it returns has `verb`, `module` (where the verb lives) and `takes_command`."""
    parser = _Parser(prog="repopool", description="Lease clean, isolated, up-to-date clones of git repositories.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_run(verbs)
    _add_status(verbs)
    add = _adder(verbs, "_manage")
    add("add", "add a slot to a pool").add_argument("pool", metavar="POOL")
    add("remove", "delete a slot that is not leased").add_argument("slot_id", metavar="SLOT_ID")
    add("repair", "make a damaged or quarantined slot anew").add_argument("slot_id", metavar="SLOT_ID")
    add("recover", "take over what dead processes left, and clean it")
    doctor = _adder(verbs, "_doctor")("doctor", "tell what is wrong in the workspaces directory, and mend it")
    doctor.add_argument("--fix", action="store_true", help="mend what can be mended")
    delete = add("delete", "delete a pool: its slots, mirror and history")
    delete.add_argument("pool", metavar="POOL")
    delete.add_argument("--force", action="store_true", help="even where slots are leased; their leases are lost")
    log = add("log", "print a slot's allocation history and clean-up log, oldest first")
    log.add_argument("slot_id", metavar="SLOT_ID")
    log.add_argument("--limit", type=_count, metavar="N", help="only the newest N entries")
    _add_salvage(verbs)
    _add_db(verbs)
    _add_hosts(verbs)
    return parser


def _adder(verbs: Any, module: str) -> Callable[..., argparse.ArgumentParser]:
    def add(name: str, help: str, **more: Any) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = verbs.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}.", **more
        )
        parser.set_defaults(module=module, takes_command=False)
        parser.add_argument(
            "--workspaces-dir", metavar="DIR", help="where pools lie (default: REPOPOOL_WORKSPACES_DIR, else user data)"
        )
        parser.add_argument("--config", metavar="FILE", help="a pools.yaml")
        parser.add_argument(
            "-v", "--verbose", action="count", default=0, help="tell on standard error what happens; twice: everything"
        )
        return parser

    return add


def _add_run(verbs: Any) -> None:
    run = _adder(verbs, "_run")(
        "run",
        "lease a slot, run a command in it, give it back",
        usage="repopool run [options] URL-or-pool -- COMMAND [ARGUMENT ...]",
        epilog=_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(takes_command=True)
    run.add_argument(
        "target",
        metavar="URL-or-pool",
        help="a pool's name, else the URL or path of a repository, which gets a pool of its own",
    )
    run.add_argument("--ref", help="branch, tag or commit (default: the remote's default branch)")
    run.add_argument("--new-branch", metavar="B", help="make this branch there and check it out")
    run.add_argument(
        "--timeout",
        type=_timeout,
        metavar="T",
        default=argparse.SUPPRESS,
        help="how long to wait for a slot at that ref: 30s, 5m, 0 for one try, none for no limit",
    )
    run.add_argument("--slots", type=_count, metavar="N", help="how many slots the pool shall have at least")
    run.add_argument("--no-fetch", action="store_true", help="take what the pool has instead of asking the remote")


def _add_status(verbs: Any) -> None:
    status = _adder(verbs, "_status")("status", "show pools and slots, without touching them")
    status.add_argument("pool", metavar="POOL", nargs="?", help="only this pool")
    status.add_argument("--json", action="store_true", help="as JSON")


def _add_salvage(verbs: Any) -> None:
    about = "what was saved of leases that ended badly: list it, show it, bring it back"
    salvage = verbs.add_parser("salvage", help=about, description=f"{about[0].upper()}{about[1:]}.")
    add = _adder(salvage.add_subparsers(dest="action", required=True, metavar="ACTION"), "_salvage")
    listing = add("list", "list saved work, the oldest first")
    listing.add_argument("pool", metavar="POOL", nargs="?", help="only of this pool")
    listing.add_argument("--json", action="store_true", help="as JSON, a line each")
    add("show", "show one lease's saved work").add_argument("salvage_id", metavar="ID", help="or its beginning")
    restore = add("restore", "bring saved work into a clone of the repository, as branches")
    restore.add_argument("salvage_id", metavar="ID", help="or its beginning")
    restore.add_argument("directory", metavar="DIR", nargs="?", default=".", help="the clone (default: here)")
    restore.add_argument("--branch", metavar="B", help="what to call the branch (default: salvage/<short id>)")


def _add_db(verbs: Any) -> None:
    about = "the schema of the database that machines share: bring it up to date, or look at it"
    db = verbs.add_parser("db", help=about, description=f"{about[0].upper()}{about[1:]}.")
    add = _adder(db.add_subparsers(dest="action", required=True, metavar="ACTION"), "_db")
    for parser in (
        add("migrate", "apply the migrations that are missing"),
        add("status", "show the schema's version; the exit status is 1 where it is not the one wanted"),
    ):
        parser.add_argument("--dsn", help="postgresql://… (default: coordination of --config, else REPOPOOL_DSN)")


def _add_hosts(verbs: Any) -> None:
    about = "the machines that hold slots: look at them, add, drain, park, resume or remove one"
    hosts = verbs.add_parser("hosts", help=about, description=f"{about[0].upper()}{about[1:]}.")
    add = _adder(hosts.add_subparsers(dest="action", required=True, metavar="ACTION"), "_hosts")
    add("list", "show every host, in what condition it is, and its slots")
    new = add("add", "add a host, for every process of this workspaces directory")
    new.add_argument("name", metavar="NAME")
    new.add_argument("address", metavar="ADDRESS", nargs="?", help="`local`, a name of ssh_config, or user@host:port")
    new.add_argument("--directory", required=True, metavar="DIR", help="where everything lies there; absolute")
    new.add_argument("--label", action="append", default=[], metavar="WORD", help="by which pools choose it")
    new.add_argument("--capacity", type=_count, metavar="N", help="how many slots it can hold")
    new.add_argument("--mirror-from", metavar="HOST", help="whose mirror it fetches from")
    for name, text in (
        ("drain", "give no more leases there; those under way go on"),
        ("park", "take it out of use at once; its leases end as lost"),
    ):
        verb = add(name, text)
        verb.add_argument("name", metavar="NAME")
        verb.add_argument("--reason", default="", metavar="TEXT", help="for people")
    add("resume", "use it again after `drain` or `park`").add_argument("name", metavar="NAME")
    remove = add("remove", "remove its slots, make them anew elsewhere, and forget the host")
    remove.add_argument("name", metavar="NAME")
    remove.add_argument("--force", action="store_true", help="also leased slots, and those of a host that is gone")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow to import

        try:
            print(f"repopool {version('repopool-async')}")
        except PackageNotFoundError:
            print("repopool, run from its source")
        parser.exit()


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return count


def _timeout(text: str) -> float | None:
    from repopool_async.config_values import parse_duration  # noqa: PLC0415 - slow to import

    if text.lower() == "none":
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
