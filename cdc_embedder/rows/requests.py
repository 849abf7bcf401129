"""What the service keeps about its own work: scans wanted and done, states for `status`, progress of the slot.

Small statements on tables of our own schema; nothing here touches a user's table but for the publication's list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import errors, sql

from cdc_embedder.lane import Lane
from cdc_embedder.lsn import LSN
from cdc_embedder.rows.session import Connection, one


@dataclass(frozen=True, slots=True)
class ScanRequest:
    """The row of `scan` for a column: is one wanted, has one ever started, does the first one count."""

    wanted: bool
    started: bool
    counted: bool
    counts: tuple[int, int, int, int, int]


async def scans(connection: Connection) -> dict[int, ScanRequest]:
    """Every column's scan row by column id."""
    cursor = await connection.execute(
        "SELECT column_id, requested_at IS NOT NULL AND (finished_at IS NULL OR requested_at > finished_at),"
        ' started_at IS NOT NULL, counted, coalesce(rows, 0), coalesce("null", 0), coalesce(current, 0),'
        " coalesce(failed, 0), coalesce(truncated, 0) FROM cdc_embedder.scan"
    )
    return {row[0]: ScanRequest(row[1], row[2], row[3], tuple(row[4:])) for row in await cursor.fetchall()}


async def want_scan(connection: Connection, columns: Sequence[int], reason: str, *, uncover: bool = True) -> None:
    """Durably request a scan of each column, where none is wanted already.

    `uncover`: events may have been missed, so the scan must be made under a snapshot taken after the stream covers
    the table again (rule 10).
    """
    await connection.execute(
        "UPDATE cdc_embedder.scan SET requested_at = clock_timestamp(), reason = $2, counted = counted AND NOT $3"
        " WHERE column_id = ANY($1) AND (requested_at IS NULL OR requested_at <= finished_at OR (counted AND $3))",
        (list(columns), reason, uncover),
    )


async def scan_started(connection: Connection, column: int) -> object:
    """A pass over the table begins; returns the request it answers, for `scan_finished`."""
    row = await one(
        connection,
        "UPDATE cdc_embedder.scan SET started_at = clock_timestamp() WHERE column_id = $1 RETURNING requested_at",
        (column,),
    )
    return row[0] if row else None


async def scan_finished(connection: Connection, lane: Lane, request: object) -> None:
    """The pass is complete and its keys are judged; a later request stays open. Without a stream it never counts."""
    scan = lane.scan
    await connection.execute(
        "UPDATE cdc_embedder.scan SET finished_at = greatest($2::timestamptz, started_at), counted = $8,"
        ' rows = $3, "null" = $4, current = $5, failed = $6, truncated = $7 WHERE column_id = $1',
        (lane.column.id, request, scan.rows, scan.null, scan.current, scan.failed, scan.truncated, scan.counted),
    )


async def weights(connection: Connection, column: int, generation: int, identity: str) -> str | None:
    """Record what was loaded for a generation the first time; returns what is recorded (None: no such generation)."""
    await connection.execute(
        "UPDATE cdc_embedder.generation SET weights = $3 WHERE column_id = $1 AND generation = $2 AND weights IS NULL",
        (column, generation, identity),
    )
    row = await one(
        connection,
        "SELECT weights FROM cdc_embedder.generation WHERE column_id = $1 AND generation = $2",
        (column, generation),
    )
    return row[0] if row else None


async def remake_ledger(connection: Connection, column: int) -> bool:
    """Make the ledger, or make it anew where the key's columns or types changed; whether it did."""
    row = await one(connection, "SELECT cdc_embedder._make_ledger($1)", (column,))
    return bool(row and row[0])


async def follow(connection: Connection, column: int) -> None:
    """Have the configuration table note the table's present name and columns. Raises psycopg.Error where it refuses."""
    await connection.execute(
        "UPDATE cdc_embedder.embedding_column SET source_table = source_table WHERE id = $1", (column,)
    )


async def publish(connection: Connection, slot: str, schema: str, table: str) -> str | None:
    """Add a table to the publication; None, or the statement that somebody with the right must run."""
    statement = sql.SQL("ALTER PUBLICATION {} ADD TABLE {}").format(sql.Identifier(slot), sql.Identifier(schema, table))
    try:
        await connection.execute(statement)
    except errors.DuplicateObject:
        return None
    except errors.Error:
        if connection.broken:
            raise
        return statement.as_string(connection)
    return None


async def unpublish(connection: Connection, slot: str, schema: str, table: str) -> None:
    """Take a table out of the publication, where the role may and it is in it."""
    statement = sql.SQL("ALTER PUBLICATION {} DROP TABLE {}").format(
        sql.Identifier(slot), sql.Identifier(schema, table)
    )
    try:
        await connection.execute(statement)
    except errors.Error:
        if connection.broken:
            raise


async def report(connection: Connection, lane: Lane, oldest_s: float | None, rows_per_s: float) -> None:
    """Write what `status` shows about a column."""
    state, reason = lane.state
    scan = lane.scan
    await connection.execute(
        'INSERT INTO cdc_embedder.column_state AS s (column_id, state, reason, rows, "null", current, failed,'
        " truncated, pending, oldest_pending_s, rows_per_s, scan_rows, last_error, updated_at)"
        " SELECT $1::int, $2::text, $3::text, $4::int8, $5::int8, $6::int8, $7::int8, $8::int8, $9::int8,"
        " $10::float8, $11::float8, $4::int8, $12::text, clock_timestamp()"
        " WHERE EXISTS (SELECT FROM cdc_embedder.embedding_column WHERE id = $1)"
        " ON CONFLICT (column_id) DO UPDATE SET state = excluded.state, reason = excluded.reason, rows = excluded.rows,"
        ' "null" = excluded."null", current = excluded.current, failed = excluded.failed,'
        " truncated = excluded.truncated, pending = excluded.pending, oldest_pending_s = excluded.oldest_pending_s,"
        " rows_per_s = excluded.rows_per_s, scan_rows = excluded.scan_rows, last_error = excluded.last_error,"
        " updated_at = excluded.updated_at",
        (
            lane.column.id,
            state,
            reason,
            scan.rows,
            scan.null,
            scan.current,
            scan.failed,
            scan.truncated,
            len(lane.pending),
            oldest_s,
            rows_per_s,
            lane.last_error,
        ),
    )


async def progress(connection: Connection, slot: str, received: LSN, confirmed: LSN, service: str) -> None:
    """Write how far the slot was read and confirmed, for this very cluster, timeline and database."""
    await connection.execute(
        "INSERT INTO cdc_embedder.progress AS p (system_identifier, timeline, database_oid, slot, received,"
        " embedded_through, confirmed, updated_at, service)"
        " SELECT s.system_identifier, c.timeline_id, d.oid, $1::name, $2::pg_lsn, $3::pg_lsn, $3::pg_lsn,"
        " clock_timestamp(), $4::text"
        "   FROM pg_control_system() s, pg_control_checkpoint() c, pg_database d WHERE d.datname = current_database()"
        " ON CONFLICT (system_identifier, timeline, database_oid, slot) DO UPDATE"
        " SET received = excluded.received, embedded_through = excluded.embedded_through,"
        " confirmed = excluded.confirmed, updated_at = excluded.updated_at, service = excluded.service",
        (slot, str(received), str(confirmed), service),
    )
