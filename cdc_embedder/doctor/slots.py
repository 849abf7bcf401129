"""The slots: whose they are, in what state, who reads them, what they hold back, and what holds them back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from psycopg import sql
from psycopg.rows import TupleRow

from cdc_embedder.conninfo import APPLICATION_NAME
from cdc_embedder.doctor.finding import Check, Verdict, error, ok, statement, warning
from cdc_embedder.doctor.patient import Patient
from cdc_embedder.sizes import size
from cdc_embedder.wal.diagnosis import Slot, propose
from cdc_embedder.wal.slot import PLUGINS

OLD_TRANSACTION_S = 300.0
"""A transaction that has been open for longer is worth naming."""

SETTLED_S = 1.0
"""Where nobody says for how long a transaction has been open: those that are still there then are not the ordinary."""


async def slot(patient: Patient) -> list[Verdict]:
    """Whether the slot of that name is ours, and with the plugin that is asked for."""
    found, name = patient.around.slot, patient.slot
    if found is None:
        return [ok(f"slot {name}", "there is none yet: the first `run` makes it")]
    if not found.logical or found.database != patient.around.database:
        whose = f"of the database {found.database}" if found.logical else "a physical one"
        other = propose(name, patient.around.database)
        return [
            error(
                f"slot {name}",
                f"it is {whose}, and slot names are shared by the whole server",
                f"cdc-embedder init --slot {other} # then CDC_EMBEDDER_SLOT={other}",
            )
        ]
    if found.plugin not in PLUGINS:
        return [
            error(
                f"slot {name}",
                f"its output plugin is {found.plugin}, which the service does not understand",
                statement("SELECT pg_drop_replication_slot({});", sql.Literal(name))
                + " -- the next `run` makes it anew",
            )
        ]
    asked = patient.settings.output_plugin
    if asked not in ("auto", found.plugin):
        return [
            warning(
                f"slot {name}",
                f"its plugin is {found.plugin}, CDC_EMBEDDER_OUTPUT_PLUGIN is {asked}: an existing slot's plugin wins",
                _drop_stopped(name),
            )
        ]
    return [ok(f"slot {name}", f"it is there, with the plugin {found.plugin}")]


async def slot_status(patient: Patient) -> list[Verdict]:
    """Whether the server still keeps what the slots need."""
    verdicts = []
    for name in (patient.slot, patient.embed_slot):
        found = await patient.find_slot(name)
        if found is None or not found.logical:
            continue
        verdicts.append(_status(found))
    return verdicts or [ok(f"slot {patient.slot}", "there is none yet")]


def _status(found: Slot) -> Verdict:
    subject = f"slot {found.name}"
    safe = "" if found.safe_wal_size is None else f", {size(max(found.safe_wal_size, 0))} may still be written"
    if found.lost:
        return error(
            subject,
            f"the server gave it up ({found.invalidation_reason}): the service makes it anew and scans everything",
            "cdc-embedder run # and a larger max_slot_wal_keep_size, if this comes back",
        )
    if found.wal_status == "unreserved":
        return error(
            subject,
            f"its wal_status is unreserved{safe}: the next checkpoint takes what it needs",
            "cdc-embedder run # or: ALTER SYSTEM SET max_slot_wal_keep_size = '…'; SELECT pg_reload_conf();",
        )
    return ok(subject, f"its wal_status is {found.wal_status}{safe}")


async def slot_retained(patient: Patient) -> list[Verdict]:
    """WAL held back, against the budget of the settings."""
    budget = patient.settings
    rows = await patient.slot_rows(_RETAINED, patient.slot, patient.embed_slot)
    verdicts = []
    for name, retained in rows:
        sentence = f"it holds back {size(retained)} of WAL"
        remedy = "cdc-embedder status # and end what `open-transactions` and `slot-reader` name"
        if budget.wal_alarm_bytes and retained > budget.wal_alarm_bytes:
            more = f"{sentence}, more than the alarm at {size(budget.wal_alarm_bytes)}"
            verdicts.append(error(f"slot {name}", more, remedy))
        elif budget.wal_warn_bytes and retained > budget.wal_warn_bytes:
            more = f"{sentence}, more than the warning at {size(budget.wal_warn_bytes)}"
            verdicts.append(warning(f"slot {name}", more, remedy))
        else:
            verdicts.append(ok(f"slot {name}", sentence))
    return verdicts or [ok(f"slot {patient.slot}", "there is none that would hold anything back")]


_RETAINED = """
SELECT s.slot_name, greatest(pg_wal_lsn_diff(
           CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END,
           s.restart_lsn), 0)::int8
  FROM pg_replication_slots s
 WHERE s.slot_name IN ($1, $2) AND s.database = current_database() AND s.restart_lsn IS NOT NULL
