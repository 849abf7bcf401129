"""`cdc-embedder doctor`: each check is well on a healthy database, finds what is spoilt, and its remedy mends it.

Remedies are run as they are printed, by psql, as the superuser.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from cdc_embedder.doctor import CHECKS, Finding, examine, server, slots, surroundings
from cdc_embedder.doctor.examining import ALWAYS
from cdc_embedder.doctor.patient import admit
from cdc_embedder.embedded import Server
from cdc_embedder.settings import Settings
from tests import servers
from tests.commands import answers, asked
from tests.configuring import one
from tests.documents import configure_documents, make_documents, make_model
from tests.embedding_api import api
from tests.servers import SERVICE_ROLE, Bench, bench_with
from tests.service import PATIENCE_S, running, standby_gone, status, until, wait_caught_up

ORIGINS = (
    f"GRANT EXECUTE ON FUNCTION pg_replication_origin_create(text), pg_replication_origin_oid(text),"
    f" pg_replication_origin_session_setup(text) TO {SERVICE_ROLE}"
)

TESTED: set[str] = set()
"""Checks that a test below makes fail, beside those of SPOILT."""


def spoils(*checks: str) -> Callable[[Any], Any]:
    """Marks a test that makes these checks fail."""
    TESTED.update(checks)
    return lambda test: test


def doctor(bench: Bench, *, model: bool = False, dsn: str = "", **settings: Any) -> list[Finding]:
    """What the doctor finds as the service's role."""
    given = {"dsn": dsn or bench.dsn_service, "slot": bench.slot, "output_plugin": bench.plugin} | settings
    return examine(Settings(**given), model=model)


def named(findings: list[Finding], check: str) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


def found(bench: Bench, check: str, **settings: Any) -> Finding:
    """The check's worst finding."""
    findings = named(doctor(bench, **settings), check)
    assert findings, check
    return max(findings, key=lambda finding: ("ok", "warning", "error").index(finding.level))


def follow(bench: Bench, remedy: str, *, replication: bool = False) -> None:
    """Run a remedy as it is printed."""
    dsn = bench.dsn_admin + (" replication=database" if replication else "")
    psql = [bench.server.bindir / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn]
    done = subprocess.run(psql, input=remedy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (remedy, done.stderr)
    wait_for_settings(bench)


def wait_for_settings(bench: Bench) -> None:
    """Sessions that are opened from now on have every setting that was changed before."""
    one(bench.admin, "SELECT pg_reload_conf()")
    asked_at = one(bench.admin, "SELECT clock_timestamp()")

    def loaded() -> bool:
        with psycopg.connect(bench.dsn_admin) as session:
            return bool(one(session, "SELECT pg_conf_load_time() > %s::timestamptz - interval '1 ms'", asked_at))

    if not loaded():
        until(lambda: one(bench.admin, "SELECT pg_reload_conf()") and loaded(), "the settings were never read")


def reset(bench: Bench) -> None:
    """What remedies and spoiling may have left on the server, which other tests use too."""
    for statement in (
        "ALTER SYSTEM RESET ALL",
        f"ALTER ROLE {SERVICE_ROLE} NOSUPERUSER REPLICATION NOBYPASSRLS CONNECTION LIMIT -1 VALID UNTIL 'infinity'",
        f"ALTER ROLE {SERVICE_ROLE} RESET ALL",
        f"REVOKE pg_read_all_stats, pg_read_all_settings, pg_monitor FROM {SERVICE_ROLE}",
    ):
        bench.admin.execute(statement)
    if bench.admin.info.server_version >= 150000:
        bench.admin.execute(f"REVOKE SET ON PARAMETER session_replication_role FROM {SERVICE_ROLE}")
    wait_for_settings(bench)


@contextmanager
def healthy(bench: Bench, rows: int = 5) -> Iterator[Bench]:
    """A database in which the doctor finds nothing."""
    bench.admin.execute(ORIGINS)
    bench.admin.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '20GB'")
    wait_for_settings(bench)
    make_model(bench)
    make_documents(bench, rows)
    try:
        yield bench
    finally:
        if not bench.admin.closed:
            reset(bench)


@pytest.fixture
def ward(bench18: Bench) -> Iterator[Bench]:
    with healthy(bench18) as bench:
        yield bench


# ---------------------------------------------------------------------------------------------------- nothing is wrong


@pytest.mark.parametrize("bench", ["15-wal2json", "15-pgoutput", "18-pgoutput"], indirect=True)
def test_a_healthy_database_has_no_finding_before_while_and_after_the_service_runs(bench: Bench) -> None:
    unseen = bench.plugin == "wal2json" and servers.lists_plugins(bench.server.bindir)
    with healthy(bench):
        before = [finding for finding in doctor(bench, model=True) if finding.level != "ok"]
        assert [(finding.check, finding.level) for finding in before] == [("output-plugin", "warning")] * unseen
        with running(bench):
            wait_caught_up(bench)
            for finding in doctor(bench, model=True):
                assert finding.level == "ok", finding
        until(lambda: "no service runs" in found(bench, "slot-reader").sentence, "the service was never gone")
        stopped = [finding for finding in doctor(bench) if finding.level != "ok"][unseen:]
        assert [(finding.check, finding.level) for finding in stopped] == [("slot-reader", "warning")]
        assert stopped[0].remedy == "cdc-embedder run"


def test_every_check_is_made_on_a_healthy_database_and_in_its_order(ward: Bench) -> None:
    made = list(dict.fromkeys(finding.check for finding in doctor(ward, model=True)))
    assert made == ["connection", "schema", *(check.name for check in CHECKS)]


def test_each_check_has_a_test_that_makes_it_fail() -> None:
    assert {case.check for case in SPOILT.values()} | TESTED == {check.name for check in CHECKS} | set(ALWAYS)


def test_each_check_is_explained_and_nothing_else_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    explained = re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE)
    assert len(explained) == len(set(explained))
    assert set(explained) == {check.name for check in CHECKS} | set(ALWAYS)


