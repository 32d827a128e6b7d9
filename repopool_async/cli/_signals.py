"""Ends a verb in good order when a signal asks for it.

The first signal goes to the command that runs, where there is one, else it cancels the verb; a second one always
cancels. Either way the verb gives back what it holds before the process exits with 128 + the signal.
"""

import asyncio
import signal
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from repopool_async.hosts.base import HostProcess

_ENDING: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_COMMAND_GRACE_SECONDS: Final = 10.0
"""How long a command may take to end after the first signal."""


class Handler(Protocol):
    """What carries out a verb and returns the exit status."""

    def __call__(self, arguments: Namespace, interruption: "Interruption", /) -> Awaitable[int]:
        """Carry it out."""


class Interruption:
    """The signals that arrived, and who gets the first."""

    def __init__(self, cancel: Callable[[], object]) -> None:
        self.number: int | None = None
        self._cancel = cancel
        self._forward: Callable[[int], object] | None = lambda _number: cancel()

    @property
    def exit_status(self) -> int | None:
        """128 + the first signal, None where there was none."""
        return None if self.number is None else 128 + self.number

    @contextmanager
    def forwarded_to(self, process: HostProcess) -> Iterator[None]:
        """Let the first signal go to a process group while the block runs, and to nobody afterwards.

        After the block only the way back is left, which a first signal does not cut short.
        """
        loop = asyncio.get_running_loop()
        timers: list[asyncio.TimerHandle] = []

        def forward(number: int) -> None:
            process.signal(number)
            timers.append(loop.call_later(_COMMAND_GRACE_SECONDS, self._cancel))

        self._forward = forward
        try:
            yield
        finally:
            self._forward = None
            for timer in timers:
                timer.cancel()

    def arrived(self, number: int) -> None:
        """Act on a signal."""
        is_first, self.number = self.number is None, self.number or number
        if not is_first:
            self._cancel()
        elif self._forward is not None:
            self._forward(number)


async def until_signalled(handler: Handler, arguments: Namespace) -> int:
    """Carry out a verb, and return its exit status or that of the signal that ended it."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    interruption = Interruption(task.cancel)
    for number in _ENDING:
        # What nohup or a shell's background job ignores stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, interruption.arrived, int(number))
    try:
        status = await handler(arguments, interruption)
    except asyncio.CancelledError:
        if interruption.exit_status is None:
            raise
        return interruption.exit_status
    return status if interruption.exit_status is None else interruption.exit_status
