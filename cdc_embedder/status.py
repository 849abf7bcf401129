"""`cdc-embedder status`: the `status` view, for people or as JSON. Never loads torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal

import psycopg
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cdc_embedder.asking import Row, session
from cdc_embedder.errors import Temporary
from cdc_embedder.identifiers import column_of
from cdc_embedder.sizes import size

PERIOD_SECONDS = 1.0
"""The service says how it is no more often."""

WIDE = 1000
"""Columns of text where there is no terminal: nothing is broken in two that somebody may want to search for."""

NUMBERS = ("rows", "current", "pending", "backlog", "failed", "coverage", "rate", "ETA", "lag", "breaker")

NOTHING = "no column is configured: INSERT INTO cdc_embedder.embedding_column, or cdc-embedder add"


def show(dsn: str, console: Console, *, as_json: bool, watch: bool) -> None:
    """Print the view once, or again every second until interrupted. Raises Problem."""
    try:
        if watch:
            _watch(dsn, console, as_json)
            return
        with session(dsn, "status", "reading the status") as connection:
            found = rows(connection)
        if as_json:
            print(_json(found))
        else:
            show_rows(found, console)
    except KeyboardInterrupt:
        return


def _watch(dsn: str, console: Console, as_json: bool) -> None:
    """For ever. A server that goes away meanwhile is asked again every second."""
    seen = False
    with _display(console, as_json) as display:
        while True:
            try:
                with session(dsn, "status", "reading the status") as connection:
                    while True:
                        display(rows(connection))
                        seen = True
                        time.sleep(PERIOD_SECONDS)
            except Temporary as problem:
                if not seen:
                    raise
                display(problem.sentence)
            time.sleep(PERIOD_SECONDS)


@contextmanager
def _display(console: Console, as_json: bool) -> Iterator[Callable[[list[Row] | str], None]]:
    """Shows what it is called with: in place on a terminal, else below what was there. JSON is a line a time."""
    if as_json:
        yield lambda found: None if isinstance(found, str) else print(_json(found) + "\n", end="", flush=True)
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda found: live.update(_shown(found, console), refresh=True)
    else:

        def below(found: list[Row] | str) -> None:
            console.print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z")
            with unbroken(console):
                console.print(_shown(found, console))

        yield below


@contextmanager
def unbroken(console: Console) -> Iterator[None]:
    """Where there is no terminal, lines are as long as they have to be."""
    width = console.width
    try:
        if not console.is_terminal:
            console.width = WIDE
        yield
    finally:
        console.width = width


def rows(connection: psycopg.Connection[Row]) -> list[Row]:
    """The view's rows, in order of id."""
    return connection.execute("SELECT * FROM cdc_embedder.status ORDER BY id").fetchall()


def table(found: list[Row]) -> Table:
    """A line a column; why it is so is too long for a line."""
    out = Table(box=None, header_style="bold")
    for name in ("column", "model", "state"):
        out.add_column(name, overflow="fold")
    for name in NUMBERS:
        out.add_column(name, justify="right", no_wrap=True)
    for row in found:
        out.add_row(_name(row), row["model"], row["state"], *_numbers(row))
    return out


def _numbers(row: Row) -> list[str]:
    """In the order of NUMBERS."""
    return [
        ("~" if row["rows_estimated"] else "") + _number(row["rows"]),
        _number(row["current"]),
        _number(row["pending"]),
        _number(row["backlog"]),
        _number(row["failed"]),
        "-" if row["coverage"] is None else f"{row['coverage']} %",
        "-" if row["rows_per_s"] is None else f"{row['rows_per_s']:,.0f}/s",
        _duration(row["eta_s"]),
        "-" if row["lag_bytes"] is None else size(row["lag_bytes"]),
        row["circuit_breaker"] or "-",
    ]


def _shown(found: list[Row] | str, console: Console) -> RenderableType:
    """The table, or lines where the console is too narrow for it; and below it the reasons of what is not live."""
    if isinstance(found, str):
        return Text(found)
    if not found:
        return Text(NOTHING)
    out: RenderableType = table(found)
    needed = Measurement.get(console, console.options.update(width=WIDE), out).maximum
    if needed > console.width:
        out = Group(*(Text(line) for row in found for line in _lines(row)))
    told = [row for row in found if row["reason"] not in (None, "", row["state"])]
    return Group(out, *(Text(f"{_name(row)} is {row['state']}: {row['reason']}") for row in told))


def _lines(row: Row) -> list[str]:
    """The same as the table has, below each other."""
    told = dict(zip(NUMBERS, _numbers(row), strict=True))
    return [
        f"{_name(row)}  {row['state']}  {row['model']}",
        f"  {told['rows']} rows, {told['coverage']} current, {told['pending']} pending, {told['failed']} failed",
        f"  {told['rate']}, ETA {told['ETA']}, backlog {told['backlog']}, lag {told['lag']}, breaker {told['breaker']}",
    ]


def _name(row: Row) -> str:
    return column_of(row["source_table"], row["target_column"])


def show_rows(found: list[Row], console: Console) -> None:
    """As a table, or as lines where a terminal is too narrow for one."""
    with unbroken(console):
        console.print(_shown(found, console))


def _json(found: list[Row]) -> str:
    return json.dumps(found, default=_plain)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for seconds_each, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * seconds_each:
            return f"{seconds / seconds_each:,.0f} {unit}"
    return f"{seconds:,.0f} s"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _plain(value: object) -> object:
    return float(value) if isinstance(value, Decimal) else str(value)
