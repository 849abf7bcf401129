"""Names and texts that want to break out of where they stand, through the whole product: they stay names and texts.

Every name that a user chooses (schema, table, columns, type, model, role, slot) and every text (of rows, prompts,
templates, separators, errors, requests) is one that quotes, and does harm where it is not quoted. A canary must not be
touched, and what comes out must be right. Beside that: what every function of ours may, as whom, and for what reason.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import psycopg
import pytest
from psycopg import sql

from cdc_embedder.embedded import Server
from cdc_embedder.embedding.fake import fake_vector
from cdc_embedder.install import install, sql_dir
from tests.commands import asked, fails, succeeds
from tests.configuring import Connection, configure, one
from tests.documents import make_documents, make_model, target_type
from tests.integration.test_schema import Bare, bare
from tests.servers import SERVICE_ROLE, Bench, make_bench
from tests.service import Service, assert_every_vector_is_of_its_text, running, status, until, wait_caught_up

__all__ = ["bare"]

SCHEMA = 'sch"; DROP TABLE canary; --'
TABLE = "t'); DROP TABLE canary; -- %s $body$\n\\*.,☃{0}"
KEY = "k' || $$ \" %1$I \\ \t"
OTHER_KEY = "k2) FROM canary; --"
SOURCE = "s'; DROP TABLE canary; -- $make$ %I \"\\"
OTHER_SOURCE = "b$check$' {x} %% \n\""
TARGET = "e', DROP COLUMN x; -- $rows$ \" %s\\"
TYPE = "ty'pe $table$ %2$s {x} ); --"
COLLATION = "c'; DROP TABLE canary; -- \" $table$ %s"
VALUE = "v'; DROP TABLE canary; -- \" \\ $table$ %s"
MODEL = "m'; DROP TABLE canary; -- \"$body$ %s {x} \\ \n☃"
PROMPT = "p'; DROP TABLE canary; -- {body} %s $1 \\n "
SEPARATOR = "'); DROP TABLE canary; -- $statement$ %L \\ {x} $1 \n"
_ODD = (
    "'; DROP TABLE canary; --",
    '"; DROP TABLE canary; --',
    "$body$; DROP TABLE canary; $body$",
    "$1 $2 $$ :name %s %(x)s %% %I",
    "\\'; DROP TABLE canary; \\\\ \\x00 \\N \\.",
    "{body} {{x}} {0} {SOURCE}",
    "a\nb\r\nc\td\x01\x1b[2J\x7f",
    "größe ½ 東京 \U0001f600 \u202e\u2028 \ufeff",
    "]]></x><!-- & &lt; ${jndi:ldap://x} `id` $(id)",
    "NULL",
    " ",
)
TEXTS = tuple(text if len(text) < 5 else f"{text} of row {number}" for number, text in enumerate(_ODD))
"""Each says of itself that it is a row's, so that it is told in a log from a name."""

DEFINERS = {
    "_after_insert()": "writes generation and scan, makes the ledger: the caller has rights on embedding_column alone",
    "_after_update()": "the same",
    "_after_model_update()": "touches the columns of a model, which its writer need not be allowed to",
    "_before_delete()": "drops the ledger",
    "_check_model()": "reads which columns the model serves",
    "_validate()": "reads model, and asks which rights the owner has: the service runs as the owner",
    "_protect()": "keeps what only triggers may fill; reads nothing",
    "_renew_generation()": "the only writer of generation (rule 4)",
    "_make_guards()": "makes the functions of one column's triggers in our schema",
    "_make_ledger(integer,boolean)": "makes tables in our schema",
    "_drop_ledger(integer)": "drops them",
    "_search_column(regclass,name)": "tells search() names of one column; its caller need not see the configuration",
    "_status()": "counts rows and reads what the service says",
    "_failed()": "reads ledgers",
    "_embed(text,text[],text,text,boolean)": "reads the secret that signs requests, and the answer of its own id",
    "embed(text,text)": "calls _embed",
    "embed(text,text[])": "calls _embed",
    "embed_query(text,text)": "calls _embed",
    "embed_document(text,text)": "calls _embed",
    "embedded_through(regclass)": "reads the configuration and the backlog",
    "wait_until_embedded(regclass,interval,boolean)": "the same, and ledgers",
    "is_current(anyelement,name)": "reads one ledger row by the row that the caller gives",
    "reconcile(regclass)": "leaves a request in scan",
    "take_slot_again(name)": "leaves a request in given_up",
    "retry_failed(regclass)": "leaves a request in ledgers",
    "pgml.embed(text,text,jsonb)": "calls _embed, so that EXECUTE in the schema pgml is enough",
    "pgml.embed(text,text[],jsonb)": "calls _embed, so that EXECUTE in the schema pgml is enough",
}
"""Every function that runs with the rights of the schema's owner, and why. Those of single columns: `GUARDS`."""

GUARDS = {
    "_clear_N()": "asks for the target's name; fires for whoever may write the text",
    "_refuse_N()": "the same, and tells the service from everybody else",
}


@contextmanager
def canary(conn: Connection) -> Iterator[None]:
    """A table with a row, beside the roles and databases there are: nothing of it is another one afterwards."""
    conn.execute("CREATE TABLE canary (x int); INSERT INTO canary VALUES (1)")
    before = _alive(conn)
    yield
    assert _alive(conn) == before


def _alive(conn: Connection) -> Any:
    return conn.execute(
        "SELECT (SELECT array_agg(x) FROM canary), (SELECT relacl::text FROM pg_class WHERE oid = 'canary'::regclass),"
        "       (SELECT array_agg((rolname, rolsuper, rolreplication, rolbypassrls)::text ORDER BY oid) FROM pg_roles),"
        "       (SELECT array_agg((roleid, member)::text ORDER BY 1) FROM pg_auth_members),"
        "       (SELECT array_agg(datname ORDER BY oid) FROM pg_database)"
    ).fetchone()


