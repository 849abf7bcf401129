"""Every command of the command line as an operator meets it: a process, its output, its exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from cdc_embedder import __version__
from cdc_embedder.embedded import Server
from cdc_embedder.embedding.fake import fake_vector
from cdc_embedder.uninstall import uninstall_plan
from tests.commands import answers, asked, cli, fails, succeeds
from tests.configuring import DOCUMENTS, configure
from tests.servers import SERVICE_ROLE, Bench
from tests.service import running, until, wait_caught_up

DIMENSIONS = 8

ODD_TABLE = '"Odd ""Shop"" 100%s"."Item.% :x:"'
ODD_NAME = 'Odd "Shop" 100%s'


def make_model(bench: Bench, **prompts: str) -> None:
    names = sql.SQL("").join(sql.SQL(", {}").format(sql.Identifier(name)) for name in prompts)
    bench.admin.execute(
        sql.SQL("INSERT INTO cdc_embedder.model (name, backend, dimensions{}) VALUES ('fake', 'fake', {}{})").format(
            names, DIMENSIONS, sql.SQL("").join(sql.SQL(", {}").format(text) for text in prompts.values())
        )
    )


@pytest.fixture
def bare(pg18: Server) -> Iterator[str]:
    """The DSN of a database without our schema."""
    name = "bare_cli"
    with psycopg.connect(pg18.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield pg18.dsn(name)
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def stored_type(bench: Bench) -> str:
    return f"vector({DIMENSIONS})" if bench.has_vector else "real[]"


def test_init_says_what_it_did_and_the_second_time_that_nothing_was_to_do(bare: str) -> None:
    first = cli("init", "--dsn", bare, "--slot", "bare_cli", "--owner", SERVICE_ROLE)
    assert first.returncode == 0, first.stderr
    for sentence in (
        f"made the schema cdc_embedder, owned by {SERVICE_ROLE}",
        "applied migration 001_tables",
        "applied migration 002_slots",
        "applied migration 003_commit_times",
        "new embedding columns use the slot bare_cli",
        "made the publication bare_cli, empty",
    ):
        assert sentence in first.stdout
    second = cli("init", "--dsn", bare, "--slot", "bare_cli")
    assert second.returncode == 0
    assert "nothing to do: version 3 of the schema is installed, the publication bare_cli exists" in second.stdout
    with psycopg.connect(bare) as connection:
        assert connection.execute(
            "SELECT DISTINCT pg_get_userbyid(relowner)::text FROM pg_class"
            " WHERE relnamespace = 'cdc_embedder'::regnamespace"
        ).fetchall() == [(SERVICE_ROLE,)]


def test_init_for_an_owner_that_does_not_exist_is_refused_with_a_remedy(bare: str) -> None:
    done = cli("init", "--dsn", bare, "--owner", "nobody_of_that_name")
    assert done.returncode == 1
    assert done.stderr.startswith("cdc-embedder: there is no role nobody_of_that_name. CREATE ROLE")


@pytest.mark.parametrize(
    "command",
    [
        ["add", "documents", "body", "embedding"],
        ["remove", "documents.embedding"],
        ["status"],
        ["status", "--json"],
        ["reconcile"],
        ["verify"],
        ["adopt", "documents.embedding"],
        ["migrate", "pgml"],
        ["search", "documents.embedding", "a question"],
        ["embed", "a text"],
    ],
)
def test_a_missing_schema_is_told_with_the_command_that_installs_it(bare: str, command: list[str]) -> None:
    done = cli(*command, CDC_EMBEDDER_DSN=bare)
    assert done.returncode == 1
    assert done.stderr == (
        "cdc-embedder: the schema cdc_embedder is not installed in this database. run: cdc-embedder init\n"
    )


@pytest.mark.parametrize("command", [["init"], ["status"], ["verify"], ["reconcile"], ["uninstall", "--yes"]])
@pytest.mark.parametrize(
    ("dsn", "said"),
    [
        ("host=/nowhere dbname=app user=emb password=Secret1", "connecting|installing|looking"),
        ("postgresql://emb:Secret1@[half", "the connection string cannot be read"),
    ],
)
def test_a_wrong_dsn_is_a_sentence_without_the_password(command: list[str], dsn: str, said: str) -> None:
    done = cli(*command, CDC_EMBEDDER_DSN=dsn)
    assert done.returncode == 1
    assert re.match(f"cdc-embedder: ({said})", done.stderr)
    assert "Secret1" not in done.stderr + done.stdout


def test_a_role_that_does_not_exist_is_told_with_what_to_check(bench18: Bench) -> None:
    sentence = fails(bench18, "status", CDC_EMBEDDER_DSN=bench18.server.dsn(bench18.database, "nobody_of_that_name"))
    assert "nobody_of_that_name" in sentence
    assert "check the DSN, the password and pg_hba.conf" in sentence


def test_a_role_without_rights_is_told_so_and_one_that_may_read_the_status_sees_it(bench18: Bench) -> None:
    role = f"monitor_{bench18.database}"
    bench18.admin.execute(f"CREATE ROLE {role} LOGIN")  # type: ignore[arg-type]
    dsn = bench18.server.dsn(bench18.database, role)
    try:
        assert "permission denied for schema cdc_embedder" in fails(bench18, "status", CDC_EMBEDDER_DSN=dsn)
        bench18.admin.execute(
            f"GRANT USAGE ON SCHEMA cdc_embedder TO {role}; GRANT SELECT ON cdc_embedder.status TO {role};"  # type: ignore[arg-type]
            f"GRANT EXECUTE ON FUNCTION cdc_embedder._status() TO {role}"
        )
        assert answers(bench18, "status", CDC_EMBEDDER_DSN=dsn) == []
    finally:
        bench18.admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")  # type: ignore[arg-type]


def test_a_role_that_is_not_the_schemas_owner_is_told_whose_rights_it_takes(bench18: Bench) -> None:
    role = f"other_{bench18.database}"
    bench18.admin.execute(f"CREATE ROLE {role} LOGIN REPLICATION")  # type: ignore[arg-type]
    environment = {"CDC_EMBEDDER_DSN": bench18.server.dsn(bench18.database, role), "CDC_EMBEDDER_HTTP": "off"}
    try:
        for granted in ("", f"GRANT USAGE ON SCHEMA cdc_embedder TO {role}"):
            bench18.admin.execute(granted)  # type: ignore[arg-type]
            ran = asked(bench18, "run", **environment)
            assert ran.returncode == 1
            [*_, last] = ran.stderr.splitlines()
            assert "permission denied for" in last
            assert "run it as the role that owns the schema cdc_embedder" in last
            assert fails(bench18, "init", **environment) == (
                f"cdc-embedder: only {SERVICE_ROLE}, a member of it, or a superuser can change the schema cdc_embedder."
                f" Connect as {SERVICE_ROLE}.\n"
            )
    finally:
        bench18.admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")  # type: ignore[arg-type]


def test_a_right_on_a_table_that_is_missing_is_told_with_who_prints_the_statement(bench18: Bench) -> None:
    make_model(bench18)
    bench18.admin.execute(DOCUMENTS)
    bench18.admin.execute("INSERT INTO documents (id, body) VALUES (1, 'a')")
    configure(bench18.admin, model="fake")
    with running(bench18) as service:
        until(lambda: answers(bench18, "status")[0]["state"] == "error", "no right was missed", lambda: service.log)
        [row] = answers(bench18, "status")
        assert "permission denied for table documents. cdc-embedder doctor --no-model" in row["reason"]
        examined = asked(bench18, "doctor", "--no-model", CDC_EMBEDDER_DSN=bench18.dsn_service).stdout
        statements = re.findall(rf"GRANT \w+ \([^)]*\) ON public\.documents TO {SERVICE_ROLE}", examined)
        assert len(statements) == 2
        for statement in statements:
            bench18.admin.execute(statement)
        wait_caught_up(bench18)
        assert service.stop() == 0


def test_an_unknown_setting_of_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('slto = "typo"\n')
    done = cli("status", "--config", str(file))
    assert done.returncode == 1
    assert done.stderr.startswith("cdc-embedder: settings: slto: ")


@pytest.mark.parametrize(
    "arguments",
    [["status", "--slto", "x"], ["unknown"], ["search", "documents.embedding"], ["verify", "--sample", "0"]],
)
def test_an_unknown_command_or_option_is_a_usage_error(arguments: list[str]) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert "Usage:" in done.stderr


def test_the_version_is_printed() -> None:
    assert cli("--version").stdout == f"{__version__}\n"


def test_add_makes_the_target_column_and_configures_it(installed: Bench) -> None:
    make_model(installed)
    installed.admin.execute("CREATE TABLE documents (id int PRIMARY KEY, title text, body text)")
    said = succeeds(installed, "add", "Documents", "title,body", "embedding", "--model", "fake", "--priority", "7")
    assert said == "column 1: Documents.embedding will hold the vectors of title,body by fake\n"
    assert installed.admin.execute(
        "SELECT source_table::text, source_columns, target_column::text, model, priority, slot::text"
        "  FROM cdc_embedder.embedding_column"
    ).fetchall() == [("documents", ["title", "body"], "embedding", "fake", 7, installed.slot)]
    [made] = installed.admin.execute(
        "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = 'documents'::regclass"
        " AND attname = 'embedding'"
    ).fetchone() or [None]
    assert made == stored_type(installed)
    refused = fails(installed, "add", "documents", "body", "embedding", "--model", "fake")
    assert "UPDATE its row in cdc_embedder.embedding_column, or DELETE it first." in refused


def test_names_are_read_as_in_sql_and_printed_as_they_were_written(bench18: Bench) -> None:
    make_model(bench18)
    make_odd_table(bench18)
    said = succeeds(bench18, "add", ODD_TABLE, '"Body, %d","b.2"', '"Vector [red]%"', "--model", "fake")
    assert said == f'column 1: {ODD_TABLE}."Vector [red]%" will hold the vectors of "Body, %d","b.2" by fake\n'
    assert bench18.admin.execute(
        "SELECT source_columns, target_column::text FROM cdc_embedder.embedding_column"
    ).fetchall() == [(["Body, %d", "b.2"], "Vector [red]%")]
    assert ODD_TABLE in succeeds(bench18, "status")
    assert succeeds(bench18, "reconcile", ODD_TABLE) == "a scan of 1 column(s) is requested\n"
    removed = succeeds(bench18, "remove", f'{ODD_TABLE}."Vector [red]%"')
    assert removed == f'{ODD_TABLE}."Vector [red]%" is not filled any more; its vectors stay\n'
    assert bench18.admin.execute("SELECT count(*) FROM cdc_embedder.embedding_column").fetchone() == (0,)


def make_odd_table(bench: Bench) -> None:
    bench.admin.execute(
        f'CREATE SCHEMA "{ODD_NAME.replace(chr(34), chr(34) * 2)}"; CREATE TABLE {ODD_TABLE}'
        ' ("Key %s" text PRIMARY KEY, "Body, %d" text, "b.2" text)'
    )


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["documents", "bdy", "embedding"], "no column bdy", "Its columns that hold text: title, body."),
        (["documents", "body", "embedding", "--model", "no-such"], "no-such", "Known: "),
        (["documents", "n", "embedding"], "integer", "Text is text, varchar, char or citext"),
        (["keyless", "body", "embedding"], "no primary key", "ALTER TABLE public.keyless ADD PRIMARY KEY"),
        (["documents", "body", "n"], "integer", "Vectors are real[], double precision[], vector(n) or halfvec(n)"),
        (["documents", "body", "embedding", "--on-existing", "ignore"], "ignore is nothing to do", "replace or adopt"),
        (["documents", "body", "embedding", "--when-stale", "burn"], "burn is nothing to do", "keep or clear"),
        (
            ["nowhere", "body", "embedding"],
            'relation "nowhere" does not exist',
            "names are [SCHEMA.]TABLE, quoted as in",
        ),
        (
            ["nowhere.documents", "body", "embedding"],
            'relation "nowhere.documents" does not',
            "see: cdc-embedder status",
        ),
        (["documents", "body", "documents.embedding"], "not the name of a column", "the table is an argument"),
        (["documents", "body", "embedding,other"], "not a name", "quote it as in SQL"),
        (["documents", "body,", "embedding"], "not a name", "quote it as in SQL"),
    ],
)
def test_what_the_server_refuses_reaches_the_operator_with_its_hint(
    bench18: Bench, arguments: list[str], message: str, hint: str
) -> None:
    make_model(bench18)
    bench18.admin.execute(DOCUMENTS)
    bench18.admin.execute("CREATE TABLE keyless (body text, embedding real[])")
    sentence = fails(bench18, "add", "--model", "fake", *arguments)
    assert message in sentence
    assert hint in sentence
    assert bench18.admin.execute("SELECT count(*) FROM cdc_embedder.embedding_column").fetchone() == (0,)


def test_a_notice_reaches_the_operator_with_the_statement_and_who_may_run_it(bench18: Bench) -> None:
    make_model(bench18)
    bench18.admin.execute(DOCUMENTS)
    bench18.admin.execute(f"GRANT SELECT ON documents TO {SERVICE_ROLE}")
    done = asked(
        bench18, "add", "documents", "body", "embedding", "--model", "fake", CDC_EMBEDDER_DSN=bench18.dsn_service
    )
    assert done.returncode == 0, done.stderr
    assert f"ALTER PUBLICATION {bench18.slot} ADD TABLE public.documents" in done.stderr
    assert "It takes the rights of the owner of the table and of the publication" in done.stderr


@pytest.mark.parametrize(
    "command",
    [["reconcile", "nowhere"], ["retry", "nowhere"], ["search", "nowhere.embedding", "text"], ["adopt", "nowhere.a"]],
)
def test_a_table_that_is_not_there_is_told_with_how_names_are_written(bench18: Bench, command: list[str]) -> None:
    assert fails(bench18, *command).endswith(
        'relation "nowhere" does not exist. see: cdc-embedder status; names are [SCHEMA.]TABLE, quoted as in SQL\n'
    )


def test_what_the_server_remarks_by_itself_is_not_shown(bench18: Bench) -> None:
    """As of a DROP … IF EXISTS; a trigger of the user's is heard."""
    make_model(bench18)
    bench18.admin.execute(DOCUMENTS)
    configure(bench18.admin, model="fake")
    bench18.admin.execute(
        "CREATE FUNCTION remark() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " DROP TABLE IF EXISTS nowhere; RAISE NOTICE 'a remark' USING HINT = 'for people'; RETURN NULL; END $$;"
        "CREATE TRIGGER remark AFTER DELETE ON cdc_embedder.embedding_column FOR EACH ROW EXECUTE FUNCTION remark()"
    )
    done = asked(bench18, "remove", "documents.embedding")
    assert (done.returncode, done.stderr) == (0, "a remark. for people\n")


