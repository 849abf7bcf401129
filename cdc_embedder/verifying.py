"""`cdc-embedder verify`: is every stored vector the model's vector of its row's present text? No service is needed.

Each row is compared with the ledger, and what the ledger vouches for is recomputed: every row, or a random sample.
It only reads. Beside a service that works, rows that wait are found stale or missing, unless they are waited for first.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
from psycopg.rows import dict_row

from cdc_embedder import catalog
from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.conninfo import pinned
from cdc_embedder.database_errors import from_database
from cdc_embedder.embedding.base import InputType
from cdc_embedder.embedding.isolation import embed_isolating
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.errors import Misconfigured, Problem
from cdc_embedder.pending import Key
from cdc_embedder.rows import audit
from cdc_embedder.rows.audit import Evidence, Finding
from cdc_embedder.rows.session import Connection, connect
from cdc_embedder.settings import Settings

LEAST_COSINE = 0.9999
"""Below this a vector is wrong: what float32 leaves between two runs of one model is ten times less."""

LEAST_COSINE_HALF = 0.99
"""The same where the model computes or the column stores in half precision."""

BATCH = 256
"""Rows that are recomputed at a time."""

STANDSTILL_SECONDS = 60.0
"""How long a column that is waited for may be stopped, paused or in error: a service may just be starting."""

PAGE_HEADER = 24
"""Bytes by which the WAL's insert position can lie beyond the end of the last record; no commit is as short."""


@dataclass(slots=True)
class Report:
    """One column's numbers. `null` counts rows without text; one that holds a vector is in wrong or stale too."""

    id: int
    source_table: str
    target_column: str
    rows: int = 0
    null: int = 0
    current: int = 0
    pending: int = 0
    failed: int = 0
    missing: int = 0
    stale: int = 0
    wrong: int = 0
    orphaned: int = 0

    @property
    def good(self) -> bool:
        """Nothing missing, stale or wrong. An orphan costs space, not truth; a failure is in the ledger, and told."""
        return not (self.missing or self.stale or self.wrong)


Advance = Callable[[str, int, int], None]
"""Called with a column's name, its rows done since the last call, and its rows as far as known."""


def verify(
    settings: Settings, names: Sequence[tuple[str, str]], *, wait: bool, sample: int | None, advance: Advance
) -> list[Report]:
    """Verify the columns `names` (table, target), or all. Raises Problem."""
    dsn = settings.dsn.get_secret_value()
    try:
        with psycopg.connect(pinned(dsn, "verify", {}), autocommit=True, row_factory=dict_row) as connection:
            ids = _chosen(connection, names)
            if wait:
                wait_for_pending(connection, ids)
            told = connection.execute(
                "SELECT s.*, c.slot AS served_by FROM cdc_embedder.status s JOIN cdc_embedder.embedding_column c USING (id)"
                " WHERE id = ANY (%s) ORDER BY id",
                (ids,),
            ).fetchall()
        return asyncio.run(_verify(settings, told, sample, advance))
    except (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedTable) as error:
        if "cdc_embedder" not in str(error):
            raise from_database(error, "verifying") from error
        raise Misconfigured("the schema cdc_embedder is not installed", hint="run: cdc-embedder init") from error
    except psycopg.Error as error:
        raise from_database(error, "verifying") from error
