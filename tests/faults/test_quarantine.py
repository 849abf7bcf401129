"""Rule 7: a row that cannot be embedded is set aside alone, even one that kills the process; nothing else counts."""

from __future__ import annotations

import signal
from typing import Any

import psycopg
import pytest

from tests.documents import make_documents, make_model
from tests.servers import Bench
from tests.service import Service, assert_every_vector_is_of_its_text, running, status, until, wait_caught_up


def failed(bench: Bench) -> list[Any]:
    return bench.admin.execute(
        "SELECT (key ->> 'id')::int, error, attempts, retry_at FROM cdc_embedder.failed"
    ).fetchall()


def supervise(service: Service, until_done: Any) -> int:
    """Start the service again whenever it dies, as systemd does, until `until_done()`; returns how often it died."""
    deaths = 0

    def step() -> bool:
        nonlocal deaths
        if service.exit_status is not None:
            assert service.exit_status == 139, service.log
            deaths += 1
            service.start()
        return bool(until_done())

    until(step, "never done", lambda: service.log)
    return deaths


@pytest.mark.parametrize("rows", [0, 40])
def test_a_row_that_kills_the_process_is_set_aside_after_its_second_kill(bench18: Any, rows: int) -> None:
    """Alone in its batch or among others, found by the scan or told by the stream."""
    make_model(bench18, exit="deadly")
    make_documents(bench18, rows)
    bench18.admin.execute("INSERT INTO documents (id, body, embedding) VALUES (999, 'a deadly text', NULL)")
    service = Service(bench18).start()
    try:
        deaths = supervise(service, lambda: failed(bench18) and status(bench18)[0]["current"] == rows)
        assert deaths == 2
        [(id, error, attempts, retry_at)] = failed(bench18)
        assert (id, attempts) == (999, 1)
        assert "the process died twice" in error
        assert bench18.admin.execute("SELECT %s > now() + interval '30 seconds'", (retry_at,)).fetchone() == (True,)
        bench18.admin.execute("INSERT INTO documents (id, body) VALUES (1000, 'one more')")
        until(lambda: status(bench18)[0]["current"] == rows + 1, "does not go on", lambda: service.log)
        assert service.exit_status is None
        # Another text is another matter, and the suspicion does not outlive it.
        bench18.admin.execute("UPDATE documents SET body = 'harmless now' WHERE id = 999")
        until(lambda: not failed(bench18), "the new text is blamed", lambda: service.log)
        assert assert_every_vector_is_of_its_text(bench18) == rows + 2
        until(
            lambda: bench18.admin.execute("SELECT count(*) FROM cdc_embedder.suspect").fetchone()[0] == 0, "suspected"
        )
        # Tried again by hand it kills once more, alone, and is not tried by itself again.
        bench18.admin.execute("UPDATE documents SET body = 'a deadly text' WHERE id = 999")
        deaths = supervise(service, lambda: failed(bench18))
        assert deaths == 2
        assert bench18.admin.execute("SELECT cdc_embedder.retry_failed('documents')").fetchone() == (1,)
        deaths = supervise(service, lambda: (found := failed(bench18)) and found[0][2] == 2)
        assert deaths == 1, service.log
        assert failed(bench18)[0][3] is None
        assert bench18.admin.execute("SELECT embedding FROM documents WHERE id = 999").fetchone() == (None,)
    finally:
        service.end()


def test_rows_that_were_with_the_model_when_somebody_killed_the_process_are_tried_and_acquitted(bench: Any) -> None:
    make_model(bench, delay_s=1.0)
    make_documents(bench, 30)
    service = Service(bench).start()
    try:
        until(lambda: bench.admin.execute("SELECT count(*) FROM cdc_embedder.in_flight").fetchone()[0], "never with it")
        service.kill()
        noted = bench.admin.execute(
            "SELECT sum(jsonb_array_length(keys::jsonb)) FROM cdc_embedder.in_flight"
        ).fetchone()[0]
        assert noted >= 1
        bench.admin.execute("UPDATE cdc_embedder.model SET options = '{}' WHERE name = 'fake'")
        service.start()
        until(
            lambda: bench.admin.execute("SELECT count(*) FROM cdc_embedder.suspect").fetchone()[0] == noted,
            "unsuspected",
        )
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 30
        assert failed(bench) == []
        until(
            lambda: bench.admin.execute("SELECT count(*) FROM cdc_embedder.suspect").fetchone()[0] == 0,
            "still suspected",
        )
        assert service.stop() == 0
        assert bench.admin.execute("SELECT count(*) FROM cdc_embedder.in_flight").fetchone() == (0,)
    finally:
        service.end()


