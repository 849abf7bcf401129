"""Put the schema, the functions and the empty publication into a database, bring them up to date, and take them out.

The SQL itself is in `sql/`; here is only in which order, by whom, and when not. Not for the replication slot: the
service makes it when it first runs (the publication has to be there before: rule 11).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow

from cdc_embedder.conninfo import pinned
from cdc_embedder.database_errors import from_database, not_connected
from cdc_embedder.errors import Misconfigured
from cdc_embedder.installable import (
    EMBED_SUFFIX,
    LONGEST_EMBED_SLOT,
    Connection,
    advice,
    check_publications,
    check_server,
    check_slot,
    scalar,
)

REAPPLIED = (
    "functions/catalog.sql",
    "functions/validation.sql",
    "functions/publication.sql",
    "functions/columns.sql",
    "functions/requests.sql",
    "functions/vectors.sql",
    "functions/embed.sql",
    "functions/search.sql",
    "functions/freshness.sql",
    "functions/status.sql",
    "functions/privileges.sql",
    "functions/triggers.sql",
    "views.sql",
    "models.sql",
)
"""What every `init` applies anew, in this order, after the missing migrations."""

_PINS = {
    "search_path": "pg_catalog",
    "row_security": "off",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "statement_timeout": "0",
    "lock_timeout": "10000",
    "client_min_messages": "warning",
    "check_function_bodies": "on",
}


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of `sql/migrations`; applied once, in order of `version`."""

    version: int
    path: Path


def sql_dir() -> Path:
    """Where the SQL files are: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "sql", package.parent / "sql"):
        if (candidate / "views.sql").is_file():
            return candidate
    raise Misconfigured("the SQL files of cdc-embedder are missing", hint="Install the package again.")


def migrations() -> list[Migration]:
    """Every migration that this version brings, in order."""
    return sorted(
        (Migration(int(path.name.split("_")[0]), path) for path in (sql_dir() / "migrations").glob("*.sql")),
        key=lambda migration: migration.version,
    )


def package_version() -> int:
    """The schema version that this version of the program needs."""
    return migrations()[-1].version


def schema_version(conn: Connection) -> int:
    """The schema version that the database has; 0 where nothing is installed."""
    if not scalar(conn, "SELECT to_regclass('cdc_embedder.migration') IS NOT NULL"):
        return 0
    return int(scalar(conn, "SELECT coalesce(max(version), 0) FROM cdc_embedder.migration"))


def install(
    dsn: str, slot: str, *, owner: str | None = None, published_everywhere: bool = False, pgml: bool = False
) -> list[str]:
    """Install or update; returns what was done, a sentence each. Repeatable, in one transaction.

    `owner` is the service's role, for a superuser who installs for it; `pgml`: with PostgresML's names. Raises
    Misconfigured where the server, a publication or the slot's name stand in the way.
    """
    try:
        with connect(dsn, "init") as conn:
            return _install(conn, slot, owner, published_everywhere, pgml)
    except psycopg.errors.InsufficientPrivilege as error:
        raise Misconfigured(
            f"installing cdc_embedder: {error.diag.message_primary}",
            hint="It takes CREATE on the database; or a superuser runs `cdc-embedder init --owner ROLE`.",
            sqlstate=error.sqlstate,
        ) from error
    except psycopg.Error as error:
        raise not_connected(error, dsn, "installing cdc_embedder") from error


def upgrade(dsn: str) -> list[str]:
    """Bring the schema that is installed up to date, as its owner; returns what was done. Raises Problem."""
    try:
        with connect(dsn, "upgrade") as conn:
            _lock(conn)
            found = schema_version(conn)
            if found >= package_version():
                return []
            done = _become_owner(conn, None) + _apply(conn, found)
            return done + _apply_pgml(conn) if has_pgml(conn) else done
    except psycopg.Error as error:
        raise from_database(error, "bringing the schema up to date") from error


def _install(conn: Connection, slot: str, owner: str | None, published_everywhere: bool, pgml: bool) -> list[str]:
    check_server(conn)
    check_slot(conn, slot)
    _lock(conn)
    if not published_everywhere:
        check_publications(conn)
    done = _become_owner(conn, owner)  # who may not is told whose the schema is, and can read no version
    found = schema_version(conn)
    if found > package_version():
        raise Misconfigured(
            f"the database has version {found} of the schema, this program brings {package_version()}",
            hint="Update cdc-embedder; an older one must not touch a newer schema.",
        )
    done += _apply(conn, found)
    if pgml or has_pgml(conn):
        done += _apply_pgml(conn)
    done += _store_slot(conn, slot)
    conn.execute("RESET ROLE")
    done += _make_publication(conn, slot)
    if len(slot) <= LONGEST_EMBED_SLOT:
        done += _make_publication(conn, slot + EMBED_SUFFIX)
    done = done or [f"nothing to do: version {found} of the schema is installed, the publication {slot} exists"]
    return done + advice(conn)


def _become_owner(conn: Connection, owner: str | None) -> list[str]:
    """Make the schema where it is missing, and go on as the role that owns it."""
    present = conn.execute(
        "SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'cdc_embedder'"
    ).fetchone()
    if present is not None and owner not in (None, present[0]):
        raise Misconfigured(
            f"the schema cdc_embedder belongs to the role {present[0]}, not to {owner}",
            hint=f"Name {present[0]} as the owner, or hand everything over with REASSIGN OWNED.",
        )
    role = present[0] if present is not None else owner or scalar(conn, "SELECT current_user")
    if not scalar(conn, "SELECT count(*) FROM pg_roles WHERE rolname = %s", role):
        raise Misconfigured(
            f"there is no role {role}", hint=f'CREATE ROLE "{role}" LOGIN REPLICATION; the service connects as it.'
        )
    if not scalar(conn, "SELECT pg_has_role(%s, 'MEMBER')", role):
        raise Misconfigured(
            f"only {role}, a member of it, or a superuser can change the schema cdc_embedder",
            hint=f"Connect as {role}.",
        )
    done = []
    if present is None:
        statement = sql.SQL("CREATE SCHEMA cdc_embedder AUTHORIZATION {}")
        conn.execute(statement.format(sql.Identifier(role)))
        done.append(f"made the schema cdc_embedder, owned by {role}")
    conn.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
    return done


def _apply(conn: Connection, found: int) -> list[str]:
    """The missing migrations, then functions, triggers, views and models; says so only where something changed."""
    done = []
    for migration in migrations():
        if migration.version > found:
            _run(conn, migration.path)
            done.append(f"applied migration {migration.path.stem}")
    before = _definitions(conn)
    for name in REAPPLIED:
        _run(conn, sql_dir() / name)
    if found and _definitions(conn) != before:
        done.append("renewed functions, triggers, views and models")
    return done


def has_pgml(conn: Connection) -> bool:
    """Whether there is a schema pgml and it is ours."""
    return bool(
        scalar(
            conn,
            "SELECT starts_with(obj_description(to_regnamespace('pgml'), 'pg_namespace'), 'cdc-embedder') IS TRUE",
        )
    )


def _apply_pgml(conn: Connection) -> list[str]:
    """The schema pgml, owned by the schema's owner as whom this runs; the file says why where it cannot be."""
    made = not has_pgml(conn)
    if scalar(conn, "SELECT to_regnamespace('pgml') IS NULL"):
        role = scalar(conn, "SELECT current_user")
        conn.execute("RESET ROLE")
        conn.execute(sql.SQL("CREATE SCHEMA pgml AUTHORIZATION {}").format(sql.Identifier(role)))
        conn.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
        conn.execute("COMMENT ON SCHEMA pgml IS 'cdc-embedder'")
    before = _definitions(conn)
    _run(conn, sql_dir() / "pgml.sql")
    if made:
        return ["made the schema pgml"]
    return ["renewed the schema pgml"] if _definitions(conn) != before else []


