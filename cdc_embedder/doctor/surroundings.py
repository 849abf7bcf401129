"""What lies between the service and the server: poolers, the replication connection, clocks, and what the role's own
settings do to a session."""

from __future__ import annotations

import time

import psycopg

from cdc_embedder.conninfo import pinned
from cdc_embedder.database_errors import from_database
from cdc_embedder.doctor.finding import Check, Verdict, error, ok, statement, warning
from cdc_embedder.doctor.patient import Patient
from cdc_embedder.errors import Problem
from cdc_embedder.rows.session import PINS
from cdc_embedder.standby import open_standby
from cdc_embedder.wal import stream

CLOCK_TOLERANCE_S = 5.0
"""Beyond this, ages in logs and metrics mislead."""

EXPIRY_DAYS = 14

DIRECT = "CDC_EMBEDDER_DSN=postgresql://role@the-server-itself:5432/database"


def refused_settings(sentence: str) -> str:
    """The remedy where a pooler refused a parameter of the startup packet (PgBouncer does so); else nothing."""
    return DIRECT if "unsupported startup parameter" in sentence else ""


async def pooler(patient: Patient) -> list[Verdict]:
    """A pooler shows by the pid: libpq was told another one at the start of the session than the server says."""
    told = patient.connection.info.backend_pid
    [pid] = await patient.one("SELECT pg_backend_pid()")
    if told != pid:
        return [
            error(
                "CDC_EMBEDDER_DSN",
                "it leads to a connection pooler: session settings and advisory locks get lost or stay behind there,"
                " and two services may work at once",
                DIRECT,
            )
        ]
    return [ok("CDC_EMBEDDER_DSN", "it leads to the server itself")]


async def session_settings(patient: Patient) -> list[Verdict]:
    """Whether the settings that the service gives its sessions are in force (rule 12)."""
    given = {name: PINS[name] for name in _SHOWN_AS_GIVEN}
    in_force = {name: (await patient.one("SELECT current_setting($1)", name))[0] for name in given}
    lost = [name for name, value in given.items() if in_force[name] != value]
    if lost:
        return [
            error(
                "the service's sessions",
                f"settings that are given when they connect are not in force: {', '.join(lost)}; a pooler drops them,"
                " or a login trigger changes them",
                DIRECT,
            )
        ]
    return [ok("the service's sessions", "their settings are in force, whatever role and database are set to")]


_SHOWN_AS_GIVEN = ("search_path", "row_security", "DateStyle", "TimeZone", "extra_float_digits", "plan_cache_mode")
"""Of those pins, the ones that the server shows as they were written."""


async def role_settings(patient: Patient) -> list[Verdict]:
    """ALTER ROLE … SET role or session_replication_role: they take effect after the connection, and nothing outranks
    them."""
    verdicts = []
    rows = await patient.rows(
        "SELECT coalesce(r.rolname, ''), coalesce(d.datname, ''), split_part(s.setting, '=', 1), s.setting"
        "  FROM (SELECT setrole, setdatabase, unnest(setconfig) AS setting FROM pg_db_role_setting) s"
        "  LEFT JOIN pg_roles r ON r.oid = s.setrole LEFT JOIN pg_database d ON d.oid = s.setdatabase"
        " WHERE s.setrole IN (0, (SELECT oid FROM pg_roles WHERE rolname = session_user))"
        "   AND s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))"
        "   AND split_part(s.setting, '=', 1) IN ('role', 'session_replication_role')"
    )
    for role, database, name, setting in rows:
        match bool(role), bool(database):
            case True, True:
                remedy = statement("ALTER ROLE {} IN DATABASE {} RESET {};", role, database, name)
            case True, False:
                remedy = statement("ALTER ROLE {} RESET {};", role, name)
            case _:
                remedy = statement("ALTER DATABASE {} RESET {};", database, name)
        verdicts.append(
            warning(
                f"role {patient.around.role}", f"its sessions begin with {setting}: they are not what they seem", remedy
            )
        )
    return verdicts or [ok(f"role {patient.around.role}", "nothing is set for it that the service cannot outrank")]


