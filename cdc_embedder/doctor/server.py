"""What the server must be and have free: version, settings, room for slots, senders, sessions, origins, and WAL."""

from __future__ import annotations

from psycopg import sql

from cdc_embedder.doctor.finding import Check, Verdict, error, ok, statement, warning
from cdc_embedder.doctor.patient import Patient
from cdc_embedder.doctor.plugins import output_plugin
from cdc_embedder.installable import OLDEST_SERVER
from cdc_embedder.rows.session import Connection
from cdc_embedder.sizes import size

SESSIONS = 10
"""What the service keeps beside its writers, one of them for replication (the README has the sum)."""

TO_THE_PRIMARY = "CDC_EMBEDDER_DSN='host=one,other … target_session_attrs=read-write'"


async def server_version(patient: Patient) -> list[Verdict]:
    major = patient.version // 10000
    if major < OLDEST_SERVER:
        sentence = f"it is PostgreSQL {major}; {OLDEST_SERVER} is the oldest that can be served"
        return [error("server", sentence, "pg_upgrade")]
    return [ok("server", f"it is PostgreSQL {major}")]


async def primary(patient: Patient) -> list[Verdict]:
    [standby] = await patient.one("SELECT pg_is_in_recovery()")
    if standby:
        return [
            error(
                "server",
                "it is a standby: nothing can be installed in it and no vector written to it",
                TO_THE_PRIMARY,
            )
        ]
    return [ok("server", "it is a primary")]


async def wal_level(patient: Patient) -> list[Verdict]:
    verdicts = []
    for (level,) in await patient.slot_rows("SELECT current_setting('wal_level')"):
        if level != "logical":
            verdicts.append(
                error(
                    "wal_level",
                    f"it is {level}: the log holds too little for logical replication",
                    "ALTER SYSTEM SET wal_level = logical; -- then restart the server",
                )
            )
    return verdicts or [ok("wal_level", "it is logical")]


async def replication_slots(patient: Patient) -> list[Verdict]:
    return [await _slots_free(patient, server) for server in _homes(patient)]


async def _slots_free(patient: Patient, server: Connection) -> Verdict:
    cursor = await server.execute(
        "SELECT current_setting('max_replication_slots')::int, (SELECT count(*) FROM pg_replication_slots)"
    )
    [[most, used]] = await cursor.fetchall()
    found = [await patient.find_slot(name) for name in _slots(patient) if patient.home(name) is server]
    missing = sum(slot is None for slot in found)
    sentence = f"{used} of {most} slots are in use{_where(patient, server)}"
    if missing > most - used:
        return error(
            "max_replication_slots",
            f"{sentence}, and the service has to make {missing} more",
            f"ALTER SYSTEM SET max_replication_slots = {used + missing + 4}; -- then restart the server,"
            " or drop a slot that nobody reads: SELECT * FROM pg_replication_slots",
        )
    return ok("max_replication_slots", sentence)


async def wal_senders(patient: Patient) -> list[Verdict]:
    return [await _senders_free(patient, server) for server in _homes(patient)]


async def _senders_free(patient: Patient, server: Connection) -> Verdict:
    cursor = await server.execute(
        "SELECT current_setting('max_wal_senders')::int, (SELECT count(*) FROM pg_stat_replication"
        " WHERE application_name IS DISTINCT FROM 'cdc-embedder doctor')"
    )
    [[most, used]] = await cursor.fetchall()
    wanted = 0
    for name in _slots(patient):
        if patient.home(name) is server:
            found = await patient.find_slot(name)
            wanted += found is None or not found.active
    sentence = f"{used} of {most} are in use{_where(patient, server)}"
    if wanted > most - used:
        return error(
            "max_wal_senders",
            f"{sentence}, and the service wants {wanted} more",
            f"ALTER SYSTEM SET max_wal_senders = {used + wanted + 4}; -- then restart the server",
        )
    return ok("max_wal_senders", sentence)