@pytest.mark.parametrize("command", ["status", "init"])
def test_where_no_database_is_named_that_is_told(command: str) -> None:
    named = "set CDC_EMBEDDER_DSN"
    missing = cli(command, PGPORT="1")
    assert missing.returncode == 1
    assert named in missing.stderr
    for environment in ({"PGHOST": "/nowhere"}, {"CDC_EMBEDDER_DSN": "port=1"}):
        elsewhere = cli(command, **environment)
        assert elsewhere.returncode == 1
        assert named not in elsewhere.stderr


def test_a_folder_is_no_file_of_settings(tmp_path: Path) -> None:
    done = cli("status", "--config", str(tmp_path))
    assert done.returncode == 2
    assert "is a directory" in done.stderr


def test_remove_stops_filling_and_leaves_the_vectors(bench18: Bench) -> None:
    make_model(bench18)
    bench18.admin.execute(DOCUMENTS)
    bench18.admin.execute("INSERT INTO documents (id, body, embedding) VALUES (1, 'a', '{1,0,0,0,0,0,0,0}')")
    configure(bench18.admin, model="fake")
    for name in ("documents", "documents.body", "other.documents.embedding", "a.b.c.d", "documents."):
        fails(bench18, "remove", name)
    assert "is not filled any more" in succeeds(bench18, "remove", "PUBLIC.documents.Embedding")
    assert bench18.admin.execute("SELECT embedding IS NOT NULL FROM documents").fetchone() == (True,)
    assert "not configured" in fails(bench18, "remove", "documents.embedding")


