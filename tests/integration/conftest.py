"""A database on each server for the tests of schema and configuration, with a superuser's and an application's session.

What a row means does not depend on the plugin, so each server runs them once.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from tests.configuring import DOCUMENTS, Connection
from tests.servers import Bench, make_bench

GRANTS = (
    "CREATE ON SCHEMA public",
    "USAGE ON SCHEMA cdc_embedder",
    "SELECT ON cdc_embedder.model",
    "SELECT, INSERT, UPDATE, DELETE ON cdc_embedder.embedding_column",
)


@pytest.fixture(params=["15-wal2json", "18-pgoutput"])
def installed(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A fresh database with the schema installed, on each server with its preferred plugin."""
    major, plugin = request.param.split("-")
    yield from make_bench(request.getfixturevalue(f"pg{major}"), plugin)


@pytest.fixture
def admin(installed: Bench) -> Connection:
    """A superuser in it, with a model of four dimensions."""
    conn: Connection = installed.admin
    conn.execute("INSERT INTO cdc_embedder.model (name, backend, dimensions) VALUES ('tiny', 'fake', 4)")
    return conn


@pytest.fixture
def application(installed: Bench, admin: Connection) -> Iterator[Connection]:
    """A role that owns the application's table and may configure columns, but does not own the publication."""
    role = sql.Identifier(f"app_{installed.database}")
    admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    for grant in GRANTS:
        admin.execute(sql.SQL("GRANT {} TO {}").format(sql.SQL(grant), role))
    try:
        with psycopg.connect(
            installed.server.dsn(installed.database, f"app_{installed.database}"), autocommit=True
        ) as conn:
            conn.execute(DOCUMENTS)
            yield conn
    finally:
        admin.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(role))
