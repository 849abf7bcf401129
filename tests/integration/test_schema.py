"""Installing: repeatable, the same by hand and by `init`, owned by the service's role, and leaving nothing behind."""

from __future__ import annotations

import re
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import psycopg
import pytest
from psycopg import sql

from cdc_embedder.embedded import Server
from cdc_embedder.errors import Misconfigured
from cdc_embedder.install import install, migrations, package_version, schema_version, sql_dir
from cdc_embedder.uninstall import uninstall, uninstall_plan
from tests.configuring import DOCUMENTS, Connection, configure, one
from tests.servers import SERVICE_ROLE, Bench


@dataclass
class Bare:
    """A database with nothing in it."""

    server: Server
    name: str
    admin: Connection

    @property
    def dsn(self) -> str:
        return self.server.dsn(self.name)


@pytest.fixture(params=["pg15", "pg18"])
def bare(request: pytest.FixtureRequest) -> Iterator[Bare]:
    server: Server = request.getfixturevalue(request.param)
    name = f"bare_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        with psycopg.connect(server.dsn(name), autocommit=True) as admin:
            yield Bare(server, name, admin)
        conn.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", (name,)
        )
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def dump(bare: Bare) -> str:
    """The catalog as pg_dump writes it, without what differs between two runs of it; and what the tables hold."""
    schema = subprocess.run(
        [bare.server.bindir / "pg_dump", "--schema-only", bare.dsn], check=True, capture_output=True, text=True
    )
    lines = [line for line in schema.stdout.splitlines() if not line.startswith(("--", "\\"))]
    rows = bare.admin.execute("TABLE cdc_embedder.model ORDER BY name").fetchall()
    rows += bare.admin.execute("SELECT version, name FROM cdc_embedder.migration").fetchall()
    return "\n".join([*lines, *map(str, rows)])