def test_status_is_a_line_a_column_or_the_views_own_columns_as_json(bench18: Bench) -> None:
    assert "no column is configured" in succeeds(bench18, "status")
    assert answers(bench18, "status") == []
    make_model(bench18)
    bench18.admin.execute(DOCUMENTS)
    bench18.grant("documents", ["id"], ["body"], "embedding")
    bench18.admin.execute("INSERT INTO documents (id, body) VALUES (1, 'a'), (2, NULL)")
    configure(bench18.admin, model="fake")
    shown = succeeds(bench18, "status")
    assert "public.documents.embedding" in shown
    assert "stopped" in shown
    [row] = answers(bench18, "status", CDC_EMBEDDER_DSN=bench18.dsn_service)
    names = [
        name
        for (name,) in bench18.admin.execute(
            "SELECT attname::text FROM pg_attribute WHERE attrelid = 'cdc_embedder.status'::regclass AND attnum > 0"
            " ORDER BY attnum"
        ).fetchall()
    ]
    assert list(row) == names
    assert {
        "source_table": "public.documents",
        "rows": 2,
        "null": 1,
        "current": 0,
        "coverage": 0.0,
    }.items() <= row.items()
    assert row["reason"] == f"no service runs for slot {bench18.slot}"


def test_status_and_verify_of_nothing_never_load_torch(bench18: Bench) -> None:
    for command in ("status", "verify"):
        program = (
            "import sys; from cdc_embedder.cli import app;"
            f"app(['{command}', '--json'], standalone_mode=False);"
            "print(sorted({'torch', 'sentence_transformers', 'transformers'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=os.environ | {"CDC_EMBEDDER_DSN": bench18.dsn_admin},
            check=True,
        )
        assert done.stdout == "[]\n[]\n"


