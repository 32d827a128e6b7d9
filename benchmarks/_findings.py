"""What a run of `benchmarks.chaos` saw."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs


@attrs.define
class Findings:
    """What a run saw; the lists, but for the seconds and the steps, must be empty in the end.

    Attributes:
        work_due: how many leases left work that must be saved, because they did not end by being given back.
        steps: how many steps a process was to die at.
    """

    kills: int = 0
    cancellations: int = 0
    work_due: int = 0
    recovery_seconds: list[float] = attrs.field(factory=list)
    slots_lost: list[str] = attrs.field(factory=list)
    double_holders: list[str] = attrs.field(factory=list)
    half_made: list[str] = attrs.field(factory=list)
    errors: list[str] = attrs.field(factory=list)
    work_lost: list[str] = attrs.field(factory=list)
    left_running: list[str] = attrs.field(factory=list)
    steps: int = 0
    steps_not_reached: list[str] = attrs.field(factory=list)

    @property
    def violations(self) -> list[str]:
        """Everything that must not be."""
        groups = {
            "slot lost": self.slots_lost, "double holder": self.double_holders, "half made": self.half_made,
            "error": self.errors, "work lost": self.work_lost, "left running": self.left_running,
        }  # fmt: skip
        return [f"{name}: {item}" for name, items in groups.items() for item in items]

    def take_accusations(self, root: Path) -> None:
        """Sort in what the workers wrote down."""
        path = root / "cancellations"
        self.cancellations += path.stat().st_size if path.exists() else 0
        path = root / "accusations"
        lists = {"double holder": self.double_holders, "half made": self.half_made}
        for line in path.read_text().splitlines() if path.exists() else []:
            entry = json.loads(line)
            lists.get(entry["kind"], self.errors).append(entry["text"])


def add(findings: Findings, more: Mapping[str, Any]) -> None:
    """Add what another run saw."""
    for name, value in more.items():
        setattr(findings, name, getattr(findings, name) + value)
