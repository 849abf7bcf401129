"""Writing vectors back: rules 4, 5 and 13 in one statement a batch.

The statement locks the rows whose present text still has the fingerprint that was embedded, skipping those that
somebody else has locked; updates them; and records in the ledger what the rows then *hold*, as `UPDATE … RETURNING`
saw it. It does so only while the generation is current and nobody has taken over the slot (rule 9): those rows are
locked FOR SHARE first. Nothing here decides that a key is done for any other reason than having been written.

A row that was locked but not updated, or that holds something else afterwards, was refused or altered by a trigger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from psycopg import sql

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.embedding.base import Vectors
from cdc_embedder.pending import Key
from cdc_embedder.rows import binary
from cdc_embedder.rows import expressions as e
from cdc_embedder.rows.session import Connection

CHANGED_BY_TRIGGER = "changed by a trigger: the row does not hold what was written"
KILLED_THE_PROCESS = "the process died twice while it embedded this text: it is set aside"
REFUSED_BY_TRIGGER = "changed by a trigger: the update was refused"

_RETRY_AT = (
    "clock_timestamp() + least(interval '1 hour', interval '10 seconds' * power(2, least({attempts}, 12)))"
    " * (0.75 + random() / 2)"
)


class Write(NamedTuple):
    """One row of a batch.

    `has_vector`: a vector is to be stored; otherwise NULL is (no text, or a text that failed again), or, with
    `keep`, the target is left alone (a text that failed for the first time). `error` makes the ledger say failed.
    """

    key: Key
    fingerprint: bytes
    has_vector: bool
    truncated: bool = False
    keep: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Term:
    """Who writes: the slot, and the number that its leader got when it took the slot over."""

    slot: str
    number: int


class WriteBack:
    """The write-back of one column on one session; the statement is composed once and prepared by the server."""

    def __init__(
        self, connection: Connection, column: EmbeddingColumn, term: Term, *, without_triggers: str | None = None
    ) -> None:
        """`without_triggers`: write nothing while the table has UPDATE triggers enabled in one of these ways."""
        self._connection = connection
        self._column = column
        self._width = len(column.key)
        self._statement = _statement(column, term, without_triggers).as_string(connection)

    async def write(self, writes: Sequence[Write], vectors: Vectors) -> set[int]:
        """Write a batch, with `vectors` of shape (len(writes), dimensions); rows without a vector are ignored there.

        Returns the ordinals (from 0) of the rows that were written or recorded as failed; the others were locked,
        changed or gone, the generation is not current any more, or the term is over. Commits; raises psycopg.Error as
        it comes.
        """
        assert self._column.target is not None
        cursor = self._connection.cursor(binary=True)
        binary.register(cursor)
        flags: NDArray[np.int16] = np.fromiter(
            (w.has_vector | w.truncated << 1 | w.keep << 2 for w in writes), dtype=np.int16, count=len(writes)
        )
        parameters = [
            *(binary.texts([write.key[position] for write in writes]) for position in range(self._width)),
            binary.octets([write.fingerprint for write in writes], 32),
            flags.tolist(),
            binary.texts([write.error for write in writes]),
            binary.vectors(vectors, self._column.target.kind, self._column.target.oid),
        ]
        await cursor.execute(self._statement, parameters, prepare=True)
        return {ordinal - 1 for (ordinal,) in await cursor.fetchall()}


_SHAPE = """
WITH guard AS MATERIALIZED (
    SELECT FROM cdc_embedder.generation g JOIN cdc_embedder.leader e ON e.slot = {slot} AND e.term = {term}
     WHERE g.column_id = {column_id} AND g.generation = {generation} AND g.superseded_at IS NULL
       FOR SHARE
), locked AS MATERIALIZED (
    SELECT {source_key}, i.ordinal, i.fingerprint, i.flags, i.error, {vector} AS vector
      FROM unnest({inputs}) WITH ORDINALITY AS i({input_names}, ordinal)
      JOIN {table} t ON {input_is_source}
     WHERE {fingerprint} = i.fingerprint AND EXISTS (SELECT FROM guard){no_triggers}
     ORDER BY {source_order}
       FOR NO KEY UPDATE OF t SKIP LOCKED
), updated AS (
    UPDATE {table} t SET {target_name} = k.vector
      FROM locked k
     WHERE {locked_is_source} AND k.flags & 4 = 0
    RETURNING {locked_key}, k.ordinal, k.fingerprint, k.flags, k.error, {stored} AS digest{check}
), held AS (
    SELECT {updated_key}, u.ordinal, u.fingerprint, u.flags, {outcome} AS error, u.digest FROM updated u
    UNION ALL
    SELECT {locked_key}, k.ordinal, k.fingerprint, k.flags,
           CASE WHEN k.flags & 4 <> 0 THEN k.error ELSE {refused} END, NULL
      FROM locked k WHERE k.ordinal NOT IN (SELECT u.ordinal FROM updated u)
), recorded AS (
    INSERT INTO {ledger} AS l ({ledger_names}, fingerprint, generation, vector_digest, state, attempts, error, retry_at,
                               embedded_at)
    SELECT {held_key}, h.fingerprint, {generation}, CASE WHEN h.error IS NULL THEN h.digest END,
           CASE WHEN h.error IS NOT NULL THEN 'failed' WHEN h.flags & 2 <> 0 THEN 'truncated' ELSE 'current' END,
           CASE WHEN h.error IS NULL THEN 0 ELSE 1 END, h.error,
           CASE WHEN h.error = {killed} THEN clock_timestamp() + interval '1 minute'
                WHEN h.error IS NOT NULL THEN {first_retry} END, clock_timestamp()
      FROM held h
    ON CONFLICT ({ledger_names}) DO UPDATE
       SET fingerprint = excluded.fingerprint, generation = excluded.generation, vector_digest = excluded.vector_digest,
           state = excluded.state, error = excluded.error, embedded_at = excluded.embedded_at,
           attempts = CASE WHEN excluded.error IS NULL THEN 0 WHEN {again} THEN l.attempts + 1 ELSE 1 END,
           retry_at = CASE WHEN excluded.error IS NULL OR ({again} AND excluded.error = {killed}) THEN NULL
                           WHEN {again} THEN {later_retry}
                           ELSE excluded.retry_at END
)
SELECT ordinal FROM held
"""

# What a trigger may have done to the row. Where none fires there is nothing to compare.
_CHECK = ", {fingerprint} AS present, {sent} AS sent"
_OUTCOME = "CASE WHEN u.present <> u.fingerprint OR u.digest IS DISTINCT FROM u.sent THEN {changed} ELSE u.error END"

_AGAIN = "l.state = 'failed' AND l.fingerprint = excluded.fingerprint AND l.generation = excluded.generation"

# The check and the trigger's creation exclude each other: CREATE TRIGGER waits for our lock on the table, and a
# statement that waited for it has a newer snapshot.
_NO_TRIGGERS = """ AND NOT EXISTS (
           SELECT FROM pg_trigger g
            WHERE (g.tgrelid = {oid} OR g.tgrelid IN (SELECT relid FROM pg_partition_tree({oid}::regclass)))
              AND NOT g.tgisinternal AND g.tgtype & 16 <> 0
              AND strpos({enabled}, g.tgenabled::text) > 0
              AND g.tgfoid NOT IN (SELECT oid FROM pg_proc WHERE pronamespace = 'cdc_embedder'::regnamespace))"""


def _statement(column: EmbeddingColumn, term: Term, without_triggers: str | None) -> sql.Composed:
    assert column.target is not None
    width = len(column.key)
    names = [sql.Identifier(f"key_{n + 1}") for n in range(width)]
    locked = [sql.Identifier("k", f"key_{n + 1}") for n in range(width)]
    source = e.source_key(column)
    comma = sql.SQL(", ").join
    inputs, input_names = _inputs(column, names)
    check: e.Composed = sql.SQL("")
    outcome: e.Composed = sql.SQL("u.error")
    if without_triggers is None:
        sent = e.digest(column, sql.Identifier("k", "vector"))
        check = sql.SQL(_CHECK).format(fingerprint=e.fingerprint(column), sent=sent)
        outcome = sql.SQL(_OUTCOME).format(changed=sql.Literal(CHANGED_BY_TRIGGER))
    return sql.SQL(_SHAPE).format(
        slot=sql.Literal(term.slot),
        term=sql.Literal(term.number),
        column_id=sql.Literal(column.id),
        generation=sql.Literal(column.generation),
        source_key=comma(sql.SQL("{} AS {}").format(a, b) for a, b in zip(source, names, strict=True)),
        vector=_vector(column, width),
        inputs=comma(inputs),
        input_names=comma(input_names),
        table=e.table(column),
        input_is_source=e.same_key(
            column.key, source, e.typed(column.key, [sql.Identifier("i", f"key_{n + 1}") for n in range(width)])
        ),
        fingerprint=e.fingerprint(column),
        no_triggers=sql.SQL("")
        if without_triggers is None
        else sql.SQL(_NO_TRIGGERS).format(oid=sql.Literal(column.table_oid), enabled=sql.Literal(without_triggers)),
        source_order=comma(source),
        target_name=sql.Identifier(column.target.name),
        locked_is_source=e.same_key(column.key, source, locked),
        stored=e.digest(column, e.target(column)),
        locked_key=comma(locked),
        updated_key=comma(sql.Identifier("u", f"key_{n + 1}") for n in range(width)),
        refused=sql.Literal(REFUSED_BY_TRIGGER),
        check=check,
        outcome=outcome,
        ledger=e.ledger(column),
        ledger_names=comma(names),
        held_key=comma(sql.Identifier("h", f"key_{n + 1}") for n in range(width)),
        first_retry=sql.SQL(_RETRY_AT).format(attempts=sql.SQL("0")),
        later_retry=sql.SQL(_RETRY_AT).format(attempts=sql.SQL("l.attempts")),
        again=sql.SQL(_AGAIN),
        killed=sql.Literal(KILLED_THE_PROCESS),
    )


def _inputs(
    column: EmbeddingColumn, names: Sequence[sql.Composable]
) -> tuple[list[sql.Composable], list[sql.Composable]]:
    """What is unnested side by side, and under which names."""
    assert column.target is not None
    width = len(names)
    inputs: list[sql.Composable] = [sql.SQL(f"${n + 1}::text[]") for n in range(width)]
    inputs += [sql.SQL(f"${width + 1}::bytea[]"), sql.SQL(f"${width + 2}::int2[]"), sql.SQL(f"${width + 3}::text[]")]
    input_names = [*names, sql.Identifier("fingerprint"), sql.Identifier("flags"), sql.Identifier("error")]
    if column.target.kind in ("vector", "halfvec"):
        inputs.append(sql.SQL(f"CAST(${width + 4} AS {column.target.type}[])"))
        input_names.append(sql.Identifier("vector"))
    return inputs, input_names


def _vector(column: EmbeddingColumn, width: int) -> sql.Composable:
    """The row's vector, or NULL. Arrays of arrays cannot be unnested: a flat array is sliced instead."""
    assert column.target is not None
    if column.target.kind in ("vector", "halfvec"):
        return sql.SQL("CASE WHEN i.flags & 1 <> 0 THEN i.vector END")
    size = column.model.dimensions
    return sql.SQL(
        f"CASE WHEN i.flags & 1 <> 0 THEN (${width + 4}::{column.target.kind}[])"
        f"[(i.ordinal - 1) * {size} + 1 : i.ordinal * {size}] END"
    )
