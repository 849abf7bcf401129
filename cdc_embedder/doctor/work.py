"""What makes writing vectors slow, and what work is left: indexes, pages, triggers, failed rows, the backlog."""

from __future__ import annotations

from psycopg import sql

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.doctor.columns import there
from cdc_embedder.doctor.finding import Check, Verdict, ok, statement, warning
from cdc_embedder.doctor.patient import Patient
from cdc_embedder.rows.writers import suppress_triggers

NOTICEABLE_UPDATES = 1000
"""Of fewer updates the share that was HOT tells nothing."""

LEAST_HOT_SHARE = 0.5


async def vector_index(patient: Patient) -> list[Verdict]:
    """HNSW and IVFFlat indexes on a column while it is filled: 390 rows a second with one, 30,000 without."""
    verdicts = []
    for column in there(patient):
        rows = await patient.rows(_VECTOR_INDEXES, column.table_oid, column.target.name if column.target else "")
        unfinished = await _being_filled(patient, column)
        for schema, index, method, definition in rows if unfinished else ():
            verdicts.append(
                warning(
                    column.label,
                    f"it is being filled, and the {method} index {index} is kept up to date for every row: about 390"
                    " rows a second with it, 30,000 without. Embed first, index afterwards",
                    statement("DROP INDEX {};", (schema, index)) + f"\n-- and when it is filled: {definition};",
                )
            )
    return verdicts or [ok("vector indexes", "none stands in the way of a column that is being filled")]


_VECTOR_INDEXES = """
SELECT n.nspname, x.relname, m.amname, pg_get_indexdef(x.oid)
  FROM pg_index i
  JOIN pg_class x ON x.oid = i.indexrelid
  JOIN pg_namespace n ON n.oid = x.relnamespace
  JOIN pg_am m ON m.oid = x.relam
  JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attname = $2 AND a.attnum = ANY (i.indkey)
 WHERE i.indrelid = $1::oid AND m.amname IN ('hnsw', 'ivfflat')
"""


async def _being_filled(patient: Patient, column: EmbeddingColumn) -> bool:
    """Its first scan is not over, and it has rows without a vector of their own."""
    [first] = await patient.one("SELECT NOT counted FROM cdc_embedder.scan WHERE column_id = $1", column.id)
    row = patient.status.get(column.id, {})
    rows, null, current = row.get("rows"), row.get("null"), row.get("current")
    return bool(first) and (rows is None or rows - (null or 0) > (current or 0))


async def room_on_pages(patient: Patient) -> list[Verdict]:
    """A vector that fits on its row's page is written without touching any index (HOT), where the column has none."""
    verdicts = []
    for column in there(patient):
        rows = await patient.rows(_UPDATES, column.table_oid)
        for schema, table, updates, hot, fillfactor in rows:
            if updates < NOTICEABLE_UPDATES or hot >= LEAST_HOT_SHARE * updates:
                continue
            verdicts.append(
                warning(
                    column.label,
                    f"of {updates} updates of {schema}.{table} {hot} were HOT, and its fillfactor is {fillfactor}: the"
                    " others wrote to every index",
                    statement("ALTER TABLE {} SET (fillfactor = 70);", (schema, table))
                    + " -- new pages have room then; VACUUM FULL makes the old ones anew, under a lock",
                )
            )
    return verdicts or [ok("fillfactor", "updates of the configured tables are HOT, or few, or have room to be")]


_UPDATES = """
SELECT s.schemaname, s.relname, s.n_tup_upd, s.n_tup_hot_upd, o.fillfactor
  FROM pg_stat_user_tables s
  JOIN pg_class c ON c.oid = s.relid
 CROSS JOIN LATERAL (
        SELECT coalesce(max(option_value) FILTER (WHERE option_name = 'fillfactor'), '100')::int AS fillfactor
          FROM pg_options_to_table(c.reloptions)) o
 WHERE s.relid IN (SELECT $1::oid UNION SELECT relid FROM pg_partition_tree($1::oid)) AND o.fillfactor > 90
"""


async def triggers(patient: Patient) -> list[Verdict]:
    """Triggers and rules of the user's that fire on the write-back."""
    verdicts = []
    suppressed = await suppress_triggers(patient.connection)
    if suppressed:
        await patient.connection.execute("RESET session_replication_role")
    for column in there(patient):
        if not (column.fires_always if suppressed else column.fires_triggers):
            verdicts.append(ok(column.label, "nothing of the application's fires when a vector is written"))
            continue
        [names] = await patient.one(_TRIGGERS, column.table_oid, ["A"] if column.fires_always else ["O", "A"])
        always = suppressed or column.fires_always
        if patient.version >= 150000 and not always:
            remedy = statement("GRANT SET ON PARAMETER session_replication_role TO {};", patient.around.role)
        else:
            remedy = "-- make it anew, BEFORE UPDATE OF the columns that it is about: all but the vector's"
        verdicts.append(
            warning(
                column.label,
                f"{names or 'a rule'} fires when a vector is written: it costs time, the service's own change is heard"
                " again, and a row that it alters is failed",
                remedy,
            )
        )
    return verdicts


_TRIGGERS = """
SELECT 'the trigger ' || string_agg(DISTINCT quote_ident(g.tgname), ', ') FROM pg_trigger g
 WHERE g.tgrelid IN (SELECT $1::oid UNION SELECT relid FROM pg_partition_tree($1::oid))
   AND NOT g.tgisinternal AND g.tgtype & 16 <> 0 AND g.tgenabled = ANY ($2)
   AND g.tgfoid NOT IN (SELECT oid FROM pg_proc WHERE pronamespace = 'cdc_embedder'::regnamespace)
"""


async def failed_rows(patient: Patient) -> list[Verdict]:
    verdicts = []
    for column in patient.columns:
        number = patient.status.get(column.id, {}).get("failed")
        if number:
            remedy = statement(
                "SELECT cdc_embedder.retry_failed({});", sql.Literal(statement("{}", (column.schema, column.table)))
            ) + (" -- after a look at: SELECT * FROM cdc_embedder.failed")
            verdicts.append(warning(column.label, f"{number} row(s) could not be embedded", remedy))
        else:
            verdicts.append(ok(column.label, "no row failed"))
    return verdicts


async def backlog(patient: Patient) -> list[Verdict]:
    """Keys that were spilled, and that nobody works off."""
    verdicts = []
    for column in patient.columns:
        [since] = await patient.one("SELECT cdc_embedder._spilled_from($1)::text", column.id)
        if since is None:
            verdicts.append(ok(column.label, "its backlog is empty"))
        elif patient.reader is None:
            sentence = f"its backlog holds keys from {since} on, and no service runs to work it off"
            verdicts.append(warning(column.label, sentence, "cdc-embedder run"))
        else:
            number = patient.status.get(column.id, {}).get("backlog")
            verdicts.append(ok(column.label, f"its backlog ({number or 'some'} keys) is being worked off"))
    return verdicts


CHECKS = (
    Check("vector-index", vector_index, "columns"),
    Check("fillfactor", room_on_pages, "columns"),
    Check("triggers", triggers, "columns"),
    Check("failed-rows", failed_rows, "columns"),
    Check("backlog", backlog, "columns"),
)
