"""The slot on a standby: the primary keeps no WAL for us, and every promise holds all the same."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdc_embedder.embedded import Server
from cdc_embedder.errors import Misconfigured
from cdc_embedder.rows.session import connect
from cdc_embedder.standby import open_standby, pinned_to
from cdc_embedder.uninstall import uninstall, uninstall_plan
from tests import servers
from tests.commands import asked
from tests.documents import make_documents, make_model
from tests.faults.application import Application, converges, more_commits, served
from tests.servers import SERVICE_ROLE, Bench, make_bench
from tests.service import assert_every_vector_is_of_its_text, running, status, until, wait_caught_up

SNAPSHOTS = "EXECUTE ON FUNCTION pg_log_standby_snapshot()"
"""Without this right the background writer is waited for, up to 15 seconds."""

LEFT_BEHIND = "until somebody calls pg_drop_replication_slot"

FOLLOWING = {"hot_standby_feedback": "on", "wal_receiver_status_interval": "1s", "primary_slot_name": "standby"}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cdc-embedder-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(scope="module")
def pair(pg18: Server, place: Path) -> Iterator[tuple[Server, Server]]:
    """A primary and its standby."""
    for primary in servers.serve(pg18.bindir):
        with psycopg.connect(primary.dsn(), autocommit=True) as session:
            session.execute("SELECT pg_create_physical_replication_slot('standby')")
        with servers.standby_of(primary, place, FOLLOWING) as standby:
            yield primary, standby


@pytest.fixture
def bench(pair: tuple[Server, Server]) -> Iterator[Bench]:
    """A fresh database on the primary, with documents."""
    for bench in make_bench(pair[0], "pgoutput"):
        make_model(bench)
        make_documents(bench, 20)
        bench.admin.execute(f"GRANT {SNAPSHOTS} TO {SERVICE_ROLE}")
        yield bench


@pytest.fixture
def there(pair: tuple[Server, Server], bench: Bench) -> str:
    """The way to the standby, as the service's role."""
    return pair[1].dsn(bench.database, SERVICE_ROLE)


def slots(dsn: str, bench: Bench) -> list[str]:
    """Of the bench, on that server."""
    with psycopg.connect(dsn, autocommit=True) as session:
        found = session.execute(
            "SELECT slot_name FROM pg_replication_slots WHERE starts_with(slot_name, %s) ORDER BY 1", (bench.slot,)
        )
        return [row[0] for row in found.fetchall()]


def settled(bench: Bench, table: str = "documents", columns: tuple[str, str] = ("body", "embedding")) -> None:
    """What is committed now is embedded, as far as SQL on the primary can tell, and every vector is of its text."""

    def embedded() -> bool:
        try:
            bench.admin.execute("SELECT cdc_embedder.wait_until_embedded(%s::regclass, '5 s')", (table,))
        except (psycopg.errors.CannotConnectNow, psycopg.errors.ObjectNotInPrerequisiteState):
            return False
        return True

    until(embedded, "it was never embedded", lambda: status(bench))
    assert_every_vector_is_of_its_text(bench, table, *columns)
    assert bench.admin.execute("SELECT count(*) FROM cdc_embedder.failed").fetchone() == (0,)


def state(bench: Bench) -> str:
    [row] = status(bench)
    return str(row["state"])


def test_the_slot_is_on_the_standby_and_all_is_as_with_one_on_the_primary(bench: Bench, there: str) -> None:
    bench.admin.execute(f"REVOKE {SNAPSHOTS} FROM {SERVICE_ROLE}")
    with running(bench, CDC_EMBEDDER_REPLICATION_DSN=there) as service:
        settled(bench)
        assert (slots(bench.dsn_admin, bench), slots(there, bench)) == ([], [bench.slot])
        bench.admin.execute("INSERT INTO documents (body) VALUES ('through the standby')")
        for _ in range(2):  # the second time nothing was written
            bench.admin.execute("SELECT cdc_embedder.wait_until_embedded('documents', '15 s')")
        assert bench.admin.execute("SELECT count(*) FROM documents WHERE embedding IS NULL").fetchone() == (0,)
        bench.admin.execute("SELECT pg_logical_emit_message(true, 'nobody', 'reads this')")
        assert asked(bench, "verify", "--wait").returncode == 0
        [row] = status(bench)
        assert row["state"] == "live"
        assert 0 <= row["lag_bytes"] < 1 << 20
        assert service.stop() == 0
        assert (state(bench), row["slot"]) == ("stopped", bench.slot)
        with pytest.raises(psycopg.errors.CannotConnectNow, match="no service runs"):
            bench.admin.execute("SELECT cdc_embedder.wait_until_embedded('documents')")
    bench.admin.execute("INSERT INTO documents (body) VALUES ('while it was stopped')")
    with served(bench, CDC_EMBEDDER_REPLICATION_DSN=there) as service:
        settled(bench)
        assert "scanned" not in service.log, "the slot kept what happened meanwhile"