def test_the_doctor_writes_nothing_and_takes_no_lock_that_the_service_wants() -> None:
    with bench_with(servers.bindir_18(), "pgoutput", {"autovacuum": "off"}) as bench, healthy(bench):
        make_slot(bench, bench.slot)
        before = one(bench.admin, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text")
        kept = "SELECT restart_lsn || ' ' || confirmed_flush_lsn || ' ' || active FROM pg_replication_slots"
        slots_before = one(bench.admin, kept)
        doctor(bench, model=True)
        doctor(bench, model=True, dsn=bench.dsn_admin)
        assert one(bench.admin, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text") == before
        assert one(bench.admin, kept) == slots_before
        with psycopg.connect(bench.dsn_service) as session:
            assert one(session, "SELECT pg_try_advisory_xact_lock(hashtextextended('cdc_embedder:' || %s, 0))",
                       bench.slot)  # fmt: skip


def test_the_doctors_session_can_write_nothing(ward: Bench) -> None:
    async def write() -> None:
        patient = await admit(Settings(dsn=ward.dsn_admin, slot=ward.slot))
        async with patient.connection:
            await patient.rows("DELETE FROM cdc_embedder.given_up RETURNING slot")

    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        asyncio.run(write())


def test_sessions_that_a_running_service_has_are_not_asked_for_again(ward: Bench) -> None:
    with running(ward):
        wait_caught_up(ward)
        ward.admin.execute(f"ALTER ROLE {SERVICE_ROLE} CONNECTION LIMIT 16")
        assert found(ward, "sessions").level == "ok"


def test_each_column_is_told_its_own_missing_rights(ward: Bench) -> None:
    ward.admin.execute("CREATE TABLE forbidden (id int PRIMARY KEY, body text, embedding vector(8))")
    ward.admin.execute(
        "DELETE FROM cdc_embedder.embedding_column; INSERT INTO cdc_embedder.embedding_column (source_table,"
        " source_columns, target_column, model) VALUES ('forbidden', '{body}', 'embedding', 'fake')"
    )
    configure_documents(ward)
    [first, second] = named(doctor(ward), "column-rights")
    assert (first.subject, first.level) == ("public.forbidden.embedding", "error")
    assert (second.subject, second.level) == ("public.documents.embedding", "ok")


# ------------------------------------------------------------------------------- spoilt by SQL, mended by the remedy


@dataclass(frozen=True)
class Spoilt:
    """After `sql` the check finds `level` with these `words` in sentence or remedy, under these settings.

    `mends`: the remedy, run by psql, makes the check well again. `admin`: the doctor is the superuser.
    """

    check: str
    sql: tuple[str, ...]
    level: str
    words: tuple[str, ...]
    mends: bool = True
    admin: bool = False
    replication: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


LOGICAL = "SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput', false, false, true)"
EMBED = "SELECT pg_create_logical_replication_slot('{slot}_embed', 'pgoutput')"

SPOILT = {
    "a role that is set to another one": Spoilt(
        "role-settings",
        (f"ALTER ROLE {SERVICE_ROLE} SET session_replication_role = 'replica'",),
        "warning", ("session_replication_role=replica", "RESET"),
    ),
    "a setting of role and database that is not what it seems": Spoilt(
        "role-settings",
        (f"ALTER ROLE {SERVICE_ROLE} IN DATABASE {{database}} SET session_replication_role = 'replica'",),
        "warning", ("IN DATABASE",),
    ),
    "a password that expires": Spoilt(
        "role-expiry", (f"ALTER ROLE {SERVICE_ROLE} VALID UNTIL 'tomorrow'",), "warning", ("valid until",),
    ),
    "no right to replicate": Spoilt(
        "replication-right", (f"ALTER ROLE {SERVICE_ROLE} NOREPLICATION",), "error", ("replication slots",),
    ),
    "no replication connection": Spoilt(
        "replication-connection", (f"ALTER ROLE {SERVICE_ROLE} NOREPLICATION",), "error", ("can be opened",),
    ),
    "a superuser": Spoilt(
        "least-privilege", (), "warning", ("superuser", "grants.sql"), mends=False, admin=True,
    ),
    "too few sessions for the role": Spoilt(
        "sessions", (f"ALTER ROLE {SERVICE_ROLE} CONNECTION LIMIT 4",), "error", ("of 4 sessions", "needs 12"),
    ),
    "too few sessions in the database": Spoilt(
        "sessions", ("ALTER DATABASE {database} CONNECTION LIMIT 6",), "error", ("of 6 sessions",),
    ),
    "WAL without a limit": Spoilt(
        "slot-wal-limit", ("ALTER SYSTEM SET max_slot_wal_keep_size = -1",), "warning", ("unlimited",),
    ),
    "a limit below the service's own": Spoilt(
        "slot-wal-limit", ("ALTER SYSTEM SET max_slot_wal_keep_size = '1GB'",), "warning", ("1024 MB", "8192 MB"),
    ),
    "a limit that is the service's own, at which the server acts first": Spoilt(
        "slot-wal-limit", ("ALTER SYSTEM SET max_slot_wal_keep_size = '20GB'",), "warning", ("20 GB", "server"),
        settings={"wal_limit_bytes": 20 << 30},
    ),
    "a plugin that is not allowed": Spoilt(
        "output-plugin", ("ALTER SYSTEM SET output_plugin_libraries = test_decoding",),
        "error", ("'test_decoding'", "test_decoding, pgoutput"), admin=True,
    ),
    "a plugin that is not allowed, as the service's role may see": Spoilt(
        "output-plugin", ("ALTER SYSTEM SET output_plugin_libraries = test_decoding",
                          f"GRANT pg_read_all_settings TO {SERVICE_ROLE}"),
        "error", ("'test_decoding'", "test_decoding, pgoutput"),
    ),
    "a list with neither of the plugins that are taken": Spoilt(
        "output-plugin", ("ALTER SYSTEM SET output_plugin_libraries = test_decoding",),
        "error", ("neither", "test_decoding, pgoutput;"), admin=True, settings={"output_plugin": "auto"},
    ),
    "a list with a plugin alone that is not there": Spoilt(
        "output-plugin", ("ALTER SYSTEM SET output_plugin_libraries = wal2json",),
        "error", ("no library wal2json", "wal2json, pgoutput;"), admin=True, settings={"output_plugin": "auto"},
    ),
    "a plugin that is not there": Spoilt(
        "output-plugin", (), "error", ("no library", "CDC_EMBEDDER_OUTPUT_PLUGIN=pgoutput"), mends=False, admin=True,
        settings={"output_plugin": "wal2json"},
    ),
    "a schema of somebody else's": Spoilt(
        "schema-owner",
        ("ALTER SCHEMA cdc_embedder OWNER TO postgres", f"GRANT USAGE ON SCHEMA cdc_embedder TO {SERVICE_ROLE}"),
        "error", ("belongs to postgres",),
    ),
    "a publication of somebody else's": Spoilt(
        "publication-owner", ("ALTER PUBLICATION {slot} OWNER TO postgres",), "warning", ("belongs to postgres",),
    ),
    "no right to the origin functions": Spoilt(
        "origin-functions", (ORIGINS.replace("GRANT", "REVOKE").replace(" TO ", " FROM "),), "warning", ("a third",),
    ),
    "no right to write the target": Spoilt(
        "column-rights", (f"REVOKE UPDATE (embedding) ON documents FROM {SERVICE_ROLE}",),
        "error", ("cannot serve public.documents", "GRANT UPDATE (embedding)"),
    ),
    "no right to read the source": Spoilt(
        "column-rights", (f"REVOKE SELECT (body, id) ON documents FROM {SERVICE_ROLE}",),
        "error", ("GRANT SELECT (id, body)",),
    ),
    "no right to read what adopting takes": Spoilt(
        "column-rights",
        ("UPDATE documents SET embedding = '[1,0,0,0,0,0,0,0]'",
         "UPDATE cdc_embedder.embedding_column SET on_existing = 'adopt'"),
        "error", ("GRANT SELECT (xmin)",),
    ),
    "row-level security": Spoilt(
        "column-rights", ("ALTER TABLE documents ENABLE ROW LEVEL SECURITY",),
        "error", ("row-level security", "BYPASSRLS"),
    ),
    "a physical slot of that name": Spoilt(
        "slot", ("SELECT pg_create_physical_replication_slot('{slot}')",), "error", ("a physical one", "--slot"),
        mends=False,
    ),
    "a plugin that is not understood": Spoilt(
        "slot", ("SELECT pg_create_logical_replication_slot('{slot}', 'test_decoding')",),
        "error", ("test_decoding",),
    ),
    "another plugin than is asked for": Spoilt(
        "slot", (LOGICAL,), "warning", ("wins",), settings={"output_plugin": "wal2json"},
    ),
    "WAL beyond the warning": Spoilt(
        "slot-retained", (LOGICAL, "SELECT pg_switch_wal()"), "warning", ("warning at 1 bytes",), mends=False,
        settings={"wal_warn_bytes": 1},
    ),
    "WAL beyond the alarm": Spoilt(
        "slot-retained", (EMBED, "SELECT pg_switch_wal()"), "error", ("alarm at 1 bytes",), mends=False,
        settings={"wal_alarm_bytes": 1},
    ),
    "a slot that was given up": Spoilt(
        "slot-given-up", ("INSERT INTO cdc_embedder.given_up VALUES ('{slot}', now(), 9 << 20)",),
        "error", ("9216 kB",),
    ),
    "a slot that nobody reads": Spoilt(
        "slot-reader", (LOGICAL,), "warning", ("no service runs", "cdc-embedder run"), mends=False,
    ),
    "a slot for questions that nobody may ask": Spoilt(
        "embed-slot", (EMBED,), "warning", ("only holds WAL back",),
    ),
    "a slot for questions that nobody reads": Spoilt(
        "embed-slot", (EMBED, "UPDATE cdc_embedder.sql_embed SET enabled = true"), "warning", ("nobody reads it",),
        mends=False,
    ),
    "a slot that would not survive a failover": Spoilt(
        "failover-slot", (LOGICAL.replace(", true)", ")"),), "warning", ("no failover slot",), replication=True,
    ),
    "a standby that holds failover slots up": Spoilt(
        "failover-slot", ("ALTER SYSTEM SET synchronized_standby_slots = 'gone'",), "error", ("of the slot gone",),
    ),
    "nothing to do": Spoilt(
        "configuration", ("DELETE FROM cdc_embedder.embedding_column",), "warning", ("cdc-embedder add",), mends=False,
    ),
    "columns that would be another service's": Spoilt(
        "configuration", ("ALTER TABLE cdc_embedder.embedding_column ALTER slot SET DEFAULT 'other'",),
        "warning", ("'other'",), mends=False,
    ),
    "columns of a service that does not run": Spoilt(
        "configuration", ("ALTER TABLE documents ADD other vector(8)",
                          "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column,"
                          " model, slot) VALUES ('documents', '{{body}}', 'other', 'fake', 'elsewhere')"),
        "warning", ("slot elsewhere",), mends=False,
    ),
    "a target that is gone": Spoilt(
        "column-state", ("ALTER TABLE documents DROP embedding",), "error", ("dropped",),
    ),
    "a target that is gone, as the check of the target says it": Spoilt(
        "target-column", ("ALTER TABLE documents DROP embedding",), "error", ("does not exist",),
    ),
    "a table that is gone": Spoilt(
        "column-state", ("DROP TABLE documents",), "error", ("dropped", "remove the column"), mends=False,
    ),
    "a source that is gone": Spoilt(
        "column-state", ("ALTER TABLE documents DROP body",), "error", ("a source column was dropped",), mends=False,
    ),
    "a table whose updates fail": Spoilt(
        "column-state", ("ALTER TABLE documents REPLICA IDENTITY NOTHING",), "error", ("NOTHING",),
    ),
    "a table whose identity is more than the keys that are published": Spoilt(
        "column-state", ("ALTER PUBLICATION {slot} SET TABLE documents (id)",
                         "ALTER TABLE documents REPLICA IDENTITY FULL"),
        "error", ("beyond the keys",),
    ),
    "another table of the name that was configured": Spoilt(
        "column-state", ("ALTER TABLE documents RENAME TO former",
                         "CREATE TABLE documents (LIKE former INCLUDING ALL)",
                         f"GRANT ALL ON documents TO {SERVICE_ROLE}"),
        "error", ("another table", "SELECT cdc_embedder.resume('public.documents');"),
    ),
    "a source that is no text any more": Spoilt(
        "source-table", ("ALTER TABLE documents ALTER body TYPE int USING 1",), "error", ("integer",),
    ),
    "a table that became a parent": Spoilt(
        "source-table", ("CREATE TABLE child () INHERITS (documents)",), "error", ("inheritance parent",), mends=False,
    ),
    "an unlogged table": Spoilt(
        "source-table", ("ALTER PUBLICATION {slot} DROP TABLE documents", "ALTER TABLE documents SET UNLOGGED"),
        "warning", ("unlogged",),
    ),
    "no primary key": Spoilt(
        "primary-key", ("ALTER TABLE documents DROP CONSTRAINT documents_pkey",), "error", ("ADD PRIMARY KEY (id)",),
    ),
    "no primary key, and none of its columns": Spoilt(
        "primary-key", ("ALTER TABLE documents DROP id",), "error", ("ADD PRIMARY KEY (...)",), mends=False,
    ),
    "a deferrable primary key": Spoilt(
        "primary-key",
        ("ALTER TABLE documents DROP CONSTRAINT documents_pkey, ADD PRIMARY KEY (id) DEFERRABLE",),
        "error", ("deferrable",),
    ),
    "replica identity NOTHING": Spoilt(
        "replica-identity", ("ALTER TABLE documents REPLICA IDENTITY NOTHING",),
        "error", ("its updates would fail", "ALTER TABLE public.documents REPLICA IDENTITY DEFAULT;"),
    ),
    "a replica identity whose index is gone, under an odd name": Spoilt(
        "replica-identity",
        ("CREATE UNIQUE INDEX identity ON documents (id)",
         "ALTER TABLE documents REPLICA IDENTITY USING INDEX identity", "DROP INDEX identity",
         """ALTER TABLE documents RENAME TO "An ""other"", or. not" """),
        "error", ("an index that is gone",),
    ),
    "an identity beyond the keys that are published": Spoilt(
        "replica-identity",
        ("UPDATE cdc_embedder.embedding_column SET keys_only = true", "ALTER TABLE documents REPLICA IDENTITY FULL"),
        "error", ("keys_only",),
    ),
    "replica identity FULL": Spoilt(
        "replica-identity", ("ALTER TABLE documents REPLICA IDENTITY FULL",), "warning", ("FULL",),
    ),
    "a target of other dimensions": Spoilt(
        "target-column", ("ALTER TABLE documents ALTER embedding TYPE vector(4)",),
        "error", ("vector(4)", "8 dimensions"),
    ),
    "a target that holds no vectors": Spoilt(
        "target-column", ("ALTER TABLE documents ALTER embedding TYPE text USING NULL",),
        "error", ("cannot hold a vector",),
    ),
    "a target without dimensions": Spoilt(
        "target-column", ("ALTER TABLE documents ALTER embedding TYPE vector",), "error", ("without a dimension",),
    ),
    "a target that must not be empty": Spoilt(
        "target-column", ("UPDATE documents SET embedding = '[1,0,0,0,0,0,0,0]'",
                          "ALTER TABLE documents ALTER embedding SET NOT NULL"),
        "error", ("NOT NULL: a row has no vector",),
    ),
    "a table that is not published": Spoilt(
        "publication", ("ALTER PUBLICATION {slot} DROP TABLE documents",), "warning", ("scans alone",),
    ),
    "a table of published keys that is not published": Spoilt(
        "publication",
        ("UPDATE cdc_embedder.embedding_column SET keys_only = true", "ALTER PUBLICATION {slot} DROP TABLE documents"),
        "warning", ('("id")',),
    ),
    "no publication": Spoilt(
        "publication", ("DROP PUBLICATION {slot}",), "error", ("missing", "cdc-embedder init"), mends=False,
    ),
    "a publication of deletes": Spoilt(
        "publication", ("ALTER PUBLICATION {slot} SET (publish = 'insert, update, delete')",), "error", ("alone",),
    ),
    "a publication of leaves": Spoilt(
        "publication", ("ALTER PUBLICATION {slot} SET (publish_via_partition_root = false)",), "error", ("root",),
    ),
    "a table that is published for nothing": Spoilt(
        "publication", ('CREATE TABLE "An ""other""" (id int PRIMARY KEY)',
                        'ALTER PUBLICATION {slot} ADD TABLE "An ""other"""'),
        "warning", ("for nothing",),
    ),
    "a publication of everything": Spoilt(
        "all-tables-publications", ("CREATE PUBLICATION everything FOR ALL TABLES",), "warning", ("FOR ALL TABLES",),
    ),
    "a publication of our schema": Spoilt(
        "all-tables-publications", ("CREATE PUBLICATION everything FOR TABLES IN SCHEMA cdc_embedder",),
        "warning", ("IN SCHEMA cdc_embedder",),
    ),
    "an HNSW index during the first scan": Spoilt(
        "vector-index", ("CREATE INDEX near ON documents USING hnsw (embedding vector_cosine_ops)",),
        "warning", ("hnsw index near", "30,000", "CREATE INDEX near ON public.documents"),
    ),
    "an IVFFlat index during the first scan": Spoilt(
        "vector-index", ("CREATE INDEX ON documents USING ivfflat (embedding vector_l2_ops)",),
        "warning", ("ivfflat",),
    ),
    "pages without room": Spoilt(
        "fillfactor", ("INSERT INTO documents (body) SELECT repeat('x', 400) FROM generate_series(1, 3000)",
                       "UPDATE documents SET views = 1", "SELECT pg_stat_force_next_flush()"),
        "warning", ("HOT", "fillfactor = 70"),
    ),
    "a trigger that fires on the write-back": Spoilt(
        "triggers", ("CREATE TRIGGER touch BEFORE UPDATE ON documents FOR EACH ROW EXECUTE FUNCTION"
                     " suppress_redundant_updates_trigger()",),
        "warning", ("the trigger touch", "GRANT SET ON PARAMETER"),
    ),
    "a trigger that always fires": Spoilt(
        "triggers", ("CREATE TRIGGER touch BEFORE UPDATE ON documents FOR EACH ROW EXECUTE FUNCTION"
                     " suppress_redundant_updates_trigger()", "ALTER TABLE documents ENABLE ALWAYS TRIGGER touch",
                     f"GRANT SET ON PARAMETER session_replication_role TO {SERVICE_ROLE}"),
        "warning", ("the trigger touch", "BEFORE UPDATE OF"), mends=False,
    ),
    "rows that failed": Spoilt(
        "failed-rows", ("INSERT INTO cdc_embedder.ledger_1 (key_1, fingerprint, generation, state, error)"
                        " VALUES (1, '', 1, 'failed', 'too odd')",),
        "warning", ("1 row(s)", "retry_failed"), mends=False,
    ),
    "a backlog that nobody works off": Spoilt(
        "backlog", ("INSERT INTO cdc_embedder.backlog_1 VALUES (1, '0/1', '0/1', NULL, 1)",),
        "warning", ("from 0/1 on", "cdc-embedder run"), mends=False,
    ),
    "an E5 model without its prompts": Spoilt(
        "prompts", ("INSERT INTO cdc_embedder.model (name, backend, dimensions)"
                    " VALUES ('intfloat/e5-base-v2', 'fake', 8)",
                    "UPDATE cdc_embedder.embedding_column SET model = 'intfloat/e5-base-v2'"),
        "warning", ("passage: ",),
    ),
    "an E5 model by its source, with one prompt": Spoilt(
        "prompts", ("INSERT INTO cdc_embedder.model (name, source, backend, dimensions, document_prompt) VALUES"
                    " ('ours', '/models/multilingual-e5-large', 'fake', 8, 'passage: ')",
                    "UPDATE cdc_embedder.embedding_column SET model = 'ours'"),
        "warning", ("query_prompt",),
    ),
    "a model with code of its own": Spoilt(
        "model-permission", ("UPDATE cdc_embedder.model SET backend = 'local', trust_remote_code = true"
                             " WHERE name = 'fake'",),
        "error", ("CDC_EMBEDDER_ALLOW_REMOTE_CODE=on",), mends=False,
    ),
    "a key that may not be taken": Spoilt(
        "model-permission",
        ("""UPDATE cdc_embedder.model SET backend = 'openai', options = '{{"api_key_env": "HOME"}}'"""
         " WHERE name = 'fake'",),
        "error", ("HOME", "CDC_EMBEDDER_API_KEY_ENVS=OPENAI_API_KEY,HOME"), mends=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT.values(), ids=SPOILT.keys())
def test_what_is_spoilt_is_found_and_the_remedy_mends_it(ward: Bench, case: Spoilt) -> None:
    given: dict[str, Any] = {"dsn": ward.dsn_admin} if case.admin else {}
    if not (case.admin and not case.sql):  # a superuser is one from the start
        assert found(ward, case.check, **given).level == "ok"
    for statement in case.sql:
        ward.admin.execute(statement.format(slot=ward.slot, database=ward.database))
    wait_for_settings(ward)
    finding = found(ward, case.check, **given, **case.settings)
    assert finding.level == case.level, finding
    for word in case.words:
        assert word in finding.sentence + finding.remedy, finding
    assert not inexact(finding.remedy), finding
    if case.mends:
        follow(ward, finding.remedy, replication=case.replication)
        assert found(ward, case.check, **given, **case.settings).level == "ok", finding


NO_SQL = ("cdc-embedder ", "CDC_EMBEDDER_", "psql ")


def inexact(remedy: str) -> str:
    """What psql would not take of it as it stands, unless it is a command or a setting."""
    if remedy.startswith(NO_SQL):
        return ""
    statements = "\n".join(line.partition("-- ")[0].rstrip() for line in remedy.splitlines()).strip()
    whole = statements.endswith(";") and "…" not in statements and "..." not in statements
    return "" if remedy and (whole or not statements) else statements or "nothing is said"


# ----------------------------------------------------------------------------------------- the server as it was started


@spoils("wal-level", "replication-slots", "wal-senders", "origins", "sessions", "replication-connection")
@pytest.mark.parametrize("bindir", [servers.bindir_15, servers.bindir_18])
def test_a_server_that_is_too_small_is_told_setting_by_setting(bindir: Callable[[], Path]) -> None:
    small = {"wal_level": "replica", "max_wal_senders": "0", "max_replication_slots": "0", "max_connections": "10"}
    if bindir is servers.bindir_18:
        small["max_active_replication_origins"] = "0"
    checks = ["wal-level", "replication-slots", "wal-senders", "sessions", "origins"]
    with bench_with(bindir(), "pgoutput", small) as bench, healthy(bench):
        findings = [found(bench, check) for check in checks]
        assert [finding.level for finding in findings] == ["error"] * 4 + ["warning"]
        assert found(bench, "replication-connection").level == "error"
        for finding in findings:
            follow(bench, finding.remedy)
        bench.restart()
        for check in [*checks, "replication-connection"]:
            assert found(bench, check).level == "ok", check


@spoils("primary", "schema", "skipped")
def test_a_standby_is_told_and_what_cannot_be_looked_at_there() -> None:
    with bench_with(servers.bindir_18(), "pgoutput", {}) as bench:
        with healthy(bench):
            assert found(bench, "primary").level == "ok"
        bench.server.stop()
        standby = bench.server.data / "standby.signal"
        standby.touch(0o644)
        bench.server.start()
        findings = doctor(bench)
        [primary], [schema], [skipped] = (named(findings, name) for name in ("primary", "schema", "skipped"))
        assert (primary.level, primary.subject) == ("error", "server")
        assert "target_session_attrs" in primary.remedy
        assert (schema.level, skipped.level) == ("warning", "warning")
        assert "column-rights" in skipped.sentence
        assert not any("could not be looked at" in finding.sentence for finding in findings)
        standby.unlink()
        bench.restart()


@spoils("standby-decoding")
def test_a_standby_that_would_lose_the_slot_is_told_and_mended() -> None:
    with (
        bench_with(servers.bindir_18(), "pgoutput", {}) as bench,
        tempfile.TemporaryDirectory(prefix="cdc-embedder-", ignore_cleanup_errors=True) as directory,
    ):
        Path(directory).chmod(0o755)
        with servers.standby_of(bench.server, Path(directory)) as standby, healthy(bench):
            there = Bench(standby, "pgoutput", bench.database, bench.slot, psycopg.connect(standby.dsn()), True)
            there.admin.autocommit = True

            def looked_at() -> list[Finding]:
                return doctor(bench, replication_dsn=there.dsn_service)

            spoilt = named(looked_at(), "standby-decoding")
            assert [finding.subject for finding in spoilt] == ["hot_standby_feedback", "primary_slot_name"]
            follow(there, spoilt[0].remedy)
            made, _, rest = spoilt[1].remedy.partition(" -- on the primary; then on the standby: ")
            follow(bench, made)
            for statement in rest.split("; "):
                follow(there, statement)
            until(lambda: one(there.admin, "SELECT count(*) FROM pg_stat_wal_receiver") == 1, "it never received again")
            assert [finding for finding in looked_at() if finding.level != "ok"] == []
            [well] = named(looked_at(), "standby-decoding")
            assert "optional" in well.remedy
            follow(bench, well.remedy)
            assert named(looked_at(), "standby-decoding")[0].remedy == ""
            with running(bench, CDC_EMBEDDER_REPLICATION_DSN=there.dsn_service):
                until(lambda: [row["state"] for row in status(bench)] == ["live"], "it never worked")
                assert [finding for finding in looked_at() if finding.level != "ok"] == []
            there.admin.execute("ALTER SYSTEM SET primary_conninfo = ''")
            there.admin.execute("SELECT pg_reload_conf()")
            until(lambda: one(there.admin, "SELECT count(*) FROM pg_stat_wal_receiver") == 0, "it goes on receiving")
            [finding] = named(looked_at(), "standby-decoding")
            assert finding.level == "error"
            assert "it receives nothing" in finding.sentence
            there.admin.close()


@spoils("wal-directory")
def test_a_wal_directory_that_a_slot_fills_is_told_with_the_slot() -> None:
    with bench_with(servers.bindir_18(), "pgoutput", {"max_wal_size": "32MB"}) as bench, healthy(bench):
        hidden = found(bench, "wal-directory")
        assert hidden.level == "ok"
        assert "cannot be seen by this role" in hidden.sentence
        follow(bench, hidden.remedy)
        seen = found(bench, "wal-directory")
        assert seen.level == "ok"
        assert "cannot be learnt by SQL" in seen.sentence
        bench.admin.execute("SELECT pg_create_physical_replication_slot('left_over', true)")
        for _ in range(6):
            bench.admin.execute("SELECT pg_logical_emit_message(false, 'x', 'x')")
            bench.admin.execute("SELECT pg_switch_wal()")
        finding = found(bench, "wal-directory")
        assert finding.level == "warning"
        assert "left_over" in finding.sentence
        follow(bench, finding.remedy)
        bench.admin.execute("CHECKPOINT")
        assert found(bench, "wal-directory").level == "ok"


@spoils("synchronous-standbys")
def test_a_synchronous_standby_that_is_gone_is_told_where_it_can_be_seen(ward: Bench) -> None:
    assert found(ward, "synchronous-standbys").level == "ok"
    with standby_gone(ward):
        hidden = found(ward, "synchronous-standbys")
        assert hidden.level == "ok"
        assert "cannot be seen" in hidden.sentence
        finding = found(ward, "synchronous-standbys", dsn=ward.dsn_admin)
        assert finding.level == "warning"
        assert "'nobody'" in finding.sentence
        follow(ward, finding.remedy)
        assert found(ward, "synchronous-standbys", dsn=ward.dsn_admin).level == "ok"


@spoils("server-version")
def test_a_server_that_is_too_old_is_told(ward: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(ward, "server-version").level == "ok"
    monkeypatch.setattr(server, "OLDEST_SERVER", 99)
    assert found(ward, "server-version").level == "error"


@spoils("clock")
@pytest.mark.parametrize(("ahead", "word"), [(3600.0, "behind"), (-3600.0, "ahead of")])
def test_a_clock_that_is_off_is_told(ward: Bench, monkeypatch: pytest.MonkeyPatch, ahead: float, word: str) -> None:
    assert found(ward, "clock").level == "ok"
    monkeypatch.setattr(surroundings, "here", lambda: time.time() + ahead)
    finding = found(ward, "clock")
    assert finding.level == "warning"
    assert f"3600 seconds {word}" in finding.sentence


# -------------------------------------------------------------------------------------------------- between us and it


@spoils("connection", "skipped")
def test_a_server_that_cannot_be_reached_is_one_error_and_the_rest_is_said_to_be_skipped() -> None:
    findings = examine(Settings(dsn="host=127.0.0.1 port=1 password=Secret1"))
    assert [(finding.check, finding.level) for finding in findings] == [("connection", "error"), ("skipped", "warning")]
    assert "refused" in findings[0].sentence
    assert all(check.name in findings[1].sentence for check in CHECKS)
    assert "Secret1" not in str(findings)


@pytest.mark.parametrize("dsn", ["postgresql://emb:Secret1@[half", "host=/nowhere password=Secret1"])
def test_a_connection_string_that_leads_nowhere_is_an_error_without_its_password(dsn: str) -> None:
    findings = examine(Settings(dsn=dsn))
    assert (findings[0].check, findings[0].level) == ("connection", "error")
    assert "Secret1" not in str(findings)


def test_a_connection_that_is_lost_meanwhile_is_told(ward: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut() -> float:
        ward.admin.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE application_name = 'cdc-embedder doctor'"
        )
        return time.time()

    monkeypatch.setattr(surroundings, "here", cut)
    findings = doctor(ward)
    assert [finding.check for finding in findings[-2:]] == ["connection", "skipped"]
    assert "lost" in findings[-2].sentence
    assert "server-version" in findings[-1].sentence


@pytest.fixture
def bouncer(ward: Bench) -> Iterator[Callable[[str], str]]:
    """PgBouncer before the ward's server; `bouncer(ignored)` starts one that ignores these startup parameters."""
    program = Path("/usr/sbin/pgbouncer")
    if not program.exists():
        servers_lack("pgbouncer (package pgbouncer)")
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="cdc-embedder-") as directory:
        folder = Path(directory)
        folder.chmod(0o777)

        def start(ignored: str) -> str:
            port = Server(Path(), folder).port
            (folder / "users").write_text(f'"{SERVICE_ROLE}" ""\n')
            (folder / "ini").write_text(
                f"[databases]\n* = host=127.0.0.1 port={ward.server.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
                f"listen_port = {port}\nunix_socket_dir =\nauth_type = trust\nauth_file = {folder}/users\n"
                f"pool_mode = transaction\nignore_startup_parameters = {ignored}\npidfile = {folder}/pid\n"
            )
            user = ["-u", "nobody"] if sys.platform != "darwin" else []
            started.append(
                subprocess.Popen([program, *user, folder / "ini"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            dsn = f"host=127.0.0.1 port={port} dbname={ward.database} user={SERVICE_ROLE}"
            until(lambda: _accepts(dsn), "PgBouncer never took a connection")
            return dsn

        try:
            yield start
        finally:
            for process in started:
                process.terminate()
                process.wait()


def _accepts(dsn: str) -> bool:
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError:
        return False
    return True


def servers_lack(what: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"this machine lacks {what}")
    pytest.skip(f"this machine lacks {what}")


@spoils("pooler", "session-settings")
def test_a_pooler_that_drops_settings_is_told_by_the_pid_and_by_the_settings(
    ward: Bench, bouncer: Callable[[str], str]
) -> None:
    for check in ("pooler", "session-settings"):
        assert found(ward, check).level == "ok"
    findings = doctor(ward, dsn=bouncer("options,extra_float_digits"))
    for check in ("pooler", "session-settings", "replication-connection"):
        [finding] = named(findings, check)
        assert finding.level == "error", finding
        assert "the-server-itself" in finding.remedy
    assert "search_path" in named(findings, "session-settings")[0].sentence


def test_a_pooler_that_refuses_settings_is_an_error_with_the_way_around_it(
    ward: Bench, bouncer: Callable[[str], str]
) -> None:
    findings = doctor(ward, dsn=bouncer("extra_float_digits"))
    assert (findings[0].check, findings[0].level) == ("connection", "error")
    assert "the-server-itself" in findings[0].remedy


def test_a_replication_connection_to_another_database_is_an_error(ward: Bench) -> None:
    finding = found(ward, "replication-connection", replication_dsn=ward.server.dsn("postgres", SERVICE_ROLE))
    assert finding.level == "error"
    assert "the database postgres" in finding.sentence


def test_settings_of_the_role_that_the_service_outranks_are_no_finding(ward: Bench) -> None:
    for setting in (
        "wal_sender_timeout = 0",
        "idle_session_timeout = '1s'",
        "statement_timeout = '1ms'",
        "row_security = on",
        "search_path = pg_temp",
        "default_transaction_isolation = 'serializable'",
    ):
        ward.admin.execute(f"ALTER ROLE {SERVICE_ROLE} SET {setting}")
    for finding in doctor(ward):
        assert finding.level == "ok", finding


# ------------------------------------------------------------------------------------------------------ schema and slot


def test_without_our_schema_the_server_is_examined_all_the_same(pg18: Server) -> None:
    findings = examine(Settings(dsn=pg18.dsn()), model=False)
    [schema], [skipped] = named(findings, "schema"), named(findings, "skipped")
    assert (schema.level, schema.remedy) == ("error", "cdc-embedder init")
    assert set(skipped.sentence.partition(": ")[2].split(", ")) == {
        check.name for check in CHECKS if check.needs != "server"
    } - {"model"}
    assert named(findings, "wal-level")[0].level == "ok"


@spoils("schema")
def test_a_schema_that_is_older_or_newer_than_the_program_is_told(ward: Bench) -> None:
    assert found(ward, "schema").level == "ok"
    ward.admin.execute("INSERT INTO cdc_embedder.migration VALUES (99, 'of the future')")
    newer = found(ward, "schema")
    assert newer.level == "error"
    assert "99" in newer.sentence
    ward.admin.execute("DELETE FROM cdc_embedder.migration WHERE version > 1")
    older = found(ward, "schema")
    assert (older.level, older.remedy) == ("warning", "cdc-embedder init")
    assert found(ward, "schema", auto_migrate=False).level == "error"


def test_a_schema_that_lacks_what_this_program_reads_is_told_with_the_command_that_brings_it(ward: Bench) -> None:
    ward.admin.execute("DELETE FROM cdc_embedder.migration WHERE version > 1")
    ward.admin.execute("ALTER TABLE cdc_embedder.embedding_column RENAME template TO other")
    finding = found(ward, "schema")
    assert (finding.level, finding.remedy) == ("error", "cdc-embedder init")


def test_a_schema_of_the_first_version_is_examined_but_for_what_it_lacks(ward: Bench) -> None:
    ward.admin.execute("DELETE FROM cdc_embedder.migration WHERE version > 1")
    ward.admin.execute("DROP VIEW cdc_embedder.status; DROP TABLE cdc_embedder.given_up")
    findings = doctor(ward)
    for check in ("slot-given-up", "column-state"):
        [finding] = named(findings, check)
        assert (finding.level, finding.remedy) == ("warning", "cdc-embedder init")
    assert named(findings, "column-rights")[0].level == "ok"


def test_a_table_that_is_locked_keeps_no_other_check_from_being_made(ward: Bench) -> None:
    with psycopg.connect(ward.dsn_admin) as session:
        session.execute("LOCK documents IN ACCESS EXCLUSIVE MODE")
        findings = doctor(ward)
    assert {finding.check for finding in findings if finding.level == "error"} == set()
    assert {check.name for check in CHECKS} - {"model"} <= {finding.check for finding in findings}


def test_a_role_that_may_not_read_our_schema_is_told_whose_doctor_to_be(ward: Bench) -> None:
    role = f"stranger_{ward.database}"
    ward.admin.execute(f"CREATE ROLE {role} LOGIN REPLICATION")
    try:
        findings = doctor(ward, dsn=ward.server.dsn(ward.database, role))
        [schema] = named(findings, "schema")
        assert schema.level == "error"
        assert "permission denied" in schema.sentence
        assert "as the role that the service has" in schema.remedy
        assert named(findings, "schema-owner") == []
    finally:
        ward.admin.execute(f"DROP ROLE {role}")


@spoils("slot-status")
def test_a_slot_that_the_server_gave_up_is_told(ward: Bench) -> None:
    make_slot(ward, ward.slot)
    assert found(ward, "slot-status").level == "ok"
    ward.admin.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
    wait_for_settings(ward)
    for _ in range(3):
        ward.admin.execute("SELECT pg_logical_emit_message(false, 'x', 'x')")
        ward.admin.execute("SELECT pg_switch_wal()")
    at_risk = found(ward, "slot-status")
    assert at_risk.level == "error"
    assert "unreserved" in at_risk.sentence
    ward.admin.execute("CHECKPOINT")
    lost = found(ward, "slot-status")
    assert lost.level == "error"
    assert "wal_removed" in lost.sentence
    with running(ward):
        wait_caught_up(ward)
        assert found(ward, "slot-status").level == "ok"


def test_every_slot_that_the_service_makes_is_a_failover_slot_and_so_it_is_told(ward: Bench) -> None:
    assert found(ward, "failover-slot").sentence.startswith("the slot will be a failover slot")
    with running(ward):
        wait_caught_up(ward)
        finding = found(ward, "failover-slot")
        assert (finding.level, finding.sentence[:23]) == ("ok", "it is a failover slot: ")


@spoils("slot-reader")
def test_a_stranger_that_reads_our_slot_is_told_and_can_be_ended(ward: Bench) -> None:
    make_slot(ward, ward.slot)
    reader = [ward.server.bindir / "pg_recvlogical", "-d", ward.dsn_admin, "--slot", ward.slot, "--start", "-f", "-",
              "-o", "proto_version=1", "-o", f"publication_names={ward.slot}", "--no-loop"]  # fmt: skip
    process = subprocess.Popen(reader, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: "pg_recvlogical" in found(ward, "slot-reader").sentence, "the stranger was never seen")
        finding = found(ward, "slot-reader")
        assert finding.level == "error"
        follow(ward, finding.remedy)
        process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    until(lambda: found(ward, "slot-reader").level == "warning", "the stranger was never gone")


def test_a_service_whose_lock_is_gone_is_no_stranger(ward: Bench) -> None:
    with running(ward) as service:
        wait_caught_up(ward)
        service.signal(signal.SIGSTOP)
        try:
            ward.admin.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory' AND database ="
                " (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            finding = found(ward, "slot-reader")
            assert finding.level == "warning"
            assert "has not the lock" in finding.sentence
        finally:
            service.signal(signal.SIGCONT)


def test_a_service_that_holds_the_lock_and_does_not_read_is_told(ward: Bench) -> None:
    make_slot(ward, ward.slot)
    with psycopg.connect(ward.dsn_service, autocommit=True) as session:
        session.execute("SELECT pg_advisory_lock(hashtextextended('cdc_embedder:' || %s, 0))", (ward.slot,))
        finding = found(ward, "slot-reader")
        assert finding.level == "warning"
        assert f"session {session.info.backend_pid}" in finding.sentence


def test_a_slot_of_another_database_is_told_with_another_name(ward: Bench) -> None:
    with psycopg.connect(ward.server.dsn(), autocommit=True) as elsewhere:
        elsewhere.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (ward.slot,))
        try:
            finding = found(ward, "slot")
            assert finding.level == "error"
            assert "of the database postgres" in finding.sentence
            assert f"CDC_EMBEDDER_SLOT={ward.slot}_{ward.database}" in finding.remedy
        finally:
            elsewhere.execute("SELECT pg_drop_replication_slot(%s)", (ward.slot,))


@pytest.mark.parametrize("bench", ["15-wal2json"], indirect=True)
def test_with_wal2json_a_table_in_the_publication_is_there_for_nothing(bench: Bench) -> None:
    with healthy(bench):
        bench.admin.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", (bench.slot,))
        finding = found(bench, "publication")
        assert finding.level == "warning"
        assert "wal2json" in finding.sentence
        follow(bench, finding.remedy)
        assert found(bench, "publication").level == "ok"


@spoils("open-transactions")
def test_transactions_that_hold_the_slot_back_are_named_with_what_ends_them(
    ward: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "OLD_TRANSACTION_S", -1.0)
    assert found(ward, "open-transactions").level == "ok"
    ward.admin.execute("BEGIN; INSERT INTO documents (body) VALUES ('x'); PREPARE TRANSACTION 'it''s old'")
    prepared = found(ward, "open-transactions")
    assert prepared.level == "warning"
    assert prepared.subject == "prepared transaction it's old"
    follow(ward, prepared.remedy)
    assert found(ward, "open-transactions").level == "ok"
    make_slot(ward, ward.slot)
    with suppress(psycopg.OperationalError), psycopg.connect(ward.dsn_admin) as session:
        session.execute("INSERT INTO documents (body) VALUES ('y')")
        hidden = found(ward, "open-transactions")
        assert hidden.level == "ok"
        assert "since when cannot be seen" in hidden.sentence
        follow(ward, hidden.remedy)
        idle = found(ward, "open-transactions")
        assert idle.level == "warning"
        assert "idle in transaction" in idle.sentence
        follow(ward, idle.remedy)
        until(lambda: found(ward, "open-transactions").level == "ok", "the session was never gone")
    with psycopg.connect(ward.dsn_service, application_name="cdc-embedder write 1") as ours:
        ours.execute("UPDATE documents SET embedding = NULL WHERE id = 1")
        assert found(ward, "open-transactions").level == "ok"


def test_a_transaction_of_unknown_age_is_a_warning_where_no_slot_can_be_made_for_it(ward: Bench) -> None:
    with psycopg.connect(ward.dsn_admin) as session:
        session.execute("INSERT INTO documents (body) VALUES ('y')")
        missing = found(ward, "open-transactions")
        assert missing.level == "warning"
        assert f"session {session.info.backend_pid} of postgres in {ward.database}" in missing.sentence
        assert f"the slot {ward.slot} cannot be made" in missing.sentence
        with running(ward):
            until(lambda: one(ward.admin, UNFINISHED, ward.slot) == 1, "the slot was never begun")
            waits = found(ward, "open-transactions")
            assert (waits.level, waits.sentence) == ("warning", missing.sentence)
            session.rollback()
            wait_caught_up(ward)
            session.execute("INSERT INTO documents (body) VALUES ('z')")
            made = found(ward, "open-transactions")
            assert (made.level, "cannot be seen" in made.sentence) == ("ok", True)
        follow(ward, missing.remedy)
        assert found(ward, "open-transactions").level == "ok"  # it is seen now, and young


UNFINISHED = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s AND confirmed_flush_lsn IS NULL"


def test_a_transaction_of_unknown_age_is_a_warning_where_a_slot_holds_back_more_than_it_should(ward: Bench) -> None:
    make_slot(ward, ward.slot)
    with psycopg.connect(ward.dsn_admin) as session:
        session.execute("INSERT INTO documents (body) VALUES ('y')")
        ward.admin.execute("SELECT pg_switch_wal()")
        assert found(ward, "open-transactions").level == "ok"
        for settings in ({"wal_warn_bytes": 1}, {"wal_warn_bytes": 0, "wal_alarm_bytes": 1}):
            holds = found(ward, "open-transactions", **settings)
            assert holds.level == "warning"
            assert f"the slot {ward.slot} holds back" in holds.sentence
        assert found(ward, "open-transactions", wal_warn_bytes=0, wal_alarm_bytes=0).level == "ok"


def test_a_transaction_that_ends_meanwhile_is_no_finding(ward: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with psycopg.connect(ward.dsn_admin) as session:
        session.execute("INSERT INTO documents (body) VALUES ('y')")

        async def waits_no_more(_: object) -> str:
            session.rollback()
            return "the slot waits"

        monkeypatch.setattr(slots, "_what_waits", waits_no_more)
        assert found(ward, "open-transactions").level == "ok"


# ---------------------------------------------------------------------------------------------------- the output plugin


@contextmanager
def plugins_listed(bench: Bench, listed: str) -> Iterator[None]:
    bench.admin.execute(f"ALTER SYSTEM SET output_plugin_libraries = {listed}".encode())
    wait_for_settings(bench)
    yield
    bench.admin.execute("ALTER SYSTEM RESET output_plugin_libraries")
    wait_for_settings(bench)


def test_whether_a_plugin_is_allowed_is_unknown_to_a_role_that_cannot_see_the_list(listing: Bench) -> None:
    with healthy(listing), plugins_listed(listing, "test_decoding"):
        hidden = found(listing, "output-plugin")
        assert hidden.level == ("warning" if listing.plugin == "wal2json" else "ok")
        assert "cannot be seen by this role" in hidden.sentence
        follow(listing, hidden.remedy)
        seen = found(listing, "output-plugin")
        assert seen.level == "error"
        assert "output_plugin_libraries is 'test_decoding'" in seen.sentence
        follow(listing, seen.remedy)
        assert found(listing, "output-plugin").level == "ok"


def test_a_plugin_that_a_slot_of_ours_streams_with_is_allowed_though_the_list_is_hidden(listing: Bench) -> None:
    with healthy(listing), running(listing):
        wait_caught_up(listing)
        finding = found(listing, "output-plugin")
        assert (finding.level, finding.sentence) == ("ok", f"the slot {listing.slot} streams with it")
        with plugins_listed(listing, "test_decoding"):
            assert found(listing, "output-plugin", dsn=listing.dsn_admin).level == "error"  # when it connects again


@pytest.mark.parametrize("bench", ["15-wal2json", "18-pgoutput"], indirect=True)
def test_a_library_is_there_or_not_or_cannot_be_seen(listing: Bench) -> None:
    with healthy(listing):
        listing.admin.execute(f"GRANT pg_read_all_settings TO {SERVICE_ROLE}")
        unknown = found(listing, "output-plugin", output_plugin="wal2json")
        assert unknown.level == "ok"
        assert "its library cannot be seen by this role" in unknown.sentence
        seen = found(listing, "output-plugin", output_plugin="wal2json", dsn=listing.dsn_admin)
        has = listing.plugin == "wal2json"
        assert (seen.level, "the server has it" in seen.sentence) == (("ok" if has else "error"), has)


@pytest.mark.parametrize("bench", ["15-wal2json"], indirect=True)
@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("pgoutput, wal2json", "the service takes wal2json where the server has it, else pgoutput"),
        ("wal2json, test_decoding", "the service takes wal2json where the server has it;"),
        ("pgoutput", "the service takes pgoutput"),
    ],
)
def test_of_both_plugins_the_one_that_the_service_takes_is_told(listing: Bench, listed: str, words: str) -> None:
    with healthy(listing), plugins_listed(listing, listed):
        hidden = found(listing, "output-plugin", output_plugin="auto")
        assert (hidden.level, "which of wal2json and pgoutput" in hidden.sentence) == ("ok", True)
        listing.admin.execute(f"GRANT pg_read_all_settings TO {SERVICE_ROLE}")
        told = found(listing, "output-plugin", output_plugin="auto")
        assert told.level == "ok"
        assert words in told.sentence
        sure = found(listing, "output-plugin", output_plugin="auto", dsn=listing.dsn_admin)
        taken = "pgoutput" if listed == "pgoutput" else "wal2json"
        assert (sure.level, sure.sentence) == ("ok", f"the service takes {taken}")


def test_where_wal2json_is_not_there_the_service_takes_pgoutput(ward: Bench) -> None:
    sure = found(ward, "output-plugin", output_plugin="auto", dsn=ward.dsn_admin)
    assert (sure.level, sure.sentence) == ("ok", "the service takes pgoutput: the server has no library wal2json")


@pytest.mark.parametrize("bench", ["15-wal2json"], indirect=True)
def test_requests_from_sql_need_pgoutput_whatever_the_slot_for_rows_has(listing: Bench) -> None:
    with healthy(listing), plugins_listed(listing, "wal2json"):
        assert found(listing, "output-plugin", dsn=listing.dsn_admin).level == "ok"
        finding = found(listing, "output-plugin", dsn=listing.dsn_admin, sql_embed=True)
        assert (finding.level, finding.subject) == ("error", "plugin pgoutput")


# --------------------------------------------------------------------------------------------------- columns and models


def test_each_partition_has_its_own_identity_and_an_error_of_one_outweighs_the_warning_of_another(ward: Bench) -> None:
    ward.admin.execute(
        "CREATE TABLE parted (id int PRIMARY KEY, body text, embedding vector(8)) PARTITION BY RANGE (id);"
        " CREATE TABLE low PARTITION OF parted FOR VALUES FROM (0) TO (9);"
        " CREATE TABLE high PARTITION OF parted FOR VALUES FROM (9) TO (99);"
        " DELETE FROM cdc_embedder.embedding_column; INSERT INTO cdc_embedder.embedding_column (source_table,"
        " source_columns, target_column, model) VALUES ('parted', '{body}', 'embedding', 'fake')"
    )
    assert found(ward, "replica-identity").level == "ok"
    ward.admin.execute("ALTER TABLE low REPLICA IDENTITY FULL; ALTER TABLE high REPLICA IDENTITY NOTHING")
    [worst] = named(doctor(ward), "replica-identity")
    assert (worst.level, worst.remedy) == ("error", "ALTER TABLE public.high REPLICA IDENTITY DEFAULT;")
    follow(ward, worst.remedy)
    [dear] = named(doctor(ward), "replica-identity")
    assert dear.level == "warning"
    follow(ward, dear.remedy)
    assert found(ward, "replica-identity").level == "ok"


def test_a_column_whose_table_is_gone_can_be_removed_as_the_remedy_says(ward: Bench) -> None:
    ward.admin.execute("DROP TABLE documents")
    follow(ward, found(ward, "column-state").remedy)
    assert one(ward.admin, "SELECT count(*) FROM cdc_embedder.embedding_column") == 0


def test_an_index_on_a_column_that_is_filled_is_no_finding(ward: Bench) -> None:
    with running(ward):
        wait_caught_up(ward)
        ward.admin.execute("CREATE INDEX ON documents USING hnsw (embedding vector_cosine_ops)")
        assert found(ward, "vector-index").level == "ok"


@spoils("column-state")
def test_what_a_running_service_says_of_a_column_is_told(ward: Bench) -> None:
    with running(ward):
        wait_caught_up(ward)
        assert found(ward, "column-state").level == "ok"
        ward.admin.execute("SELECT cdc_embedder.pause('documents')")
        until(lambda: status(ward)[0]["state"] == "paused", "it was never paused")
        assert found(ward, "column-state").level == "ok"  # its operator's will
        ward.admin.execute("SELECT cdc_embedder.resume('documents')")
        ward.admin.execute(f"REVOKE SELECT (body) ON documents FROM {SERVICE_ROLE}")
        ward.admin.execute("INSERT INTO documents (body) VALUES ('unreadable')")
        until(lambda: status(ward)[0]["state"] == "error", "it never was in error", lambda: status(ward))
        finding = found(ward, "column-state")
        assert finding.level == "error"
        assert "permission denied" in finding.sentence
        assert not inexact(finding.remedy)


def test_vectors_that_are_there_wait_for_their_operators_word_and_that_is_told(bench18: Bench) -> None:
    with healthy(bench18):
        bench18.admin.execute("DELETE FROM cdc_embedder.embedding_column")
        bench18.admin.execute("UPDATE documents SET embedding = '[1,0,0,0,0,0,0,0]'")
        configure_documents(bench18)
        with running(bench18):
            until(lambda: status(bench18)[0]["state"] == "paused", "it never waited", lambda: status(bench18))
            finding = found(bench18, "column-state")
            assert finding.level == "warning"
            assert "on_existing" in finding.sentence
            follow(bench18, finding.remedy.partition("anew: ")[2])
            until(lambda: found(bench18, "column-state").level == "ok", "it waits on", lambda: status(bench18))


def test_a_model_that_is_down_is_told_while_the_service_runs(ward: Bench) -> None:
    with running(ward) as service:
        wait_caught_up(ward)
        ward.admin.execute("""UPDATE cdc_embedder.model SET options = '{"down": true}' WHERE name = 'fake'""")
        until(lambda: service.log.count("the model fake runs") > 1, "the model was never made anew")
        ward.admin.execute("INSERT INTO documents (body) VALUES ('waits')")
        until(lambda: found(ward, "column-state").level == "error", "the breaker never opened", lambda: status(ward))
        assert "circuit breaker" in found(ward, "column-state").sentence
        [finding] = named(doctor(ward, model=True), "model")
        assert finding.level == "error"
        assert "is down" in finding.sentence


def test_a_backlog_that_a_service_works_off_is_no_finding(ward: Bench) -> None:
    with psycopg.connect(ward.dsn_service, autocommit=True) as session:
        session.execute("SELECT pg_advisory_lock(hashtextextended('cdc_embedder:' || %s, 0))", (ward.slot,))
        ward.admin.execute("INSERT INTO cdc_embedder.backlog_1 VALUES (1, '0/1', '0/1', NULL, 1)")
        assert found(ward, "backlog").level == "ok"


def test_a_model_whose_vectors_are_no_numbers_is_told(ward: Bench) -> None:
    ward.admin.execute("""UPDATE cdc_embedder.model SET options = '{"nan": "canary"}' WHERE name = 'fake'""")
    [finding] = named(doctor(ward, model=True), "model")
    assert finding.level == "error"
    assert "no number" in finding.sentence


def test_an_identity_that_cannot_serve_is_told_once_and_not_as_the_key(ward: Bench) -> None:
    ward.admin.execute("ALTER TABLE documents REPLICA IDENTITY NOTHING")
    assert found(ward, "replica-identity").level == "error"
    assert found(ward, "primary-key").level == "ok"
    ward.admin.execute("ALTER TABLE documents DROP CONSTRAINT documents_pkey")
    assert found(ward, "primary-key").level == "error"
    assert found(ward, "replica-identity").level == "ok"


@spoils("model")
def test_a_local_model_is_loaded_and_its_device_and_dimensions_are_held_to_its_row(ward: Bench, tmp_path: Path) -> None:
    from tests import models  # torch takes its time, and no other test here wants it

    folder = models.bert(tmp_path / "model")
    ward.admin.execute(
        "UPDATE cdc_embedder.model SET backend = 'local', source = %s WHERE name = 'fake'", (str(folder),)
    )
    [wrong] = named(doctor(ward, model=True, device="cpu"), "model")
    assert wrong.level == "error"
    assert "32" in wrong.sentence
    [device] = named(doctor(ward, model=True, device="cuda:7"), "model")
    assert (device.level, device.subject) == ("error", "device cuda:7")
    ward.admin.execute("DELETE FROM cdc_embedder.embedding_column")
    ward.admin.execute("UPDATE cdc_embedder.model SET dimensions = 32 WHERE name = 'fake'")
    ward.admin.execute("ALTER TABLE documents ALTER embedding TYPE vector(32)")
    configure_documents(ward)
    [right] = named(doctor(ward, model=True, device="cpu"), "model")
    assert right.level == "ok", right
    assert "cpu" in right.sentence


def test_a_model_behind_an_api_is_asked_and_an_answer_of_other_dimensions_is_told(ward: Bench) -> None:
    with api() as service:
        options = {"base_url": f"http://127.0.0.1:{service.server_address[1]}/v1"}
        ward.admin.execute(
            "UPDATE cdc_embedder.model SET backend = 'openai', options = %s WHERE name = 'fake'", (Jsonb(options),)
        )
        [right] = named(doctor(ward, model=True), "model")
        assert right.level == "ok", right
        service.down = True
        [down] = named(doctor(ward, model=True), "model")
        assert down.level == "error"
        assert down.remedy


def test_without_the_model_check_torch_is_not_loaded_though_a_local_model_is_used(ward: Bench, tmp_path: Path) -> None:
    ward.admin.execute("UPDATE cdc_embedder.model SET backend = 'local', source = '/no/such' WHERE name = 'fake'")
    program = (
        "import sys; from cdc_embedder.settings import Settings; from cdc_embedder.doctor import examine;"
        f"found = examine(Settings(dsn={ward.dsn_service!r}, slot={ward.slot!r}), model=False);"
        "assert 'prompts' in {f.check for f in found} and 'model' not in {f.check for f in found};"
        "assert not {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_every_finding_with_its_remedy_and_exits_by_the_worst(ward: Bench) -> None:
    as_service = {"CDC_EMBEDDER_DSN": ward.dsn_service}
    well = asked(ward, "doctor", "--no-model", **as_service)
    assert well.returncode == 0, well.stdout
    assert "0 error(s), 0 warning(s)" in well.stdout
    found_as_json = answers(ward, "doctor", "--no-model", **as_service)
    assert {tuple(finding) for finding in found_as_json} == {("check", "level", "subject", "sentence", "remedy")}
    ward.admin.execute('ALTER TABLE documents RENAME TO "odd \x1b[31m %s"')
    ward.admin.execute(f'REVOKE UPDATE (embedding) ON "odd \x1b[31m %s" FROM {SERVICE_ROLE}')
    ill = asked(ward, "doctor", "--no-model", **as_service)
    assert ill.returncode == 1
    assert re.search(r"^error +column-rights", ill.stdout, re.MULTILINE)
    assert "→ GRANT UPDATE (embedding)" in ill.stdout
    assert "\x1b" not in ill.stdout


def make_slot(bench: Bench, name: str) -> None:
    failover = ", false, false, true" if bench.admin.info.server_version >= 170000 else ""
    bench.admin.execute(f"SELECT pg_create_logical_replication_slot(%s, 'pgoutput'{failover})", (name,))