"""


async def slot_given_up(patient: Patient) -> list[Verdict]:
    rows = await patient.rows(
        "SELECT at::timestamptz(0)::text, retained_bytes FROM cdc_embedder.given_up WHERE slot = $1", patient.slot
    )
    for at, retained in rows:
        return [
            error(
                f"slot {patient.slot}",
                f"it was given up at {at}, when it held back {size(retained)} of WAL: the service waits to be told",
                "SELECT cdc_embedder.take_slot_again();",
            )
        ]
    return [ok(f"slot {patient.slot}", "it was not given up")]


async def slot_reader(patient: Patient) -> list[Verdict]:
    """Whether a service runs, and whether it is ours that reads the slot."""
    found, subject = patient.around.slot, f"slot {patient.slot}"
    active = found is not None and found.active
    if active and patient.reader is None:
        assert found is not None
        cursor = await patient.home(patient.slot).execute(
            "SELECT coalesce((SELECT nullif(application_name, '') FROM pg_stat_activity WHERE pid = $1), 'unknown')",
            (found.active_pid,),
        )
        [[who]] = await cursor.fetchall()
        if who.startswith(APPLICATION_NAME):
            sentence = "a service reads it and has not the lock beside it: it has just ended, or its session was cut"
            return [warning(subject, sentence, "cdc-embedder doctor # again, in a minute")]
        return [
            error(
                subject,
                f"it is read by the session {found.active_pid} ({who}), which is no service of ours: what that one"
                " confirms, we never hear of",
                f"SELECT pg_terminate_backend({found.active_pid});",
            )
        ]
    if active:
        return [ok(subject, "a service runs and reads it")]
    if patient.reader is not None:
        return [
            warning(
                subject,
                f"a service has the lock (session {patient.reader}) and does not read the slot: it starts, waits for"
                " open transactions, or for the model",
                "cdc-embedder status # and the service's log",
            )
        ]
    if found is None:
        return [ok(subject, "no service runs, and none did before", "cdc-embedder run")]
    return [warning(subject, "no service runs, and the slot holds WAL back", "cdc-embedder run")]


async def embed_slot(patient: Patient) -> list[Verdict]:
    """The slot for requests from SQL: there when they are wanted, gone when not."""
    found, name = await patient.find_slot(patient.embed_slot), patient.embed_slot
    if found is None:
        if patient.sql_embed and patient.reader is not None:
            return [warning(f"slot {name}", "SQL may ask for vectors, and the slot is missing", "cdc-embedder run")]
        return [ok(f"slot {name}", "there is none" + ("" if patient.sql_embed else ", and none is wanted"))]
    if not patient.sql_embed:
        return [
            warning(
                f"slot {name}",
                "it is there, but SQL may not ask for vectors: it only holds WAL back",
                statement("SELECT pg_drop_replication_slot({});", sql.Literal(name)),
            )
        ]
    if not found.active:
        return [
            warning(
                f"slot {name}", "nobody reads it: requests from SQL wait, and it holds WAL back", "cdc-embedder run"
            )
        ]
    return [ok(f"slot {name}", "it is read")]


async def failover_slot(patient: Patient) -> list[Verdict]:
    """17 and up: whether standbys may have the slot, and whether one that is gone stops it.

    The service makes all of its slots as failover slots. Whether a standby synchronizes them is told there alone.
    """
    if patient.standby is not None:
        return [
            ok("failover", "the slot is on a standby: there it survives a failover to that one; a scan repairs any")
        ]
    if patient.version < 170000:
        return [ok("failover", "slots that survive a failover are there from PostgreSQL 17 on; a scan repairs one")]
    verdicts = []
    found = patient.around.slot
    if found is not None and found.logical and not found.failover:
        verdicts.append(
            warning(
                f"slot {found.name}",
                "it is no failover slot, as those are that the service makes: after a failover it is made anew, and"
                " everything is scanned",
                statement("ALTER_REPLICATION_SLOT {} (FAILOVER true);", found.name)
                + " -- while the service is stopped, by: psql 'dbname=… replication=database'",
            )
        )
    rows = await patient.rows(
        "SELECT n.name FROM (SELECT trim(unnest(string_to_array(current_setting('synchronized_standby_slots', true),"
        " ','))) AS name) n WHERE n.name <> '' AND NOT EXISTS ("
        "SELECT FROM pg_replication_slots s WHERE s.slot_name = n.name AND s.slot_type = 'physical' AND s.active)"
    )
    for (name,) in rows:
        verdicts.append(
            error(
                "synchronized_standby_slots",
                f"the standby of the slot {name} is not connected: a failover slot delivers nothing until it is",
                "ALTER SYSTEM RESET synchronized_standby_slots;\nSELECT pg_reload_conf(); -- or bring the standby back",
            )
        )
    slots = "it is a failover slot" if found is not None and found.failover else "the slot will be a failover slot"
    return verdicts or [ok("failover", f"{slots}: standbys that synchronize slots have it; a scan repairs the others")]


async def standby_decoding(patient: Patient) -> list[Verdict]:
    """Where the slot is on a standby: what makes that one lose it, or stand still."""
    if patient.standby is None:
        return [ok("standby", "the slot is on the primary")]
    [here] = await patient.one("SELECT pg_current_wal_lsn()::text")
    cursor = await patient.standby.execute(
        "SELECT current_setting('hot_standby_feedback')::bool, current_setting('primary_slot_name'),"
        " EXISTS (SELECT FROM pg_stat_wal_receiver), pg_wal_lsn_diff($1::pg_lsn, pg_last_wal_replay_lsn())::int8",
        (here,),
    )
    [[feedback, physical_slot, receives, behind]] = await cursor.fetchall()
    verdicts = []
    if not feedback:
        verdicts.append(
            warning(
                "hot_standby_feedback",
                "it is off on the standby: the primary removes what decoding needs, and the slot is invalidated",
                "ALTER SYSTEM SET hot_standby_feedback = on;\nSELECT pg_reload_conf(); -- on the standby",
            )
        )
    if not physical_slot:
        verdicts.append(
            warning(
                "primary_slot_name",
                "it is empty on the standby: whenever that one is away the primary forgets what it needs",
                "SELECT pg_create_physical_replication_slot('standby'); -- on the primary; then on the standby:"
                " ALTER SYSTEM SET primary_slot_name = 'standby'; SELECT pg_reload_conf();",
            )
        )
    if not receives:
        verdicts.append(
            error(
                "standby",
                f"it receives nothing from the primary, and is {size(max(behind, 0))} behind: so are the vectors",
                "SELECT * FROM pg_stat_wal_receiver; -- on the standby, whose log says why",
            )
        )
    [may] = await patient.one("SELECT has_function_privilege('pg_log_standby_snapshot()', 'EXECUTE')")
    grant = statement("GRANT EXECUTE ON FUNCTION pg_log_standby_snapshot() TO {};", patient.around.role)
    behind_now = ok(
        "standby",
        f"the slot is there; it is {size(max(behind, 0))} behind",
        "" if may else f"{grant} -- optional: a slot is made at once",
    )
    return verdicts or [behind_now]


async def open_transactions(patient: Patient) -> list[Verdict]:
    """Sessions and prepared transactions that have written and stay open: no slot can release WAL behind them."""
    rows = await patient.rows(_OPEN)
    verdicts = []
    for pid, gid, owner, database, state, seconds, _ in rows:
        if gid is not None and seconds > OLD_TRANSACTION_S:
            verdicts.append(
                warning(
                    f"prepared transaction {gid}",
                    f"of {owner} in {database}, open for {seconds:.0f} seconds: the slot holds WAL back for it",
                    statement("ROLLBACK PREPARED {};", sql.Literal(gid)) + f" -- in {database}; or COMMIT PREPARED",
                )
            )
        elif gid is None and seconds is not None and seconds > OLD_TRANSACTION_S:
            verdicts.append(
                warning(
                    f"session {pid}",
                    f"of {owner} in {database}, {state}, its transaction open for {seconds:.0f} seconds: the slot holds"
                    " WAL back for it",
                    f"SELECT pg_terminate_backend({pid});",
                )
            )
    if others := _of_unknown_age(rows):
        verdicts.append(await _judge_unknown(patient, others))
    return verdicts or [ok("open transactions", "none holds a slot back")]


_OPEN = """
SELECT a.pid, NULL::text, a.usename::text, a.datname::text, a.state,
       extract(epoch FROM clock_timestamp() - a.xact_start)::float8, a.backend_xid::text
  FROM pg_stat_activity a
 WHERE a.backend_xid IS NOT NULL AND a.pid <> pg_backend_pid() AND a.application_name NOT LIKE 'cdc-embedder %'
 UNION ALL
