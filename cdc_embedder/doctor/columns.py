"""The configured columns: what has become of table, key and target since, and what the service says of them.

What a configured column must be is judged by the database's own functions, those that judged its INSERT.
"""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import LiteralString

import psycopg

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.doctor.finding import Check, Verdict, error, ok, statement, warning
from cdc_embedder.doctor.mending import default_identity, mend, mend_target, not_full, split
from cdc_embedder.doctor.patient import Patient
from cdc_embedder.identifiers import join_plain


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
    return [await _state(patient, column) for column in patient.columns]


async def _state(patient: Patient, column: EmbeddingColumn) -> Verdict:
    row = patient.status.get(column.id, {})
    if column.fault is not None:
        return error(column.label, column.fault, await _against_the_fault(patient, column))
    reason = row.get("reason") or ""
    if row.get("state") == "error":
        return error(column.label, f"the service cannot serve it: {reason}", _remedy_within(reason))
    if patient.reader is not None and row.get("circuit_breaker") not in (None, "closed"):
        sentence = f"its model's circuit breaker is {row['circuit_breaker']}: {row.get('last_error') or reason}"
        return error(column.label, sentence, "cdc-embedder status # and the model's service, device or network")
    if row.get("state") == "paused" and column.enabled:
        remedy = _about_vectors(column) if column.on_existing == "ask" else _remedy_within(reason)
        return warning(column.label, f"it is paused: {reason}", remedy)
    return ok(column.label, "paused by its operator" if not column.enabled else f"it is {row.get('state', 'new')}")


async def _against_the_fault(patient: Patient, column: EmbeddingColumn) -> str:
    """What the check would say that finds the same; the fault itself ends with what is to be done otherwise."""
    with suppress(psycopg.Error):  # those checks tell
        for query, by in ((_CHECK_TABLE, mend), (_CHECK_KEY, mend), (_CHECK_TARGET, mend_target)):
            for verdict in await _judge(patient, column, query, by):
                return verdict.remedy
    refused = column.refuses_updates and await default_identity(patient, column)
    return refused or split(column.fault or "")[1]


def _remedy_within(reason: str) -> str:
    """The statement that such a sentence of the service's ends with, if it has one."""
    _, remedy = split(reason)
    return "cdc-embedder status # and the service's log" if remedy in ("", f"-- {reason}") else remedy


def _about_vectors(column: EmbeddingColumn) -> str:
    """What keeps nothing that is not the model's stands first."""
    name = shlex.quote(join_plain([column.schema, column.table, column.target.name if column.target else ""]))
    replace = f"UPDATE cdc_embedder.embedding_column SET on_existing = 'replace' WHERE id = {column.id};"
    return f"cdc-embedder adopt {name} # or, to have them embedded anew: {replace}"


async def source_table(patient: Patient) -> list[Verdict]:
    """Table, source columns, and that the slot can hear of it."""
    verdicts = []
    for column in there(patient):
        found = await _judge(patient, column, _CHECK_TABLE, mend)
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
    verdicts = []
    for column in there(patient):
        refused = await _judge(patient, column, _CHECK_KEY, mend, lambda state: state != _IDENTITY)
        verdicts += refused or [ok(column.label, "its primary key serves")]
    return verdicts


async def replica_identity(patient: Patient) -> list[Verdict]:
    """NOTHING, or an index that is gone, makes the application's updates fail; FULL makes them dear."""
    verdicts = []
    for column in there(patient):
        if refused := await _judge(patient, column, _CHECK_KEY, mend, lambda state: state == _IDENTITY):
            verdicts += refused
            continue
        full, remedy = await not_full(patient, column)
        if full:
            sentence = f"{full} has REPLICA IDENTITY FULL: each update writes the old row to the WAL, its vector too"
            verdicts.append(warning(column.label, sentence, f"{remedy} -- unless somebody else needs it"))
        else:
            verdicts.append(ok(column.label, "its replica identity serves"))
    return verdicts


_IDENTITY = "55000"

_CHECK_KEY = """
SELECT cdc_embedder._check_key(c.source_table, c.keys_only) FROM cdc_embedder.embedding_column c WHERE c.id = $1
"""


async def target_column(patient: Patient) -> list[Verdict]:
    verdicts = []
    for column in there(patient):
        found = await _judge(patient, column, _CHECK_TARGET, mend_target)
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
    patient: Patient,
    column: EmbeddingColumn,
    query: LiteralString,
    by: Callable[[Patient, EmbeddingColumn, str | None], Awaitable[str]],
    mine: Callable[[str], bool] = lambda state: True,
) -> list[Verdict]:
    """The refusal of the database's own check as an error, unless its SQLSTATE is another check's to tell."""
    try:
        await patient.rows(query, column.id)
    except psycopg.Error as refused:
        if refused.sqlstate in (None, "42501", "57014"):
            raise
        if mine(refused.sqlstate):
            why, remedy = split(refused.diag.message_hint or "")
            sentence = ": ".join(filter(None, (refused.diag.message_primary, why)))
            return [error(column.label, sentence, await by(patient, column, refused.sqlstate) or remedy)]
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
