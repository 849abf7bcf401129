"""Rule 1: what is confirmed rests on nothing that a crash of the server could take back."""

from __future__ import annotations

import signal

import psycopg

from tests.documents import make_documents, make_model
from tests.servers import bench_with, bindir_18
from tests.service import confirmed, running, until, wait_caught_up


def test_a_verdict_that_rests_on_an_asynchronous_commit_is_confirmed_when_that_is_flushed() -> None:
    """One commit changes a text and is flushed, the next takes it back and is not: the row is found as it was. A crash
    would bring the changed text again, and nobody would judge it if the first commit had been confirmed."""
    with bench_with(bindir_18(), "pgoutput", {"wal_writer_delay": "10s", "fsync": "on"}) as bench:
        make_model(bench)
        make_documents(bench, 3)
        with running(bench, CDC_EMBEDDER_SPILL_AFTER_S="60") as service:
            wait_caught_up(bench)
            with psycopg.connect(bench.dsn_admin, autocommit=True) as application:
                application.execute("SET synchronous_commit = off")
                body = application.execute("SELECT body FROM documents WHERE id = 1").fetchone()
                assert body is not None
                for _ in range(3):
                    service.signal(signal.SIGSTOP)  # it shall see the first only when the second is made
                    application.execute("SET synchronous_commit = on")
                    application.execute("UPDATE documents SET body = 'for a moment' WHERE id = 1")
                    application.execute("SET synchronous_commit = off")
                    application.execute("UPDATE documents SET body = %s WHERE id = 1", body)
                    row = application.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
                    service.signal(signal.SIGCONT)
                    assert row is not None
                    taken_back = row[0]
                    first = application.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
                    assert first is not None
                    until(lambda first=first[0]: confirmed(bench, first), "never confirmed", lambda: service.log)
                    flushed = application.execute(
                        "SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), %s) >= 0", (taken_back,)
                    ).fetchone()
                    assert flushed == (True,)
