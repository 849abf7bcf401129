"""A configured column while the service runs: its waiting keys, its model, how it is doing. No I/O.

A lane is *served* when changes of its table are put on its waiting list. One that is not served has a scan requested,
durably, before its keys are forgotten, so that nothing is lost by passing changes over.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cdc_embedder.breaker import Breaker
from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.embedding.base import Embedder
from cdc_embedder.metering import ColumnMeter
from cdc_embedder.pending import Key, Pending, Work
from cdc_embedder.routing import Route
from cdc_embedder.rows.crashes import Suspect

BATCH_SECONDS = 0.25
"""What one call of the embedder should take at most: live changes wait behind it."""

LOCK_SECONDS = 0.1
"""What one write-back should take at most: it holds row locks (rule 5)."""

HEAL_SECONDS = 10.0
"""After how long a column that failed for a reason found while running is tried again."""


@dataclass(slots=True)
class Size:
    """How many rows go into one step: adapts to what the last ones took, within bounds.

    `calls`: the step has a price of its own (a service far away): what a step takes at the least is not held against
    its rows, and they may cost as much again. Otherwise smaller steps would only make more of them.
    """

    rows: int
    lowest: int
    highest: int
    seconds: float
    calls: bool = False
    least: float = float("inf")

    def part(self, share: float) -> int:
        """The rows of a step that is to take only this share of the time."""
        return max(1, int(self.rows * share))

    def took(self, rows: int, elapsed: float, share: float = 1.0) -> None:
        """A step of `rows` took `elapsed` seconds; one that was not full, as `part` has it, only makes it smaller."""
        seconds = self.seconds
        if self.calls:
            self.least = min(self.least * 1.02, elapsed)  # forgets, slowly
            seconds, elapsed = max(seconds, self.least), elapsed - self.least
        if elapsed > seconds:
            self.rows = max(self.lowest, min(self.rows, int(rows * seconds / elapsed)))
        elif rows >= self.part(share) and elapsed < seconds * share / 2:
            self.rows = min(self.highest, self.rows * 2)


@dataclass(slots=True)
class ScanProgress:
    """What the last complete scan, or the running one, has counted.

    `routine`: the running one is the endless scan's, which nobody asked for; the next of those is due at `due`.
    """

    wanted: bool = False
    counted: bool = False
    running: bool = False
    routine: bool = False
    due: float = 0.0
    rows: int = 0
    null: int = 0
    current: int = 0
    failed: int = 0
    truncated: int = 0


@dataclass(eq=False, slots=True)
class Lane:
    """Everything that is known about a column on this connection.

    `barrier` and `covered`: see `scanning` and `following`. `uncovered`, `trouble` and `waiting_for` are what `status`
    tells while the column works all the same: no stream, no embedder for the moment, old transactions.
    `backlog` is the number of spilled keys, `drained` the seq up to which they were taken up again, `settled` the rows
    that may be removed. `next_live` is when the next batch of live changes may begin, `loaded` when the embedder came.
    `suspects`: see `rows.crashes`.
    """

    column: EmbeddingColumn
    pending: Pending
    route: Route
    served: bool = False
    paused: str = ""
    fault: str = ""
    fault_until: float = 0.0
    waiting_for: str = ""
    trouble: str = ""
    uncovered: str = ""
    covered: bool | None = None
    next_scan: float = 0.0
    next_publication: float = 0.0
    next_live: float = 0.0
    statement: str | None = None
    embedder: Embedder | None = None
    loaded: float = 0.0
    loading: bool = False
    breaker: Breaker = field(default_factory=Breaker)
    backlog: int = 0
    drained: int = 0
    settled: list[tuple[Key, int]] = field(default_factory=list)
    suspects: dict[Key, Suspect] = field(default_factory=dict)
    barrier: int | None = None
    doubts: int = 0
    scan: ScanProgress = field(default_factory=ScanProgress)
    embed_size: Size = field(default_factory=lambda: Size(16, 1, 1024, BATCH_SECONDS, calls=True))
    write_size: Size = field(default_factory=lambda: Size(256, 16, 1024, LOCK_SECONDS))
    failed_rows: int = 0
    meter: ColumnMeter = field(default_factory=ColumnMeter)
    last_error: str = ""

    @property
    def state(self) -> tuple[str, str]:
        """State and reason, in the words of the `status` view."""
        if self.fault:
            return "error", self.fault
        if not self.column.enabled:
            return "paused", "paused"
        if self.paused:
            return "paused", self.paused
        reason = "; ".join(filter(None, (self.uncovered, self.trouble, self.waiting_for)))
        if (
            self.scan.wanted
            or (self.scan.running and not self.scan.routine)
            or not (self.scan.counted or self.covered is False)
        ):
            return "backfilling", reason
        return ("error" if self.uncovered and not self.column.unlogged else "live"), reason

    def ready(self, now: float) -> bool:
        """Whether the model can be given work."""
        return self.served and self.embedder is not None and self.breaker.state(now) != "open"

    @property
    def outstanding(self) -> int:
        """Keys to be judged, in memory and in the backlog; one that changed since it was spilled may count twice."""
        return len(self.pending) + max(0, self.backlog - self.pending.unfinished(Work.REPAIR))

    def cast_doubt(self) -> None:
        """Changes may have been missed: no scan that began before now counts, and none is complete any more."""
        self.scan.wanted, self.scan.counted, self.barrier = True, False, None
        self.doubts += 1

    def forget(self) -> None:
        """Forget every key that waits; those in the backlog stay there."""
        self.pending.clear()
        self.settled.clear()
        self.drained = 0

    def scan_drained(self) -> bool:
        """Whether every key that a scan found has been judged."""
        return self.pending.unfinished(Work.SCAN) == 0