async def connections(patient: Patient) -> list[Verdict]:
    """Sessions free for the role, in the database, in the server."""
    extra = (patient.version < 170000) + (patient.standby is not None) + 2 * patient.sql_embed
    need = SESSIONS + patient.settings.writers + extra
    if patient.reader is not None:
        return [ok("sessions", "the service has those that it needs")]
    verdicts = []
    for what, most, used, remedy in await patient.rows(_ROOM):
        # the doctor's own session is among those in use, and ends with it
        if most is not None and need > most - used + 1:
            sentence = f"{used} of {most} sessions are in use, and the service needs {need}"
            verdicts.append(error(what, sentence, remedy.replace("?", str(used + need + 5))))
    return verdicts or [ok("sessions", f"the service needs {need}, and there is room for them")]


_ROOM = """
SELECT 'role ' || rolname, nullif(rolconnlimit, -1),
       (SELECT count(*) FROM pg_stat_activity WHERE usename = rolname),
       format('ALTER ROLE %I CONNECTION LIMIT ?;', rolname)
  FROM pg_roles WHERE rolname = current_user AND NOT rolsuper
 UNION ALL
SELECT 'database ' || datname, nullif(datconnlimit, -1),
       (SELECT count(*) FROM pg_stat_activity a WHERE a.datname = d.datname),
       format('ALTER DATABASE %I CONNECTION LIMIT ?;', datname)
  FROM pg_database d WHERE datname = current_database()
   AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
 UNION ALL
SELECT 'max_connections',
       (SELECT sum(CASE name WHEN 'max_connections' THEN setting::int ELSE -setting::int END) FROM pg_settings
         WHERE name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections')),
       (SELECT sum(numbackends) FROM pg_stat_database),
       'ALTER SYSTEM SET max_connections = ?; -- then restart the server'
"""


async def origins(patient: Patient) -> list[Verdict]:
    """Room for the writers' replication origins, which each take one of a setting that depends on the version."""
    name = "max_active_replication_origins" if patient.version >= 180000 else "max_replication_slots"
    most, others = await patient.one(
        "SELECT setting::int, (SELECT count(*) FROM pg_replication_origin WHERE NOT starts_with(roname, $2 || '_'))"
        "  FROM pg_settings WHERE name = $1",
        name,
        patient.slot,
    )
    writers = patient.settings.writers
    sentence = f"it is {most}; others have {others} replication origins, the service's writers would use {writers}"
    if others + writers > most:
        return [
            warning(
                name,
                f"{sentence}: where none is free the service hears its own writes, which costs a third of the rate",
                f"ALTER SYSTEM SET {name} = {others + writers + 4}; -- then restart the server",
            )
        ]
    return [ok(name, sentence)]


async def slot_wal_limit(patient: Patient) -> list[Verdict]:
    """max_slot_wal_keep_size, and that the service's own budget lies below it."""
    [limit] = await patient.one(
        "SELECT setting::int8 * 1024 * 1024 FROM pg_settings WHERE name = 'max_slot_wal_keep_size'"
    )
    if limit < 0:
        return [
            warning(
                "max_slot_wal_keep_size",
                "it is unlimited: the slot of a service that is stopped for long fills the server's disk, where a limit"
                " only costs a new scan",
                "ALTER SYSTEM SET max_slot_wal_keep_size = '20GB';\nSELECT pg_reload_conf();",
            )
        ]
    own = patient.settings.wal_limit_bytes or patient.settings.wal_alarm_bytes or patient.settings.wal_warn_bytes
    if own >= limit:  # where both are the same it is the server that acts first
        return [
            warning(
                "max_slot_wal_keep_size",
                f"it is {size(limit)}, no more than the {size(own)} at which the service would speak up or give the"
                " slot up in order: the server invalidates the slot first",
                f"ALTER SYSTEM SET max_slot_wal_keep_size = '{max(own // (1 << 20) * 2, 1024)}MB';\n"
                "SELECT pg_reload_conf();",
            )
        ]
    return [ok("max_slot_wal_keep_size", f"it is {size(limit)}")]


