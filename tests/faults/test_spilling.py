"""Rule 8: the slot holds WAL back only for as long as it takes to read it, whatever the model does."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.documents import make_documents, make_model
from tests.servers import Bench
from tests.service import (
    Service,
    assert_every_vector_is_of_its_text,
    confirmed,
    running,
    standby_gone,
    status,
    until,
    wait_caught_up,
    waiting_for_standby,
)


def position(bench: Bench) -> str:
    lsn: str = bench.admin.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()[0]  # type: ignore[index]
    return lsn


def retained(bench: Bench) -> int:
    """Bytes of WAL that the slot keeps the server from removing."""
    row = bench.admin.execute(
        "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::int8"
        " FROM pg_replication_slots WHERE slot_name = %s",
        (bench.slot,),
    ).fetchone()
    assert row is not None
    return int(row[0])


def backlog(bench: Bench) -> int:
    return int(bench.admin.execute("SELECT count(*) FROM cdc_embedder.backlog_1").fetchone()[0])  # type: ignore[index]


def live(bench: Bench) -> bool:
    return bool((rows := status(bench)) and rows[0]["state"] == "live")


def resident_mb(service: Service, what: str = "VmRSS") -> float:
    line = next(line for line in Path(f"/proc/{service.pid}/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


@pytest.fixture
def down(tmp_path: Path) -> Path:
    """While this file exists, the model is down."""
    tmp_path.chmod(0o755)
    return tmp_path / "down"


def test_an_embedder_that_is_down_does_not_hold_the_slot(bench: Any, down: Path) -> None:
    """Inserts, updates and key changes go on while the model is away, through a kill of the service; a restart in the
    middle finds the keys again, and what was changed, deleted or re-inserted meanwhile is right in the end."""
    down.touch()
    make_model(bench, down_while_exists=str(down))
    make_documents(bench, 20)
    with running(bench, CDC_EMBEDDER_SPILL_AFTER_S="0.2") as service:
        most = 0
        for round in range(4):
            with bench.admin.transaction():
                bench.admin.execute(
                    "INSERT INTO documents (body) SELECT repeat('x', 2000) || n FROM generate_series(1, 200) n"
                )
                bench.admin.execute("UPDATE documents SET body = body || %s WHERE id %% 7 = %s", (f" {round}", round))
                bench.admin.execute("UPDATE documents SET id = id + 100000 WHERE id %% 50 = %s", (round,))
                bench.admin.execute("DELETE FROM documents WHERE id %% 31 = %s", (round,))
            here = position(bench)
            until(lambda here=here: confirmed(bench, here), "held back", lambda: status(bench))
            most = max(most, backlog(bench))
            if round == 1:
                service.kill()
                service.start()
        assert most > 100
        until(lambda: status(bench)[0]["backlog"] == backlog(bench), "never reported", lambda: status(bench))
        row = status(bench)[0]
        assert row["pending"] >= row["backlog"] > 100
        assert bench.admin.execute(
            "SELECT s.embedded_through < r.confirmed_flush_lsn AND s.embedded_through = (SELECT min(first_lsn) FROM"
            " cdc_embedder.backlog_1) FROM cdc_embedder.status s, pg_replication_slots r WHERE r.slot_name = %s",
            (bench.slot,),
        ).fetchone() == (True,)
        until(
            lambda: status(bench)[0]["circuit_breaker"] in ("open", "half-open"), "never opened", lambda: status(bench)
        )
        down.unlink()
        wait_caught_up(bench)
        assert backlog(bench) == 0
        assert status(bench)[0]["circuit_breaker"] == "closed"
        assert_every_vector_is_of_its_text(bench)
        assert bench.admin.execute("SELECT count(*) FROM cdc_embedder.failed").fetchone() == (0,)


def test_an_hour_of_writes_leaves_the_retained_wal_flat(bench18: Any, down: Path) -> None:
    """600,000 changes are an hour at 170 a second. `restart_lsn` follows at the server's own pace (checkpoints,
    snapshots of running transactions), so the bound is generous; the writes are many times as large."""
    down.touch()
    make_model(bench18, down_while_exists=str(down))
    make_documents(bench18)
    with running(bench18, CDC_EMBEDDER_SPILL_AFTER_S="1", CDC_EMBEDDER_MAX_PENDING_KEYS="20000") as service:
        until(lambda: live(bench18), "never live", lambda: service.log)
        before = position(bench18)
        kept = []
        for _ in range(12):
            bench18.admin.execute(
                "INSERT INTO documents (body) SELECT repeat('x', 200) || n FROM generate_series(1, 10000) n"
            )
            for turn in range(4):
                bench18.admin.execute(
                    "UPDATE documents SET body = body || '.' WHERE id > (SELECT max(id) - 10000 FROM documents)"
                    " AND id %% 4 = %s", (turn,))  # fmt: skip
            bench18.admin.execute("CHECKPOINT")
            here = position(bench18)
            until(lambda here=here: confirmed(bench18, here), "held back", lambda: status(bench18))
            kept.append(retained(bench18))
        written = bench18.admin.execute("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), %s)::int8", (before,)).fetchone()[
            0
        ]
        print(f"written {written >> 20} MB, kept at most {max(kept) >> 20} MB")
        print(f"peak {resident_mb(service, 'VmHWM'):.0f} MB")
        assert written > 4 * max(kept)
        assert backlog(bench18) >= 100_000


@pytest.mark.timeout(600)
def test_a_transaction_of_a_million_rows_leaves_memory_and_small_transactions_alone(bench18: Any) -> None:
    """Live before backlog: a row that comes after the million is embedded while they wait."""
    make_model(bench18, delay_per_text_s=0.0005)
    make_documents(bench18)
    with running(bench18, CDC_EMBEDDER_SPILL_AFTER_S="2") as service:
        until(lambda: live(bench18), "never live", lambda: service.log)
        before = resident_mb(service)
        bench18.admin.execute("INSERT INTO documents (body) SELECT 'text ' || n FROM generate_series(1, 1000000) n")
        here = position(bench18)
        until(lambda: confirmed(bench18, here), "held back", lambda: status(bench18))
        waiting = backlog(bench18)
        print(f"{waiting} keys in the backlog when the slot had passed the transaction")
        assert waiting > 500_000
        small = bench18.admin.execute("INSERT INTO documents (body) VALUES ('small') RETURNING id").fetchone()[0]
        until(
            lambda: bench18.admin.execute("SELECT embedding FROM documents WHERE id = %s", (small,)).fetchone()[0],
            "the small transaction waits for the large one",
            lambda: status(bench18),
        )
        assert backlog(bench18) > 400_000
        drained = backlog(bench18)
        until(lambda: backlog(bench18) < drained - 2000, "the backlog does not drain", lambda: status(bench18))
        peak = resident_mb(service, "VmHWM")
        print(f"resident before {before:.0f} MB, peak {peak:.0f} MB")
        assert peak - before < 400


def test_a_row_that_stays_locked_holds_the_slot_no_longer_than_any_other(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 3)
    with running(bench, CDC_EMBEDDER_SPILL_AFTER_S="0.5") as service:
        wait_caught_up(bench)
        with psycopg.connect(bench.dsn_admin) as holder:
            bench.admin.execute("UPDATE documents SET body = 'changed and then locked' WHERE id = 1")
            holder.execute("SELECT FROM documents WHERE id = 1 FOR UPDATE")
            here = position(bench)
            until(lambda: confirmed(bench, here), "held back by a locked row", lambda: service.log)
            bench.admin.execute("UPDATE documents SET body = 'beside it' WHERE id = 2")
            until(
                lambda: bench.admin.execute(
                    "SELECT l.fingerprint = sha256('\\x01' || convert_to(body, 'UTF8'))"
                    " FROM documents d JOIN cdc_embedder.ledger_1 l ON l.key_1 = d.id WHERE id = 2"
                ).fetchone()[0],
                "a neighbour waits",
            )
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 3
        assert backlog(bench) == 0


def test_rule_2_a_spilled_key_is_not_judged_before_its_transaction_is_visible(bench: Any) -> None:
    """The standby that commits wait for is gone: the change is in the stream and in the backlog, and not visible."""
    make_model(bench)
    make_documents(bench, 3)
    with running(bench, CDC_EMBEDDER_SPILL_AFTER_S="0.2") as service:
        wait_caught_up(bench)

        def commit() -> None:
            with psycopg.connect(bench.dsn_admin, autocommit=True) as writer:
                writer.execute("UPDATE documents SET body = 'seen late' WHERE id = 1")

        with standby_gone(bench):
            writer = threading.Thread(target=commit)
            writer.start()
            until(lambda: waiting_for_standby(bench), "no wait")
            with bench.admin.transaction():
                bench.admin.execute("SET LOCAL synchronous_commit = local")
                until(lambda: backlog(bench) == 1, "never spilled", lambda: service.log)
            time.sleep(1.0)  # taken up, and not judged, several times
            assert backlog(bench) == 1
        writer.join()
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 3
        assert backlog(bench) == 0
