"""Where in the caller's code a lease was taken, and by which task: for time-outs, and for leases that never end.

The place costs a walk over a few frames; the whole stack is remembered only where it was asked for. Nothing here keeps
a frame or a task alive.
"""

import asyncio
import sys
import traceback
import weakref
from types import FrameType
from typing import Final

import attrs

_PACKAGE: Final = __name__.partition(".")[0]
_BETWEEN: Final = frozenset({"contextlib", "anyio", "asyncio"})
_STACK_DEPTH: Final = 32


@attrs.frozen(eq=False)
class Origin:
    """Who took a lease.

    Attributes:
        task_name: of the asyncio task. where: `file:line (function)` of the nearest caller outside this library.
        task: the task, while it is alive. stack: outermost call first, empty where it was not asked for.
    """

    task_name: str
    where: str
    task: "weakref.ref[asyncio.Task[object]] | None" = None
    stack: "traceback.StackSummary | None" = None

    def is_of(self, task: "asyncio.Task[object] | None") -> bool:
        """Return whether a task is the one that took the lease."""
        return task is not None and self.task is not None and self.task() is task

    @property
    def has_ended(self) -> bool:
        """Whether the task that took the lease is done."""
        task = self.task() if self.task is not None else None
        return task is None or task.done()

    def __str__(self) -> str:
        return f"by task {self.task_name!r} at {self.where}"

    def formatted_stack(self) -> str:
        """Return the stack as tracebacks show it."""
        return "".join(self.stack.format()).rstrip() if self.stack else self.where


def here(*, is_whole: bool) -> Origin:
    """Return the present caller's origin; call it before the first suspension.

    Args:
        is_whole: remember the stack too.
    """
    task = asyncio.current_task()
    frame = _outside(sys._getframe(1))  # noqa: SLF001 - inspect.currentframe is the same, after a slow import
    where = "unknown place"
    if frame is not None:
        where = f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
    return Origin(
        task_name=task.get_name() if task else "none",
        where=where,
        task=weakref.ref(task) if task else None,
        stack=_stack(frame) if is_whole and frame is not None else None,
    )


def _outside(frame: FrameType | None) -> FrameType | None:
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package != _PACKAGE and package not in _BETWEEN:
            return frame
        frame = frame.f_back
    return None


def _stack(frame: FrameType) -> traceback.StackSummary:
    # Source lines are read only if it is ever shown.
    stack = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=_STACK_DEPTH, lookup_lines=False)
    stack.reverse()
    return stack
