"""docs/sql.md against the catalog: every function, table, column and SQLSTATE is in it, and no function besides; and
against a server that answers, as a role that has no right but those that it is told to have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc_embedder.errors import Problem
from cdc_embedder.install import install
from cdc_embedder.searching import search_column
from cdc_embedder.settings import Settings
from tests.configuring import configure
from tests.documents import make_documents, make_model
from tests.servers import SERVICE_ROLE, Bench, make_bench
from tests.service import running, wait_caught_up

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "sql.md").read_text()
SIGNATURE = re.compile(r"`((?:cdc_embedder|pgml)\.\w+\([^`]*\) → [^`]+)`")

FUNCTIONS = """
SELECT format('%s.%s(%s) → %s', n.nspname, p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid))
  FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
 WHERE n.nspname = %s AND p.proname !~ '^_'
"""
COLUMNS = """
SELECT c.relname::text, array_agg(a.attname::text) FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
 WHERE c.relnamespace = 'cdc_embedder'::regnamespace AND c.relkind IN ('r', 'v') AND a.attnum > 0 AND NOT a.attisdropped
 GROUP BY 1
"""


def signatures(bench: Bench, schema: str) -> set[str]:
    """Without the casts of defaults; T is a vector's element where a function is there for both."""
    statement = FUNCTIONS.replace("%s.%s(%s) → %s", "%%s.%%s(%%s) → %%s")
    found = [
        re.sub(r"::[a-z][a-z ]*(\[\])?", "", row[0]) for row in bench.admin.execute(statement, (schema,)).fetchall()
    ]
    general = {one: re.sub(r"\b(real|double precision)\b", "T", one) for one in found}
    times = Counter(general.values())
    return {general[one] if times[general[one]] == 2 else one for one in found}


def documented(schema: str) -> set[str]:
    return {found for found in SIGNATURE.findall(DOCS) if found.startswith(schema + ".")}


@pytest.fixture
def everything(bench18: Bench) -> Bench:
    install(bench18.dsn_admin, bench18.slot, owner=SERVICE_ROLE, pgml=True)
    return bench18


def test_every_function_is_documented_as_it_is(everything: Bench) -> None:
    there = signatures(everything, "cdc_embedder")
    assert len(there) > 30
    assert documented("cdc_embedder") == there


def test_pgml_has_what_is_documented_or_has_the_same_name_here(everything: Bench) -> None:
    there, ours = signatures(everything, "pgml"), documented("cdc_embedder")
    assert documented("pgml") - there == set()
    assert {
        found for found in there - documented("pgml") if found.replace("pgml.", "cdc_embedder.", 1) not in ours
    } == set()


def test_every_table_and_column_is_documented(everything: Bench) -> None:
    sections = dict(re.findall(r"^### `cdc_embedder\.(\w+)`\n(.*?)(?=^##|\Z)", DOCS, re.MULTILINE | re.DOTALL))
    there = dict(everything.admin.execute(COLUMNS).fetchall())
    assert set(sections) == set(there)
    missing = {
        (table, column)
        for table, columns in there.items()
        for column in columns
        if f"`{column}`" not in sections[table]
    }
    assert missing == set()


def test_every_sqlstate_that_our_sql_raises_is_documented() -> None:
    files = [*(ROOT / "sql").rglob("*.sql")]
    raised = {name for file in files for name in re.findall(r"ERRCODE = '(\w+)'", file.read_text())}
    assert len(raised) > 10
    states = {}
    for name in raised:
        found = getattr(psycopg.errors, "".join(part.capitalize() for part in name.split("_")), None)
        states[name] = name if found is None else found.sqlstate
    assert {name for name, state in states.items() if f"`{state}`" not in DOCS} == set()


Connection = psycopg.Connection[Any]