def test_reconcile_requests_a_scan_of_one_table_or_of_all(bench18: Bench) -> None:
    make_model(bench18)
    for table in ("documents", "others"):
        bench18.admin.execute(DOCUMENTS.replace("documents", table))
        configure(bench18.admin, table, model="fake")
    bench18.admin.execute("UPDATE cdc_embedder.scan SET requested_at = NULL, reason = NULL")
    assert succeeds(bench18, "reconcile", "documents") == "a scan of 1 column(s) is requested\n"
    wanted = (
        "SELECT column_id FROM cdc_embedder.scan WHERE reason = 'requested' AND requested_at IS NOT NULL ORDER BY 1"
    )
    assert bench18.admin.execute(wanted).fetchall() == [(1,)]
    assert succeeds(bench18, "reconcile") == "a scan of 2 column(s) is requested\n"
    assert bench18.admin.execute(wanted).fetchall() == [(1,), (2,)]
    bench18.admin.execute("CREATE TABLE unknown (id int)")
    assert "SELECT * FROM cdc_embedder.embedding_column shows what is." in fails(bench18, "reconcile", "unknown")


def test_embed_prints_the_vectors_of_a_model_of_the_database(bench18: Bench) -> None:
    make_model(bench18, document_prompt="passage: ", query_prompt="query: ")
    for input_type, prompt in (("none", ""), ("document", "passage: "), ("query", "query: ")):
        found = answers(bench18, "embed", "--model", "fake", "--input-type", input_type, "one text", "[b]:x:[/b]")
        assert found == [
            pytest.approx(fake_vector("fake", prompt + text, DIMENSIONS).tolist(), abs=1e-7)
            for text in ("one text", "[b]:x:[/b]")
        ]
    printed = succeeds(bench18, "embed", "--model", "fake", "one text")
    assert json.loads(printed) == pytest.approx(fake_vector("fake", "one text", DIMENSIONS).tolist(), abs=1e-5)
    assert len(answers(bench18, "embed", "--model", "fake", "one text")[0]) == DIMENSIONS
    assert "none, query, document" in fails(bench18, "embed", "--model", "fake", "--input-type", "passage", "text")
    assert "there is no model unheard-of" in fails(bench18, "embed", "--model", "unheard-of", "text")


