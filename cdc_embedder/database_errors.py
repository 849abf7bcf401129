"""The one edge where the driver's exceptions become ours: by SQLSTATE, never by message text, with one exception.

libpq gives no SQLSTATE for a connection that was never made. There, and only there, the server's English words for what
waiting cannot mend are looked for; a server that says it in another language is tried again for ever.

Not for the replication slot: what its errors mean for an operator is told by `wal.diagnosis.explain`.
SQLSTATE classes: https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from __future__ import annotations

import os

import psycopg

from cdc_embedder.errors import ColumnFault, Misconfigured, Problem, ServerGone, SlotBusy, Temporary

_SERVER_GONE = ("08", "57P")  # connection exceptions; admin shutdown, crash shutdown, cannot connect now
_SESSION_GONE = ("53300", "25006", "25P03", "25P04")  # no connection left, a standby, timeouts that end a session
_TRY_AGAIN = ("40001", "40P01", "55P03", "57014")  # serialization, deadlock, lock timeout, cancelled
_COLUMN = ("42P01", "42703", "42704", "42804", "42846", "42883", "42501", "22000", "22P02", "428C9", "23502", "42P17")
NOT_FOUND = ("42P01", "42883", "42703", "42704")

_NEVER_CONNECTS = (
    "password authentication failed",
    "no password supplied",
    "authentication failed for user",
    "no pg_hba.conf entry",
    "is not permitted to log in",
    'FATAL:  role "',
    'FATAL:  database "',
    "pg_hba.conf rejects",
    "permission denied for database",
    "must be superuser or replication role to start walsender",
    "permission denied to start WAL sender",
    "root certificate file",
)
"""What the server answers when only an operator can help."""

_MAY_CONNECT = (
    "Connection refused",
    "starting up",
    "shutting down",
    "too many",
    "remaining connection slots",
    "timeout",
)
"""What another host of the list, or the same one, may get over."""


_NAMES_A_DATABASE = ("PGHOST", "PGHOSTADDR", "PGSERVICE", "PGDATABASE")
"""Variables of libpq: where none of them is set, nobody has said which database is meant."""


def not_connected(error: psycopg.Error, dsn: str, doing: str) -> Problem:
    """The driver's `error`, met while `doing` what begins with connecting to `dsn`."""
    problem = from_database(error, doing)
    if error.sqlstate is None and not dsn and not any(map(os.environ.get, _NAMES_A_DATABASE)):
        problem.hint = "; ".join(filter(None, (problem.hint, "set CDC_EMBEDDER_DSN: no database is named")))
    return problem


def from_database(error: psycopg.Error, doing: str, *, of_rows: bool = False) -> Problem:
    """Translate the driver's `error`, met while `doing` something, by its SQLSTATE.

    `of_rows`: a statement on the user's rows met it. Then only words that cannot hold a value of a row are passed on.
    """
    state = error.sqlstate
    primary = error.diag.message_primary or (str(error).splitlines() or ["no message"])[0]
    hint = error.diag.message_hint or ""
    if of_rows and _may_quote_a_row(error):
        primary, hint = f"a constraint, a conversion or a function of the database failed with SQLSTATE {state}", ""
    message = f"{doing}: {primary}"
    if state is None:
        said = str(error)
        if any(words in said for words in _NEVER_CONNECTS) and not any(words in said for words in _MAY_CONNECT):
            return Misconfigured(message, hint="check the DSN, the password and pg_hba.conf, with TLS its certificates")
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return ServerGone(message, hint=hint)
        return Problem(message, hint=hint)
    if state.startswith(_SERVER_GONE) or state in _SESSION_GONE:
        return ServerGone(message, hint=hint, sqlstate=state)
    if state == "55006":
        return SlotBusy(message, hint=hint, sqlstate=state)
    if state in _TRY_AGAIN or state.startswith("53"):
        return Temporary(message, hint=hint, sqlstate=state)
    if state.startswith("28") or state == "3D000":
        return Misconfigured(message, hint=hint or "check the DSN, the password and pg_hba.conf", sqlstate=state)
    if of_rows and state in NOT_FOUND and error.diag.context and not hint:
        hint = (
            "a function, such as a trigger's, looks for it by search_path, and that of our sessions is pg_catalog:"
            " ALTER FUNCTION … SET search_path = …"
        )
    if of_rows and state == "42501" and not error.diag.context and not hint:  # with a context it is a function's right
        hint = "cdc-embedder doctor --no-model, run as the same role, prints the statement that is missing"
    if state in _COLUMN:
        return ColumnFault(message, hint=hint, sqlstate=state)
    return Problem(message, hint=hint, sqlstate=state)


def _may_quote_a_row(error: psycopg.Error) -> bool:
    """What a function raised, and what was said inside one, may hold anything; so may what a conversion failed on.

    Not where a name was not found, whose statement is the function's own.
    """
    state, said = error.sqlstate or "", error.diag
    if said.source_function == "exec_stmt_raise" or state.startswith(("P0", "38", "39", "44")):
        return True
    if state.startswith("22") and state != "22000":  # 22000 is pgvector's: other dimensions
        return True
    return bool(said.context) and state not in NOT_FOUND