def psql(bare: Bare, *arguments: str) -> None:
    command = [bare.server.bindir / "psql", "-X", "-q", "-d", bare.dsn, "-f", sql_dir() / "schema.sql", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


def changes(done: list[str]) -> list[str]:
    """What was done, without advice to the administrator."""
    return [line for line in done if not line.startswith(("advice:", "still to do:"))]


def test_installing_twice_changes_nothing_and_says_so(bare: Bare) -> None:
    done = changes(install(bare.dsn, "cdc_embedder"))
    assert [line.split(",")[0] for line in done] == [
        "made the schema cdc_embedder",
        "applied migration 001_tables",
        "applied migration 002_slots",
        "applied migration 003_commit_times",
        "made the publication cdc_embedder",
        "made the publication cdc_embedder_embed",
    ]
    before = dump(bare)
    assert "FUNCTION cdc_embedder._make_ledger" in before
    assert changes(install(bare.dsn, "cdc_embedder"))[0].startswith("nothing to do")
    assert dump(bare) == before
    assert schema_version(bare.admin) == package_version() == len(migrations())


def test_psql_and_init_give_the_same_catalog(bare: Bare) -> None:
    psql(bare)
    by_hand = dump(bare)
    psql(bare)
    assert dump(bare) == by_hand
    assert changes(install(bare.dsn, "cdc_embedder"))[0].startswith("nothing to do")
    assert dump(bare) == by_hand
    bare.admin.execute("DROP SCHEMA cdc_embedder CASCADE; DROP PUBLICATION cdc_embedder, cdc_embedder_embed")
    install(bare.dsn, "cdc_embedder")
    assert dump(bare) == by_hand


def test_psql_takes_the_name_of_the_slot(bare: Bare) -> None:
    psql(bare, "-v", "slot=other")
    assert one(bare.admin, "SELECT array_agg(pubname::text ORDER BY 1) FROM pg_publication") == ["other", "other_embed"]
    assert changes(install(bare.dsn, "other"))[0].startswith("nothing to do")


def test_a_function_that_was_changed_by_hand_is_put_right(bare: Bare) -> None:
    install(bare.dsn, "cdc_embedder")
    before = dump(bare)
    bare.admin.execute("ALTER FUNCTION cdc_embedder._make_ledger(int, boolean) RESET search_path")
    assert changes(install(bare.dsn, "cdc_embedder")) == ["renewed functions, triggers, views and models"]
    assert dump(bare) == before


def test_a_model_that_the_user_changed_stays(bare: Bare) -> None:
    install(bare.dsn, "cdc_embedder")
    bare.admin.execute("UPDATE cdc_embedder.model SET query_prompt = 'mine' WHERE name = 'intfloat/e5-small-v2'")
    install(bare.dsn, "cdc_embedder")
    prompt = "SELECT query_prompt FROM cdc_embedder.model WHERE name = 'intfloat/e5-small-v2'"
    assert one(bare.admin, prompt) == "mine"


def test_the_models_have_their_cards_values(bare: Bare) -> None:
    install(bare.dsn, "cdc_embedder")
    known = bare.admin.execute(
        "SELECT name, coalesce(source, name), backend, dimensions, document_prompt, query_prompt, normalize,"
        " trust_remote_code FROM cdc_embedder.model ORDER BY dimensions, name"
    ).fetchall()
    query = "Represent this sentence for searching relevant passages: "
    minilm, e5 = "all-MiniLM-L6-v2", "intfloat/e5-small-v2"
    gte, mxbai = "Alibaba-NLP/gte-large-en-v1.5", "mixedbread-ai/mxbai-embed-large-v1"
    assert known == [
        (minilm, f"sentence-transformers/{minilm}", "local", 384, None, None, True, False),
        (e5, e5, "local", 384, "passage: ", "query: ", True, False),
        (gte, gte, "local", 1024, None, None, True, True),
        (mxbai, mxbai, "local", 1024, None, query, True, False),
    ]


def test_a_newer_schema_is_not_touched(bare: Bare) -> None:
    install(bare.dsn, "cdc_embedder")
    bare.admin.execute("INSERT INTO cdc_embedder.migration VALUES (999, 'from the future')")
    with pytest.raises(Misconfigured, match="version 999") as refused:
        install(bare.dsn, "cdc_embedder")
    assert "Update cdc-embedder" in refused.value.hint


def test_a_publication_for_all_tables_is_refused_unless_it_is_wanted(bare: Bare) -> None:
    bare.admin.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    with pytest.raises(Misconfigured, match="everything is FOR ALL TABLES") as refused:
        install(bare.dsn, "cdc_embedder")
    assert "--published-everywhere" in refused.value.hint
    assert schema_version(bare.admin) == 0
    install(bare.dsn, "cdc_embedder", published_everywhere=True)
    assert schema_version(bare.admin) == package_version()


def test_every_logged_table_has_a_primary_key(installed: Bench, admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    configure(admin)
    bare_tables = one(
        admin,
        "SELECT array_agg(c.relname) FROM pg_class c WHERE c.relnamespace = 'cdc_embedder'::regnamespace"
        " AND c.relkind = 'r' AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)",
    )
    assert bare_tables is None
    unlogged = (
        "SELECT array_agg(relname::text ORDER BY relname) FROM pg_class WHERE relpersistence = 'u' AND relkind = 'r'"
    )
    assert one(admin, unlogged) == ["answer", "column_state", "in_flight", "leader", "suspect"]


@pytest.mark.parametrize("slot", ["", "Upper", "with-dash", "x" * 64, "a b", "ä"])
def test_a_name_that_no_slot_can_have_is_refused(bare: Bare, slot: str) -> None:
    with pytest.raises(Misconfigured, match="cannot be the name"):
        install(bare.dsn, slot)


def test_a_slot_of_another_database_is_refused_with_a_name_to_use(bare: Bare) -> None:
    slot = f"taken_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(bare.server.dsn(), autocommit=True) as elsewhere:
        elsewhere.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
        try:
            with pytest.raises(Misconfigured, match='the database "postgres"') as refused:
                install(bare.dsn, slot)
        finally:
            elsewhere.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
    proposed = f"{slot}_{bare.name}"
    assert f"--slot {proposed}" in refused.value.hint
    install(bare.dsn, proposed)


def test_another_slot_becomes_the_default_of_the_database(bare: Bare) -> None:
    install(bare.dsn, "one")
    assert changes(install(bare.dsn, "two")) == [
        "new embedding columns use the slot two", "made the publication two, empty",
        "made the publication two_embed, empty"]  # fmt: skip
    bare.admin.execute(DOCUMENTS + "; INSERT INTO cdc_embedder.model (name, dimensions) VALUES ('tiny', 4)")
    configure(bare.admin)
    assert one(bare.admin, "SELECT slot FROM cdc_embedder.embedding_column") == "two"


def test_the_publication_is_empty_and_says_inserts_and_updates(bare: Bare) -> None:
    install(bare.dsn, "cdc_embedder")
    flags = "pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot, puballtables"
    for name in ("cdc_embedder", "cdc_embedder_embed"):
        found = one(bare.admin, f"SELECT {flags} FROM pg_publication WHERE pubname = '{name}'")
        assert found == (True, True, False, False, True, False)
    assert one(bare.admin, "SELECT count(*) FROM pg_publication_rel") == 0
    assert one(bare.admin, "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()") == 0


def test_a_publication_of_somebody_else_is_left_alone(bare: Bare) -> None:
    bare.admin.execute("CREATE PUBLICATION cdc_embedder")
    with pytest.raises(Misconfigured, match="none of cdc-embedder's"):
        install(bare.dsn, "cdc_embedder")
    assert schema_version(bare.admin) == 0


FOREIGN_OWNED = """
SELECT array_agg(what) FROM (
    SELECT relname::text AS what, relowner AS owner FROM pg_class WHERE relnamespace = 'cdc_embedder'::regnamespace
    UNION ALL SELECT proname::text, proowner FROM pg_proc WHERE pronamespace = 'cdc_embedder'::regnamespace
    UNION ALL SELECT nspname::text, nspowner FROM pg_namespace WHERE nspname = 'cdc_embedder'
    UNION ALL SELECT pubname::text, pubowner FROM pg_publication
) AS ours WHERE pg_get_userbyid(owner) <> %s
"""


def test_a_superuser_installs_for_the_role_of_the_service(bare: Bare) -> None:
    install(bare.dsn, "cdc_embedder", owner=SERVICE_ROLE)
    assert one(bare.admin, FOREIGN_OWNED, SERVICE_ROLE) is None
    bare.admin.execute("DROP FUNCTION cdc_embedder._failed() CASCADE")
    install(bare.dsn, "cdc_embedder")
    assert one(bare.admin, FOREIGN_OWNED, SERVICE_ROLE) is None, "an update does not need to be told the owner"
    as_service = bare.server.dsn(bare.name, SERVICE_ROLE)
    assert changes(install(as_service, "cdc_embedder"))[0].startswith("nothing to do")
    with pytest.raises(Misconfigured, match=f"belongs to the role {SERVICE_ROLE}"):
        install(bare.dsn, "cdc_embedder", owner="postgres")


def test_a_role_installs_for_itself_where_it_may_create(bare: Bare) -> None:
    as_service = bare.server.dsn(bare.name, SERVICE_ROLE)
    with pytest.raises(Misconfigured, match="permission denied") as refused:
        install(as_service, "cdc_embedder")
    assert "--owner" in refused.value.hint
    grant = sql.SQL("GRANT CREATE ON DATABASE {} TO {}")
    bare.admin.execute(grant.format(sql.Identifier(bare.name), sql.Identifier(SERVICE_ROLE)))
    install(as_service, "cdc_embedder")
    assert one(bare.admin, FOREIGN_OWNED, SERVICE_ROLE) is None


def test_a_role_that_does_not_own_the_schema_is_told_who_does(bare: Bare) -> None:
    install(bare.dsn, "cdc_embedder")
    bare.admin.execute(f"GRANT USAGE ON SCHEMA cdc_embedder TO {SERVICE_ROLE}")
    bare.admin.execute(f"GRANT SELECT ON cdc_embedder.migration TO {SERVICE_ROLE}")
    with pytest.raises(Misconfigured, match="only postgres"):
        install(bare.server.dsn(bare.name, SERVICE_ROLE), "cdc_embedder")


def test_an_owner_that_does_not_exist_is_refused(bare: Bare) -> None:
    with pytest.raises(Misconfigured, match="no role nobody_at_all"):
        install(bare.dsn, "cdc_embedder", owner="nobody_at_all")


def test_two_at_a_time_install_once(bare: Bare) -> None:
    done: list[list[str]] = []
    threads = [threading.Thread(target=lambda: done.append(install(bare.dsn, "cdc_embedder"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(changes(lines)[0].split()[0] for lines in done) == ["made", "nothing", "nothing"]


def test_functions_are_nobodys_to_call_and_find_only_what_is_theirs(bare: Bare) -> None:
    install(bare.dsn, "cdc_embedder")
    ours = "FROM pg_proc p WHERE pronamespace = 'cdc_embedder'::regnamespace"
    callable_by_all = (
        f"SELECT array_agg(proname::text) {ours} AND has_function_privilege('{SERVICE_ROLE}', oid, 'EXECUTE')"
    )
    assert one(bare.admin, callable_by_all) is None
    pinned = "proconfig @> ARRAY['search_path=pg_catalog, pg_temp']"
    own_path = f"SELECT array_agg(proname::text) {ours} AND prokind <> 'a' AND ({pinned}) IS NOT TRUE"
    assert one(bare.admin, own_path) is None, "of an aggregate it is its functions that have one"
    assert one(bare.admin, f"SELECT count(*) > 20 {ours}")


def test_uninstalling_removes_everything_of_ours_and_leaves_vectors(bare: Bare) -> None:
    install(bare.dsn, "mine", owner=SERVICE_ROLE)
    bare.admin.execute(DOCUMENTS + "; INSERT INTO documents (id, embedding) VALUES (1, '{1}')")
    bare.admin.execute("INSERT INTO cdc_embedder.model (name, dimensions) VALUES ('tiny', 1)")
    configure(bare.admin)
    origin = f"{bare.name}_1"
    bare.admin.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (bare.name,))
    bare.admin.execute(
        "SELECT pg_replication_origin_create(o) FROM unnest(%s::text[]) o", ([origin, f"{bare.name}_mine"],)
    )
    plan = uninstall_plan(bare.dsn, bare.name)
    assert plan == [
        f"the replication slot {bare.name}", "the publication mine", "the publication mine_embed",
        f"the replication origin {origin}",
        "the schema cdc_embedder with 1 configured columns and their ledgers"]  # fmt: skip
    with closing(psycopg.connect(bare.dsn, autocommit=True, replication="database")) as stream:
        stream.execute(f"START_REPLICATION SLOT {bare.name} LOGICAL 0/0 (proto_version '1', publication_names 'mine')")
        with pytest.raises(Misconfigured, match=f"a service holds the slot {bare.name}"):
            uninstall(bare.dsn, bare.name)
    while one(bare.admin, "SELECT active FROM pg_replication_slots WHERE slot_name = %s", bare.name):
        pass
    assert uninstall(bare.dsn, bare.name) == [f"removed {line}" for line in plan]
    assert uninstall_plan(bare.dsn, bare.name) == []
    assert one(bare.admin, "SELECT embedding FROM documents") == [1.0]
    assert one(bare.admin, "SELECT to_regnamespace('cdc_embedder')") is None
    left = one(
        bare.admin, "SELECT array_agg(roname) FROM pg_replication_origin WHERE starts_with(roname, %s)", bare.name
    )
    assert left == [f"{bare.name}_mine"], "an origin of another pattern is not ours"
    bare.admin.execute("SELECT pg_replication_origin_drop(%s)", (f"{bare.name}_mine",))


def test_the_role_of_the_service_uninstalls_what_it_may(installed: Bench, admin: Connection) -> None:
    origin = f"{installed.slot}_1"
    admin.execute("SELECT pg_replication_origin_create(%s)", (origin,))
    done = uninstall(installed.dsn_service, installed.slot)
    assert any(re.match(f"left the replication origin {origin}", line) for line in done)
    assert "removed the schema cdc_embedder with 0 configured columns and their ledgers" in done
