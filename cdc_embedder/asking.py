"""The sessions in which commands ask the database: in the operator's own name, search path and date style.

Not for the service, whose sessions are pinned (`rows.session`). What goes wrong inside leaves as a Problem.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.rows import RowFactory, dict_row

from cdc_embedder.conninfo import pinned
from cdc_embedder.database_errors import from_database
from cdc_embedder.errors import Misconfigured

Row = dict[str, Any]

_ROW: RowFactory[Row] = dict_row


@contextmanager
def session(dsn: str, purpose: str, doing: str) -> Iterator[psycopg.Connection[Row]]:
    """An autocommit session named `cdc-embedder <purpose>` in a database that has our schema; parameters are $1, $2.

    The driver's errors are translated as met while `doing` something. Raises Problem.
    """
    try:
        connection = psycopg.connect(
            pinned(dsn, purpose, {}, client_encoding="UTF8"),
            autocommit=True,
            row_factory=_ROW,
            cursor_factory=psycopg.RawCursor,  # identifiers may hold percent signs
        )
    except psycopg.Error as error:
        raise from_database(error, "connecting") from error
    try:
        with connection:
            installed = connection.execute("SELECT to_regclass('cdc_embedder.migration') IS NOT NULL AS yes").fetchone()
            if installed is None or not installed["yes"]:
                raise Misconfigured(
                    "the schema cdc_embedder is not installed in this database", hint="run: cdc-embedder init"
                )
            yield connection
    except psycopg.Error as error:
        raise from_database(error, doing) from error