def name(*parts: str) -> str:
    """As SQL quotes it."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in parts)


NAME = name(SCHEMA, TABLE)


@contextmanager
def raw(bench: Bench) -> Iterator[Connection]:
    """A superuser whose parameters are $1: the names are full of percent signs."""
    with psycopg.connect(bench.dsn_admin, autocommit=True, cursor_factory=psycopg.RawCursor) as conn:
        yield conn


def make_odd_table(bench: Bench, conn: Connection, *, reject: str = "never") -> None:
    conn.execute(f"CREATE SCHEMA {name(SCHEMA)}")
    conn.execute(f"GRANT USAGE ON SCHEMA {name(SCHEMA)} TO {SERVICE_ROLE}")
    conn.execute(f'CREATE COLLATION {name(SCHEMA, COLLATION)} FROM pg_catalog."C"')
    value = VALUE.replace("'", "''")
    conn.execute(f"CREATE TYPE {name('public', TYPE)} AS ENUM ('{value}', 'other')")
    conn.execute(
        f"CREATE TABLE {NAME} ({name(KEY)} text COLLATE {name(SCHEMA, COLLATION)},"
        f" {name(OTHER_KEY)} {name('public', TYPE)},"
        f" {name(SOURCE)} text, {name(OTHER_SOURCE)} varchar, {name(TARGET)} {target_type(bench)},"
        f" PRIMARY KEY ({name(KEY)}, {name(OTHER_KEY)}))"
    )
    bench.grant(NAME, [KEY, OTHER_KEY], [SOURCE, OTHER_SOURCE], TARGET)
    make_model(bench, MODEL, reject=reject)
    conn.execute("UPDATE cdc_embedder.model SET document_prompt = $1, query_prompt = $1, source = $2 WHERE name = $2",
                 (PROMPT, MODEL))  # fmt: skip


def insert(conn: Connection, texts: tuple[str, ...]) -> None:
    statement = f"INSERT INTO {NAME} ({name(KEY)}, {name(OTHER_KEY)}, {name(SOURCE)}, {name(OTHER_SOURCE)})"
    for number, text in enumerate(texts):
        conn.execute(f"{statement} VALUES ($1, $2, $3, $4)", (f"{number}{text}", VALUE, text, f"and {text}"))


@pytest.fixture
def by_choice(pg15: Server) -> Iterator[Bench]:
    """A server that has both plugins; the service chooses."""
    yield from make_bench(pg15, "auto")


@pytest.mark.parametrize("schema", ["App", 'a"', '"}],"table":"other","columns":[{"name":"id'])
def test_a_type_that_wal2json_cannot_name_stops_nobody(by_choice: Bench, schema: str) -> None:
    """wal2json passes on what format_type quotes as if it were JSON, where the name of the schema needs quotes."""
    make_model(by_choice)
    make_documents(by_choice, 3)
    with raw(by_choice) as conn, canary(conn):
        conn.execute(f"CREATE SCHEMA {name(schema)}; CREATE TYPE {name(schema, 'mood')} AS ENUM ('a')")
        conn.execute(f"ALTER TABLE documents ADD mood {name(schema, 'mood')}")
        with running(by_choice) as service:
            service.wait_for_log("with the plugin pgoutput")
            until(lambda: "until its table" in str(status(by_choice)[0]["reason"]), "never asked", lambda: service.log)
            conn.execute(f'ALTER PUBLICATION "{by_choice.slot}" ADD TABLE documents')
            conn.execute("UPDATE documents SET mood = 'a', body = body || ' once more'")
            wait_caught_up(by_choice)
            assert assert_every_vector_is_of_its_text(by_choice) == 3
            assert service.stop() == 0


def assert_right(conn: Connection, separator: str = SEPARATOR) -> int:
    """Each row's vector is that of its texts, put together as configured."""
    columns = ", ".join((name(SOURCE), name(OTHER_SOURCE), f"{name(TARGET)}::real[]"))
    rows = conn.execute(f"SELECT {columns} FROM {NAME}").fetchall()
    for first, second, vector in rows:
        assert vector is not None, first
        assert np.allclose(vector, fake_vector(MODEL, f"{PROMPT}{first}{separator}{second}", 8), atol=2e-3), first
    return len(rows)


def test_odd_names_and_texts_go_the_whole_way_to_right_vectors(installed: Bench) -> None:
    with raw(installed) as conn, canary(conn):
        make_odd_table(installed, conn)
        insert(conn, TEXTS[:3])
        conn.execute(
            "SELECT cdc_embedder.add_embedding_column($1::regclass, ARRAY[$2, $3], $4::text::name, $5, separator => $6,"
            " when_stale => 'clear', protect => true, keys_only => $7)",
            (NAME, SOURCE, OTHER_SOURCE, TARGET, MODEL, SEPARATOR, installed.plugin == "pgoutput"),
        )
        with running(installed, CDC_EMBEDDER_SQL_EMBED="on") as service:
            wait_caught_up(installed)
            insert(conn, TEXTS[3:])
            wait_caught_up(installed)
            assert assert_right(conn) == len(TEXTS)
            conn.execute(f"UPDATE {NAME} SET {name(SOURCE)} = {name(SOURCE)} || $1", (SEPARATOR,))
            wait_caught_up(installed)
            assert assert_right(conn) == len(TEXTS)
            with pytest.raises(psycopg.errors.GeneratedAlways) as refusal:
                conn.execute(f"UPDATE {NAME} SET {name(TARGET)} = NULL")
            assert refusal.value.diag.message_primary is not None
            assert name(TARGET) in refusal.value.diag.message_primary
            assert_functions_say_the_same(installed, conn)
            assert_renames_are_followed(installed, conn)
            assert service.stop() == 0
        conn.execute("SELECT cdc_embedder.remove_embedding_column($1::regclass, $2::text::name)", (NAME, TARGET))
        assert one(conn, "SELECT count(*) FROM pg_trigger WHERE tgrelid = $1::regclass AND NOT tgisinternal", NAME) == 0
        conn.execute(f"DROP SCHEMA {name(SCHEMA)} CASCADE")