SELECT NULL, gid, owner::text, database::text, NULL, extract(epoch FROM clock_timestamp() - prepared)::float8, NULL
  FROM pg_prepared_xacts
 ORDER BY 6 DESC NULLS LAST, 1
"""


async def _judge_unknown(patient: Patient, others: dict[tuple[int, str], str]) -> Verdict:
    """A role without pg_read_all_stats sees that others have written and not since when: a warning where it matters."""
    subject, unseen = "open transactions", "since when cannot be seen by this role"
    grant = statement("GRANT pg_read_all_stats TO {};", patient.around.role)
    if not (waits := await _what_waits(patient)):
        return ok(subject, f"{len(others)} that have written are open; {unseen}", f"{grant} -- optional")
    await asyncio.sleep(SETTLED_S)
    after = _of_unknown_age(await patient.rows(_OPEN))
    stayed = [whose for transaction, whose in others.items() if transaction in after]
    if not stayed:
        return ok(subject, "none of those that have written stayed open")
    named = ", ".join(stayed[:_NAMED]) + (f" and {len(stayed) - _NAMED} more" if len(stayed) > _NAMED else "")
    sentence = f"{len(stayed)} that have written are open, {unseen}: {named}; {waits}"
    return warning(subject, sentence, f"{grant} -- then those that are old are told, each with what ends it")


_NAMED = 5


def _of_unknown_age(rows: Sequence[TupleRow]) -> dict[tuple[int, str], str]:
    """Whose the transactions are that this role cannot see more of, by pid and transaction id."""
    return {
        (pid, xid): f"session {pid} of {owner} in {database}"
        for pid, gid, owner, database, _, seconds, xid in rows
        if gid is None and seconds is None
    }


async def _what_waits(patient: Patient) -> str:
    """What open transactions are in the way of; nothing where the slots are made and hold back what they may."""
    for name in (patient.slot, patient.embed_slot) if patient.sql_embed else (patient.slot,):
        found = await patient.find_slot(name)
        if found is None or found.lost or (found.logical and found.confirmed_flush_lsn is None):
            return f"the slot {name} cannot be made until they have ended"
    budget = patient.settings.wal_warn_bytes or patient.settings.wal_alarm_bytes
    for name, retained in await patient.slot_rows(_RETAINED, patient.slot, patient.embed_slot):
        if 0 < budget < retained:
            return f"the slot {name} holds back {size(retained)} of WAL, and may do so for them"
    return ""


def _drop_stopped(name: str) -> str:
    drop = statement("SELECT pg_drop_replication_slot({});", sql.Literal(name))
    return f"{drop} -- while the service is stopped; it makes the slot anew and scans everything"


CHECKS = (
    Check("slot", slot),
    Check("slot-status", slot_status),
    Check("slot-retained", slot_retained),
    Check("slot-given-up", slot_given_up, "schema"),
    Check("slot-reader", slot_reader),
    Check("embed-slot", embed_slot),
    Check("failover-slot", failover_slot),
    Check("standby-decoding", standby_decoding),
    Check("open-transactions", open_transactions),
)