def test_an_idle_service_with_its_slot_on_a_standby_writes_nothing(bench: Bench, there: str) -> None:
    with served(bench, CDC_EMBEDDER_REPLICATION_DSN=there):
        settled(bench)

        def stands_still() -> bool:
            before = bench.admin.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
            bench.admin.execute("SELECT pg_sleep(5)")
            return bench.admin.execute("SELECT pg_current_wal_insert_lsn()").fetchone() == before

        until(stands_still, "it writes for ever")


def test_the_standby_may_be_restarted_and_killed_under_load(
    pair: tuple[Server, Server], bench: Bench, there: str
) -> None:
    with (
        served(bench, CDC_EMBEDDER_REPLICATION_DSN=there) as service,
        Application(bench.dsn_admin, 3) as application,
    ):
        until(lambda: state(bench) == "live", "it never worked", lambda: service.log)
        for mode in ("fast", "immediate"):
            more_commits(application)
            pair[1].restart(mode)  # type: ignore[arg-type]
            more_commits(application)
        application.stop()
        settled(bench)
        assert service.log.count("making the slot") == 1
    assert not application.unexpected


def test_a_slot_moves_between_primary_and_standby(bench: Bench, there: str) -> None:
    with served(bench):
        wait_caught_up(bench)
        assert slots(bench.dsn_admin, bench) == [bench.slot]
    bench.admin.execute("INSERT INTO documents (body) VALUES ('between the two')")
    with served(bench, CDC_EMBEDDER_REPLICATION_DSN=there) as service:
        settled(bench)
        assert slots(bench.dsn_admin, bench) == [], "nobody would read it, and it would hold WAL back"
        assert "the one on the primary is dropped" in service.log
    with served(bench) as service:
        converges(bench)
        assert slots(bench.dsn_admin, bench) == [bench.slot]
        assert LEFT_BEHIND in service.log
    assert slots(there, bench) == [bench.slot], "nobody knows any more where it is"


def test_a_copy_of_the_slot_on_the_primary_is_waited_for_until_it_is_gone(
    pair: tuple[Server, Server], bench: Bench, there: str
) -> None:
    """A standby that keeps failover slots has one of that name, and lets nobody read or drop it."""
    with psycopg.connect(pair[1].dsn(), autocommit=True) as standby:

        def copied() -> bool:
            with suppress(psycopg.errors.ObjectNotInPrerequisiteState):
                standby.execute("SELECT pg_sync_replication_slots()")
            return slots(there, bench) == [bench.slot]

        with served(bench):
            wait_caught_up(bench)
            until(copied, "it was never copied")
        with served(bench, CDC_EMBEDDER_REPLICATION_DSN=there) as service:
            service.wait_for_log("is the copy of one that was on the primary")
            assert slots(bench.dsn_admin, bench) == []
            until(lambda: not copied(), "it is kept")
            settled(bench)
            assert slots(there, bench) == [bench.slot]


def test_of_several_servers_the_stream_goes_to_the_one_that_has_the_slot(
    pair: tuple[Server, Server], there: str
) -> None:
    def replayed() -> bool:
        with suppress(psycopg.OperationalError):
            psycopg.connect(there).close()
            return True
        return False

    until(replayed, "the database never came to the standby")

    async def pinned() -> str:
        primary = await connect(pair[0].dsn(conninfo_to_dict(there)["dbname"]), "test")
        ports = f"{pair[0].port},{pair[1].port}"
        dsn = make_conninfo(there, host="127.0.0.1,127.0.0.1", port=ports, target_session_attrs="standby")
        async with primary:
            standby = await open_standby(primary, dsn)
            assert standby is not None
            async with standby:
                return pinned_to(standby, dsn)

    found = conninfo_to_dict(asyncio.run(pinned()))
    assert (found["port"], found["host"], found["target_session_attrs"]) == (str(pair[1].port), "127.0.0.1", "any")
    assert found["user"] == SERVICE_ROLE