def test_embed_needs_no_database_for_a_model_that_is_pre_filled() -> None:
    done = cli("embed", "--json", "a cat", "a dog", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    vectors = json.loads(done.stdout)
    assert [len(vector) for vector in vectors] == [384, 384]
    assert [sum(value * value for value in vector) for vector in vectors] == pytest.approx([1, 1], abs=1e-5)


def test_a_text_that_the_model_refuses_is_named_by_its_place(bench18: Bench) -> None:
    make_model(bench18)
    bench18.admin.execute("""UPDATE cdc_embedder.model SET options = '{"reject": "bad"}' WHERE name = 'fake'""")
    sentence = fails(bench18, "embed", "--model", "fake", "good", "bad")
    assert sentence.startswith("cdc-embedder: text 2: ")


def test_search_gives_the_nearest_rows_first(installed: Bench) -> None:
    make_model(installed)
    installed.admin.execute(
        f"CREATE TABLE documents (id int PRIMARY KEY, body text, embedding {stored_type(installed)})"
    )
    installed.admin.execute("INSERT INTO documents SELECT n, 'text ' || n FROM generate_series(1, 30) n")
    installed.admin.execute("INSERT INTO documents VALUES (31, 'without a vector')")
    configure(installed.admin, model="fake")
    assert "no row has a vector yet" in succeeds(installed, "search", "documents.embedding", "text 7")
    assert answers(installed, "search", "documents.embedding", "text 7") == []
    store_fakes(installed, "documents", "id", "body", "embedding", "id <= 30")
    question = fake_vector("fake", "text 7", DIMENSIONS)
    scores = {str(n): float(fake_vector("fake", f"text {n}", DIMENSIONS) @ question) for n in range(1, 31)}
    best = sorted(scores, key=lambda key: -scores[key])
    found = answers(installed, "search", "documents.embedding", "text 7", "-k", "5")
    assert [row["key"] for row in found] == [{"id": key} for key in best[:5]]
    assert [row["score"] for row in found] == pytest.approx([scores[key] for key in best[:5]], abs=1e-5)
    assert found[0]["text"] == "text 7"
    assert len(answers(installed, "search", "documents.embedding", "text 7", "-k", "100")) == 30
    assert len(answers(installed, "search", "documents.embedding", "text 7")) == 10
    shown = succeeds(installed, "search", "documents.embedding", "text 7", "-k", "3").splitlines()
    assert shown[0].split() == ["id", "score", "text"]
    assert [line.split()[0] for line in shown[1:]] == best[:3]
    assert fails(installed, "search", "documents.body", "text 7").endswith("see: cdc-embedder status\n")
    assert "does not exist" in fails(installed, "search", "nowhere.embedding", "text 7")


def store_fakes(bench: Bench, table: str, key: str, text: str, target: str, where: str = "true") -> None:
    """What the service would have stored; names as SQL writes them."""
    cursor = psycopg.RawCursor(bench.admin)
    for value, body in cursor.execute(f"SELECT {key}, {text} FROM {table} WHERE {where}").fetchall():  # type: ignore[arg-type]
        vector = fake_vector("fake", body, DIMENSIONS).tolist()
        cursor.execute(
            f"UPDATE {table} SET {target} = $1::real[]::{stored_type(bench)} WHERE {key} = $2",  # type: ignore[arg-type]
            (vector, value),
        )


def test_search_reads_names_with_quotes_and_percent_signs_and_shows_texts_as_they_are(installed: Bench) -> None:
    make_model(installed)
    make_odd_table(installed)
    cursor = psycopg.RawCursor(installed.admin)
    cursor.execute(f'ALTER TABLE {ODD_TABLE} ADD "Vector [red]%" {stored_type(installed)}')  # type: ignore[arg-type]
    cursor.execute(
        f"INSERT INTO {ODD_TABLE} VALUES ($1, $2)", ("[/b] %s :x:", "[/red] 100%s :x: \x1b[31m\nsecond line")
    )  # type: ignore[arg-type]
    store_fakes(installed, ODD_TABLE, '"Key %s"', '"Body, %d"', '"Vector [red]%"')
    cursor.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ($1::regclass, ARRAY['Body, %d', 'b.2'], 'Vector [red]%', 'fake')",
        (ODD_TABLE,),
    )
    column = f'{ODD_TABLE}."Vector [red]%"'
    [row] = answers(installed, "search", column, "a question")
    assert row["key"] == {"Key %s": "[/b] %s :x:"}
    assert row["text"] == "[/red] 100%s :x: \x1b[31m"
    shown = succeeds(installed, "search", column, "a question")
    assert "Key %s" in shown
    assert "[/b] %s :x:" in shown
    assert "[/red] 100%s :x: \N{REPLACEMENT CHARACTER}[31m" in shown