def test_a_poison_row_fails_alone_its_delays_grow_and_retry_failed_makes_it_due(bench18: Any) -> None:
    make_model(bench18, reject="poison")
    make_documents(bench18, 50)
    bench18.admin.execute("UPDATE documents SET body = 'poison ' || id WHERE id IN (7, 33)")
    with running(bench18):
        until(lambda: len(failed(bench18)) == 2, "not found", lambda: status(bench18))
        until(lambda: status(bench18)[0]["current"] == 48, "neighbours wait", lambda: status(bench18))
        delays = []
        for attempt in (1, 2, 3):
            until(
                lambda attempt=attempt: {row[2] for row in failed(bench18)} == {attempt},
                "never tried",
                lambda: failed(bench18),
            )
            delays.append(
                bench18.admin.execute(
                    "SELECT array_agg(extract(epoch FROM retry_at - embedded_at)::float8 ORDER BY key_1)"
                    " FROM cdc_embedder.ledger_1 WHERE state = 'failed'"
                ).fetchone()[0]
            )
            assert bench18.admin.execute("SELECT cdc_embedder.retry_failed('documents')").fetchone() == (2,)
        for n, pair in enumerate(delays):
            assert all(0.7 * 10 * 2**n <= delay <= 1.3 * 10 * 2**n for delay in pair), delays
            assert pair[0] != pair[1], "without jitter all are tried at once"
        assert bench18.admin.execute("SELECT count(*) FROM documents WHERE embedding IS NULL").fetchone() == (2,)
        bench18.admin.execute("UPDATE documents SET body = 'wholesome ' || id WHERE body LIKE 'poison%'")
        wait_caught_up(bench18)
        assert failed(bench18) == []
        assert assert_every_vector_is_of_its_text(bench18) == 50


def test_an_outage_of_the_model_is_told_by_the_circuit_breaker_and_counts_against_no_row(
    bench18: Any, tmp_path: Any
) -> None:
    tmp_path.chmod(0o755)
    down = tmp_path / "down"
    make_model(bench18, down_while_exists=str(down), delay_s=2)  # long enough to see a trial
    make_documents(bench18, 10)
    with running(bench18) as service:
        wait_caught_up(bench18)
        assert status(bench18)[0]["circuit_breaker"] == "closed"
        down.touch()
        bench18.admin.execute("UPDATE documents SET body = body || ' again'")
        seen: set[str] = set()
        until(
            lambda: seen.add(status(bench18)[0]["circuit_breaker"]) or {"open", "half-open"} <= seen,
            "no breaker",
            lambda: seen,
        )
        assert status(bench18)[0]["reason"]
        assert status(bench18)[0]["state"] == "live"
        assert failed(bench18) == []
        # half-open lets one row try, so that an outage costs a call and no batch
        assert "trying again in" in service.log
        down.unlink()
        wait_caught_up(bench18)
        assert status(bench18)[0]["circuit_breaker"] == "closed"
        assert assert_every_vector_is_of_its_text(bench18) == 10
        service.signal(signal.SIGTERM)
        assert service.wait() == 0


def test_trouble_of_the_database_counts_against_no_row(bench18: Any) -> None:
    """A write-back that the server cancels again and again is tried until it succeeds."""
    make_model(bench18)
    make_documents(bench18, 10)
    with running(bench18) as service:
        wait_caught_up(bench18)
        with psycopg.connect(bench18.dsn_admin) as holder:
            holder.execute("LOCK TABLE documents IN SHARE ROW EXCLUSIVE MODE")
            bench18.admin.execute("SELECT 1")
            holder.execute("UPDATE documents SET body = body || ' under a lock'")
            holder.execute("LOCK TABLE documents IN ACCESS EXCLUSIVE MODE")
            holder.commit()
            holder.execute("LOCK TABLE documents IN ACCESS EXCLUSIVE MODE")
            until(lambda: "lock timeout" in service.log, "never refused", lambda: service.log)
        wait_caught_up(bench18)
        assert failed(bench18) == []
        assert assert_every_vector_is_of_its_text(bench18) == 10