def assert_functions_say_the_same(bench: Bench, conn: Connection) -> None:
    """Every function that takes a table, a column or a text, with the odd ones."""
    for function in ("reconcile", "retry_failed", "pause", "resume"):
        conn.execute(f"SELECT cdc_embedder.{function}($1::regclass)", (NAME,))
    wait_caught_up(bench)
    for function in ("wait_until_embedded", "embedded_through"):
        conn.execute(f"SELECT cdc_embedder.{function}($1::regclass)", (NAME,))
    fresh = f"SELECT count(*) FROM cdc_embedder.fresh(NULL::{NAME}, $1::text::name)"
    until(lambda: one(conn, fresh, TARGET) == len(TEXTS), "not every row is current")
    conn.execute("SET cdc_embedder.embed_timeout = '60s'")
    for text in TEXTS:
        found = one(conn, "SELECT cdc_embedder.embed($1, $2)", MODEL, text)
        assert np.allclose(found, fake_vector(MODEL, text, 8), atol=1e-6)
        found = conn.execute(
            "SELECT key, score FROM cdc_embedder.search($1::regclass, $2::text::name, $3, 2)", (NAME, TARGET, text)
        ).fetchall()
        assert [set(key) for key, _ in found] == [{KEY, OTHER_KEY}] * 2
    with pytest.raises(psycopg.errors.UndefinedObject) as unknown:
        conn.execute("SELECT cdc_embedder.embed($1, 'x')", (MODEL + "?",))
    assert MODEL + "?" in str(unknown.value)


def assert_renames_are_followed(bench: Bench, conn: Connection) -> None:
    new = SOURCE[::-1]
    conn.execute(f"ALTER TABLE {NAME} RENAME {name(SOURCE)} TO {name(new)}")
    bench.grant(NAME, [], [new], TARGET)
    conn.execute(f"UPDATE {NAME} SET {name(new)} = $1 WHERE {name(KEY)} LIKE '0%'", ("after the rename '",))
    wait_caught_up(bench)
    conn.execute(f"ALTER TABLE {NAME} RENAME {name(new)} TO {name(SOURCE)}")
    wait_caught_up(bench)
    assert assert_right(conn) == len(TEXTS)


def test_templates_of_odd_columns_are_filled_and_no_text_is_a_template(installed: Bench) -> None:
    first, second = "a'; DROP TABLE canary; -- \"$1 %s \\", "b $statement$ \n☃"
    template = f"'; DROP TABLE canary; -- {{{{x}}}} {{{first}}} $1 %s \\ $body$ {{{second}}} {{{first}}}"
    with raw(installed) as conn, canary(conn):
        make_model(installed)
        conn.execute(
            f"CREATE TABLE documents (id int PRIMARY KEY, {name(first)} text, {name(second)} text,"
            f" embedding {target_type(installed)})"
        )
        installed.grant("documents", ["id"], [first, second], "embedding")
        conn.execute(
            "INSERT INTO cdc_embedder.embedding_column (source_table, target_column, model, template)"
            " VALUES ('documents', 'embedding', 'fake', $1)",
            (template,),
        )
        assert one(conn, "SELECT source_columns FROM cdc_embedder.embedding_column") == [first, second]
        with running(installed):
            for number, text in enumerate(TEXTS):
                conn.execute("INSERT INTO documents VALUES ($1, $2, $3)", (number, text, text[::-1]))
            conn.execute("INSERT INTO documents VALUES (-1, $1, $2)", (f"{{{second}}}", f"{{{first}}}"))
            wait_caught_up(installed)
        for one_text, other, vector in conn.execute(
            f"SELECT {name(first)}, {name(second)}, embedding::real[] FROM documents"
        ).fetchall():
            filled = f"'; DROP TABLE canary; -- {{x}} {one_text} $1 %s \\ $body$ {other} {one_text}"
            assert np.allclose(vector, fake_vector("fake", filled, 8), atol=2e-3), one_text
        for wrong in ("{nothing'; DROP TABLE canary; --}", "{", "{" + first + "}", "}}{"):
            with pytest.raises(psycopg.Error):
                conn.execute("UPDATE cdc_embedder.embedding_column SET template = $1", (wrong,))


def test_failed_rows_and_their_errors_are_data(installed: Bench) -> None:
    with raw(installed) as conn, canary(conn):
        make_odd_table(installed, conn, reject="poison'; --")
        conn.execute(
            "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model, separator)"
            " VALUES ($1::regclass, ARRAY[$2, $3], $4, $5, $6)",
            (NAME, SOURCE, OTHER_SOURCE, TARGET, MODEL, SEPARATOR),
        )
        poisons = tuple(f"poison'; -- {text}" for text in TEXTS)
        insert(conn, poisons)
        with running(installed) as service:
            until(lambda: status(installed)[0]["failed"] == len(TEXTS), "never failed", lambda: service.log)
            found = conn.execute("SELECT source_table, target_column, key, error FROM cdc_embedder.failed").fetchall()
            assert {(table, target) for table, target, _, _ in found} == {(NAME, TARGET)}
            expected = {(f"{number}{text}", VALUE) for number, text in enumerate(poisons)}
            assert {(key[KEY], key[OTHER_KEY]) for _, _, key, _ in found} == expected
            assert not any("DROP TABLE" in error for *_, error in found)
            odd = "'; DROP TABLE canary; -- $rows$ %s %1$I \" \\ {x}\n☃"
            conn.execute("UPDATE cdc_embedder.ledger_1 SET error = $1", (odd,))
            assert one(conn, "SELECT array_agg(DISTINCT error) FROM cdc_embedder.failed") == [odd]
            assert one(conn, "SELECT cdc_embedder.retry_failed($1::regclass)", NAME) == len(TEXTS)
            conn.execute(f"UPDATE {NAME} SET {name(SOURCE)} = substr({name(SOURCE)}, 12), {name(OTHER_SOURCE)} = ''")
            wait_caught_up(installed)
            assert assert_right(conn) == len(TEXTS)
            conn.execute("UPDATE cdc_embedder.model SET options = jsonb_build_object($1::text, 1)", (odd,))
            until(lambda: odd in (status(installed)[0]["reason"] or ""), "no reason", lambda: status(installed))
            assert MODEL in status(installed)[0]["reason"]
            lines = service.log.splitlines()
        assert all(re.match(r"\d{4}-\d\d-\d\dT\S+Z (debug|info|warning|error|critical) ", line) for line in lines), (
            "a name made a line of its own"
        )


