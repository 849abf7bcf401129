"""What the service keeps about its own work: scans wanted and done, states for `status`, progress of the slot.

Small statements on tables of our own schema; nothing here touches a user's table but for the publication's list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from psycopg import errors, sql

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.lane import Lane
from cdc_embedder.lsn import LSN
from cdc_embedder.rows.session import Connection, jsonb, one


@dataclass(frozen=True, slots=True)
class ScanRequest:
    """The row of `scan` for a column: is one wanted, has one ever started, does the first one count.

    `age_s`: seconds since the last one was finished; `storage`: see `EmbeddingColumn.storage`, when last looked at.
    """

    wanted: bool = True
    started: bool = False
    counted: bool = False
    counts: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    age_s: float = 0.0
    storage: int | None = None


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A pass that was broken off: every row up to `position` was judged. It serves one request and one generation."""

    request: str
    generation: int
    key: list[str]
    position: list[str]
    sound: bool
    counts: list[int]


async def scans(connection: Connection) -> dict[int, ScanRequest]:
    """Every column's scan row by column id."""
    cursor = await connection.execute(
        "SELECT column_id, requested_at IS NOT NULL AND (finished_at IS NULL OR requested_at > finished_at),"
        ' started_at IS NOT NULL, counted, coalesce(rows, 0), coalesce("null", 0), coalesce(current, 0),'
        " coalesce(failed, 0), coalesce(truncated, 0),"
        " coalesce(extract(epoch FROM clock_timestamp() - finished_at)::float8, 0), storage FROM cdc_embedder.scan"
    )
    return {row[0]: ScanRequest(row[1], row[2], row[3], tuple(row[4:9]), *row[9:]) for row in await cursor.fetchall()}


async def want_scan(connection: Connection, columns: Sequence[int], reason: str, *, uncover: bool = True) -> None:
    """Durably request a scan of each column.

    `uncover`: events may have been missed, so the scan must be made under a snapshot taken after the stream covers
    the table again (rule 10), whatever was wanted before. Otherwise a request that is open stays as it is.
    """
    await connection.execute(
        "UPDATE cdc_embedder.scan SET requested_at = clock_timestamp(), reason = $2, counted = counted AND NOT $3,"
        " unfinished = CASE WHEN NOT $3 THEN unfinished END WHERE column_id = ANY($1)"
        " AND ($3 OR requested_at IS NULL OR requested_at <= finished_at)",
        (list(columns), reason, uncover),
    )


async def note_storage(connection: Connection, column: EmbeddingColumn) -> None:
    """Remember in which files and partitions the rows are: a scan of them was requested, or was not needed."""
    await connection.execute(
        "UPDATE cdc_embedder.scan SET storage = $2 WHERE column_id = $1", (column.id, column.storage)
    )


async def scan_started(connection: Connection, column: int) -> tuple[str, Unfinished | None]:
    """A pass over the table begins: the request it answers, for `scan_finished`, and where to go on, if anywhere."""
    row = await one(
        connection,
        "UPDATE cdc_embedder.scan SET started_at = clock_timestamp() WHERE column_id = $1"
        " RETURNING coalesce(requested_at, 'epoch')::text, unfinished",
        (column,),
    )
    if row is None:
        return "epoch", None
    return row[0], Unfinished(**row[1]) if row[1] is not None and row[1]["request"] == row[0] else None


async def scan_checkpoint(connection: Connection, column: int, unfinished: Unfinished) -> None:
    """Every row up to the position was judged: a pass that is broken off after this goes on from there."""
    await connection.execute(
        "UPDATE cdc_embedder.scan SET unfinished = $2 WHERE column_id = $1 AND coalesce(requested_at, 'epoch') = $3",
        (column, jsonb(asdict(unfinished)), unfinished.request),
    )


