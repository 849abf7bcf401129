"""Reading a table to find out whether its vectors can be trusted: `verify`'s side of the database. It changes nothing.

A page compares up to a thousand rows with the ledger and names the keys of those whose vector the ledger vouches for.
These are read again with text and vector in one statement, which judges them anew, so that what is recomputed belongs
together. Ledger rows without a source row are counted from the ledger's side. Not for deciding what is to be
embedded: the fetch does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from psycopg import sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.pq import Format
from psycopg.types.string import ByteaBinaryLoader

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.pending import Key
from cdc_embedder.rows import expressions as e
from cdc_embedder.rows import fetch, scan
from cdc_embedder.rows.session import Connection, one


class Finding(IntEnum):
    """What is the matter with a row."""

    ABSENT = 0
    """There is no such row any more."""
    EMPTY = 1
    """No text and no vector, as it should be."""
    FAILED = 2
    """The ledger says that exactly this text failed."""
    MISSING = 3
    """A text without a vector, or of which the ledger knows nothing."""
    STALE = 4
    """The ledger is about another text, or another generation."""
    WRONG = 5
    """The stored vector is not the one of the ledger; or there is one without a text."""
    VOUCHED = 6
    """Text, generation and vector are the ledger's: what is left is to recompute the vector."""
    LATER = 7
    """As VOUCHED, but the texts before it fill the batch: it is asked for again."""


@dataclass(frozen=True, slots=True)
class Page:
    """What a page held. `last` is where the next one goes on; None when this was the last page.

    `null`: rows without text, whatever they hold. `vouched`: keys to recompute.
    """

    last: Key | None
    rows: int
    null: int
    failed: int
    missing: int
    stale: int
    wrong: int
    vouched: list[Key]


@dataclass(frozen=True, slots=True)
class Evidence:
    """A row read again. `text` (UTF-8 as the server sent it) and `vector` are there for VOUCHED alone.

    A `vector` that is no plain list of numbers is empty.
    """

    finding: Finding
    text: bytes | None
    vector: NDArray[np.float32] | None


async def page(connection: Connection, column: EmbeddingColumn, after: Key | None) -> Page:
    """The page of rows whose keys come after `after` (None: the first). Raises psycopg.Error as it comes."""
    row = await one(connection, _page(column, first=after is None), list(after or ()))
    assert row is not None
    rows, null, failed, missing, stale, wrong, vouched, last = row
    return Page(
        tuple(last) if rows == scan.PAGE else None,
        rows, null, failed, missing, stale, wrong,
        [tuple(key) for key in vouched],
    )  # fmt: skip


async def orphans(connection: Connection, column: EmbeddingColumn, after: Key | None) -> tuple[Key | None, int]:
    """Ledger rows without a source row in the page after `after`: where to go on (or None), and how many."""
    row = await one(connection, _orphans(column, first=after is None), list(after or ()))
    assert row is not None
    seen, orphaned, last = row
    return (tuple(last) if seen == scan.PAGE else None), orphaned


class Evidences:
    """Rows by key with what it takes to recompute them, of one column on one session."""

    def __init__(self, connection: Connection, column: EmbeddingColumn) -> None:
        self._connection = connection
        self._statement = _evidence(column).as_string(connection)
        self._width = len(column.key)

    async def read(self, keys: Sequence[Key]) -> list[Evidence]:
        """Judge `keys` (at least one) as they stand now, in order. Raises psycopg.Error as it comes."""
        cursor = self._connection.cursor(binary=True)
        cursor.adapters.register_loader("text", ByteaBinaryLoader)
        cursor.adapters.register_loader(cursor.adapters.types["float4"].array_oid, _Floats)
        columns = [[key[position] for key in keys] for position in range(self._width)]
        await cursor.execute(self._statement, columns, prepare=True)
        return [Evidence(Finding(finding), text, vector) for finding, text, vector in await cursor.fetchall()]


class _Floats(Loader):
    """A real[] of one dimension without NULLs as an array; anything else as an empty one. Source: arrayfuncs.c."""

    format = Format.BINARY

    def load(self, data: Buffer) -> NDArray[np.float32]:
        dimensions, has_null = np.frombuffer(data, dtype=">i4", count=2)
        if dimensions != 1 or has_null:
            return np.empty(0, dtype=np.float32)
        elements = np.frombuffer(data, dtype=[("length", ">i4"), ("value", ">f4")], offset=20)
        return elements["value"].astype(np.float32)


def _finding(column: EmbeddingColumn) -> sql.Composed:
    """SQL: what is the matter with the row `t`, its ledger row `l` and the fingerprint `f` beside it."""
    f = sql.SQL("f.fingerprint")
    return sql.SQL(
        "CASE WHEN {key} IS NULL THEN {absent}"
        " WHEN {is_null} THEN CASE WHEN {verdict} = 0 THEN {empty}"
        "  WHEN {target} IS NOT NULL AND (l.key_1 IS NULL OR l.fingerprint = {f}) THEN {wrong} ELSE {stale} END"
        " WHEN {failed} THEN {is_failed}"
        " WHEN {target} IS NULL OR l.key_1 IS NULL THEN {missing}"
        " WHEN l.fingerprint <> {f} OR l.generation <> {generation} THEN {stale}"
        " WHEN {current} THEN {vouched}"
        " ELSE {wrong} END"
    ).format(
        key=e.source_key(column)[0],
        absent=_number(Finding.ABSENT),
        is_null=e.is_null(column),
        verdict=fetch.verdict(column, f),
        empty=_number(Finding.EMPTY),
        target=e.target(column),
        f=f,
        wrong=_number(Finding.WRONG),
        stale=_number(Finding.STALE),
        failed=fetch.failed(column, f),
        is_failed=_number(Finding.FAILED),
        missing=_number(Finding.MISSING),
        generation=sql.Literal(column.generation),
        current=fetch.current(column, f),
        vouched=_number(Finding.VOUCHED),
    )


