"""PostgresML's names: the queries of its users run unchanged against the real service, for a role with nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray
from psycopg import sql
from sentence_transformers import SentenceTransformer

from cdc_embedder.errors import Misconfigured, Problem
from cdc_embedder.install import install
from cdc_embedder.uninstall import uninstall, uninstall_plan
from tests import models
from tests.commands import fails, succeeds
from tests.configuring import Connection, one
from tests.documents import make_model
from tests.integration.test_schema import Bare, changes, dump, psql
from tests.servers import SERVICE_ROLE, Bench, make_bench
from tests.service import fake_vector, running, until

E5 = "intfloat/e5-small-v2"
BODIES = ("This is a cat", "A dog and a long path", "read and write a csv file", "the key of a map")

SEED = f"""
CREATE TABLE documents (id bigint PRIMARY KEY, body text);
CREATE TABLE documents_with_embeddings (
    id bigint PRIMARY KEY,
    body text,
    embedding FLOAT[] GENERATED ALWAYS AS (pgml.normalize_l2(pgml.embed('{E5}', body))) STORED
);
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with mean pooling, as e5-small is one; its vectors mean nothing and are not of unit length."""
    return models.bert(tmp_path_factory.mktemp("e5"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module", params=["pg15", "pg18"])
def served(request: pytest.FixtureRequest, folder: Path) -> Iterator[Bench]:
    for bench in make_bench(request.getfixturevalue(request.param), "pgoutput"):
        install(bench.dsn_admin, bench.slot, pgml=True)
        make_model(bench)
        bench.admin.execute(
            "UPDATE cdc_embedder.model SET query_prompt = 'query: ', document_prompt = 'passage: ' WHERE name = 'fake'"
        )
        bench.admin.execute(
            "UPDATE cdc_embedder.model SET source = %s, dimensions = %s WHERE name = %s",
            (str(folder), models.HIDDEN, E5),
        )
        with running(bench, CDC_EMBEDDER_SQL_EMBED="on") as service:
            until(lambda: "SQL is answered" in service.log, "never answered", lambda: service.log)
            yield bench


@pytest.fixture(scope="module")
def user(served: Bench) -> Iterator[Connection]:
    """A role that may use the schema pgml and make tables of its own."""
    name = f"user_{served.database}"
    role = sql.Identifier(name)
    for statement in (
        "CREATE ROLE {} LOGIN",
        "GRANT CREATE ON SCHEMA public TO {}",
        "GRANT USAGE ON SCHEMA pgml TO {}",
        "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pgml TO {}",
    ):
        served.admin.execute(sql.SQL(statement).format(role))
    try:
        with psycopg.connect(served.server.dsn(served.database, name), autocommit=True) as conn:
            conn.execute("SET cdc_embedder.embed_timeout = '60s'")
            yield conn
    finally:
        served.admin.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(role))


def near(found: Any, want: NDArray[np.float32]) -> bool:
    return np.shape(found) == want.shape and bool(np.allclose(found, want, atol=1e-5))


def test_the_queries_of_postgresmls_users_run_unchanged(user: Connection, encoder: SentenceTransformer) -> None:
    user.execute(SEED)  # type: ignore[arg-type]
    with user.cursor() as cursor:
        for table in ("documents", "documents_with_embeddings"):
            cursor.executemany(
                f"INSERT INTO {table} (id, body) VALUES (%s, %s)",  # type: ignore[arg-type]
                list(enumerate(BODIES, 1)),
            )
    vectors = encoder.encode(list(BODIES), normalize_embeddings=True)
    [(vector,)] = user.execute("""
SELECT pgml.embed('intfloat/e5-small-v2', 'This is some text to embed');
    """).fetchall()
    assert near(vector, encoder.encode("This is some text to embed", normalize_embeddings=True))

    rows = user.execute("""
SELECT id, pgml.embed('intfloat/e5-small-v2', body) FROM documents;
    """).fetchall()
    assert [key for key, _ in rows] == [1, 2, 3, 4]
    assert near([vector for _, vector in rows], vectors)

    user.execute("""
