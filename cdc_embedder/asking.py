"""The sessions in which commands ask the database: in the operator's own name, search path and date style.

Not for the service, whose sessions are pinned (`rows.session`). What goes wrong inside leaves as a Problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.rows import RowFactory, dict_row

from cdc_embedder.conninfo import pinned
from cdc_embedder.database_errors import NOT_FOUND, from_database, not_connected
from cdc_embedder.errors import Misconfigured, Problem

Row = dict[str, Any]

NAMES = "see: cdc-embedder status; names are [SCHEMA.]TABLE, quoted as in SQL"
"""What to do about a name that means nothing."""

_ROW: RowFactory[Row] = dict_row


@contextmanager
def session(
    dsn: str, purpose: str, doing: str, show: Callable[[str], None] | None = None
) -> Iterator[psycopg.Connection[Row]]:
    """An autocommit session named `cdc-embedder <purpose>` in a database that has our schema; parameters are $1, $2.

    The driver's errors are translated as met while `doing` something. `show` is told what functions of ours, or the
    user's triggers, have to say, and every warning. Raises Problem.
    """
    try:
        connection = psycopg.connect(
            pinned(dsn, purpose, {}, client_encoding="UTF8"),
            autocommit=True,
            row_factory=_ROW,
            cursor_factory=psycopg.RawCursor,  # identifiers may hold percent signs
        )
    except psycopg.Error as error:
        raise not_connected(error, dsn, "connecting") from error
    if show is not None:
        connection.add_notice_handler(lambda notice: _pass_on(notice, show))
    with connection:
        try:
            installed = connection.execute("SELECT to_regclass('cdc_embedder.migration') IS NOT NULL AS yes").fetchone()
            if installed is None or not installed["yes"]:
                raise Misconfigured(
                    "the schema cdc_embedder is not installed in this database", hint="run: cdc-embedder init"
                )
            yield connection
        except psycopg.Error as error:
            raise _problem(connection, error, doing) from error


def _pass_on(notice: psycopg.errors.Diagnostic, show: Callable[[str], None]) -> None:
    """Not what the server itself remarks, as of a DROP … IF EXISTS: an operator can do nothing about it."""
    if notice.source_function == "exec_stmt_raise" or notice.severity_nonlocalized == "WARNING":
        show(". ".join(filter(None, (notice.message_primary, notice.message_hint))))


def _problem(connection: psycopg.Connection[Row], error: psycopg.Error, doing: str) -> Problem:
    """With the reason why something was not found: it is ours and of another version, or a name is not as meant."""
    problem = from_database(error, doing)
    if error.sqlstate in NOT_FOUND and error.diag.source_function != "exec_stmt_raise":
        named = NAMES if error.sqlstate == "42P01" else ""
        problem.hint = _other_version(connection) or problem.hint or named
    return problem


def _other_version(connection: psycopg.Connection[Row]) -> str:
    """What to do about the schema, if that is of another version than this program, and anything can be asked."""
    from cdc_embedder.install import package_version

    try:
        [found] = connection.execute("SELECT max(version) AS version FROM cdc_embedder.migration").fetchall()
    except psycopg.Error:
        return ""
    if (found["version"] or 0) < package_version():
        return "the schema is older than this cdc-embedder: run cdc-embedder init"
    if found["version"] > package_version():
        return "the schema is newer than this cdc-embedder: install the newer one"
    return ""