def _run(conn: Connection, path: Path) -> None:
    conn.execute(path.read_bytes())


def _definitions(conn: Connection) -> TupleRow | None:
    """What re-applying can change, to tell an update from a repetition."""
    return conn.execute(
        "SELECT (SELECT array_agg(CASE prokind WHEN 'a' THEN oid::regprocedure::text ELSE pg_get_functiondef(oid) END"
        "                         ORDER BY oid)"
        "          FROM pg_proc WHERE pronamespace IN ('cdc_embedder'::regnamespace, to_regnamespace('pgml'))),"
        "       (SELECT array_agg(pg_get_triggerdef(t.oid) ORDER BY t.oid) FROM pg_trigger t"
        "          JOIN pg_class c ON c.oid = t.tgrelid"
        "         WHERE c.relnamespace = 'cdc_embedder'::regnamespace AND NOT t.tgisinternal),"
        "       (SELECT array_agg(pg_get_viewdef(oid) ORDER BY oid) FROM pg_class"
        "         WHERE relnamespace = 'cdc_embedder'::regnamespace AND relkind = 'v'),"
        "       (SELECT count(*) FROM cdc_embedder.model)"
    ).fetchone()


def _store_slot(conn: Connection, slot: str) -> list[str]:
    """This database's default for embedding_column.slot."""
    default = scalar(
        conn,
        "SELECT pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef d"
        "  JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum"
        " WHERE d.adrelid = 'cdc_embedder.embedding_column'::regclass AND a.attname = 'slot'",
    )
    if default == f"'{slot}'::name":
        return []
    conn.execute(
        sql.SQL("ALTER TABLE cdc_embedder.embedding_column ALTER slot SET DEFAULT {}").format(sql.Literal(slot))
    )
    return [f"new embedding columns use the slot {slot}"]


def _make_publication(conn: Connection, slot: str) -> list[str]:
    """The publication named after the slot, empty, owned by the schema's owner. An existing one must be of our kind."""
    found = conn.execute(
        "SELECT pubinsert AND pubupdate AND NOT pubdelete AND NOT pubtruncate AND pubviaroot AND NOT puballtables"
        " FROM pg_publication WHERE pubname = %s",
        (slot,),
    ).fetchone()
    name = sql.Identifier(slot)
    if found is not None:
        if not found[0]:
            raise Misconfigured(
                f"the publication {slot} exists and is none of cdc-embedder's",
                hint=f"Choose another slot name, or, if it is not used: DROP PUBLICATION {slot}.",
            )
        return []
    statement = sql.SQL("CREATE PUBLICATION {} WITH (publish = 'insert, update', publish_via_partition_root = true)")
    owner = scalar(conn, "SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'cdc_embedder'")
    conn.execute(statement.format(name))
    if owner != scalar(conn, "SELECT current_user"):
        conn.execute(sql.SQL("ALTER PUBLICATION {} OWNER TO {}").format(name, sql.Identifier(owner)))
    return [f"made the publication {slot}, empty"]


def _lock(conn: Connection) -> None:
    """One installer at a time; released with the transaction."""
    conn.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdc_embedder install', 0))")


def connect(dsn: str, purpose: str) -> Connection:
    """A pinned session for work on the schema, in one transaction."""
    return psycopg.connect(pinned(dsn, purpose, _PINS, client_encoding="UTF8"))
