"""Reading rows by key, and judging them: rules 2, 4 and 6. SQL in, verdicts out.

One statement reads the rows as they are now, compares text, generation and vector with the ledger, and gives the
snapshot it was made under. Text travels only for rows that need the model. A verdict counts only for keys whose
transaction that snapshot sees; the caller decides that.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from psycopg import sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.errors import CharacterNotInRepertoire, UntranslatableCharacter
from psycopg.pq import Format

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.pending import Key
from cdc_embedder.rows import binary
from cdc_embedder.rows import expressions as e
from cdc_embedder.rows.session import Connection
from cdc_embedder.visibility import Snapshot


class Verdict(IntEnum):
    """What is to be done about a row."""

    DONE = 0
    """Current, absent, or failed and not to be tried again yet."""
    EMBED = 1
    CLEAR = 2
    """The text is NULL and the vector, or the ledger, does not say so yet."""
    LATER = 3
    """To be embedded, but the texts before it fill the batch: it was not read, and is asked for again."""


TEXT_BYTES = 16 * 1024 * 1024
"""Text that one fetch brings, as the server counts it: a single longer one still travels, alone."""


_VERDICTS = tuple(Verdict)


class Row(NamedTuple):
    """A judged row. `text` is the server's bytes in UTF-8 as it sent them, None where it could not; `failures` of this
    very text so far."""

    verdict: Verdict
    fingerprint: bytes | None
    text: bytes | None
    failures: int


class _Bytes(Loader):
    """Text as bytes: a value that is not valid UTF-8 (in an SQL_ASCII database) concerns one row, not the batch."""

    format = Format.BINARY

    def load(self, data: Buffer) -> bytes:
        return bytes(data)


def current(column: EmbeddingColumn, fingerprint: e.Composed) -> e.Composed:
    """SQL: the row `t` with its ledger row `l` is current (rule 6). `generation` is the one the session works for."""
    return sql.SQL(
        "(l.state <> 'failed' AND l.fingerprint = {fingerprint} AND l.generation = {generation}"
        " AND {target} IS NOT NULL AND l.vector_digest = {digest})"
    ).format(
        fingerprint=fingerprint,
        generation=sql.Literal(column.generation),
        target=e.target(column),
        digest=e.digest(column, e.target(column)),
    )


def failed(column: EmbeddingColumn, fingerprint: e.Composed) -> e.Composed:
    """SQL: the ledger says that exactly this text failed under exactly this generation."""
    return sql.SQL("(l.state = 'failed' AND l.fingerprint = {} AND l.generation = {})").format(
        fingerprint, sql.Literal(column.generation)
    )


def verdict(column: EmbeddingColumn, fingerprint: e.Composed) -> e.Composed:
    """SQL: the verdict on the row `t` with its ledger row `l`.

    A NULL text with a NULL vector is done when the ledger has nothing about the row, or knows of the NULL; which
    generation it was cleared under does not matter.
    """
    return sql.SQL(
        "CASE WHEN {is_null} THEN"
        " CASE WHEN {target} IS NULL AND (l.key_1 IS NULL OR (l.fingerprint = {fingerprint} AND l.state = 'current'))"
        " THEN 0 ELSE 2 END"
        " WHEN {current} THEN 0"
        " WHEN {failed} AND coalesce(l.retry_at > now(), true) THEN 0"
        " ELSE 1 END"
    ).format(
        is_null=e.is_null(column),
        target=e.target(column),
        fingerprint=fingerprint,
        current=current(column, fingerprint),
        failed=failed(column, fingerprint),
    )


class Fetch:
    """The fetch of one column on one session; the statement is composed and prepared once."""

    def __init__(self, connection: Connection, column: EmbeddingColumn) -> None:
        self._connection = connection
        self._statement = _statement(column, texts=True).as_string(connection)
        self._without_texts = _statement(column, texts=False).as_string(connection)
        self._width = len(column.key)

    async def rows(self, keys: Sequence[Key]) -> list[tuple[Snapshot, Row]]:
        """Judge `keys` (at least one): for each key, in order, its row and the snapshot that it was read with.

        A text that the server cannot convert to UTF-8 is found by halving; its row has none and says EMBED. Raises
        psycopg.Error as it comes.
        """
        try:
            snapshot, rows = await self._read(self._statement, keys)
        except (CharacterNotInRepertoire, UntranslatableCharacter):
            if len(keys) == 1:
                snapshot, rows = await self._read(self._without_texts, keys)
            else:
                middle = len(keys) // 2
                return await self.rows(keys[:middle]) + await self.rows(keys[middle:])
        return [(snapshot, row) for row in rows]

    async def _read(self, statement: str, keys: Sequence[Key]) -> tuple[Snapshot, list[Row]]:
        cursor = self._connection.cursor(binary=True)
        cursor.adapters.register_loader("text", _Bytes)
        binary.register(cursor)
        columns = [binary.texts([key[position] for key in keys]) for position in range(self._width)]
        await cursor.execute(statement, columns, prepare=True)
        found = await cursor.fetchall()
        snapshot = Snapshot.parse(bytes(found[0][4]).decode())
        return snapshot, [
            Row(_VERDICTS[judged], fingerprint, text, failures) for judged, fingerprint, text, failures, _ in found
        ]


def _statement(column: EmbeddingColumn, *, texts: bool) -> sql.Composed:
    width = len(column.key)
    inputs = [sql.Identifier("k", f"key_{n + 1}") for n in range(width)]
    source = e.source_key(column)
    # A key without a row joins as a row of NULLs: no text and no vector, which is done.
    return sql.SQL(
        "SELECT CASE WHEN j.verdict = 1 AND j.before > {limit} THEN 3 ELSE j.verdict END, j.fingerprint,"
        " CASE WHEN j.verdict = 1 AND j.before <= {limit} THEN j.text END, j.failures,"
        " CASE WHEN j.ordinal = 1 THEN pg_current_snapshot()::text END"
        " FROM (SELECT s.*, sum(s.size) OVER (ORDER BY s.ordinal) - s.size AS before FROM ("
        "  SELECT k.ordinal, v.verdict, f.fingerprint, {text} AS text,"
        "         CASE WHEN v.verdict = 1 THEN octet_length({text}) ELSE 0 END AS size,"
        "         CASE WHEN {failed} THEN l.attempts ELSE 0 END AS failures"
        "    FROM unnest({arrays}) WITH ORDINALITY AS k({names}, ordinal)"
        "    LEFT JOIN {table} t ON {same_source}"
        "    LEFT JOIN {ledger} l ON {same_ledger}"
        "   CROSS JOIN LATERAL (SELECT {fingerprint} AS fingerprint OFFSET 0) f"
        "   CROSS JOIN LATERAL (SELECT {verdict} AS verdict OFFSET 0) v"
        " ) s) j ORDER BY j.ordinal"
    ).format(
        limit=sql.Literal(TEXT_BYTES),
        arrays=sql.SQL(", ").join(sql.SQL(f"${n + 1}::text[]") for n in range(width)),
        names=sql.SQL(", ").join(sql.Identifier(f"key_{n + 1}") for n in range(width)),
        text=e.text(column) if texts else sql.SQL("NULL::text"),
        verdict=verdict(column, sql.SQL("f.fingerprint")),
        failed=failed(column, sql.SQL("f.fingerprint")),
        fingerprint=e.fingerprint(column),
        table=e.table(column),
        ledger=e.ledger(column),
        same_ledger=e.same_key(column.key, [e.ledger_key(n) for n in range(width)], source),
        same_source=e.same_key(column.key, source, e.typed(column.key, inputs)),
    )