def test_search_uses_an_index_on_the_column_and_still_finds_as_many_rows_as_asked_for(bench18: Bench) -> None:
    make_model(bench18)
    bench18.admin.execute(f"CREATE TABLE documents (id int PRIMARY KEY, body text, embedding vector({DIMENSIONS}))")
    bench18.admin.execute(
        "INSERT INTO documents SELECT n, 'text ' || n,"
        " ARRAY(SELECT random() - 0.5 + 0 * n FROM generate_series(1, 8))::real[]::vector"
        "  FROM generate_series(1, 3000) n"
    )
    store_fakes(bench18, "documents", "id", "body", "embedding", "id <= 100")
    bench18.admin.execute("CREATE INDEX nearest ON documents USING hnsw (embedding vector_cosine_ops)")
    bench18.admin.execute("ANALYZE documents")
    configure(bench18.admin, model="fake")
    used = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'nearest'"
    before = bench18.admin.execute(used).fetchone()
    found = answers(bench18, "search", "documents.embedding", "text 7", "-k", "90")
    assert len(found) == 90
    assert found[0]["key"] == {"id": "7"}
    assert found[0]["score"] == pytest.approx(1, abs=1e-5)
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    bench18.admin.execute("SELECT pg_stat_clear_snapshot()")
    assert bench18.admin.execute(used).fetchone() > before


