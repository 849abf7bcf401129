"""What is counted while the service runs, for whoever asks: plain numbers, cheap to add to. No I/O.

They belong to the process and outlive a connection. `metrics` turns them into Prometheus' form; what can be looked up
when somebody asks (how many keys wait) is not counted here. All of it is touched by the event loop alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cdc_embedder.embedding.base import Spent

LATENCY_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BATCH_TOKENS = (64, 256, 1024, 4096, 16_384, 65_536, 131_072)


class Histogram:
    """Observations by upper bound, the last of which is infinity, and their sum."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = np.array([*bounds, np.inf])
        self.counts: NDArray[np.int64] = np.zeros(len(self.bounds), dtype=np.int64)
        self.sum = 0.0

    def observe(self, *values: float) -> None:
        places = np.searchsorted(self.bounds, values)
        np.add.at(self.counts, places, 1)
        self.sum += sum(values)

    def cumulative(self) -> list[tuple[float, int]]:
        """(upper bound, observations at or below it)."""
        return list(zip(self.bounds.tolist(), np.cumsum(self.counts).tolist(), strict=True))


@dataclass(slots=True)
class ColumnMeter:
    """Rows of one column by what became of them. `retried`: put back to be judged again, `guard_misses` among them.

    A row whose text was cut counts in `embedded` too.
    """

    embedded: int = 0
    unchanged: int = 0
    cleared: int = 0
    failed: int = 0
    truncated: int = 0
    retried: int = 0
    guard_misses: int = 0
    spilled: int = 0
    commit_to_vector: Histogram = field(default_factory=lambda: Histogram(LATENCY_SECONDS))


@dataclass(slots=True)
class ModelMeter:
    """Calls of one model, those of queries among them; `busy_s` is summed over its devices."""

    calls: int = 0
    errors: int = 0
    tokens: int = 0
    padding: int = 0
    busy_s: float = 0.0
    rows: Histogram = field(default_factory=lambda: Histogram(BATCH_ROWS))
    batch_tokens: Histogram = field(default_factory=lambda: Histogram(BATCH_TOKENS))
    _busy_until: float = 0.0

    def called(self, rows: int, tokens: int, spent: Spent, began: float, ended: float) -> None:
        """A call that succeeded. Where the device cannot tell, it is taken to be busy with any call."""
        self.calls += 1
        self.tokens += tokens
        self.padding += spent.padding
        self.rows.observe(rows)
        self.batch_tokens.observe(tokens)
        if (device_s := spent.device_s) is None:  # calls overlap: what none before covered
            device_s = max(0.0, ended - max(began, self._busy_until))
            self._busy_until = max(self._busy_until, ended)
        self.busy_s += device_s


@dataclass(slots=True)
class Meters:
    """Everything that is counted. `stages` holds seconds by stage, `queries` answers by (via, result)."""

    columns: dict[str, ColumnMeter] = field(default_factory=dict)
    models: dict[str, ModelMeter] = field(default_factory=dict)
    stages: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    queries: Counter[tuple[str, str]] = field(default_factory=Counter)
    query_seconds: defaultdict[str, Histogram] = field(
        default_factory=lambda: defaultdict(lambda: Histogram(LATENCY_SECONDS))
    )
    reconnects: int = 0
    received_changes: int = 0
    own_changes: int = 0

    def column(self, label: str) -> ColumnMeter:
        return self.columns.setdefault(label, ColumnMeter())

    def model(self, name: str) -> ModelMeter:
        return self.models.setdefault(name, ModelMeter())

    def called(self, model: str, rows: int, tokens: int, spent: Spent, began: float, ended: float) -> None:
        """A call of a model that succeeded, on the clock `time.monotonic`."""
        self.model(model).called(rows, tokens, spent, began, ended)
        self.stages["tokenizing"] += spent.tokenizing_s
        self.stages["embedding"] += max(0.0, ended - began - spent.tokenizing_s)

    def query(self, via: str, result: str, seconds: float) -> None:
        """A question that came by `via` (sql, http) was answered, refused or failed."""
        self.queries[via, result] += 1
        self.query_seconds[via].observe(seconds)
