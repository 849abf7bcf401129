"""Rows on their way through the stages. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.embedding.base import Vectors
from cdc_embedder.embedding.isolation import Outcome
from cdc_embedder.lane import Lane
from cdc_embedder.pending import Entry, Pending
from cdc_embedder.rows.fetch import Row, Verdict
from cdc_embedder.rows.writeback import KILLED_THE_PROCESS, Write
from cdc_embedder.scheduling import Candidate

HALF_LARGEST = 65504.0
"""The greatest number that halfvec's elements can hold; only vectors that are not normalized come near it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """That rows of a batch went through a stage, and when, on the clock `time.monotonic`."""

    name: str
    began: float
    ended: float
    rows: int


@dataclass(eq=False, slots=True)
class Batch:
    """Rows of one column on their way, as it was configured when they were read. `alone`: no other call meanwhile.

    `share`: of a full batch, that it was to be. `unwritten`: rows that those who write have not had in hand yet.
    """

    lane: Lane
    column: EmbeddingColumn
    pending: Pending
    entries: list[Entry]
    rows: list[Row]
    chosen: Candidate
    writes: list[Write] = field(default_factory=list)
    vectors: Vectors = field(default_factory=lambda: np.empty((0, 0), np.float32))
    alone: bool = False
    share: float = 1.0
    stages: list[Stage] = field(default_factory=list)
    tokens: int = 0
    unwritten: int = 0

    def texts(self) -> tuple[list[str], list[int], dict[int, str]]:
        """What the model is to be asked, for which rows, and why not for others that have a text."""
        texts: list[str] = []
        where: list[int] = []
        errors: dict[int, str] = {}
        for index, row in enumerate(self.rows):
            suspect = self.lane.suspects.get(self.entries[index].key)
            if suspect is not None and suspect.guilty:
                errors[index] = KILLED_THE_PROCESS
            elif row.verdict is Verdict.EMBED and row.text is None:
                errors[index] = "the text cannot be converted to UTF-8"
            elif row.verdict is Verdict.EMBED and row.text is not None:
                try:
                    texts.append(row.text.decode())
                    where.append(index)
                except UnicodeDecodeError as error:
                    errors[index] = f"the text is not valid UTF-8 at byte {error.start}"
        return texts, where, errors

    def decide(self, outcome: Outcome | None, where: list[int], errors: dict[int, str]) -> None:
        """What is written of each row, from the model's answer (None: nothing was asked) and `errors` by row."""
        self.vectors = np.zeros((len(self.rows), self.column.model.dimensions), dtype=np.float32)
        truncated: set[int] = set()
        errors = dict(errors)
        if outcome is not None:
            self.vectors[where] = outcome.vectors
            errors |= {where[index]: sentence for index, sentence in outcome.errors.items()}
            if self.column.target is not None and self.column.target.kind == "halfvec":
                beyond = np.abs(outcome.vectors).max(axis=1, initial=0) > HALF_LARGEST
                errors |= {where[index]: "the vector does not fit into a halfvec" for index in np.flatnonzero(beyond)}
            truncated = {where[index] for index in np.flatnonzero(outcome.truncated)}
        self.writes = [
            Write(
                entry.key,
                row.fingerprint or b"",
                has_vector=row.verdict is Verdict.EMBED and index not in errors,
                truncated=index in truncated,
                keep=index in errors and row.failures == 0 and errors[index] is not KILLED_THE_PROCESS,
                error=errors.get(index),
            )
            for index, (entry, row) in enumerate(zip(self.entries, self.rows, strict=True))
        ]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of a batch that are written in one statement."""

    batch: Batch
    rows: slice
