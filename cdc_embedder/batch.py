"""Rows on their way through the stages. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.embedding.base import Vectors
from cdc_embedder.lane import Lane
from cdc_embedder.pending import Entry, Pending
from cdc_embedder.rows.fetch import Row
from cdc_embedder.rows.writeback import Write
from cdc_embedder.scheduling import Candidate


@dataclass(eq=False, slots=True)
class Batch:
    """Rows of one column on their way, as it was configured when they were read. `alone`: no other call meanwhile.

    `share`: of a full batch, that it was to be.
    """

    lane: Lane
    column: EmbeddingColumn
    pending: Pending
    entries: list[Entry]
    rows: list[Row]
    chosen: Candidate
    writes: list[Write]
    vectors: Vectors
    alone: bool = False
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of a batch that are written in one statement."""

    batch: Batch
    rows: slice
