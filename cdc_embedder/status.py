"""`cdc-embedder status`: the `status` view, for people or as JSON. Never loads torch."""

from __future__ import annotations

import json
import time
from decimal import Decimal

import psycopg
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cdc_embedder.asking import Row, session


def show(dsn: str, console: Console, *, as_json: bool, watch: bool) -> None:
    """Print the view once, or again every second until interrupted. Raises Problem."""
    try:
        with session(dsn, "status", "reading the status") as connection:
            if not watch:
                _print(rows(connection), console, as_json)
                return
            with Live(console=console, auto_refresh=False) as live:
                while True:
                    live.update(table(rows(connection)), refresh=True)
                    time.sleep(1)
    except KeyboardInterrupt:
        return


def rows(connection: psycopg.Connection[Row]) -> list[Row]:
    """The view's rows, in order of id."""
    return connection.execute("SELECT * FROM cdc_embedder.status ORDER BY id").fetchall()


def table(found: list[Row]) -> Table:
    """A line a column."""
    out = Table(box=None, header_style="bold")
    for name in ("column", "model", "state", "rows", "current", "pending", "failed", "coverage", "lag"):
        out.add_column(name, justify="left" if name in ("column", "model", "state") else "right")
    for row in found:
        about = "~" if row["rows_estimated"] else ""
        out.add_row(
            f"{row['source_table']}.{row['target_column']}",
            row["model"],
            row["state"] + (f": {row['reason']}" if row["reason"] else ""),
            about + _number(row["rows"]),
            _number(row["current"]),
            _number(row["pending"]),
            _number(row["failed"]),
            "-" if row["coverage"] is None else f"{row['coverage']} %",
            "-" if row["lag_bytes"] is None else f"{row['lag_bytes']:,} B",
        )
    return out


def _print(found: list[Row], console: Console, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, default=_plain))
    elif found:
        console.print(table(found))
    else:
        console.print("no column is configured: INSERT INTO cdc_embedder.embedding_column, or cdc-embedder add")


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _plain(value: object) -> object:
    return float(value) if isinstance(value, Decimal) else str(value)