def test_a_slot_on_a_standby_that_was_invalidated_is_made_anew(
    pair: tuple[Server, Server], bench: Bench, there: str
) -> None:
    """Without feedback the primary removes rows of catalogs that decoding needs."""
    with psycopg.connect(pair[1].dsn(), autocommit=True) as standby:
        standby.execute("ALTER SYSTEM SET hot_standby_feedback = off")
        standby.execute("SELECT pg_reload_conf()")
    try:
        with served(bench, CDC_EMBEDDER_REPLICATION_DSN=there) as service:
            settled(bench)

            def made_anew() -> bool:
                bench.admin.execute("CREATE TABLE more ()")
                bench.admin.execute("DROP TABLE more")
                bench.admin.execute("VACUUM pg_class, pg_attribute, pg_type, pg_depend")
                return service.log.count("made the slot") == 2

            until(made_anew, "it was never invalidated", lambda: service.log)
            bench.admin.execute("INSERT INTO documents (body) VALUES ('after it')")
            settled(bench)
            assert "was invalidated (rows_removed)" in service.log
            assert LEFT_BEHIND not in service.log
    finally:
        with psycopg.connect(pair[1].dsn(), autocommit=True) as standby:
            standby.execute("ALTER SYSTEM RESET hot_standby_feedback")
            standby.execute("SELECT pg_reload_conf()")


def test_beyond_the_limit_the_slot_on_the_standby_is_dropped(bench: Bench, there: str) -> None:
    with served(bench, CDC_EMBEDDER_REPLICATION_DSN=there, CDC_EMBEDDER_WAL_LIMIT_BYTES=str(16 << 20)) as service:
        settled(bench)
        with psycopg.connect(bench.dsn_admin) as open_:
            open_.execute("SELECT pg_current_xact_id()")
            for _ in range(20):
                bench.admin.execute("SELECT pg_logical_emit_message(true, 'much', repeat('x', 1000000))")
            service.wait_for_log("on the standby, more than the limit")
            until(lambda: slots(there, bench) == [], "it was never given up")
        service.wait_for_log("waiting: the slot")
        bench.admin.execute("SELECT cdc_embedder.take_slot_again()")
        bench.admin.execute("INSERT INTO documents (body) VALUES ('after it')")
        settled(bench)
        assert slots(there, bench) == [bench.slot]


def test_beyond_the_limit_the_slot_on_the_standby_is_made_anew_where_that_is_wanted(bench: Bench, there: str) -> None:
    ours = {"CDC_EMBEDDER_WAL_LIMIT_BYTES": str(16 << 20), "CDC_EMBEDDER_WAL_LIMIT_THEN": "renew"}
    with served(bench, CDC_EMBEDDER_REPLICATION_DSN=there, **ours) as service:
        settled(bench)
        with psycopg.connect(bench.dsn_admin) as open_:
            open_.execute("SELECT pg_current_xact_id()")
            for _ in range(20):
                bench.admin.execute("SELECT pg_logical_emit_message(true, 'much', repeat('x', 1000000))")
            service.wait_for_log("dropped the slot")
        settled(bench)
        assert slots(there, bench) == [bench.slot]


def test_a_slot_that_was_given_up_and_could_not_be_dropped_is_dropped_later_and_one_that_is_missing_is_told(
    bench: Bench, there: str
) -> None:
    """The standby may have been away at that moment."""
    with served(bench, CDC_EMBEDDER_REPLICATION_DSN=there):
        settled(bench)
    bench.admin.execute("INSERT INTO cdc_embedder.given_up (slot, retained_bytes) VALUES (%s, 1)", (bench.slot,))
    with served(bench, CDC_EMBEDDER_REPLICATION_DSN=there) as service:
        until(lambda: slots(there, bench) == [], "it is kept")
        service.wait_for_log("waiting: the slot")
        bench.admin.execute("SELECT cdc_embedder.take_slot_again()")
        settled(bench)
        assert LEFT_BEHIND not in service.log
    with psycopg.connect(there, autocommit=True) as session:
        until(lambda: not held(there, bench), "the walsender is there for ever")
        session.execute("SELECT pg_drop_replication_slot(%s)", (bench.slot,))
    with served(bench, CDC_EMBEDDER_REPLICATION_DSN=there) as service:
        service.wait_for_log(LEFT_BEHIND)
        settled(bench)


def test_sql_is_answered_by_a_service_whose_slot_is_on_a_standby(bench: Bench, there: str) -> None:
    with served(bench, CDC_EMBEDDER_REPLICATION_DSN=there, CDC_EMBEDDER_SQL_EMBED="on"):
        settled(bench)
        found = bench.admin.execute("SELECT cardinality(cdc_embedder.embed('fake', 'a question'))").fetchone()
        assert found is not None
        assert found[0] > 0
        assert slots(bench.dsn_admin, bench) == [f"{bench.slot}_embed"]