def test_uninstall_asks_first_and_leaves_the_vectors(bench18: Bench) -> None:
    make_model(bench18)
    bench18.admin.execute(DOCUMENTS)
    bench18.admin.execute("INSERT INTO documents (id, body, embedding) VALUES (1, 'a', '{1,0,0,0,0,0,0,0}')")
    configure(bench18.admin, model="fake")
    installed = "SELECT to_regnamespace('cdc_embedder') IS NOT NULL"
    for answer in ("n\n", ""):
        declined = cli("uninstall", stdin=answer, CDC_EMBEDDER_DSN=bench18.dsn_admin, CDC_EMBEDDER_SLOT=bench18.slot)
        assert declined.returncode == 1
        assert f"the publication {bench18.slot}\n" in declined.stdout
        assert "the schema cdc_embedder with 1 configured columns and their ledgers\n" in declined.stdout
        assert bench18.admin.execute(installed).fetchone() == (True,)
    accepted = cli("uninstall", stdin="y\n", CDC_EMBEDDER_DSN=bench18.dsn_admin, CDC_EMBEDDER_SLOT=bench18.slot)
    assert accepted.returncode == 0, accepted.stderr
    assert f"removed the publication {bench18.slot}\n" in accepted.stdout
    assert bench18.admin.execute(installed).fetchone() == (False,)
    assert bench18.admin.execute("SELECT embedding IS NOT NULL FROM documents").fetchone() == (True,)
    assert succeeds(bench18, "uninstall") == "nothing to remove\n"


def test_uninstall_is_refused_while_a_service_runs_and_takes_its_slot_afterwards(bench: Bench) -> None:
    make_model(bench)
    bench.admin.execute(DOCUMENTS)
    bench.grant("documents", ["id"], ["body"], "embedding")
    bench.admin.execute("INSERT INTO documents (id, body) VALUES (1, 'a')")
    configure(bench.admin, model="fake")
    with running(bench) as service:
        wait_caught_up(bench)
        assert "Stop it first." in asked(bench, "uninstall", "--yes").stderr
        assert answers(bench, "status")[0]["state"] == "live"
        assert service.stop() == 0
    removed = succeeds(bench, "uninstall", "--yes")
    assert f"removed the replication slot {bench.slot}\n" in removed
    assert bench.admin.execute(
        "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", (bench.slot,)
    ).fetchone() == (0,)