CREATE TEMPORARY TABLE embeddings AS SELECT id AS document_id, pgml.embed('intfloat/e5-small-v2', body) FROM documents;
    """)
    rows = user.execute("SELECT document_id, embed FROM embeddings ORDER BY document_id").fetchall()
    assert near([vector for _, vector in rows], vectors)

    rows = user.execute("""
WITH query AS (SELECT pgml.embed('intfloat/e5-small-v2', 'An example search query') AS embedding)
SELECT id, pgml.distance_l2(query.embedding, documents_with_embeddings.embedding) FROM documents_with_embeddings, query ORDER BY distance_l2;
    """).fetchall()  # noqa: E501
    query = encoder.encode("An example search query", normalize_embeddings=True)
    distances = np.linalg.norm(vectors - query, axis=1)
    assert [key for key, _ in rows] == (np.argsort(distances) + 1).tolist()
    assert near([distance for _, distance in rows], np.sort(distances))

    rows = user.execute("""
SELECT pgml.embed('intfloat/e5-small-v2', array_agg(body)) AS embedding FROM documents;
    """).fetchall()
    assert near([vector for (vector,) in rows], vectors)


def test_no_prompt_is_added_and_those_of_kwargs_are_honoured(user: Connection) -> None:
    for kwargs, prompt in (
        ("{}", ""),
        ('{"prompt": "Represent: "}', "Represent: "),
        ('{"prompt": ""}', ""),
        ('{"prompt_name": "query"}', "query: "),
        ('{"prompt_name": "passage"}', "passage: "),
        ('{"prompt_name": "document"}', "passage: "),
        ('{"prompt_name": null, "prompt": null, "normalize_embeddings": null}', ""),
        ('{"prompt_name": "query", "prompt": "mine: "}', "mine: "),
    ):
        found = one(user, "SELECT pgml.embed('fake', 'a text', %s)", kwargs)
        assert near(found, fake_vector("fake", f"{prompt}a text", 8)), kwargs
        rows = user.execute("SELECT pgml.embed('fake', ARRAY['a text', 'b'], %s)", (kwargs,)).fetchall()
        assert near([row[0] for row in rows], np.array([fake_vector("fake", prompt + t, 8) for t in ("a text", "b")]))
    named = (
        "SELECT * FROM pgml.embed(transformer => 'fake', text => 'a', kwargs => '{\"prompt\": \"p \"}') AS embedding"
    )
    assert near(one(user, named), fake_vector("fake", "p a", 8))
    named = "SELECT embed FROM pgml.embed(transformer => 'fake', inputs => ARRAY['a'])"
    assert near(one(user, named), fake_vector("fake", "a", 8))


def test_the_length_of_a_vector_is_the_models_rows_or_what_is_asked_for(
    user: Connection, encoder: SentenceTransformer
) -> None:
    raw = encoder.encode("a cat")
    assert abs(np.linalg.norm(raw) - 1) > 0.1
    for kwargs, want in (
        ("{}", raw / np.linalg.norm(raw)),
        ('{"normalize_embeddings": true}', raw / np.linalg.norm(raw)),
        ('{"normalize_embeddings": false}', raw),
    ):
        assert near(one(user, f"SELECT pgml.embed('{E5}', 'a cat', %s)", kwargs), want), kwargs


def test_null_gives_null(user: Connection) -> None:
    for call in (
        "pgml.embed('fake', NULL::text)", "pgml.embed(NULL, 'a')", "pgml.embed('fake', 'a', NULL)"):  # fmt: skip
        assert one(user, f"SELECT {call}") is None
    assert user.execute("SELECT pgml.embed('fake', NULL::text[])").fetchall() == []


@pytest.mark.parametrize(
    ("kwargs", "state", "said", "hint"),
    [
        ('{"device": "cuda"}', "0A000", '"device"', "leave it out"),
        ('{"batch_size": 5}', "0A000", '"batch_size"', "leave it out"),
        ('{"instruction": "a"}', "0A000", '"instruction"', '"prompt"'),
        ('{"prompt": "a", "truncate_dim": 8}', "0A000", '"truncate_dim"', "normalize_embeddings"),
        ('{"prompt_name": "clustering"}', "22023", '"clustering"', '"passage"'),
        ('{"prompt": 1}', "22023", "types", "strings"),
        ('{"prompt_name": []}', "22023", "types", "strings"),
        ('{"normalize_embeddings": "yes"}', "22023", "types", "true or false"),
        ('["prompt"]', "22023", "array", "prompt"),
    ],
)
def test_other_kwargs_are_refused_with_a_sentence(
    user: Connection, kwargs: str, state: str, said: str, hint: str
) -> None:
    for texts in ("'a text'", "ARRAY['a text']"):
        with pytest.raises(psycopg.Error) as refused:
            user.execute(f"SELECT pgml.embed('fake', {texts}, %s)", (kwargs,))  # type: ignore[arg-type]
        assert refused.value.sqlstate == state
        assert said in (refused.value.diag.message_primary or "")
        assert hint in (refused.value.diag.message_hint or "")


def test_the_rights_are_those_that_were_granted(served: Bench, user: Connection) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        user.execute("SELECT cdc_embedder.embed('fake', 'a')")
    reachable = (
        "SELECT count(*) FROM pg_proc"
        " WHERE pronamespace = 'pgml'::regnamespace AND has_function_privilege(%s, oid, 'EXECUTE')"
    )
    assert one(served.admin, reachable, user.info.user) > 40
    served.admin.execute("CREATE ROLE nobody_of_pgml")
    try:
        assert one(served.admin, reachable, "nobody_of_pgml") == 0
    finally:
        served.admin.execute("DROP ROLE nobody_of_pgml")


def test_the_vector_functions_are_those_of_cdc_embedder_and_declared_as_postgresmls(served: Bench) -> None:
    """All of them, and `embed` besides: a name that is missing would be an error in somebody's query."""
    shown = (
        "SELECT proname::text, pg_get_function_arguments(oid), pg_get_function_result(oid), provolatile, proisstrict,"
        " proparallel, prosrc FROM pg_proc WHERE pronamespace = %s::regnamespace AND proname !~ '^_'"
        " AND proname !~ '^embed' AND (prokind = 'a' OR provolatile = 'i') ORDER BY 1, 2"
    )
    found = served.admin.execute(shown, ("pgml",)).fetchall()
    assert found == served.admin.execute(shown, ("cdc_embedder",)).fetchall()
    assert len(found) == 48
    declared = (
        "SELECT DISTINCT provolatile, proisstrict, proparallel FROM pg_proc"
        " WHERE pronamespace = 'pgml'::regnamespace AND proname = 'embed'"
    )
    assert served.admin.execute(declared).fetchall() == [("i", True, "u")]