def test_what_only_triggers_fill_cannot_be_given(application: Connection, installed: Bench) -> None:
    """Names and statements that are used later on, as the owner."""
    evil = "x'; DROP TABLE canary; --"
    with canary(installed.admin):
        configure(application, publication_statement="DROP TABLE canary", source_schema=evil, source_name=evil,
                  key_columns=[evil], key_types=["int); DROP TABLE canary; --"], generation=7)  # fmt: skip
        for statement in (
            "publication_statement = 'DROP TABLE canary', key_columns = ARRAY[$$x'; DROP TABLE canary; --$$]",
            "key_types = ARRAY['int); DROP TABLE canary; --'], source_name = $$x'; DROP TABLE canary; --$$",
        ):
            application.execute(f"UPDATE cdc_embedder.embedding_column SET {statement}, enabled = true")  # type: ignore[call-overload]
        row = one(
            installed.admin,
            "SELECT publication_statement, source_schema, source_name, key_columns, key_types, generation"
            "  FROM cdc_embedder.embedding_column",
        )
        assert not any("canary" in str(value) or "evil" in str(value) for value in row)
        assert row[1:] == ("public", "documents", ["id"], ["bigint"], 1)
        for slot in (evil, 'x"; DROP TABLE canary; --', "x\n", "Ünï", "a'" * 31):
            with pytest.raises(psycopg.Error, match="cannot be the name of a replication slot"):
                application.execute("UPDATE cdc_embedder.embedding_column SET slot = %s::text::name", (slot,))


# Who runs what with whose rights


LURES = """
CREATE TABLE public.caught (who text, what text);
GRANT INSERT ON public.caught TO PUBLIC;
CREATE FUNCTION public.lure(what text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.caught VALUES (current_user, what);
    RETURN what;
END $$;
CREATE FUNCTION public.format(text, VARIADIC text[]) RETURNS text LANGUAGE sql AS $$ SELECT public.lure('format') $$;
CREATE FUNCTION public.format(text, text) RETURNS text LANGUAGE sql AS $$ SELECT public.lure('format 2') $$;
CREATE FUNCTION public.format(text, int) RETURNS text LANGUAGE sql AS $$ SELECT public.lure('format 3') $$;
CREATE FUNCTION public.concat_ws(text, text) RETURNS text LANGUAGE sql AS $$ SELECT public.lure('concat_ws') $$;
CREATE FUNCTION public.quote_ident(name) RETURNS text LANGUAGE sql AS $$ SELECT public.lure('quote_ident') $$;
CREATE FUNCTION public.jsonb_build_object(text, bigint) RETURNS jsonb LANGUAGE sql
    AS $$ SELECT to_jsonb(public.lure('jsonb_build_object')) $$;
CREATE FUNCTION public.same(bigint, int) RETURNS boolean LANGUAGE sql AS $$ SELECT public.lure('=') IS NULL $$;
CREATE OPERATOR public.= (LEFTARG = bigint, RIGHTARG = int, FUNCTION = public.same);
CREATE FUNCTION public.same(name, text) RETURNS boolean LANGUAGE sql AS $$ SELECT public.lure('=') IS NULL $$;
CREATE OPERATOR public.= (LEFTARG = name, RIGHTARG = text, FUNCTION = public.same);
CREATE TEMP TABLE pg_class (oid oid);
CREATE TEMP TABLE pg_attribute (attrelid oid);
SET search_path = pg_temp, public, pg_catalog;
"""
"""What a role that may make objects in a schema of the search path lays out: nobody else is to step on it."""


def caught(admin: Connection) -> set[tuple[str, str]]:
    return {(row[0], row[1]) for row in admin.execute("SELECT who, what FROM public.caught").fetchall()}


def test_functions_of_strangers_are_never_run_with_our_rights(application: Connection, installed: Bench) -> None:
    admin, role = installed.admin, application.info.user
    for function in ("is_current(anyelement, name)", "embedded_through(regclass)", "reconcile(regclass)",
                     "retry_failed(regclass)", "_status()", "_failed()", "_search_column(regclass, name)",
                     "add_embedding_column", "remove_embedding_column", "fresh", "search"):  # fmt: skip
        admin.execute(
            sql.SQL(f"GRANT EXECUTE ON FUNCTION cdc_embedder.{function} TO {{}}").format(sql.Identifier(role))
        )  # type: ignore[arg-type]
    admin.execute(
        sql.SQL("GRANT SELECT ON cdc_embedder.status, cdc_embedder.failed TO {}").format(sql.Identifier(role))
    )
    admin.execute(sql.SQL("GRANT USAGE ON SCHEMA cdc_embedder TO {}").format(sql.Identifier(role)))
    application.execute(LURES.encode())
    with canary(admin):
        for more in ({}, {"when_stale": "clear", "protect": True}, {"template": "{body} {title}"}):
            columns = {"columns": "{body,title}"} if "template" in more else {}
            if columns:
                configure_by_name(application, "{body,title}", **more)
            else:
                configure_by_name(application, "{body}", **more)
            application.execute("UPDATE cdc_embedder.embedding_column SET separator = 'x', priority = 2")
            application.execute("INSERT INTO public.documents (id, body) VALUES (1, 'a')")
            application.execute("UPDATE public.documents SET body = 'b'")
            application.execute("SELECT * FROM cdc_embedder.status")
            application.execute("SELECT * FROM cdc_embedder.failed")
            application.execute("SELECT cdc_embedder.is_current(d, 'embedding') FROM public.documents d")
            application.execute("SELECT * FROM cdc_embedder.fresh(NULL::public.documents, 'embedding')")
            for call in ("embedded_through", "reconcile", "retry_failed"):
                application.execute(f"SELECT cdc_embedder.{call}('public.documents')")  # type: ignore[call-overload]
            application.execute("SELECT cdc_embedder._search_column('public.documents', 'embedding')")
            application.execute("DELETE FROM cdc_embedder.embedding_column; DELETE FROM public.documents")
        application.execute("RESET search_path")
        configure_by_name(application, "{body}")
        application.execute("INSERT INTO public.documents (id, body) VALUES (1, 'a'), (2, NULL)")
        installed.grant("documents", ["id"], ["body"], "embedding")
        publish(installed)
        with running(installed):
            wait_caught_up(installed)
        succeeds(installed, "status")
        succeeds(installed, "verify")
        succeeds(installed, "search", "documents.embedding", "a")
        succeeds(installed, "reconcile", "documents")
        succeeds(installed, "remove", "documents.embedding")
    assert {pair for pair in caught(admin) if pair[0] != role} == set()