def _number(finding: Finding) -> e.Composed:
    return sql.Literal(int(finding))


def _page(column: EmbeddingColumn, *, first: bool) -> sql.Composed:
    source = e.source_key(column)
    counted = (Finding.FAILED, Finding.MISSING, Finding.STALE, Finding.WRONG)
    return sql.SQL(
        "WITH page AS MATERIALIZED ("
        " SELECT {key_text} AS key, row_number() OVER (ORDER BY {order}) AS position,"
        "        {is_null} AS is_null, {finding} AS finding"
        "   FROM (SELECT {columns} FROM {table} t{after} ORDER BY {order} LIMIT {limit}) t"
        "   LEFT JOIN {ledger} l ON {same}"
        "   CROSS JOIN LATERAL (SELECT {fingerprint} AS fingerprint OFFSET 0) f)"
        " SELECT count(*), count(*) FILTER (WHERE is_null), {counts},"
        "        coalesce(jsonb_agg(to_jsonb(key) ORDER BY position) FILTER (WHERE finding = {vouched}), '[]'),"
        "        (SELECT to_jsonb(key) FROM page ORDER BY position DESC LIMIT 1)"
        "   FROM page"
    ).format(
        key_text=e.key_text(column),
        order=scan.in_order(column.key, source),
        is_null=e.is_null(column),
        finding=_finding(column),
        columns=sql.SQL(", ").join(sql.Identifier("t", name) for name in scan.needed_columns(column)),
        table=e.table(column),
        after=sql.SQL("") if first else sql.SQL(" WHERE {}").format(scan.comes_after(column.key, source)),
        limit=sql.Literal(scan.PAGE),
        ledger=e.ledger(column),
        same=e.same_key(column.key, [e.ledger_key(n) for n in range(len(column.key))], source),
        fingerprint=e.fingerprint(column),
        counts=sql.SQL(", ").join(
            sql.SQL("count(*) FILTER (WHERE finding = {})").format(_number(finding)) for finding in counted
        ),
        vouched=_number(Finding.VOUCHED),
    )


def _evidence(column: EmbeddingColumn) -> sql.Composed:
    width = len(column.key)
    source = e.source_key(column)
    inputs = [sql.Identifier("k", f"key_{n + 1}") for n in range(width)]
    return sql.SQL(
        "SELECT CASE WHEN j.finding = {vouched} AND j.before > {limit} THEN {later} ELSE j.finding END,"
        " CASE WHEN j.finding = {vouched} AND j.before <= {limit} THEN j.text END,"
        " CASE WHEN j.finding = {vouched} AND j.before <= {limit} THEN j.vector END"
        " FROM (SELECT s.*, sum(s.size) OVER (ORDER BY s.ordinal) - s.size AS before FROM ("
        "  SELECT k.ordinal, v.finding, {text} AS text,"
        "         CASE WHEN v.finding = {vouched} THEN CAST({target} AS real[]) END AS vector,"
        "         CASE WHEN v.finding = {vouched} THEN octet_length({text}) ELSE 0 END AS size"
        "    FROM unnest({arrays}) WITH ORDINALITY AS k({names}, ordinal)"
        "    LEFT JOIN {table} t ON {same_source}"
        "    LEFT JOIN {ledger} l ON {same_ledger}"
        "   CROSS JOIN LATERAL (SELECT {fingerprint} AS fingerprint OFFSET 0) f"
        "   CROSS JOIN LATERAL (SELECT {finding} AS finding OFFSET 0) v"
        " ) s) j ORDER BY j.ordinal"
    ).format(
        vouched=_number(Finding.VOUCHED),
        later=_number(Finding.LATER),
        limit=sql.Literal(fetch.TEXT_BYTES),
        text=e.text(column),
        target=e.target(column),
        arrays=sql.SQL(", ").join(sql.SQL(f"${n + 1}::text[]") for n in range(width)),
        names=sql.SQL(", ").join(sql.Identifier(f"key_{n + 1}") for n in range(width)),
        table=e.table(column),
        same_source=e.same_key(column.key, source, e.typed(column.key, inputs)),
        ledger=e.ledger(column),
        same_ledger=e.same_key(column.key, [e.ledger_key(n) for n in range(width)], source),
        fingerprint=e.fingerprint(column),
        finding=_finding(column),
    )


def _orphans(column: EmbeddingColumn, *, first: bool) -> sql.Composed:
    ledger = [e.ledger_key(n) for n in range(len(column.key))]
    return sql.SQL(
        "WITH page AS MATERIALIZED ("
        " SELECT ARRAY[{texts}] AS key, row_number() OVER (ORDER BY {order}) AS position,"
        "        EXISTS (SELECT FROM {table} t WHERE {same}) AS present"
        "   FROM (SELECT {keys} FROM {name} l{after} ORDER BY {order} LIMIT {limit}) l)"
        " SELECT count(*), count(*) FILTER (WHERE NOT present),"
        "        (SELECT to_jsonb(key) FROM page ORDER BY position DESC LIMIT 1)"
        "   FROM page"
    ).format(
        texts=sql.SQL(", ").join(sql.SQL("CAST({} AS text)").format(key) for key in ledger),
        order=scan.in_order(column.key, ledger),
        table=e.table(column),
        same=e.same_key(column.key, e.source_key(column), ledger),
        keys=sql.SQL(", ").join(ledger),
        name=e.ledger(column),
        after=sql.SQL("") if first else sql.SQL(" WHERE {}").format(scan.comes_after(column.key, ledger)),
        limit=sql.Literal(scan.PAGE),
    )
