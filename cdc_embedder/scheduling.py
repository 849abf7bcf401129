"""Whose turn it is: strict classes with a floor, priorities, and fairness between columns. No I/O.

1. Live work goes first, then repair, then scan.
2. A lower class that has work gets at least a twentieth of the device's time all the same, so that repair never
   starves under a steady stream.
3. Inside a class the higher `priority` goes first; columns of equal priority share by time used.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from cdc_embedder.pending import Work

FLOOR = 0.05
"""The share of the device that a lower class with work never falls below."""

_MEMORY = 0.98
"""How much of the past a new account keeps: about the last fifty batches count."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A column that has work of a class."""

    column: Hashable
    work: Work
    priority: int


class Scheduler:
    """Chooses the next (column, class), and is told afterwards what it cost."""

    def __init__(self) -> None:
        self._by_class: dict[Work, float] = dict.fromkeys(Work, 0.0)
        self._by_column: dict[tuple[Work, Hashable], float] = {}

    def choose(self, candidates: Iterable[Candidate]) -> Candidate | None:
        """The candidate whose turn it is; None where there is none."""
        waiting = list(candidates)
        if not waiting:
            return None
        work = self._class({candidate.work for candidate in waiting})
        mine = [candidate for candidate in waiting if candidate.work is work]
        top = max(candidate.priority for candidate in mine)
        return min(
            (candidate for candidate in mine if candidate.priority == top),
            key=lambda candidate: self._by_column.get((work, candidate.column), 0.0),
        )

    def account(self, chosen: Candidate, cost: float) -> None:
        """`chosen` used `cost` of the device, in any unit that is the same for all (seconds, tokens)."""
        for work in Work:
            self._by_class[work] *= _MEMORY
        for key in list(self._by_column):
            self._by_column[key] *= _MEMORY
            if self._by_column[key] < 1e-9:
                del self._by_column[key]
        self._by_class[chosen.work] += cost
        key = (chosen.work, chosen.column)
        self._by_column[key] = self._by_column.get(key, 0.0) + cost

    def _class(self, present: set[Work]) -> Work:
        total = sum(self._by_class.values())
        for work in sorted(present, reverse=True):
            if work is not min(present) and total > 0 and self._by_class[work] < FLOOR * total:
                return work
        return min(present)
