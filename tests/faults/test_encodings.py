"""Databases that are not UTF-8: it is asked of the server, and what cannot be converted is one row's trouble."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql

from cdc_embedder.embedded import Server
from cdc_embedder.embedding.fake import fake_vector
from cdc_embedder.install import install
from tests import servers
from tests.documents import configure_documents, make_model
from tests.servers import SERVICE_ROLE, Bench
from tests.service import Service, running, status, until, wait_caught_up


@contextmanager
def database(server: Server, plugin: str, encoding: str) -> Iterator[Bench]:
    """A bench whose database has another encoding."""
    name = f"t{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C'").format(
                sql.Identifier(name), sql.Literal(encoding)
            )
        )
    install(server.dsn(name), name, owner=SERVICE_ROLE)
    with psycopg.connect(server.dsn(name), autocommit=True) as admin:
        bench = Bench(server, plugin, name, name, admin, has_vector=False)
        try:
            make_model(bench)
            admin.execute("CREATE TABLE documents (id text PRIMARY KEY, body text, other text, embedding real[])")
            bench.grant("documents", ["id"], ["body"], "embedding")
            configure_documents(bench)
            yield bench
        finally:
            admin.close()
            servers._drop(server, name)


def insert(bench: Bench, *values: bytes) -> None:
    """Insert a row whose values have these very bytes."""
    bench.admin.execute("SET client_encoding = 'SQL_ASCII'")
    listed = b", ".join(b"'" + value + b"'" for value in values)
    result = bench.admin.pgconn.exec_(b"INSERT INTO documents (id, body, other) VALUES (" + listed + b")")
    assert not result.error_message, result.error_message
    bench.admin.execute("SET client_encoding = 'UTF8'")


def embedded(bench: Bench) -> set[bytes]:
    rows = bench.admin.execute(
        "SELECT convert_to(id, getdatabaseencoding()) FROM documents WHERE embedding IS NOT NULL"
    )
    return {bytes(row[0]) for row in rows.fetchall()}


@pytest.mark.parametrize(("major", "plugin"), [("15", "wal2json"), ("15", "pgoutput"), ("18", "pgoutput")])
def test_keys_and_texts_of_a_latin1_database(request: pytest.FixtureRequest, major: str, plugin: str) -> None:
    with database(request.getfixturevalue(f"pg{major}"), plugin, "LATIN1") as bench:
        insert(bench, "schlüssel".encode("latin1"), "grüße".encode("latin1"), b"")
        with running(bench):
            wait_caught_up(bench)
            insert(bench, "später".encode("latin1"), "grüße, später".encode("latin1"), "ß".encode("latin1"))
            wait_caught_up(bench)
            for body, stored in bench.admin.execute("SELECT body, embedding FROM documents").fetchall():
                assert abs(fake_vector("fake", body, 8) - stored).max() < 1e-6, body


@pytest.mark.parametrize(("major", "plugin"), [("15", "auto"), ("18", "auto")])
def test_what_has_no_utf8_form_in_a_win1252_database_is_one_row_s_trouble(
    request: pytest.FixtureRequest, major: str, plugin: str
) -> None:
    """A client that said its text was WIN1252 was believed: 0x81 is no character there."""
    with database(request.getfixturevalue(f"pg{major}"), plugin, "WIN1252") as bench:
        bench.admin.execute(f"ALTER TABLE documents OWNER TO {SERVICE_ROLE}")  # so that it can publish it
        insert(bench, b"before", b"x\x81", b"")
        with running(bench) as service:
            insert(bench, b"text", b"x\x81", b"")
            insert(bench, b"other", b"fine", b"x\x81")
            insert(bench, "größe".encode("cp1252"), "fünf €".encode("cp1252"), b"")
            expected = {b"other", "größe".encode("cp1252")}
            until(lambda: embedded(bench) == expected, "a neighbour waits", lambda: service.log)
            until(lambda: status(bench)[0]["failed"] == 2, "not recorded", lambda: status(bench))
            until(lambda: status_of(bench) == "live", "never live", lambda: service.log)


@pytest.mark.parametrize("major", ["15", "18"])
def test_what_is_not_utf8_in_an_sql_ascii_database_is_one_row_s_trouble(
    request: pytest.FixtureRequest, major: str
) -> None:
    with database(request.getfixturevalue(f"pg{major}"), "auto", "SQL_ASCII") as bench:
        insert(bench, b"before", b"x\xff\xfe", b"")
        insert(bench, b"beside", b"fine", b"")
        with running(bench) as service:
            until(lambda: embedded(bench) == {b"beside"}, "the neighbour waits", lambda: service.log)
            insert(bench, b"other", b"fine", b"x\xff\xfe")
            insert(bench, b"text", b"x\xff\xfe", b"")
            insert(bench, "schlüssel".encode(), "grüße".encode(), b"")
            insert(bench, b"last", b"fine", b"")
            expected = {b"beside", b"other", "schlüssel".encode(), b"last"}
            until(lambda: embedded(bench) == expected, "a neighbour waits", lambda: service.log)
            failed: list[Any] = bench.admin.execute("SELECT error FROM cdc_embedder.failed").fetchall()
            assert failed == [("the text cannot be converted to UTF-8",)] * 2
            until(lambda: status_of(bench) == "live", "never live", lambda: service.log)
            bench.admin.execute("UPDATE documents SET body = 'mended' WHERE id = 'text'")
            until(lambda: b"text" in embedded(bench), "never mended", lambda: service.log)


def status_of(bench: Bench) -> str:
    [row] = status(bench)
    return str(row["state"])


def test_wal2json_is_refused_for_an_sql_ascii_database(pg15: Server) -> None:
    with database(pg15, "wal2json", "SQL_ASCII") as bench:
        service = Service(bench).start()
        try:
            assert service.wait() == 1
            assert "SQL_ASCII" in service.log
        finally:
            service.end()