async def role_expiry(patient: Patient) -> list[Verdict]:
    [until, days] = await patient.one(
        "SELECT rolvaliduntil::text, CASE WHEN isfinite(rolvaliduntil)"
        " THEN extract(epoch FROM rolvaliduntil - clock_timestamp())::float8 / 86400 END"
        "  FROM pg_roles WHERE rolname = session_user"
    )
    role = patient.around.role
    if days is not None and days < EXPIRY_DAYS:
        return [
            warning(
                f"role {role}",
                f"its password is valid until {until}: no session can be opened with it after that",
                statement("ALTER ROLE {} VALID UNTIL 'infinity';", role),
            )
        ]
    return [ok(f"role {role}", "its password does not expire soon")]


async def replication_connection(patient: Patient) -> list[Verdict]:
    """A replication connection as the service opens it: let in by pg_hba.conf, through no pooler, to this cluster."""
    subject = "CDC_EMBEDDER_REPLICATION_DSN"
    other = patient.settings.replication_dsn or patient.settings.dsn
    limit = str(int(patient.settings.wal_sender_timeout_s * 1000))
    pins = stream.PINS | {"wal_sender_timeout": limit}
    try:
        conninfo = pinned(other.get_secret_value(), "doctor", pins, replication="database", client_encoding="UTF8")
        async with await psycopg.AsyncConnection.connect(conninfo, autocommit=True, prepare_threshold=None) as session:
            identified = await (await session.execute("IDENTIFY_SYSTEM")).fetchone()
            shown = await (await session.execute(_TIMEOUT)).fetchone()
    except psycopg.Error as problem:
        told = from_database(problem, "no replication connection can be opened")
        if not patient.around.can_replicate:
            remedy = statement("ALTER ROLE {} REPLICATION;", patient.around.role)
        else:
            pool = "unsupported startup parameter" in str(problem)
            remedy = f"CDC_EMBEDDER_REPLICATION_DSN={DIRECT.partition('=')[2]}" if pool else told.hint or _HBA
        return [error(subject, str(told), remedy)]
    assert identified is not None
    assert shown is not None
    [system, database] = await patient.one(
        "SELECT system_identifier::text, current_database() FROM pg_control_system()"
    )
    if (str(identified[0]), identified[3]) != (system, database):
        return [
            error(
                subject,
                f"it leads to the database {identified[3]} of the cluster {identified[0]}, CDC_EMBEDDER_DSN to"
                f" {database} of {system}",
                "unset CDC_EMBEDDER_REPLICATION_DSN",
            )
        ]
    if patient.settings.replication_dsn is not None:
        try:
            standby = await open_standby(patient.connection, other.get_secret_value())
        except Problem as problem:
            return [error(subject, str(problem), problem.hint)]
        if standby is not None:
            await standby.close()
    if shown[0] != limit:
        return [
            error(
                subject,
                f"its wal_sender_timeout is {shown[0]} ms, not the {limit} ms that are asked for: a pooler drops what"
                " is given when it connects",
                f"CDC_EMBEDDER_REPLICATION_DSN={DIRECT.partition('=')[2]}",
            )
        ]
    return [ok(subject, f"it can be opened, with a wal_sender_timeout of {limit} ms")]


_TIMEOUT = "SELECT setting FROM pg_settings WHERE name = 'wal_sender_timeout'"


_HBA = "host database role address scram-sha-256 # a line of pg_hba.conf, before any that rejects"


async def clock(patient: Patient) -> list[Verdict]:
    """The server's clock against this machine's, in the middle of the question's way."""
    before = here()
    [there] = await patient.one("SELECT extract(epoch FROM clock_timestamp())::float8")
    after = here()
    apart = there - (before + after) / 2
    if abs(apart) > CLOCK_TOLERANCE_S + (after - before) / 2:
        return [
            warning(
                "clock",
                f"the server's is {abs(apart):.0f} seconds {'ahead of' if apart > 0 else 'behind'} this machine's: ages"
                " in logs and metrics mislead, nothing else does",
                "timedatectl set-ntp true # on both machines",
            )
        ]
    return [ok("clock", "the server's and this machine's agree")]


def here() -> float:
    """This machine's clock, seconds since 1970."""
    return time.time()


CHECKS = (
    Check("pooler", pooler),
    Check("session-settings", session_settings),
    Check("role-settings", role_settings),
    Check("role-expiry", role_expiry),
    Check("replication-connection", replication_connection),
    Check("clock", clock),
)
