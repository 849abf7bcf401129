"""The configured columns: what has become of table, key and target since, and what the service says of them.

What a configured column must be is judged by the database's own functions, those that judged its INSERT.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import LiteralString

import psycopg

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.doctor.finding import Check, Verdict, error, ok, statement, warning
from cdc_embedder.doctor.patient import Patient


async def configured(patient: Patient) -> list[Verdict]:
    """Whether there is anything to do, and whether new columns will be this service's."""
    subject = "cdc_embedder.embedding_column"
    [default] = await patient.one(
        "SELECT pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef d"
        "  JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum"
        " WHERE d.adrelid = 'cdc_embedder.embedding_column'::regclass AND a.attname = 'slot'"
    )
    verdicts = []
    if default != f"'{patient.slot}'::name":
        verdicts.append(
            warning(
                subject,
                f"new columns get the slot {default}, this service's is {patient.slot}",
                f"cdc-embedder init --slot {patient.slot}",
            )
        )
    elsewhere = sorted({row["slot"] for row in patient.status.values() if row["slot"] != patient.slot
                        and row["state"] == "stopped"})  # fmt: skip
    for slot in elsewhere:
        sentence = f"columns of the slot {slot} are configured, and no service runs for it"
        verdicts.append(warning(subject, sentence, f"CDC_EMBEDDER_SLOT={slot} cdc-embedder run"))
    if not patient.columns:
        sentence = f"no column is configured for the slot {patient.slot}"
        verdicts.append(warning(subject, sentence, "cdc-embedder add TABLE SOURCE TARGET"))
    return verdicts or [ok(subject, f"{len(patient.columns)} column(s) are configured")]


async def state(patient: Patient) -> list[Verdict]:
    """What the service says of each column, and what the catalog says against serving it."""
    if not patient.status:
        await patient.read_status()  # it failed before: now it is told why
    return [_state(patient, column) for column in patient.columns]


def _state(patient: Patient, column: EmbeddingColumn) -> Verdict:
    row = patient.status.get(column.id, {})
    if column.fault is not None:
        return error(column.label, column.fault, _remedy_within(column.fault))
    reason = row.get("reason") or ""
    if row.get("state") == "error":
        return error(column.label, f"the service cannot serve it: {reason}", _remedy_within(reason))
    if patient.reader is not None and row.get("circuit_breaker") not in (None, "closed"):
        sentence = f"its model's circuit breaker is {row['circuit_breaker']}: {row.get('last_error') or reason}"
        return error(column.label, sentence, "cdc-embedder status # and the model's service, device or network")
    if row.get("state") == "paused" and column.enabled:
        return warning(column.label, f"it is paused: {reason}", _remedy_within(reason))
    return ok(column.label, "paused by its operator" if not column.enabled else f"it is {row.get('state', 'new')}")


def _remedy_within(sentence: str) -> str:
    """What such a sentence says is to be done stands at its end; a statement goes to the very end."""
    if found := re.search(r"(SELECT cdc_embedder\.|ALTER |GRANT ).*$", sentence):
        return found[0]
    for mark in ("; ", ". "):
        if mark in sentence:
            return sentence.rpartition(mark)[2]
    return "cdc-embedder status # and the service's log"


async def source_table(patient: Patient) -> list[Verdict]:
    """Table, source columns, and that the slot can hear of it."""
    verdicts = []
    for column in there(patient):
        found = await _judge(patient, column, _CHECK_TABLE)
        if found:
            verdicts += found
        elif column.unlogged:
            sentence = "the table is unlogged: the slot never hears of it, scans alone feed it"
            remedy = statement("ALTER TABLE {} SET LOGGED;", (column.schema, column.table))
            verdicts.append(warning(column.label, sentence, remedy))
        else:
            verdicts.append(ok(column.label, "table and source columns are as they must be"))
    return verdicts