def publish(bench: Bench) -> None:
    """What the application may not, where it is asked for."""
    statement = one(bench.admin, "SELECT publication_statement FROM cdc_embedder.embedding_column")
    if statement is not None:
        bench.admin.execute(statement)


def configure_by_name(conn: Connection, columns: str, **more: object) -> None:
    configure(conn, "public.documents", columns, **more)


def test_psql_installs_whatever_is_laid_out_in_public(bare: Bare) -> None:
    bare.admin.execute("CREATE ROLE layer_out; GRANT ALL ON SCHEMA public TO layer_out; SET ROLE layer_out")
    try:
        bare.admin.execute(LURES.encode())
        bare.admin.execute("RESET ROLE; DISCARD TEMP; RESET search_path")
        with canary(bare.admin):
            done = by_psql(bare, "cdc_embedder")
            assert done.returncode == 0, done.stderr
        assert caught(bare.admin) == set()
    finally:
        bare.admin.execute("RESET ROLE; RESET search_path; DROP OWNED BY layer_out CASCADE; DROP ROLE layer_out")


def by_psql(bare: Bare, slot: str) -> subprocess.CompletedProcess[str]:
    variables = ("-v", f"slot={slot}", "-v", "pgml=true")
    command = [bare.server.bindir / "psql", "-X", "-q", "-d", bare.dsn, *variables, "-f", sql_dir() / "schema.sql"]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_a_slot_name_given_to_psql_is_a_name(bare: Bare) -> None:
    with canary(bare.admin):
        for slot in ("x'; DROP TABLE canary; --", 'x"; DROP TABLE canary; --', "$make$ %I"):
            by_psql(bare, slot)
            bare.admin.execute("DROP SCHEMA IF EXISTS cdc_embedder, pgml CASCADE")
            for (publication,) in bare.admin.execute("SELECT pubname FROM pg_publication").fetchall():
                assert publication in (slot, slot + "_embed")
                bare.admin.execute(sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(publication)))


def swap_types(conn: Connection, schema: str) -> None:
    """Types of the application's that are called as ours must be, with casts that run its own code."""
    for type_name, other, result in (
        ("text", "pg_catalog.text", "'x'"),
        ("vector", "pg_catalog.float4[]", "'{1,0,0,0}'"),
    ):
        conn.execute(
            f"CREATE TYPE {schema}.{type_name} AS ENUM ('x');"  # type: ignore[arg-type]
            f"CREATE FUNCTION {schema}.cast_away({schema}.{type_name}) RETURNS {other} LANGUAGE plpgsql AS"
            f" $$ BEGIN PERFORM public.lure('cast of {type_name}'); RETURN {result}; END $$;"
            f"CREATE CAST ({schema}.{type_name} AS {other}) WITH FUNCTION {schema}.cast_away({schema}.{type_name})"
        )


LURE = LURES[: LURES.index("CREATE FUNCTION public.format")]


@pytest.mark.parametrize("swapped", ["body", "embedding"])
def test_a_type_that_is_only_called_text_or_vector_is_not_cast(
    application: Connection, installed: Bench, swapped: str
) -> None:
    """The table's owner gives a configured column another type: its cast would run with the rights of the service."""
    admin, role = installed.admin, application.info.user
    installed.grant("documents", ["id"], ["body"], "embedding")
    admin.execute(
        sql.SQL("GRANT EXECUTE ON FUNCTION cdc_embedder.is_current, cdc_embedder.fresh TO {0};"
                "GRANT USAGE ON SCHEMA cdc_embedder TO {0};"
                "CREATE SCHEMA app AUTHORIZATION {0}").format(sql.Identifier(role))
    )  # fmt: skip
    admin.execute("GRANT USAGE ON SCHEMA app TO PUBLIC")
    configure(application)
    application.execute(LURE.encode())
    swap_types(application, "app")
    application.execute("INSERT INTO documents (id, body) VALUES (1, 'x')")
    application.execute(
        "ALTER TABLE documents ALTER body TYPE app.text USING 'x'::app.text"
        if swapped == "body"
        else "ALTER TABLE documents ALTER embedding TYPE app.vector USING 'x'::app.vector"
    )
    with running(installed) as service:
        until(lambda: status(installed)[0]["state"] == "error" or caught(admin), "never served", lambda: service.log)
        for call in ("SELECT cdc_embedder.is_current(d, 'embedding') FROM documents d",
                     "SELECT * FROM cdc_embedder.fresh(NULL::documents, 'embedding')"):  # fmt: skip
            with pytest.raises(psycopg.errors.DatatypeMismatch):
                application.execute(call)  # type: ignore[call-overload]
        application.execute("UPDATE documents SET n = 1")
        until(lambda: status(installed)[0]["state"] == "error", "it is served", lambda: service.log)
        assert {pair for pair in caught(admin) if pair[0] != role} == set()


