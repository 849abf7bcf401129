"""What a server and its administrators do to a running service: it converges, nothing is wrong, and its log says what
is the matter."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

from cdc_embedder.embedded import Server
from cdc_embedder.errors import ServerGone
from tests import servers
from tests.documents import make_documents, make_model
from tests.faults.application import Application, assert_sane, converges, more_commits, served
from tests.servers import SERVICE_ROLE, Bench, make_bench
from tests.service import (
    Service,
    assert_every_vector_is_of_its_text,
    confirmed,
    running,
    status,
    until,
    wait_caught_up,
)


@pytest.fixture(scope="module", params=["15-wal2json", "18-pgoutput"])
def own(request: pytest.FixtureRequest) -> Iterator[tuple[Server, str]]:
    """A server that may be stopped, and the plugin to use with it."""
    major, plugin = request.param.split("-")
    shared: Server = request.getfixturevalue(f"pg{major}")  # says what is missing
    for server in servers.serve(shared.bindir):
        yield server, plugin


ONE = pytest.mark.parametrize("own", ["18-pgoutput"], indirect=True)
"""For what does not depend on server or plugin."""


@pytest.fixture
def mortal(own: tuple[Server, str]) -> Iterator[Bench]:
    """A fresh database on it."""
    yield from make_bench(*own)


def reconnect(bench: Bench) -> None:
    """As soon as the server takes connections."""

    def reconnected() -> bool:
        try:
            bench.admin = psycopg.connect(bench.dsn_admin, autocommit=True)
        except psycopg.OperationalError:
            return False
        return True

    bench.admin.close()
    until(reconnected, "the server never came back")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that the server's user can reach; pytest's own are private."""
    with tempfile.TemporaryDirectory(prefix="cdc-embedder-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


# Restarts


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_a_server_may_be_restarted_under_load(mortal: Bench, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(mortal)
    make_documents(mortal, 20)
    with served(mortal) as service, Application(mortal.dsn_admin, 1) as application:
        for _ in range(2):
            more_commits(application)
            if mode == "smart":  # it waits for every session to end by itself, and ours do not
                monkeypatch.setenv("PGCTLTIMEOUT", "1")
                with pytest.raises(ServerGone):
                    mortal.server.stop("smart")
                monkeypatch.delenv("PGCTLTIMEOUT")
                more_commits(application)
            mortal.restart("immediate" if mode == "immediate" else "fast")
            more_commits(application)
    assert not application.unexpected
    with served(mortal) as service:
        converges(mortal)
        assert service.log.count("streaming from the slot") == 1


@ONE
def test_a_server_in_crash_recovery_is_waited_for(mortal: Bench, place: Path) -> None:
    make_model(mortal)
    make_documents(mortal, 20)
    hold = place / "hold"
    hold.touch()
    # recovery asks for old log first, and is kept waiting for it
    mortal.admin.execute(f"ALTER SYSTEM SET restore_command = 'while [ -e {hold} ]; do sleep 0.1; done; false'")
    mortal.admin.execute("ALTER SYSTEM SET hot_standby = off")
    with served(mortal) as service:
        converges(mortal)
        mortal.admin.execute("INSERT INTO documents (body) VALUES ('just before the crash')")
        mortal.admin.close()
        mortal.server.stop("immediate")
        (mortal.server.data / "recovery.signal").touch(mode=0o644)
        starting = threading.Thread(target=mortal.server.start)
        starting.start()
        try:
            service.wait_for_log("starting up")
        finally:
            hold.unlink()
            starting.join()
        reconnect(mortal)
        mortal.admin.execute("ALTER SYSTEM RESET restore_command")
        mortal.admin.execute("ALTER SYSTEM RESET hot_standby")
        mortal.admin.execute("INSERT INTO documents (body) VALUES ('and after it')")
        converges(mortal)


@pytest.mark.parametrize("case", ["the_model_takes_its_time", "the_model_is_down", "a_big_transaction_is_read"])
def test_a_fast_shutdown_does_not_wait_for_us(
    mortal: Bench, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walsender waits until what it sent is confirmed, or for our timeout of 60 seconds: pg_ctl would give up."""
    sign = tmp_path / "down"
    monkeypatch.setenv("PGCTLTIMEOUT", "30")
    make_model(mortal, down_while_exists=str(sign), delay_per_text_s=0.001)
    make_documents(mortal, 1)
    with served(mortal, CDC_EMBEDDER_MAX_PENDING_KEYS="1000") as service:
        wait_caught_up(mortal)
        rows = 20
        match case:
            case "the_model_takes_its_time":
                mortal.admin.execute("UPDATE cdc_embedder.model SET options = %s", (Jsonb({"delay_s": 60}),))
                mortal.admin.execute("SELECT pg_sleep(2.5)")  # longer than the configuration is looked at
            case "the_model_is_down":
                sign.touch()
            case _:
                rows = 10_000
        mortal.admin.execute("INSERT INTO documents (body) SELECT 'text ' || n FROM generate_series(1, %s) n", (rows,))
        until(lambda: sum(row["pending"] or 0 for row in status(mortal)) > 1, "the rows never arrived")
        mortal.restart("fast")
        sign.unlink(missing_ok=True)
        mortal.admin.execute("UPDATE cdc_embedder.model SET options = '{}'")
        converges(mortal)
        assert service.log.count("streaming from the slot") >= 2


# Sessions


@ONE
def test_the_statement_of_each_of_our_sessions_may_be_cancelled(mortal: Bench) -> None:
    make_model(mortal)
    make_documents(mortal, 50)
    with served(mortal) as service, Application(mortal.dsn_admin, 2) as application:
        until(lambda: status(mortal) and status(mortal)[0]["state"] == "live", "it never worked")
        for _ in range(5):
            until(
                lambda: mortal.admin.execute(
                    "SELECT pg_cancel_backend(pid), pg_sleep(0.03) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND application_name LIKE 'cdc-embedder %' ORDER BY random()"
                ).fetchall(),
                "it never came back",
            )
            more_commits(application, 10)
        application.stop()
        converges(mortal)
        assert " error " not in service.log, "a column, or a row, was blamed"
    assert not application.unexpected


@ONE
def test_a_role_out_of_connections_is_waited_for(mortal: Bench) -> None:
    make_model(mortal)
    make_documents(mortal, 20)
    mortal.admin.execute(f"ALTER ROLE {SERVICE_ROLE} CONNECTION LIMIT 3")
    try:
        with served(mortal) as service:
            until(lambda: service.log.count("too many connections") >= 3, "it was not told", lambda: service.log)
            mortal.admin.execute(f"ALTER ROLE {SERVICE_ROLE} CONNECTION LIMIT -1")
            converges(mortal)
    finally:
        mortal.admin.execute(f"ALTER ROLE {SERVICE_ROLE} CONNECTION LIMIT -1")


@pytest.mark.parametrize("own", ["15-wal2json"], indirect=True)  # which wants the most sessions
def test_wherever_the_connections_run_out_nothing_is_left_half_made(mortal: Bench) -> None:
    make_model(mortal)
    make_documents(mortal, 3)
    with served(mortal):
        wait_caught_up(mortal)
    ours = f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{SERVICE_ROLE}'"
    try:
        for limit in range(1, 12):
            mortal.admin.execute(f"ALTER ROLE {SERVICE_ROLE} CONNECTION LIMIT {limit}")
            until(lambda: mortal.admin.execute(ours).fetchone() == (0,), "sessions remain")
            with running(mortal) as service:
                service.wait_for_log("too many connections")
                service.wait_for_log("trying again in")
                service.stop()
                assert_sane(service)
    finally:
        mortal.admin.execute(f"ALTER ROLE {SERVICE_ROLE} CONNECTION LIMIT -1")


HOSTILE = {
    "statement_timeout": "30ms",
    "lock_timeout": "1ms",
    "idle_in_transaction_session_timeout": "1ms",
    "idle_session_timeout": "200ms",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "synchronous_commit": "off",
    "search_path": "nowhere",
    "row_security": "on",
}


def test_no_setting_of_the_role_disturbs_us(mortal: Bench) -> None:
    """A model that is slow makes sessions idle; a big transaction takes longer to be decoded than it may take."""
    make_model(mortal, delay_s=0.3)
    make_documents(mortal, 5)
    settings = HOSTILE | ({"transaction_timeout": "30ms"} if mortal.admin.info.server_version >= 170000 else {})
    for name, value in settings.items():
        mortal.admin.execute(f"ALTER ROLE {SERVICE_ROLE} IN DATABASE {mortal.database} SET {name} = '{value}'")
    with served(mortal) as service:
        wait_caught_up(mortal)
        mortal.admin.execute("UPDATE cdc_embedder.model SET options = '{}'")
        mortal.admin.execute("INSERT INTO documents (body) SELECT repeat('x', 500) FROM generate_series(1, 20000)")
        mortal.admin.execute("UPDATE documents SET views = 1, body = body || id")
        converges(mortal)
        assert service.log.count("streaming from the slot") == 1
        assert " warning " not in service.log


# Credentials


PASSWORD = "open sesame 1"
ROTATED = "open sesame 2"


@pytest.fixture
def locked(own: tuple[Server, str], mortal: Bench) -> Iterator[Bench]:
    """The service's role needs a password here."""
    access = own[0].data / "pg_hba.conf"
    before = access.read_text()
    access.write_text(f"host all {SERVICE_ROLE} 127.0.0.1/32 scram-sha-256\n" + before)
    mortal.admin.execute("SELECT pg_reload_conf()")
    rotate(mortal, PASSWORD)
    yield mortal
    access.write_text(before)
    mortal.admin.execute("SELECT pg_reload_conf()")


def rotate(bench: Bench, password: str) -> None:
    bench.admin.execute(f"ALTER ROLE {SERVICE_ROLE} PASSWORD '{password}'")
    bench.admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (SERVICE_ROLE,))


@ONE
def test_a_password_that_is_not_right_any_more_ends_the_service_with_what_to_do(locked: Bench) -> None:
    make_model(locked)
    make_documents(locked, 5)
    with running(locked, CDC_EMBEDDER_DSN=f"{locked.dsn_service} password='{PASSWORD}'") as service:
        wait_caught_up(locked)
        rotate(locked, ROTATED)
        assert service.wait() == 1
        assert "check the DSN, the password and pg_hba.conf" in service.log
        assert "sesame" not in service.log
        assert_sane(service)


@ONE
def test_a_password_file_is_read_again_at_every_attempt(locked: Bench, tmp_path: Path) -> None:
    make_model(locked)
    make_documents(locked, 5)
    file = tmp_path / "passwords"
    file.touch(mode=0o600)
    file.write_text(f"*:*:*:*:{PASSWORD}\n")
    with served(locked, CDC_EMBEDDER_DSN=f"{locked.dsn_service} passfile='{file}'"):
        wait_caught_up(locked)
        file.write_text(f"*:*:*:*:{ROTATED}\n")
        rotate(locked, ROTATED)
        locked.admin.execute("INSERT INTO documents (body) VALUES ('with the new password')")
        converges(locked)


# Disks


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 4 MB that the server may write to."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=777", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this machine lacks the right to mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


@ONE
def test_a_full_disk_under_our_tables_loses_nothing(mortal: Bench, small_disk: Path) -> None:
    """Neither a vector nor a spilled key can be written: the slot must wait for both."""
    location = small_disk / "tablespace"
    location.mkdir()
    if os.geteuid() == 0:
        os.chown(location, mortal.server.data.stat().st_uid, -1)
    make_model(mortal)
    make_documents(mortal, 5)
    admin = mortal.admin
    admin.execute(f"CREATE TABLESPACE small LOCATION '{location}'")
    try:
        with served(mortal, CDC_EMBEDDER_SPILL_AFTER_S="1") as service:
            wait_caught_up(mortal)
            for relation, kind in admin.execute(
                "SELECT oid::regclass::text, relkind FROM pg_class WHERE relnamespace = 'cdc_embedder'::regnamespace"
                " AND (relname ~ '^(ledger|backlog)_1') AND relkind IN ('r', 'i')"
            ).fetchall():
                admin.execute(f"ALTER {'TABLE' if kind == 'r' else 'INDEX'} {relation} SET TABLESPACE small")
            filler = small_disk / "filler"
            with pytest.raises(OSError, match="No space left"):
                fill(filler)
            admin.execute("INSERT INTO documents (body) SELECT 'text ' || n FROM generate_series(1, 5000) n")
            target = admin.execute("SELECT pg_current_wal_insert_lsn()").fetchone()[0]  # type: ignore[index]
            for doing in ("writing", "spilling"):
                said = re.compile(f"{doing} .*No space left on device.*trying again")
                until(lambda said=said: said.search(service.log), "nothing was said", lambda: service.log)
            assert "Check free disk space" in service.log
            assert not confirmed(mortal, target)
            assert service.log.count("No space left on device") < 30, "a busy loop"
            assert [row["state"] for row in status(mortal)] == ["live"]
            filler.unlink()
            converges(mortal)
            assert assert_every_vector_is_of_its_text(mortal) == 5005
    finally:
        for relation, kind in admin.execute(
            "SELECT oid::regclass::text, relkind FROM pg_class WHERE relnamespace = 'cdc_embedder'::regnamespace"
            " AND reltablespace = (SELECT oid FROM pg_tablespace WHERE spcname = 'small')"
        ).fetchall():
            admin.execute(f"ALTER {'TABLE' if kind == 'r' else 'INDEX'} {relation} SET TABLESPACE pg_default")
        admin.execute("DROP TABLESPACE small")


def test_commits_that_a_crash_takes_back_leave_no_vector_of_theirs(pg18: Server) -> None:
    """Rule 1. With `synchronous_commit = off` the application's last commits go with the server; ours do not."""
    hostile = {"fsync": "on", "synchronous_commit": "off", "wal_writer_delay": "10s"}
    with servers.bench_with(pg18.bindir, "pgoutput", hostile) as bench:
        make_model(bench)
        make_documents(bench, 50)
        lost = 0
        with served(bench):
            for round in range(3):
                with Application(bench.dsn_admin, round) as application:
                    more_commits(application, 60)
                assert not application.unexpected
                bench.admin.execute("SET synchronous_commit = on")
                bench.admin.execute("INSERT INTO documents (id, body) VALUES (%s, 'stays')", (1000 + round,))
                converges(bench)
                bench.admin.execute("SET synchronous_commit = off")
                bench.admin.execute("UPDATE documents SET body = 'goes' WHERE id = %s", (1000 + round,))
                bench.restart("immediate")
                [(text,)] = bench.admin.execute("SELECT body FROM documents WHERE id = %s", (1000 + round,)).fetchall()
                lost += text == "stays"
                with Application(bench.dsn_admin, round) as application:
                    more_commits(application)
                    bench.restart("immediate")
                bench.admin.execute("SET synchronous_commit = on")
                bench.admin.execute("UPDATE documents SET views = views + 1 WHERE id = %s", (1000 + round,))
                converges(bench)
        assert lost, "no commit was lost: nothing was tested"


def test_what_the_slot_confirmed_survives_a_crash(pg18: Server) -> None:
    """Rule 1. The slot is written to disk when it is confirmed past a snapshot of running transactions. A write-back
    that is not on disk by then would be gone after a crash, and the change that asked for it in the slot's past."""
    with servers.bench_with(pg18.bindir, "pgoutput", {"fsync": "on", "wal_writer_delay": "10s"}) as bench:
        make_model(bench, delay_s=0.5)
        make_documents(bench)
        with served(bench):
            flush(bench)
            wait_caught_up(bench)
            for id in range(1, 3):
                bench.admin.execute("INSERT INTO documents (id, body) VALUES (%s, 'confirmed and gone?')", (id,))
                bench.admin.execute("SELECT pg_log_standby_snapshot()")
                flush(bench)
                target = bench.admin.execute("SELECT pg_current_wal_flush_lsn()").fetchone()[0]  # type: ignore[index]
                until(lambda target=target: confirmed(bench, target), "it was never confirmed")
                bench.restart("immediate")
                flush(bench)
                converges(bench)


def flush(bench: Bench) -> None:
    """Have everything that was written so far on disk, without waiting for the WAL writer."""
    bench.admin.execute("SELECT pg_logical_emit_message(true, 'nobody', 'reads this')")


# Failover


@pytest.mark.parametrize("version", [15, 18])
def test_a_failover_to_a_standby_is_followed_and_what_it_missed_is_found(
    request: pytest.FixtureRequest, version: int, place: Path
) -> None:
    """The slot is not there, rows may have changed on the new primary before we are: everything is scanned."""
    bindir = request.getfixturevalue(f"pg{version}").bindir
    plugin = "wal2json" if version == 15 else "pgoutput"
    with servers.bench_with(bindir, plugin, {}) as bench, servers.standby_of(bench.server, place) as standby:
        make_model(bench)
        make_documents(bench, 300)
        ours = {"host": "127.0.0.1,127.0.0.1", "port": f"{bench.server.port},{standby.port}"}
        dsn = make_conninfo(bench.dsn_service, **ours, target_session_attrs="read-write")
        with served(bench, CDC_EMBEDDER_DSN=dsn) as service:
            wait_caught_up(bench)
            bench.admin.execute("INSERT INTO documents (body) SELECT 'late ' || n FROM generate_series(1, 50) n")
            caught_up_with(bench, standby)
            too_early(bench, standby)
            bench.admin.close()
            bench.server.stop("immediate")
            service.wait_for_log("trying again in")
            with psycopg.connect(standby.dsn(bench.database), autocommit=True) as other:
                with pytest.raises(psycopg.errors.ReadOnlySqlTransaction, match="a standby cannot ask"):
                    other.execute("SELECT cdc_embedder.embed('fake', 'a')")
                assert other.execute("SELECT pg_promote()").fetchone() == (True,)
                other.execute("UPDATE documents SET body = 'before we came ' || id WHERE id <= 20")
                promoted = Bench(standby, plugin, bench.database, bench.slot, other, bench.has_vector)
                converges(promoted)
                assert assert_every_vector_is_of_its_text(promoted) == 350
                assert "everything is scanned" in service.log or "made the slot" in service.log
        bench.server.start()
        reconnect(bench)


def too_early(bench: Bench, standby: Server) -> None:
    """A service that is started on a standby says what to do."""
    service = Service(bench, CDC_EMBEDDER_DSN=standby.dsn(bench.database, SERVICE_ROLE)).start()
    try:
        assert service.wait() == 1
        assert "target_session_attrs=read-write" in service.log
        assert_sane(service)
    finally:
        service.end()


def caught_up_with(bench: Bench, standby: Server) -> None:
    target = bench.admin.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
    assert target is not None
    with psycopg.connect(standby.dsn(), autocommit=True) as other:
        until(
            lambda: other.execute("SELECT pg_last_wal_replay_lsn() >= %s", target).fetchone() == (True,),
            "the standby lags",
        )