async def wal_directory(patient: Patient) -> list[Verdict]:
    """How large the WAL is, against what the settings mean it to be. SQL cannot tell how much room the disk has."""
    [may, meant] = await patient.one(
        "SELECT has_function_privilege('pg_catalog.pg_ls_waldir()', 'EXECUTE'),"
        " (SELECT sum(setting::int8) * 1024 * 1024 FROM pg_settings WHERE name IN ('max_wal_size', 'wal_keep_size'))"
    )
    unknown = "how much room its disk has cannot be learnt by SQL: df pg_wal"
    if not may:
        grant = statement("GRANT EXECUTE ON FUNCTION pg_ls_waldir() TO {};", patient.around.role)
        return [ok("pg_wal", f"its size cannot be seen by this role; {unknown}", f"{grant} -- optional")]
    [now] = await patient.one("SELECT coalesce(sum(size), 0)::int8 FROM pg_ls_waldir()")
    if now <= 2 * meant:
        return [ok("pg_wal", f"it holds {size(now)}; {unknown}")]
    held = await patient.rows(
        "SELECT slot_name FROM pg_replication_slots WHERE NOT active AND restart_lsn IS NOT NULL ORDER BY restart_lsn"
    )
    slots = ", ".join(row[0] for row in held)
    return [
        warning(
            "pg_wal",
            f"it holds {size(now)}, where max_wal_size and wal_keep_size mean {size(meant)}; slots that nobody reads:"
            f" {slots or 'none'}; {unknown}",
            "\n".join(statement("SELECT pg_drop_replication_slot({});", sql.Literal(row[0])) for row in held)
            or "SELECT * FROM pg_stat_archiver; -- a failing archive_command keeps WAL, too",
        )
    ]


async def synchronous_standbys(patient: Patient) -> list[Verdict]:
    [names, seen, sync] = await patient.one(
        "SELECT current_setting('synchronous_standby_names'),"
        " (SELECT rolsuper OR pg_has_role('pg_read_all_stats', 'USAGE') FROM pg_roles WHERE rolname = current_user),"
        " (SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum'))"
    )
    if not names:
        return [ok("synchronous_standby_names", "it is empty")]
    if not seen:
        grant = statement("GRANT pg_read_all_stats TO {};", patient.around.role)
        sentence = f"it is {names!r}; whether such a standby is connected cannot be seen by this role"
        return [ok("synchronous_standby_names", sentence, f"{grant} -- optional")]
    if sync:
        return [ok("synchronous_standby_names", f"it is {names!r}, and {sync} standby(s) answer")]
    return [
        warning(
            "synchronous_standby_names",
            f"it is {names!r} and no such standby is connected: the application's commits wait, and a row that waits"
            " reaches the slot but cannot be seen, so it is not embedded",
            "ALTER SYSTEM RESET synchronous_standby_names;\nSELECT pg_reload_conf(); -- or bring the standby back",
        )
    ]


def _slots(patient: Patient) -> list[str]:
    return [patient.slot, patient.embed_slot] if patient.sql_embed else [patient.slot]


def _homes(patient: Patient) -> list[Connection]:
    """The servers that the slots are, or will be, on."""
    return list(dict.fromkeys(patient.home(name) for name in _slots(patient)))


def _where(patient: Patient, server: Connection) -> str:
    return " on the standby" if server is patient.standby else ""


CHECKS = (
    Check("server-version", server_version),
    Check("primary", primary),
    Check("wal-level", wal_level),
    Check("replication-slots", replication_slots),
    Check("wal-senders", wal_senders),
    Check("sessions", connections),
    Check("origins", origins),
    Check("slot-wal-limit", slot_wal_limit),
    Check("wal-directory", wal_directory),
    Check("output-plugin", output_plugin),
    Check("synchronous-standbys", synchronous_standbys),
)