def test_uninstall_takes_a_slot_that_no_column_names_any_more(bench: Bench) -> None:
    """It would hold WAL back for ever, and nothing would tell of it any more."""
    second = f"{bench.slot}_b"
    make_model(bench)
    bench.admin.execute(DOCUMENTS)
    bench.grant("documents", ["id"], ["body"], "embedding")
    bench.admin.execute("INSERT INTO documents (id, body) VALUES (1, 'a')")
    succeeds(bench, "init", CDC_EMBEDDER_SLOT=second)
    configure(bench.admin, model="fake")
    with running(bench, CDC_EMBEDDER_SLOT=second) as service:
        until(lambda: answers(bench, "status")[0]["state"] == "live", "it was never live", lambda: service.log)
        assert service.stop() == 0
    succeeds(bench, "remove", "documents.embedding")
    succeeds(bench, "init")
    origins = [
        f"removed the replication origin {name}"
        for (name,) in bench.admin.execute(
            "SELECT roname FROM pg_replication_origin WHERE roname ~ ('^' || %s || '_[0-9]+$') ORDER BY 1", (second,)
        ).fetchall()
    ]
    done = succeeds(bench, "uninstall", "--yes").splitlines()
    assert {line for line in done if line.startswith("removed")} == {
        f"removed the replication slot {second}",
        *(f"removed the publication {slot}{suffix}" for slot in (bench.slot, second) for suffix in ("", "_embed")),
        *origins,
        "removed the schema cdc_embedder with 0 configured columns and their ledgers",
    }
    left = "SELECT slot_name::text FROM pg_replication_slots WHERE database = current_database()"
    assert bench.admin.execute(left + " UNION SELECT pubname FROM pg_publication").fetchall() == []


@pytest.mark.parametrize(
    ("noted", "taken"),
    [
        ("INSERT INTO cdc_embedder.leader (slot, term, service) VALUES ('noted', 1, 'x')", True),
        ("INSERT INTO cdc_embedder.given_up (slot, retained_bytes) VALUES ('noted', 1)", True),
        ("INSERT INTO cdc_embedder.standby_slot (slot, proof) VALUES ('noted', gen_random_uuid())", True),
        ("ALTER TABLE cdc_embedder.embedding_column ALTER slot SET DEFAULT 'noted'", True),
        (
            "INSERT INTO cdc_embedder.progress (system_identifier, timeline, database_oid, slot)"
            " SELECT s.system_identifier, 1, d.oid, 'noted' FROM pg_control_system() s, pg_database d"
            " WHERE d.datname = current_database()",
            True,
        ),
        (
            "INSERT INTO cdc_embedder.progress (system_identifier, timeline, database_oid, slot)"
            " SELECT s.system_identifier, 1, 1, 'noted' FROM pg_control_system() s",
            False,
        ),
    ],
)
def test_uninstall_knows_every_slot_that_its_tables_tell_of(bench18: Bench, noted: str, taken: bool) -> None:
    for name in ("noted", "noted_embed", "others"):
        bench18.admin.execute(f"CREATE PUBLICATION {name} WITH (publish = 'insert, update')")  # type: ignore[arg-type]
    bench18.admin.execute(noted)  # type: ignore[arg-type]
    plan = uninstall_plan(bench18.dsn_admin, bench18.slot)
    assert ("the publication noted" in plan, "the publication noted_embed" in plan) == (taken, taken)
    assert "the publication others" not in plan


def test_uninstall_leaves_what_belongs_to_others(bench18: Bench) -> None:
    """A slot of a plugin that is not ours; and, in a copy of a database, the origins of the service of the original."""
    elsewhere = f"{bench18.slot}_o"
    bench18.admin.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", (bench18.slot,))
    bench18.admin.execute("INSERT INTO cdc_embedder.leader (slot, term, service) VALUES (%s, 1, 'x')", (elsewhere,))
    bench18.admin.execute(
        "SELECT pg_replication_origin_create(name) FROM unnest(%s::text[]) name",
        ([f"{elsewhere}_1", f"{bench18.slot}_1"],),
    )
    with psycopg.connect(bench18.server.dsn(), autocommit=True) as original:
        original.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (elsewhere,))
        try:
            plan = uninstall_plan(bench18.dsn_admin, bench18.slot)
        finally:
            original.execute("SELECT pg_drop_replication_slot(%s)", (elsewhere,))
            original.execute("SELECT pg_replication_origin_drop(%s)", (f"{elsewhere}_1",))
    assert [line for line in plan if "slot" in line or "origin" in line] == [f"the replication origin {bench18.slot}_1"]


def test_a_question_without_a_database_server_is_no_traceback(bench18: Bench) -> None:
    """Nor is a server that goes away between two commands."""
    dsn: Any = bench18.dsn_admin.replace(f"port={bench18.server.port}", "port=1")
    done = cli("search", "documents.embedding", "text", CDC_EMBEDDER_DSN=dsn)
    assert done.returncode == 1
    assert done.stderr.startswith("cdc-embedder: connecting: ")
