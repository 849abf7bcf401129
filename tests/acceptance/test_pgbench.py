"""Under load and kill -9: four pgbench clients write while the service dies every few seconds, and nothing is lost."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.commands import answers
from tests.configuring import one
from tests.documents import make_documents, make_model
from tests.servers import Bench
from tests.service import (
    Service,
    assert_every_vector_is_of_its_text,
    status,
    until,
    wait_caught_up,
)

ROWS = 500
"""Few enough that rows are changed again while they wait for the model, or while they are with it."""

SECONDS = 15
TRANSACTIONS_PER_SECOND = 200

SCRIPTS = {
    "insert": (4, "INSERT INTO documents (body) VALUES ('inserted by client ' || :client_id || ', ' || :r);"),
    "update_text": (8, "UPDATE documents SET body = 'updated to ' || :r WHERE id = :id;"),
    "update_other": (6, "UPDATE documents SET views = views + 1 WHERE id = :id;"),
    "to_and_fro": (
        2,
        """BEGIN;
        UPDATE documents SET body = 'for a moment ' || :r WHERE id = :id;
        UPDATE documents SET body = 'in the end ' || :r WHERE id = :id;
        SAVEPOINT s;
        UPDATE documents SET body = 'never', embedding = NULL WHERE id = :id;
        ROLLBACK TO s;
        INSERT INTO documents (body) VALUES (CASE WHEN :r % 3 = 0 THEN NULL ELSE '' END);
        END;""",
    ),
    "empty": (1, "UPDATE documents SET body = NULL WHERE id = :id;"),
    "delete": (2, "DELETE FROM documents WHERE id = :id;"),
    "delete_and_insert": (
        1,
        """BEGIN;
        DELETE FROM documents WHERE id = :id;
        INSERT INTO documents (id, body) VALUES (:id, 'born again ' || :r) ON CONFLICT DO NOTHING;
        END;""",
    ),
    "rekey": (1, "UPDATE documents SET id = 1000000000 + :r WHERE id = :id;"),
    "roll_back": (1, "BEGIN; UPDATE documents SET body = 'never' WHERE id = :id; ROLLBACK;"),
}
"""name -> (weight, what one transaction does)"""


@pytest.mark.parametrize("bench", ["15-wal2json", "18-pgoutput"], indirect=True)
def test_after_a_load_with_kills_every_vector_is_of_its_text(bench: Bench, tmp_path: Path) -> None:
    make_model(bench, delay_s=0.01)
    make_documents(bench, ROWS)
    bench.admin.execute(f"ALTER TABLE documents ALTER id RESTART WITH {10 * ROWS}")
    chance = random.Random(bench.plugin)
    service = Service(bench, CDC_EMBEDDER_LOG_LEVEL="info").start()
    try:
        wait_caught_up(bench)
        scans = one(bench.admin, "SELECT requested_at, finished_at FROM cdc_embedder.scan")
        load, kills = start_pgbench(bench, tmp_path), 0
        while load.poll() is None:
            until(lambda: slot_is_active(bench), "the slot was never taken", lambda: service.log)
            time.sleep(chance.uniform(0.3, 2.5))
            service.kill()
            kills += 1
            service.start()
        output = load.communicate()[0]
        assert load.returncode == 0, output
        assert kills >= 3, output
        wait_caught_up(bench)
        (report,) = answers(bench, "verify", "--wait")
        assert {name: report[name] for name in ("missing", "stale", "wrong", "failed", "pending")} == dict.fromkeys(
            ("missing", "stale", "wrong", "failed", "pending"), 0
        )
        assert report["rows"] == report["null"] + report["current"] == assert_every_vector_is_of_its_text(bench)
        # What the stream told of was enough: no scan has repaired anything.
        assert one(bench.admin, "SELECT requested_at, finished_at FROM cdc_embedder.scan") == scans
        bench.admin.execute("SELECT cdc_embedder.reconcile('documents')")
        assert answers(bench, "verify", "--wait")[0]["orphaned"] == 0
        assert service.stop() == 0
    except BaseException:
        print(service.log, status(bench))
        raise
    finally:
        service.end()


def start_pgbench(bench: Bench, folder: Path) -> subprocess.Popen[str]:
    """Four clients for SECONDS, at a rate that the service could keep up with if it were left alive."""
    files = []
    for name, (weight, statements) in SCRIPTS.items():
        file = folder / f"{name}.sql"
        lines = " ".join(line.strip() for line in statements.splitlines())
        file.write_text(
            f"\\set id random_zipfian(1, {2 * ROWS}, 1.05)\n\\set r random(1, 1000000000)\n"
            + lines.replace("; ", ";\n")
            + "\n"
        )
        files += ["-f", f"{file}@{weight}"]
    return subprocess.Popen(
        [
            str(bench.server.bindir / "pgbench"), "--no-vacuum", "--client=4", "--jobs=1", f"--time={SECONDS}",
            f"--rate={TRANSACTIONS_PER_SECOND}", "--random-seed=1", *files, bench.dsn_admin,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def slot_is_active(bench: Bench) -> bool:
    return bool(one(bench.admin, "SELECT active FROM pg_replication_slots WHERE slot_name = %s", bench.slot))
