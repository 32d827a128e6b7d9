"""Sees everything that happens in a simulated fleet, counts it, and says where two were in a slot at once.

It knows neither tokens nor fences: only who was let into which slot last, and which processes live there. Of all
others none may live there from then on, nor start.
"""

import hashlib
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Final, Protocol

import attrs

STORY_EVENTS: Final = 40
"""How many of a slot's last events are told with a violation."""


class Occupant(Protocol):
    """A process in a slot."""

    @property
    def hold_id(self) -> uuid.UUID:
        """In the name of whose work it runs."""


@attrs.frozen
class Violation:
    """Two holds were in one slot at once.

    Attributes:
        story: the slot's last events, the latest last.
    """

    at: float
    slot: str
    what: str
    story: tuple[str, ...]


class Judge:
    """The oracle of one run.

    Args:
        time: the virtual clock.

    Attributes:
        counts: how often what happened. violations: the first hundred, told in full.
        failure: of the simulation itself.
    """

    def __init__(self, time: Callable[[], float]) -> None:
        self.counts: Final[Counter[str]] = Counter()
        self.violations: Final[list[Violation]] = []
        self.failure: BaseException | None = None
        self._time = time
        self._digest = hashlib.blake2b(digest_size=16)
        self._stories: dict[str, deque[tuple[float, str]]] = defaultdict(lambda: deque(maxlen=STORY_EVENTS))
        self._inside: dict[str, uuid.UUID] = {}
        self._alive: dict[str, dict[Occupant, None]] = defaultdict(dict)

    @property
    def digest(self) -> str:
        """What tells whether two runs were the same, event by event."""
        return self._digest.hexdigest()

    def fail(self, failure: BaseException) -> None:
        """Note that the simulation itself is at fault."""
        self.failure = self.failure or failure

    def note(self, kind: str, slot: str = "", about: object = "") -> None:
        """Count an event, and remember it as one of its slot's."""
        at = self._time()
        self.counts[kind] += 1
        self._digest.update(f"{at!r} {kind} {slot} {about}\n".encode())
        if slot:
            self._stories[slot].append((at, f"{kind} {about}"))

    def entered(self, slot: str, hold_id: uuid.UUID) -> None:
        """Note that a hold was let into a slot: it may work there from now on, and nobody else."""
        inside = self._inside.get(slot)
        if inside == hold_id:
            return
        self._inside[slot] = hold_id
        for process in self._alive[slot]:
            if process.hold_id != hold_id:
                self._accuse(slot, f"{_short(hold_id)} was let in while a process of {_short(process.hold_id)} lives")

    def started(self, slot: str, process: Occupant) -> None:
        """Note that a process runs in a slot from now on."""
        self._alive[slot][process] = None
        inside = self._inside.get(slot)
        if process.hold_id != inside:
            self._accuse(slot, f"a process of {_short(process.hold_id)} starts though {_short(inside)} is inside")

    def ended(self, slot: str, process: Occupant) -> None:
        """Note that a process is gone."""
        self._alive[slot].pop(process, None)

    def _accuse(self, slot: str, what: str) -> None:
        self.note("violations", slot, what)
        if len(self.violations) < 100:
            story = tuple(f"{at:10.3f} {event}" for at, event in self._stories[slot])
            self.violations.append(Violation(self._time(), slot, what, story))


def _short(hold_id: uuid.UUID | None) -> str:
    return "nobody" if hold_id is None else f"hold {hold_id.int}"
