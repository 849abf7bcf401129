"""A circuit breaker before one column's model: when it is asked, and with how much. No I/O.

Trouble of the device or the network is counted here and never against a row (rule 7). *Closed*: every batch goes
through. *Open*: nothing does until a rest is over, which grows with each failure. *Half-open*: one row tries.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 60.0
LONGEST_ASKED_SECONDS = 3600.0


@dataclass(slots=True)
class Breaker:
    """Times are monotonic seconds, given by the caller."""

    failures: int = 0
    until: float = 0.0

    def state(self, now: float) -> str:
        """closed, open or half-open."""
        if not self.failures:
            return "closed"
        return "open" if now < self.until else "half-open"

    def failed(self, now: float, rest: float | None = None) -> float:
        """Open; returns for how many seconds: longer each time, and at least `rest`, which the other side asked for."""
        self.failures += 1
        own = min(LONGEST_SECONDS, FIRST_SECONDS * 2 ** min(self.failures - 1, 10)) * random.uniform(0.5, 1.0)
        rest = own if rest is None else min(max(rest, own), LONGEST_ASKED_SECONDS)
        self.until = now + rest
        return rest

    def succeeded(self) -> None:
        """Close."""
        self.failures, self.until = 0, 0.0