def test_the_vector_functions_need_no_other_right(user: Connection) -> None:
    assert one(user, "SELECT pgml.distance_l2('{3,4}'::real[], '{0,0}'::double precision[])") == 5
    assert one(user, "SELECT pgml.sum(v) FROM (VALUES ('{1,2}'::real[]), ('{3,4}')) AS t(v)") == [4, 6]
    with pytest.raises(psycopg.errors.ArraySubscriptError):
        user.execute("SELECT pgml.dot_product('{3,4}'::real[], '{0}')")


def test_init_installs_it_when_asked_and_keeps_it_up_to_date(installed: Bench) -> None:
    assert one(installed.admin, "SELECT to_regnamespace('pgml')") is None
    assert "made the schema pgml\n" in succeeds(installed, "init", "--pgml")
    owned = "SELECT pg_get_userbyid(nspowner)::text, count(*) FROM pg_namespace WHERE nspname = 'pgml' GROUP BY 1"
    assert one(installed.admin, owned) == (SERVICE_ROLE, 1)
    bare = Bare(installed.server, installed.database, installed.admin)
    before = dump(bare)
    assert changes(install(installed.dsn_admin, installed.slot, pgml=True))[0].startswith("nothing to do")
    assert changes(install(installed.dsn_service, installed.slot))[0].startswith("nothing to do")
    installed.admin.execute("ALTER FUNCTION pgml.norm_l1(real[]) RESET search_path")
    assert changes(install(installed.dsn_admin, installed.slot)) == ["renewed the schema pgml"]
    assert dump(bare) == before


