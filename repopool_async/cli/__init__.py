"""The command `repopool`: leases for shells, and a look at what the pools are doing.

Here are the arguments and the way from an error to an exit status; what the verbs do is in the modules beside this one,
imported only when their verb is used, so that `repopool --help` answers at once. Nobody below imports this package.
"""

import argparse
import contextlib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final

from repopool_async.cli._arguments import ExitStatus, build_parser, split_command
from repopool_async.exceptions import (
    ConfigError,
    CoordinatorUnavailableError,
    LockTimeoutError,
    PoolManagerError,
    PoolTimeoutError,
    TooManyRequestsError,
)

__all__ = ["ExitStatus", "main"]

_PASSES: Final = (PoolTimeoutError, LockTimeoutError, TooManyRequestsError, CoordinatorUnavailableError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb to its end and return the exit status.

    Args:
        argv: the arguments without the program's name; those of this process where missing.

    Signals that ask for an end (HUP, INT, QUIT, TERM) end the verb in good order: what it leased is given back.
    """
    own, command = split_command(list(sys.argv[1:] if argv is None else argv))
    try:
        arguments = build_parser().parse_args(own)
    except SystemExit as end:
        return int(end.code or 0)
    if (refusal := _misuse(arguments, command)) is not None:
        _say(f"{refusal}; see `repopool {arguments.verb} --help`")
        return ExitStatus.USAGE
    arguments.command = command
    _set_up_logging(arguments.verbose)
    return _status_of(arguments)


def _misuse(arguments: argparse.Namespace, command: list[str] | None) -> str | None:
    if arguments.takes_command and not command:
        return "which command? write it last: repopool run URL-or-pool -- COMMAND"
    if command is not None and not arguments.takes_command:
        return "only `run` takes a command after --"
    return None


def _status_of(arguments: argparse.Namespace) -> int:
    import asyncio  # noqa: PLC0415 - three times as slow to import as all the rest of this

    try:
        verb = importlib.import_module(f"repopool_async.cli.{arguments.module}")
        signals = importlib.import_module("repopool_async.cli._signals")
        status = int(asyncio.run(signals.until_signalled(verb.HANDLERS[arguments.verb], arguments)))
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return ExitStatus.BROKEN_PIPE
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    except (PoolManagerError, OSError) as error:
        if arguments.verbose > 1:
            traceback.print_exc()
        _say(str(error) or type(error).__name__)
        return _failure(error)
    return status


def _failure(error: BaseException) -> int:
    if isinstance(error, ConfigError):
        return ExitStatus.CONFIG
    return ExitStatus.TRY_LATER if isinstance(error, _PASSES) else ExitStatus.FAILURE


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"repopool: {text}", file=sys.stderr, flush=True)


def _discard_output() -> None:
    """Keep the interpreter from complaining, at its end, about output that nobody reads any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _set_up_logging(verbosity: int) -> None:
    logger = logging.getLogger("repopool")
    logger.propagate = False
    if not verbosity:
        logger.addHandler(logging.NullHandler())
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("repopool: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)