def test_every_function_names_what_it_uses_and_none_is_everybodys(installed: Bench) -> None:
    """search_path is pinned in every function with a body. Aggregates have neither: their steps are bound by oid."""
    install(installed.dsn_admin, installed.slot, pgml=True)
    make_model(installed)
    make_documents(installed)
    installed.admin.execute("UPDATE cdc_embedder.embedding_column SET when_stale = 'clear', protect = true")
    found = installed.admin.execute(
        "SELECT CASE WHEN n.nspname = 'pgml' THEN 'pgml.' ELSE '' END || p.proname"
        "       || '(' || replace(oidvectortypes(p.proargtypes), ', ', ',') || ')',"
        "       p.prosecdef, p.prokind::text, coalesce(p.proconfig, '{}'), pg_get_userbyid(p.proowner),"
        "       ARRAY(SELECT pg_get_userbyid(x.grantee)"
        "               FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) x"
        "              WHERE x.grantee <> p.proowner)"
        "  FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname IN ('cdc_embedder', 'pgml')"
    ).fetchall()
    assert len(found) > 100
    assert {function for function, _, kind, config, *_ in found
            if kind != "a" and "search_path=pg_catalog, pg_temp" not in config} == set()  # fmt: skip
    definers = {re.sub(r"_\d+\(", "_N(", function) for function, definer, *_ in found if definer}
    assert definers == DEFINERS.keys() | GUARDS.keys()
    assert {owner for *_, owner, _ in found} == {SERVICE_ROLE}
    guards = {function for function, *_ in found if re.search(r"_\d+\(", function)}
    assert {function: granted for function, *_, granted in found if granted} == {
        guard: ["postgres"] for guard in guards
    }
    steps = installed.admin.execute(
        "SELECT DISTINCT n.nspname FROM pg_aggregate a JOIN pg_proc f ON f.oid = a.aggfnoid"
        "  JOIN pg_proc s ON s.oid IN (a.aggtransfn, a.aggcombinefn, a.aggfinalfn)"
        "  JOIN pg_namespace n ON n.oid = s.pronamespace"
        " WHERE f.pronamespace IN ('cdc_embedder'::regnamespace, 'pgml'::regnamespace)"
    ).fetchall()
    assert steps == [("cdc_embedder",)]


def test_no_table_view_or_schema_of_ours_is_everybodys(installed: Bench) -> None:
    install(installed.dsn_admin, installed.slot, pgml=True)
    make_model(installed)
    make_documents(installed)
    open_to_all = installed.admin.execute(
        "SELECT c.relname FROM pg_class c, aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) x"
        " WHERE c.relnamespace IN ('cdc_embedder'::regnamespace, 'pgml'::regnamespace) AND c.relkind <> 'c'"
        "   AND x.grantee <> c.relowner"
        " UNION ALL SELECT n.nspname FROM pg_namespace n, aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) x"
        " WHERE n.nspname IN ('cdc_embedder', 'pgml') AND x.grantee <> n.nspowner"
    ).fetchall()
    assert open_to_all == []
    role = sql.Identifier(f"nobody_{installed.database}")
    installed.admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    try:
        with psycopg.connect(
            installed.server.dsn(installed.database, f"nobody_{installed.database}"), autocommit=True
        ) as conn:
            for statement in ("TABLE cdc_embedder.sql_embed", "SELECT cdc_embedder.embed('fake', 'x')",
                              "TABLE cdc_embedder.status", "SELECT pgml.embed('fake', 'x')"):  # fmt: skip
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    conn.execute(statement)  # type: ignore[call-overload]
    finally:
        installed.admin.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


# The stream and the channel, which any role may write to


def test_messages_and_notifications_of_strangers_change_nothing(installed: Bench) -> None:
    make_model(installed)
    make_documents(installed, 3)
    with canary(installed.admin), running(installed, CDC_EMBEDDER_SQL_EMBED="on") as service:
        until(lambda: "SQL is answered" in service.log, "never answered", lambda: service.log)
        wait_caught_up(installed)
        id = str(uuid.uuid4())
        request = {"id": id, "slot": f"{installed.slot}_embed", "until": 1e12, "model": "fake"}
        forged = json.dumps({**request, "texts": ["x"], "input_type": "none", "prompt": None, "normalize": None})
        odd = forged.replace(id, "'; DROP TABLE canary; --")
        for content in (forged, "x" * 32 + forged, "x" * 32 + odd, "", "'; DROP TABLE canary; --", "[" * 100_000):
            for prefix in (
                "cdc_embedder.embed",
                "cdc_embedder.wait",
                "cdc_embedder",
                "cdc_embedder.'; DROP TABLE canary; --",
            ):
                installed.admin.execute("SELECT pg_logical_emit_message(false, %s, %s::text)", (prefix, content))
        for payload in ("'; DROP TABLE canary; --", "", "embedding_column", "x" * 7000):
            installed.admin.execute("SELECT pg_notify('cdc_embedder', %s)", (payload,))
        installed.admin.execute("SET cdc_embedder.embed_timeout = '60s'")
        found = one(installed.admin, "SELECT cdc_embedder.embed('fake', 'still there')")
        assert np.allclose(found, fake_vector("fake", "still there", 8), atol=1e-6)
        assert one(installed.admin, "SELECT count(*) FROM cdc_embedder.answer WHERE id = %s", id) == 0
        for timeout in ("'; DROP TABLE canary; --", "1s'::interval; DROP TABLE canary; --", "%s x"):
            installed.admin.execute("SELECT set_config('cdc_embedder.embed_timeout', %s, false)", (timeout,))
            with pytest.raises(psycopg.errors.InvalidParameterValue, match="is no duration"):
                installed.admin.execute("SELECT cdc_embedder.embed('fake', 'x')")
        wait_caught_up(installed)
        assert service.stop() == 0


# The command line