def test_psql_and_init_give_the_same_schema_pgml(installed: Bench) -> None:
    bare = Bare(installed.server, installed.database, installed.admin)
    installed.admin.execute("DROP SCHEMA cdc_embedder CASCADE")
    psql(bare, "-v", f"slot={installed.slot}", "-v", "pgml=true")
    by_hand = dump(bare)
    assert "FUNCTION pgml.normalize_l2" in by_hand
    assert "AGGREGATE pgml.max_abs" in by_hand
    psql(bare, "-v", f"slot={installed.slot}")
    assert changes(install(installed.dsn_admin, installed.slot))[0].startswith("nothing to do")
    assert dump(bare) == by_hand


def test_a_schema_of_that_name_that_is_not_ours_is_left_alone(installed: Bench) -> None:
    installed.admin.execute("CREATE SCHEMA pgml; CREATE TABLE pgml.projects (id int)")
    sentence = fails(installed, "init", "--pgml")
    assert "there is a schema pgml already" in sentence
    assert "DROP SCHEMA pgml" in sentence
    install(installed.dsn_admin, installed.slot)
    assert one(installed.admin, "SELECT count(*) FROM pg_proc WHERE pronamespace = 'pgml'::regnamespace") == 0
    assert not any("pgml" in line for line in uninstall_plan(installed.dsn_admin, installed.slot))


def test_the_extension_has_to_go_first_and_the_order_is_told(bench18: Bench) -> None:
    """An extension of that name, from a folder of ours (PostgreSQL 18 takes one)."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        extension = Path(directory) / "extension"
        extension.mkdir()
        (extension / "pgml.control").write_text("default_version = '1'\nschema = pgml\n")
        (extension / "pgml--1.sql").write_text("CREATE FUNCTION pgml.version() RETURNS text LANGUAGE sql RETURN '1';")
        bench18.admin.execute(f"SET extension_control_path = '{directory}:$system'; CREATE EXTENSION pgml")  # type: ignore[arg-type]
        with pytest.raises(Problem, match="the extension pgml is installed") as refused:
            install(bench18.dsn_admin, bench18.slot, pgml=True)
    order = ("migrate pgml --apply", "DROP EXTENSION pgml", "DROP SCHEMA pgml", "init --pgml")
    assert sorted(order, key=refused.value.hint.index) == list(order)
    bench18.admin.execute("DROP EXTENSION pgml; DROP SCHEMA pgml")
    assert "made the schema pgml" in install(bench18.dsn_admin, bench18.slot, pgml=True)


def test_uninstalling_removes_it_but_not_what_the_application_built_on_it(installed: Bench) -> None:
    install(installed.dsn_admin, installed.slot, pgml=True)
    installed.admin.execute(
        "CREATE TABLE seed (a real[], n double precision[] GENERATED ALWAYS AS (pgml.normalize_l2(a)) STORED);"
        "INSERT INTO seed (a) VALUES ('{3,4}');"
        "CREATE VIEW lengths AS SELECT cdc_embedder.norm_l2(a) FROM seed"
    )
    plan = uninstall_plan(installed.dsn_admin, installed.slot)
    assert "the schema pgml" in plan
    with pytest.raises(Misconfigured, match=r"column n of table public\.seed.*view public\.lengths") as refused:
        uninstall(installed.dsn_admin, installed.slot)
    assert "DROP EXPRESSION" in refused.value.hint
    installed.admin.execute("ALTER TABLE seed ALTER n DROP EXPRESSION; DROP VIEW lengths")
    assert uninstall(installed.dsn_admin, installed.slot) == [f"removed {line}" for line in plan]
    assert one(installed.admin, "SELECT to_regnamespace('pgml'), to_regnamespace('cdc_embedder')") == (None, None)
    assert one(installed.admin, "SELECT n FROM seed") == pytest.approx([0.6, 0.8])