_CHECK_TABLE = """
SELECT cdc_embedder._check_table(c.source_table, c.id),
       cdc_embedder._check_sources(c.source_table, (
           SELECT array_agg(a.attname::text ORDER BY s.position)
             FROM unnest(c.source_attnums) WITH ORDINALITY AS s(attnum, position)
             JOIN pg_attribute a ON a.attrelid = c.source_table AND a.attnum = s.attnum))
  FROM cdc_embedder.embedding_column c WHERE c.id = $1
"""


async def primary_key(patient: Patient) -> list[Verdict]:
    return await _by_key(patient, lambda state: state != _IDENTITY, "its primary key serves")


async def replica_identity(patient: Patient) -> list[Verdict]:
    """NOTHING, or an index that is gone, makes the application's updates fail; FULL makes them dear."""
    verdicts = await _by_key(patient, lambda state: state == _IDENTITY, "its replica identity serves")
    for column in there(patient):
        [full] = await patient.one(
            "SELECT string_agg(oid::regclass::text, ', ') FROM pg_class WHERE relreplident = 'f' AND relkind = 'r'"
            "   AND oid IN (SELECT $1::oid UNION SELECT relid FROM pg_partition_tree($1::oid))",
            column.table_oid,
        )
        if full:
            verdicts = [verdict for verdict in verdicts if verdict.subject != column.label]
            sentence = f"{full} has REPLICA IDENTITY FULL: each update writes the old row to the WAL, its vector too"
            remedy = statement("ALTER TABLE {} REPLICA IDENTITY DEFAULT;", (column.schema, column.table))
            verdicts.append(warning(column.label, sentence, f"{remedy} -- unless somebody else needs it"))
    return verdicts


_IDENTITY = "55000"


async def _by_key(patient: Patient, mine: Callable[[str], bool], well: str) -> list[Verdict]:
    verdicts = []
    for column in there(patient):
        verdicts += await _judge(patient, column, _CHECK_KEY, mine) or [ok(column.label, well)]
    return verdicts


_CHECK_KEY = """
SELECT cdc_embedder._check_key(c.source_table, c.keys_only) FROM cdc_embedder.embedding_column c WHERE c.id = $1
"""


async def target_column(patient: Patient) -> list[Verdict]:
    verdicts = []
    for column in there(patient):
        found = await _judge(patient, column, _CHECK_TARGET)
        kind = column.target.type if column.target else "no column"
        verdicts += found or [ok(column.label, f"{kind} holds the {column.model.dimensions} dimensions of its model")]
    return verdicts


_CHECK_TARGET = """
SELECT cdc_embedder._check_target(c.source_table, coalesce(a.attname, c.target_column), c.source_columns, m.name,
                                  m.dimensions)
  FROM cdc_embedder.embedding_column c
  JOIN cdc_embedder.model m ON m.name = c.model
  LEFT JOIN pg_attribute a ON a.attrelid = c.source_table AND a.attnum = c.target_attnum AND NOT a.attisdropped
 WHERE c.id = $1
"""


async def _judge(
    patient: Patient, column: EmbeddingColumn, query: LiteralString, mine: Callable[[str], bool] = lambda state: True
) -> list[Verdict]:
    """The refusal of the database's own check as an error, unless its SQLSTATE is another check's to tell."""
    try:
        await patient.rows(query, column.id)
    except psycopg.Error as refused:
        if refused.sqlstate in (None, "42501", "57014"):
            raise
        if mine(refused.sqlstate):
            return [error(column.label, refused.diag.message_primary or "", refused.diag.message_hint or "")]
    return []


def there(patient: Patient) -> list[EmbeddingColumn]:
    """Columns whose table there still is."""
    return [column for column in patient.columns if column.key or column.target is not None]


CHECKS = (
    Check("configuration", configured, "schema"),
    Check("column-state", state, "columns"),
    Check("source-table", source_table, "columns"),
    Check("primary-key", primary_key, "columns"),
    Check("replica-identity", replica_identity, "columns"),
    Check("target-column", target_column, "columns"),
)