async def scan_finished(connection: Connection, lane: Lane, request: str) -> None:
    """The pass is complete and its keys are judged; a later request stays open. Without a stream it never counts.

    Nothing is adopted after it (see `rows.adoption`).
    """
    scan = lane.scan
    await connection.execute(
        "WITH finished AS (UPDATE cdc_embedder.scan SET finished_at = greatest($2::timestamptz, started_at),"
        ' counted = $8, rows = $3, "null" = $4, current = $5, failed = $6, truncated = $7, unfinished = NULL'
        " WHERE column_id = $1 AND coalesce(requested_at, 'epoch') = $2::timestamptz RETURNING column_id)"
        " UPDATE cdc_embedder.generation g SET adopting = false"
        "   FROM finished f WHERE g.column_id = f.column_id AND g.adopting",
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


async def make_publication(connection: Connection, slot: str) -> bool:
    """Make the publication where it is missing; whether it was. Raises psycopg.Error where the role may not.

    It is made empty and before the slot: otherwise 14 to 17 stick at the first change, and 18 passes changes over.
    """
    if await one(connection, "SELECT FROM pg_publication WHERE pubname = $1", (slot,)) is not None:
        return False
    await connection.execute(
        sql.SQL("CREATE PUBLICATION {} WITH (publish = 'insert, update', publish_via_partition_root = true)").format(
            sql.Identifier(slot)
        )
    )
    return True


async def publish(connection: Connection, slot: str, column: EmbeddingColumn) -> str | None:
    """Add a table to the publication; None, or the statement that somebody with the right must run."""
    keys = sql.SQL(", ").join(sql.Identifier(key.name) for key in column.key)
    statement = sql.SQL("ALTER PUBLICATION {} ADD TABLE {}{}").format(
        sql.Identifier(slot),
        sql.Identifier(column.schema, column.table),
        sql.SQL(" ({})").format(keys) if column.keys_only else sql.SQL(""),
    )
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


async def report(
    connection: Connection, lane: Lane, oldest_s: float | None, rows_per_s: float, circuit_breaker: str
) -> None:
    """Write what `status` shows about a column."""
    state, reason = lane.state
    scan = lane.scan
    await connection.execute(
        'INSERT INTO cdc_embedder.column_state AS s (column_id, state, reason, rows, "null", current, failed,'
        " truncated, pending, backlog, oldest_pending_s, rows_per_s, circuit_breaker, engine, last_error,"
        " updated_at)"
        " SELECT $1::int, $2::text, $3::text, $4::int8, $5::int8, $6::int8, $7::int8, $8::int8, $9::int8, $10::int8,"
        " $11::float8, $12::float8, $13::text, $14::text, $15::text, clock_timestamp()"
        " WHERE EXISTS (SELECT FROM cdc_embedder.embedding_column WHERE id = $1)"
        " ON CONFLICT (column_id) DO UPDATE SET state = excluded.state, reason = excluded.reason, rows = excluded.rows,"
        ' "null" = excluded."null", current = excluded.current, failed = excluded.failed,'
        " truncated = excluded.truncated, pending = excluded.pending, backlog = excluded.backlog,"
        " oldest_pending_s = excluded.oldest_pending_s, rows_per_s = excluded.rows_per_s,"
        " circuit_breaker = excluded.circuit_breaker, engine = excluded.engine, last_error = excluded.last_error,"
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
            lane.outstanding,
            lane.backlog,
            oldest_s,
            rows_per_s,
            circuit_breaker,
            None if lane.embedder is None else lane.embedder.engine,
            lane.last_error,
        ),
    )


async def take_term(connection: Connection, slot: str, service: str) -> int:
    """Rule 9: a term of one's own. Write-backs of an earlier term change nothing from now on."""
    row = await one(
        connection,
        "INSERT INTO cdc_embedder.leader AS l (slot, term, service) VALUES ($1, 1, $2) ON CONFLICT (slot) DO UPDATE"
        " SET term = l.term + 1, service = excluded.service, since = clock_timestamp() RETURNING term",
        (slot, service),
    )
    assert row is not None
    return int(row[0])


async def give_up(connection: Connection, slot: str, retained_bytes: int, reason: str) -> None:
    """Note, durably, that the slot was given up, with a scan of each of its columns requested."""
    async with connection.transaction():
        cursor = await connection.execute("SELECT id FROM cdc_embedder.embedding_column WHERE slot = $1", (slot,))
        await want_scan(connection, [row[0] for row in await cursor.fetchall()], reason)
        await connection.execute(
            "INSERT INTO cdc_embedder.given_up AS g (slot, retained_bytes) VALUES ($1, $2) ON CONFLICT (slot) DO UPDATE"
            " SET at = excluded.at, retained_bytes = excluded.retained_bytes",
            (slot, retained_bytes),
        )


async def given_up(connection: Connection, slot: str) -> bool:
    """Whether the slot was given up, and is not to be made again yet."""
    return await one(connection, "SELECT FROM cdc_embedder.given_up WHERE slot = $1", (slot,)) is not None


async def take_again(connection: Connection, slot: str) -> None:
    """The slot may be made again."""
    await connection.execute("DELETE FROM cdc_embedder.given_up WHERE slot = $1", (slot,))


_HERE = """
SELECT s.system_identifier, ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int AS timeline,
       d.oid AS database_oid
  FROM pg_control_system() s, pg_database d WHERE d.datname = current_database()
"""
"""Not pg_control_checkpoint(): its timeline is the old one until the first checkpoint after a promotion."""


async def elsewhere(connection: Connection, slot: str) -> bool:
    """Whether this slot was served before, but in another cluster, on another timeline or in another database."""
    row = await one(
        connection,
        f"WITH here AS ({_HERE}), known AS (SELECT p.* FROM cdc_embedder.progress p WHERE p.slot = $1)"
        " SELECT EXISTS (SELECT FROM known) AND NOT EXISTS ("
        "   SELECT FROM known JOIN here USING (system_identifier, timeline, database_oid))",
        (slot,),
    )
    assert row is not None
    return bool(row[0])


async def progress(
    connection: Connection, slot: str, received: LSN, embedded: LSN, confirmed: LSN, service: str
) -> None:
    """Write how far the slot was read, embedded and confirmed, for this very cluster, timeline and database."""
    await connection.execute(
        "INSERT INTO cdc_embedder.progress AS p (system_identifier, timeline, database_oid, slot, received,"
        " embedded_through, confirmed, updated_at, service)"
        " SELECT h.system_identifier, h.timeline, h.database_oid, $1::name, $2::pg_lsn, $3::pg_lsn, $4::pg_lsn,"
        f" clock_timestamp(), $5::text FROM ({_HERE}) h"
        " ON CONFLICT (system_identifier, timeline, database_oid, slot) DO UPDATE"
        " SET received = greatest(p.received, excluded.received),"
        " embedded_through = greatest(p.embedded_through, excluded.embedded_through),"
        " confirmed = greatest(p.confirmed, excluded.confirmed),"
        " updated_at = excluded.updated_at, service = excluded.service",
        (slot, str(received), str(embedded), str(confirmed), service),
    )