def test_the_command_line_takes_odd_names_and_refuses_what_is_none(installed: Bench) -> None:
    with raw(installed) as conn, canary(conn):
        make_odd_table(installed, conn)
        insert(conn, TEXTS)
        for wrong in (
            "x; DROP TABLE canary",
            "x'; DROP TABLE canary; --",
            'x"; DROP TABLE canary; --',
            "",
            '""',
            "a.b.c.d",
        ):
            fails(installed, "add", wrong, "body", "embedding")
            fails(installed, "remove", f"{wrong}.embedding")
            fails(installed, "reconcile", wrong)
            fails(installed, "search", f"{wrong}.embedding", "x")
            fails(installed, "verify", f"{wrong}.embedding")
        table, target = NAME, name(TARGET)
        column = f"{table}.{target}"
        succeeds(installed, "add", table, f"{name(SOURCE)},{name(OTHER_SOURCE)}", target, "--model", MODEL,
                 "--separator", SEPARATOR)  # fmt: skip
        assert one(conn, "SELECT separator FROM cdc_embedder.embedding_column") == SEPARATOR
        with running(installed):
            wait_caught_up(installed)
            assert assert_right(conn) == len(TEXTS)
            [shown] = json.loads(succeeds(installed, "status", "--json"))
            assert (shown["source_table"], shown["target_column"], shown["model"]) == (NAME, TARGET, MODEL)
            assert json.loads(succeeds(installed, "verify", column, "--json"))[0]["current"] == len(TEXTS)
            succeeds(installed, "reconcile", table)
        for text in (*TEXTS, SEPARATOR):
            [vector] = json.loads(succeeds(installed, "embed", "--model", MODEL, "--json", "--", text))
            assert np.allclose(vector, fake_vector(MODEL, text, 8), atol=1e-6), text
        found = json.loads(succeeds(installed, "search", column, "'; DROP TABLE canary; --", "--json"))
        assert len(found) == 10
        assert set(found[0]["key"]) == {KEY, OTHER_KEY}
        for command in (("status",), ("search", column, "x"), ("verify", column)):
            assert_harmless(succeeds(installed, *command))
        for slot in ("x'; DROP TABLE canary; --", 'x"', "x y", ""):
            assert asked(installed, "init", "--slot", slot).returncode == 1
        for owner in ("nobody'; DROP TABLE canary; --", 'nobody"; DROP TABLE canary; --'):
            fails(installed, "init", "--owner", owner)
        succeeds(installed, "remove", column)


def assert_harmless(shown: str) -> None:
    """What is shown to people steers no terminal."""
    assert not re.search(r"[^\n -~\x80-\U0010ffff]|[\x80-\x9f]", shown), ascii(shown)


def test_names_do_not_steer_the_operators_terminal(bench18: Bench) -> None:
    escape = "\x1b]0;owned\x07\x1b[2Jx\x9b\x08"
    with raw(bench18) as conn:
        make_model(bench18, escape)
        conn.execute(f"CREATE TABLE {name(escape)} (id int PRIMARY KEY, body text, embedding vector(8))")
        bench18.grant(name(escape), ["id"], ["body"], "embedding")
        conn.execute(f"INSERT INTO {name(escape)} VALUES (1, 'x')")
        conn.execute(
            "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
            " VALUES ($1::regclass, '{body}', 'embedding', $2)",
            (name(escape), escape),
        )
        with running(bench18) as service:
            wait_caught_up(bench18)
            assert service.stop() == 0
            assert_harmless(service.log)
        for command in ("status", "verify"):
            assert_harmless(succeeds(bench18, command))
        assert_harmless(fails(bench18, "reconcile", name("no " + escape)))


def test_a_remedy_that_is_shown_can_be_run_as_it_stands(installed: Bench) -> None:
    """An operator takes statements out of reasons and hints: a name in them must not be more than a name."""
    odd = "t'); DROP TABLE canary; --"
    with raw(installed) as conn, canary(conn):
        make_model(installed)
        for _ in range(2):
            conn.execute(
                f"CREATE TABLE {name(odd)} (id int PRIMARY KEY, body text, embedding {target_type(installed)})"
            )
            installed.grant(name(odd), ["id"], ["body"], "embedding")
            if one(conn, "SELECT count(*) FROM cdc_embedder.embedding_column") == 0:
                conn.execute(
                    "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
                    " VALUES ($1::regclass, '{body}', 'embedding', 'fake')",
                    (name(odd),),
                )
                conn.execute(f"ALTER TABLE {name(odd)} RENAME TO aside")
        with running(installed) as service:
            until(lambda: "is another table" in service.log, "not noticed", lambda: service.log)
            said = re.findall(r"SELECT (cdc_embedder\.resume\(.*\))$", service.log, re.MULTILINE)
            said += re.findall(r"(cdc_embedder\.resume\('.*?'\)) takes", status(installed)[0]["reason"])
            assert len(said) >= 2, service.log
            for call in said:
                conn.execute(f"SELECT {call}")


def test_a_migration_from_pgml_takes_odd_names_and_prompts(installed: Bench) -> None:
    install(installed.dsn_admin, installed.slot, pgml=True)
    prompt = "p'; DROP TABLE canary; -- \" {x} $body$ %s "
    kwargs = json.dumps({"prompt": prompt}).replace("'", "''")
    with raw(installed) as conn, canary(conn):
        conn.execute("INSERT INTO cdc_embedder.model (name, backend, dimensions) VALUES ($1, 'fake', 8)", (MODEL,))
        model = MODEL.replace("'", "''").replace("\\", "\\\\")
        conn.execute(f"CREATE SCHEMA {name(SCHEMA)}")
        conn.execute(
            f"CREATE TABLE {NAME} ({name(KEY)} int PRIMARY KEY, {name(SOURCE)} text, {name(TARGET)} real[]"
            f" GENERATED ALWAYS AS (pgml.embed(E'{model}', {name(SOURCE)}, '{kwargs}')) STORED)"
        )
        assert_harmless(succeeds(installed, "migrate", "pgml"))
        succeeds(installed, "migrate", "pgml", f"{NAME}.{name(TARGET)}", "--apply")
        row = one(
            conn,
            "SELECT c.source_schema, c.source_name, c.source_columns, c.target_column, m.document_prompt"
            "  FROM cdc_embedder.embedding_column c JOIN cdc_embedder.model m ON m.name = c.model",
        )
        assert row == (SCHEMA, TABLE, [SOURCE], TARGET, prompt)
        conn.execute("DELETE FROM cdc_embedder.embedding_column")
        conn.execute(f"DROP SCHEMA {name(SCHEMA)} CASCADE")


# The web port


