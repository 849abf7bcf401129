"""`cdc-embedder failed`: the rows that could not be embedded, filtered, for people or as JSON.

It reads the view `cdc_embedder.failed`. Not for trying them again: that is `cdc_embedder.retry_failed`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console
from rich.table import Table

from cdc_embedder.asking import Row, session
from cdc_embedder.identifiers import column_of
from cdc_embedder.pausing import called
from cdc_embedder.status import unbroken


@dataclass(frozen=True, slots=True)
class Found:
    """Rows of the view, and how many there are beside them that were not asked for."""

    rows: list[Row]
    more: int


def find(dsn: str, name: str | None, error: str | None, key: str | None, limit: int) -> Found:
    """The failed rows of the table or column `name` (None: of all), whose error contains `error`, whose key has the
    value `key`: those to be tried again first, `limit` of them. Raises Problem."""
    with session(dsn, "cli", "reading the failed rows") as connection:
        ids = None if name is None else called(connection, name).ids
        connection.execute("SET TimeZone = 'UTC'")
        rows = connection.execute(_FAILED, (ids, error, key, limit)).fetchall()
    total = rows[0]["total"] if rows else 0
    return Found([{name: row[name] for name in row if name != "total"} for row in rows], total - len(rows))


def print_found(found: Found, console: Console, *, as_json: bool, whole: bool) -> None:
    """A line a row; or with `whole` a line a field; or as JSON, a list of objects."""
    if as_json:
        print(json.dumps(found.rows, default=_plain))
        return
    if not found.rows:
        console.print("no row failed, of those that were asked for")
    elif whole:
        for row in found.rows:
            for field, value in row.items():
                console.print(f"{field:<13} {_shown(_told(field, value))}", soft_wrap=True)
            console.print()
    else:
        with unbroken(console):
            console.print(_table(found.rows))
    if found.more:
        console.print(f"and {found.more:,} more: --limit shows them")


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("column", "key", "attempts", "next try", "error"):
        table.add_column(name, justify="right" if name == "attempts" else "left", overflow="fold")
    for row in rows:
        table.add_row(
            _shown(column_of(row["source_table"], row["target_column"])),
            _shown(_told("key", row["key"])),
            str(row["attempts"]),
            _told("retry_at", row["retry_at"]),
            _shown(row["error"]),
        )
    return table


def _told(field: str, value: object) -> str:
    if field == "key":
        return json.dumps(value, ensure_ascii=False)
    if field == "retry_at":
        return f"{value:%Y-%m-%d %H:%M:%S}Z" if isinstance(value, datetime) else "not by itself: cdc-embedder retry"
    return str(value)


def _shown(text: str) -> str:
    """Keys as a terminal may have them: without what would steer it."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _plain(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else str(value)


_FAILED = """
SELECT f.*, count(*) OVER () AS total
  FROM cdc_embedder.failed f
 WHERE ($1::int[] IS NULL OR f.column_id = ANY ($1))
   AND ($2::text IS NULL OR strpos(lower(f.error), lower($2)) > 0)
   AND ($3::text IS NULL OR EXISTS (SELECT FROM jsonb_each_text(f.key) k WHERE k.value = $3))
 ORDER BY f.retry_at, f.column_id, f.key
 LIMIT $4
"""