def test_uninstall_takes_the_slot_away_from_the_standby(bench: Bench, there: str) -> None:
    with served(bench, CDC_EMBEDDER_REPLICATION_DSN=there):
        settled(bench)
        with pytest.raises(Misconfigured, match="a service holds the slot"):
            uninstall(bench.dsn_admin, bench.slot, there)
    for function in (uninstall, uninstall_plan):
        with pytest.raises(Misconfigured, match="on a standby, where it would go on holding WAL back"):
            function(bench.dsn_admin, bench.slot)
        with pytest.raises(Misconfigured, match="on a standby, where it would go on holding WAL back"):
            function(bench.dsn_admin, bench.slot, bench.dsn_admin)
    assert f"the replication slot {bench.slot} on the standby" in uninstall_plan(bench.dsn_admin, bench.slot, there)
    assert slots(there, bench) == [bench.slot]
    until(lambda: not held(there, bench), "the walsender is there for ever")
    assert f"removed the replication slot {bench.slot} on the standby" in uninstall(bench.dsn_admin, bench.slot, there)
    assert slots(there, bench) == []
    assert bench.admin.execute("SELECT to_regnamespace('cdc_embedder')").fetchone() == (None,)


def held(dsn: str, bench: Bench) -> bool:
    with psycopg.connect(dsn, autocommit=True) as session:
        row = session.execute("SELECT active FROM pg_replication_slots WHERE slot_name = %s", (bench.slot,)).fetchone()
        return row == (True,)


def test_what_is_no_standby_of_the_primary_is_refused_and_nothing_is_made(
    pair: tuple[Server, Server], bench: Bench, place: Path
) -> None:
    primary, standby = pair
    with servers.clone_of(primary, place / "promoted") as promoted:
        promoted.start()
        for dsn in (promoted.dsn(bench.database, SERVICE_ROLE), standby.dsn("postgres", SERVICE_ROLE)):
            with running(bench, CDC_EMBEDDER_REPLICATION_DSN=dsn) as service:
                assert service.wait() == 1
                assert "the replication connection leads to another server or database" in service.log
            assert slots(dsn, bench) == []
    assert slots(bench.dsn_admin, bench) == []
    with running(bench, CDC_EMBEDDER_REPLICATION_DSN=primary.dsn(bench.database, SERVICE_ROLE)):
        wait_caught_up(bench)


def test_a_standby_that_does_not_follow_the_primary_is_waited_for_and_nothing_is_made(
    pair: tuple[Server, Server], bench: Bench, place: Path
) -> None:
    """A clone of it in recovery: it has the same identifier, and would deliver a history that ends with the copy."""
    with servers.clone_of(pair[0], place / "left") as left:
        (left.data / "standby.signal").touch(0o644)
        left.start()
        with running(bench, CDC_EMBEDDER_REPLICATION_DSN=left.dsn(bench.database, SERVICE_ROLE)) as service:
            service.wait_for_log("does not follow this primary")
            assert slots(left.dsn(bench.database), bench) == []
            assert service.stop() == 0


def test_odd_names_nulls_an_empty_table_a_locked_row_and_kills(
    pair: tuple[Server, Server], bench: Bench, there: str
) -> None:
    table, key, body, vector = '"Odd ""Name"', '"Id %s"', '"Bo dy"', '"V""ec"'
    bench.admin.execute(
        f"CREATE TABLE {table} ({key} int PRIMARY KEY, {body} text, {vector} vector(8));"  # type: ignore[arg-type]
        f" CREATE TABLE empty (id int PRIMARY KEY, body text, v vector(8));"
        f" GRANT SELECT, UPDATE ON {table}, empty TO {SERVICE_ROLE};"
        " DELETE FROM cdc_embedder.embedding_column;"
        " INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        f" VALUES ('{table}', '{{Bo dy}}', 'V\"ec', 'fake'), ('empty', '{{body}}', 'v', 'fake')"
    )
    with running(bench, CDC_EMBEDDER_REPLICATION_DSN=there) as service:
        settled(bench, "empty", ("body", "v"))
        settled(bench, table, (body, vector))
        for thousand in range(3):
            bench.admin.execute(
                f"INSERT INTO {table} SELECT {1000 * thousand} + n, CASE WHEN n % 7 > 0 THEN 'row ' || n END"  # type: ignore[arg-type]
                " FROM generate_series(1, 300) n"
            )
            service.kill()
            service.start()
        settled(bench, table, (body, vector))
        with psycopg.connect(bench.dsn_admin) as holder:
            holder.execute(f"SELECT FROM {table} LIMIT 1 FOR UPDATE".encode())
            bench.admin.execute("INSERT INTO empty VALUES (1, 'beside a locked row'), (2, NULL)")
            settled(bench, "empty", ("body", "v"))
        pair[1].stop("immediate")
        bench.admin.execute(f"UPDATE {table} SET {body} = NULL WHERE {key} = 1".encode())
        bench.admin.execute(f"UPDATE {table} SET {body} = 'no standby' WHERE {key} IN (2, 7)".encode())
        service.wait_for_log("trying again in")
        service.kill()
        service.start()
        pair[1].start()
        settled(bench, table, (body, vector))
        assert "Traceback" not in service.log