@pytest.fixture
def service(bench18: Bench) -> Iterator[Service]:
    make_model(bench18, MODEL)
    make_model(bench18)
    with canary(bench18.admin), running(bench18, CDC_EMBEDDER_HTTP="127.0.0.1:0") as service:
        service.wait_for_log("embeddings at /v1/embeddings")
        until(lambda: "fake" in httpx.get(url(service) + "/v1/models").text, "no model", lambda: service.log)
        yield service
        assert post(service, {"model": "fake", "input": "still there"}).status_code == 200
        assert service.stop() == 0
        assert "Traceback" not in service.log


def url(service: Service) -> str:
    found = re.search(r"health is served at (http://\S+)/healthz", service.log)
    assert found is not None
    return found[1]


def post(service: Service, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        url(service) + "/v1/embeddings",
        content=content,
        headers={"Content-Type": "application/json"} | headers,
        timeout=60,
    )


def test_model_names_and_texts_over_http_are_data(service: Service) -> None:
    for text in (*TEXTS, "a\0b"):
        answer = post(service, {"model": MODEL, "input": [text, "x"]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == MODEL
        assert np.allclose(answer.json()["data"][0]["embedding"], fake_vector(MODEL, text, 8), atol=1e-6)
    before = len(service.log.splitlines())
    for model in UNKNOWN:
        answer = post(service, {"model": model, "input": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), model
        assert "set-cookie" not in answer.headers
    added = service.log.splitlines()[before:]
    assert not any("forged" in line or "\x1b" in line for line in added)


UNKNOWN = (
    "'; DROP TABLE canary; --", "../../etc/passwd", "fake\0", "fake\r\nSet-Cookie: x=1", "{0}%s%n", "☃" * 1000,
    "x\n2026-01-01T00:00:00.000Z error   forged", "\x1b[2J", "FAKE", "fake ", "http://127.0.0.1:1/",
)  # fmt: skip

ODD_BODIES = [
    b"", b"null", b"[]", b"{", b'"x"', b"1e999", b"[" * 200_000, b'{"model":' * 50_000, b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b'{"model": "fake", "input": "\\ud800"}', b'{"model": "fake", "input": "\xed\xa0\x80"}',
    b'{"model": "fake", "input": NaN}', b'{"model": "fake", "input": 1e400}', b'{"model": "fake", "input": {"a": 1}}',
    b'{"model": ["fake"], "input": "x"}', b'{"model": {"$ne": null}, "input": "x"}', b'{"model": null, "input": "x"}',
    b'{"model": "fake", "input": "x", "dimensions": 99999999999999999999999999}',
    b'{"model": "fake", "input": "x", "dimensions": -1}', b'{"model": "fake", "input": "x", "dimensions": true}',
    b'{"model": "fake", "input": "x", "dimensions": 1.5}', b'{"model": "fake", "input": "x", "encoding_format": "hex"}',
    b'{"model": "fake", "input": "x", "input_type": "\'; DROP TABLE canary; --"}',
    b'{"model": "fake", "input": "x", "__class__": "x"}', b'{"model": "fake", "input": "x", "\\u0000": 1}',
    b'{"model": "fake", "input": "x", "prompt": "y"}', b'{"model": "fake", "input": [["x"]]}', b'{"input": "x"}',
    b'{"model": "fake", "input": ' + json.dumps(["x"] * 5000).encode() + b"}",
]  # fmt: skip


def test_odd_bodies_are_refused_in_openais_form(service: Service) -> None:
    for body in ODD_BODIES:
        answer = post(service, body)
        assert answer.status_code == 400, (body[:80], answer.text)
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert "canary" not in error["message"]
        assert "\0" not in answer.text
    twice = post(service, b'{"model": "nothing", "model": "fake", "input": "a", "input": "b"}').json()
    assert np.allclose(twice["data"][0]["embedding"], fake_vector("fake", "b", 8), atol=1e-6)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx", ""):
        assert post(service, {"model": "fake", "input": "x"}, **{"Content-Type": kind}).status_code == 415


BODY = json.dumps({"model": "fake", "input": "x"}).encode()
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

ODD_REQUESTS = {
    "a line feed in a header": HEAD + b"X: a\nSet-Cookie: b\r\nContent-Length: 0\r\n\r\n",
    "a NUL in a header": HEAD + b"X: a\0b\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 3\r\nContent-Length: 30\r\n\r\n" + BODY,
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "a length that is none": HEAD + b"Content-Length: 1e9\r\n\r\n",
    "an odd transfer encoding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n",
    "a chunk size that is none": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a blank in a header's name": HEAD + b"Content-Length : 3\r\n\r\n" + BODY,
    "a folded header": HEAD + b" folded\r\nContent-Length: 0\r\n\r\n",
    "another protocol": b"POST /v1/embeddings HTTP/9.9\r\n\r\n",
    "no HTTP": b"'; DROP TABLE canary; --\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a large header": HEAD + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("what", ODD_REQUESTS)
def test_odd_requests_are_answered_once_or_cut_off(service: Service, what: str) -> None:
    answer = exchange(service, ODD_REQUESTS[what])
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer
    assert b"Set-Cookie" not in answer


def test_paths_and_headers_do_not_come_back(service: Service) -> None:
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    for path in (
        b"/v1/%0d%0aSet-Cookie:%20x=1", b"/v1/embeddings/..;/", b"//evil/v1/embeddings", b"/healthz%00", b"http://evil/v1/",
        b"/v1/embeddings?x=\xe2\x98\x83", b"/../../../etc/passwd",
    ):  # fmt: skip
        answer = exchange(
            service,
            b"GET " + path + b" HTTP/1.1\r\nHost: evil'; --\r\nX-Forwarded-For: <x>\r\nConnection: close\r\n\r\n",
        )
        assert b"evil" not in answer
        assert b"Cookie" not in answer
        assert b"passwd" not in answer
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer
    both = HEAD + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n" % len(BODY)
    answer = exchange(service, both + b"0\r\n\r\n" + smuggled)
    assert b"owned_by" not in answer
    assert answer.count(b"HTTP/1.1 ") <= 1


def exchange(service: Service, sent: bytes) -> bytes:
    """All that is answered until the connection is closed."""
    host, port = url(service).removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        received = b""
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                received += part
        except ConnectionError:
            pass
        return received