@pytest.fixture(scope="module", params=["pg15", "pg18"])
def answering(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """`documents` with vectors, a service that answers SQL, and a role `app_…` that may read the table."""
    for bench in make_bench(request.getfixturevalue(request.param), "pgoutput"):
        install(bench.dsn_admin, bench.slot, owner=SERVICE_ROLE, pgml=True)
        make_model(bench)
        make_documents(bench, 20)
        role = f"app_{bench.database}"
        bench.admin.execute(
            f"CREATE ROLE {role} LOGIN; GRANT SELECT ON documents TO {role};"  # type: ignore[arg-type]
            "CREATE TABLE mine (id int PRIMARY KEY, body text, embedding real[], other real[]);"
            f"ALTER TABLE mine OWNER TO {role}"
        )
        try:
            with running(bench, CDC_EMBEDDER_SQL_EMBED="on") as service:
                service.wait_for_log("SQL is answered")
                wait_caught_up(bench)
                configure(bench.admin, "mine", model="fake", enabled=False)
                yield bench
        finally:
            bench.admin.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")  # type: ignore[arg-type]


@pytest.fixture
def app(answering: Bench) -> Iterator[Connection]:
    role = f"app_{answering.database}"
    with psycopg.connect(answering.server.dsn(answering.database, role), autocommit=True) as connection:
        connection.execute("SET cdc_embedder.embed_timeout = '60s'")
        yield connection


def by_command(app: Connection) -> None:
    dsn = f"host={app.info.host} port={app.info.port} dbname={app.info.dbname} user={app.info.user}"
    assert len(search_column(Settings(dsn=dsn), "documents", "embedding", "a question", 3)) == 3  # type: ignore[arg-type]


Call = str | Callable[[Connection], None]

GRANTED: dict[tuple[str, int], list[Call]] = {
    ("SQL reference", 1): [
        "SELECT * FROM cdc_embedder.status", "SELECT * FROM cdc_embedder.failed",
        "SELECT cdc_embedder.embed_query('fake', 'a')"],
    ("SQL reference", 2): [
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('mine', '{body}', 'other', 'fake')",
        "UPDATE cdc_embedder.embedding_column SET when_stale = 'clear' WHERE source_table = 'mine'::regclass",
        "DELETE FROM cdc_embedder.embedding_column WHERE source_table = 'mine'::regclass",
        "SELECT name FROM cdc_embedder.model"],
    ("Configuration", 1): ["SELECT cdc_embedder.add_embedding_column('mine', '{body}', 'added', 'fake')"],
    ("Freshness", 1): ["SELECT * FROM cdc_embedder.fresh(NULL::documents, 'embedding')"],
    ("Embedding from SQL", 1): ["SELECT cdc_embedder.embed_query('fake', 'a')"],
    ("Vector functions", 1): [
        "SELECT cdc_embedder.distance_l2('{3,4}'::real[], '{0,0}')", "SELECT cdc_embedder.sum('{3,4}'::real[])"],
    ("Search", 1): ["SELECT * FROM cdc_embedder.search('documents', 'embedding', 'a question')"],
    ("Search", 2): [by_command],
    ("The names of PostgresML: schema `pgml`", 1): [
        "SELECT pgml.embed('fake', 'a')", "SELECT pgml.embed('fake', ARRAY['a'])",
        "SELECT pgml.distance_l2('{3,4}'::real[], '{0,0}')", "SELECT pgml.sum('{3,4}'::real[])"],
}  # fmt: skip
"""What the GRANTs of a section are for, each block of them apart."""


def granting() -> dict[tuple[str, int], list[str]]:
    """The GRANTs of every block, each of one privilege on one object."""
    found: dict[tuple[str, int], list[str]] = {}
    heading = ""
    for title, block in re.findall(r"^#{1,2} ([^\n]+)$|^```sql\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL):
        heading = title or heading
        if "GRANT " not in block:
            continue
        number = 1 + sum(1 for section, _ in found if section == heading)
        found[heading, number] = [
            f"GRANT {privilege} ON {kind}{one} TO app"
            for statement in re.sub(r"--.*", "", block).replace("\n", " ").split(";")
            if statement.strip()
            for rights, kind, objects in [parts(statement)]
            for privilege in rights.split(", ")
            for one in re.split(r",\s*(?![^(]*\))", objects)
        ]
    return found


def parts(statement: str) -> Sequence[str]:
    found = re.fullmatch(
        r"\s*GRANT (.+) ON ((?:ALL FUNCTIONS IN )?SCHEMA |FUNCTION |)(.+) TO app\s*", re.sub(r"\s+", " ", statement)
    )
    assert found is not None, statement
    return found.groups()


def refused(app: Connection, calls: Sequence[Call]) -> list[Call]:
    """Those that lack a right; what the others do is undone."""
    found, states = [], set()
    for call in calls:
        try:
            with app.transaction(force_rollback=True):
                if isinstance(call, str):
                    app.execute(call)  # type: ignore[arg-type]
                else:
                    call(app)
        except (psycopg.errors.InsufficientPrivilege, Problem) as error:
            found.append(call)
            states.add(error.sqlstate)
    assert states <= {"42501"}
    return found


def test_every_block_of_grants_is_tried() -> None:
    assert granting().keys() == GRANTED.keys()


@pytest.mark.parametrize("place", GRANTED, ids=lambda place: f"{place[0]} {place[1]}")
def test_the_grants_of_a_block_are_what_its_calls_need_all_of_them_and_no_more(
    answering: Bench, app: Connection, place: tuple[str, int]
) -> None:
    calls, grants = GRANTED[place], granting()[place]

    def change(grant: str, *, given: bool) -> None:
        statement = grant if given else grant.replace("GRANT", "REVOKE").replace(" TO app", " FROM app")
        answering.admin.execute(re.sub(r"\bapp$", app.info.user, statement))  # type: ignore[arg-type]

    assert refused(app, calls) == calls
    try:
        for grant in grants:
            change(grant, given=True)
        assert refused(app, calls) == []
        for grant in grants:
            change(grant, given=False)
            assert refused(app, calls), f"nothing needs {grant}"
            change(grant, given=True)
    finally:
        for grant in grants:
            change(grant, given=False)
    assert refused(app, calls) == calls


EXECUTED = {
    "remove_embedding_column": ["remove_embedding_column('mine', 'embedding')"],
    "pause": ["pause('mine')"],
    "resume": ["resume('mine')"],
    "reconcile": ["reconcile('documents')", "reconcile()"],
    "retry_failed": ["retry_failed('documents')"],
    "take_slot_again": ["take_slot_again()"],
    "wait_until_embedded": ["wait_until_embedded('documents')"],
    "embedded_through": ["embedded_through('documents')"],
    "is_current": ["is_current(d, 'embedding') FROM documents d"],
    "embed": ["embed('fake', 'a')", "embed('fake', ARRAY['a', 'b'])"],
    "embed_query": ["embed_query('fake', 'a')"],
    "embed_document": ["embed_document('fake', 'a')"],
}
"""Calls of every function but vector functions, and those of which a block has the grants."""

CALLABLE = """
SELECT p.proname::text, p.prosecdef, array_agg(p.oid::regprocedure::text)
  FROM pg_proc p
 WHERE p.pronamespace = 'cdc_embedder'::regnamespace AND p.proname !~ '^_' AND NOT (p.proname = ANY (%s))
 GROUP BY 1, 2
"""


def test_execute_on_a_function_is_enough_to_call_it_and_who_runs_with_the_callers_rights_is_told(
    answering: Bench, app: Connection
) -> None:
    [section] = re.findall(r"^## Vector functions\n(.*?)(?=^## )", DOCS, re.MULTILINE | re.DOTALL)
    arithmetic = sorted(set(re.findall(r"^\| `cdc_embedder\.(\w+)\(", section, re.MULTILINE)))
    assert len(arithmetic) == 20
    there = answering.admin.execute(CALLABLE, (arithmetic,)).fetchall()
    told = re.search(r"\n((?:`\w+`[\s,and]+)+)run with the caller's rights;", DOCS)
    assert told is not None
    invokers = set(re.findall(r"`(\w+)`", told[1]))
    assert {name for name, definer, _ in there if not definer} == invokers
    assert {name for name, *_ in there} - EXECUTED.keys() == {"add_embedding_column", "search", "fresh"}
    role = app.info.user
    schema, table = granting()["SQL reference", 2][0], granting()["SQL reference", 2][1:]
    for name, definer, signatures in there:
        if name not in EXECUTED:
            continue
        calls = [f"SELECT cdc_embedder.{call}" for call in EXECUTED[name]]
        granted = [schema, *([] if definer else table), *(f"GRANT EXECUTE ON FUNCTION {s} TO app" for s in signatures)]
        for grant in granted:
            assert refused(app, calls), (name, grant)
            answering.admin.execute(re.sub(r"\bapp$", role, grant))  # type: ignore[arg-type]
        assert refused(app, calls) == [], name
        for grant in granted:
            statement = grant.replace("GRANT", "REVOKE").replace(" TO app", f" FROM {role}")
            answering.admin.execute(statement)  # type: ignore[arg-type]
