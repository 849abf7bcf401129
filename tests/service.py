"""The real process under test, and what may be asked about its work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from cdc_embedder.embedding.fake import fake_vector

PATIENCE_S = float(os.environ.get("TESTS_PATIENCE_S", "150"))
"""How long a test waits for what must become true; nothing is asserted about how long it took."""


class Service:
    """`python -m cdc_embedder run`, or another module in its place, as a child process; its log is kept in a file."""

    def __init__(self, bench: Any, module: str = "cdc_embedder", **environment: str) -> None:
        self._bench = bench
        self._module = module
        self._environment = {
            "CDC_EMBEDDER_DSN": bench.dsn_service,
            "CDC_EMBEDDER_SLOT": bench.slot,
            "CDC_EMBEDDER_OUTPUT_PLUGIN": bench.plugin,
            "CDC_EMBEDDER_LOG_LEVEL": "debug",
            "CDC_EMBEDDER_HTTP": "off",
        } | environment
        self._log = Path(tempfile.mkstemp(prefix="cdc-embedder-", suffix=".log")[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def start(self) -> Service:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CDC_EMBEDDER_", "PG"))}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, "run"],
                env=inherited | self._environment,
                cwd=Path(__file__).parents[1],
                stdout=log,
                stderr=log,
            )
        return self

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait(timeout=PATIENCE_S)

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, and nothing of the process remains."""
        self.signal(signal.SIGKILL)
        self.wait()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                assert_no_text_was_logged(self._bench, self.log)
        finally:
            self.end()

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.unlink(missing_ok=True)

    def wait_for_log(self, text: str) -> None:
        until(lambda: text in self.log, f"the log never said {text!r}", lambda: self.log)


@contextmanager
def running(bench: Any, module: str = "cdc_embedder", **environment: str) -> Iterator[Service]:
    """The service from start to end; a failing test shows its log. However it went, no text of a row is in it."""
    with Service(bench, module, **environment).start() as service:
        try:
            yield service
        except BaseException:
            print(service.log)
            raise


def assert_no_text_was_logged(bench: Any, log: str) -> None:
    """None of the longer texts that configured columns are made of now."""
    try:
        with psycopg.connect(
            bench.dsn_admin, autocommit=True, options="-c statement_timeout=5s", client_encoding="UTF8"
        ) as session:
            texts = {
                text
                for schema, table, columns in session.execute(
                    "SELECT n.nspname, t.relname, c.source_columns FROM cdc_embedder.embedding_column c"
                    "  JOIN pg_class t ON t.oid = c.source_table JOIN pg_namespace n ON n.oid = t.relnamespace"
                ).fetchall()
                for column in columns
                for (text,) in session.execute(
                    sql.SQL("SELECT {0}::text FROM {1} WHERE length({0}::text) BETWEEN 9 AND 200 LIMIT 500").format(
                        sql.Identifier(column), sql.Identifier(schema, table)
                    )
                ).fetchall()
            }
    except (psycopg.Error, UnicodeDecodeError):
        return  # the test took the server, the schema or the table away, or the texts are none
    told = [text for text in texts if text in log]
    assert not told, f"the log holds texts of rows: {told}"


def until(true: Callable[[], object], otherwise: str, detail: Callable[[], object] = lambda: "") -> None:
    """Wait until `true()` is; fail with `otherwise` and `detail()` when it does not become so."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"{otherwise}\n{detail()}"
        time.sleep(0.05)


@contextmanager
def standby_gone(bench: Any) -> Iterator[None]:
    """Commits wait for a standby that is not there, except where `synchronous_commit` is `local`."""
    bench.admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    try:
        bench.admin.execute("SELECT pg_reload_conf()")
        until(lambda: _a_commit_waits(bench), "no commit ever waited for its standby")
        yield
    finally:
        bench.admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
        bench.admin.execute("SELECT pg_reload_conf()")


def waiting_for_standby(bench: Any) -> list[int]:
    """The sessions whose commits wait for a standby."""
    return [pid for (pid,) in bench.admin.execute("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")]


def _a_commit_waits(bench: Any) -> bool:
    """Commits begin to wait when the checkpointer has read the setting, which may be after sessions have."""
    with psycopg.connect(bench.dsn_admin, autocommit=True) as session:
        message = "SELECT pg_logical_emit_message(true, 'test', '')"
        commit = threading.Thread(target=session.execute, args=(message,))
        commit.start()
        while commit.is_alive() and session.info.backend_pid not in waiting_for_standby(bench):
            time.sleep(0.01)
        waits = commit.is_alive()
        while commit.is_alive():
            bench.admin.execute("SELECT pg_cancel_backend(%s)", (session.info.backend_pid,))
            commit.join(0.05)
        return waits


def status(bench: Any) -> list[dict[str, Any]]:
    cursor = bench.admin.execute("SELECT to_jsonb(s) FROM cdc_embedder.status s ORDER BY id")
    return [row[0] for row in cursor.fetchall()]


def caught_up(bench: Any) -> bool:
    """Every column is live and current, and its slot is confirmed past everything written so far."""
    target = bench.admin.execute("SELECT pg_current_wal_insert_lsn()").fetchone()[0]
    rows = status(bench)
    if not rows or any(row["state"] != "live" or row["pending"] or row["coverage"] != 100 for row in rows):
        return False
    return confirmed(bench, target)


def confirmed(bench: Any, target: str) -> bool:
    """Whether the bench's slot, and each that serves a column, is confirmed up to `target`."""
    return bool(bench.admin.execute(_CONFIRMED, {"slot": bench.slot, "target": target}).fetchone()[0])


_CONFIRMED = """
SELECT bool_and(coalesce(r.confirmed_flush_lsn >= %(target)s::pg_lsn, false))
  FROM (SELECT %(slot)s::name AS slot UNION SELECT slot FROM cdc_embedder.embedding_column) wanted
  LEFT JOIN pg_replication_slots r ON r.slot_name = wanted.slot
"""


def wait_caught_up(bench: Any) -> None:
    """Wait until what is committed now is embedded: every slot passes the present position, then all is current.

    What the service reports may be a second old; what is in the backlog, and which scans are wanted, is not.
    """
    target = bench.admin.execute("SELECT pg_current_wal_insert_lsn()").fetchone()[0]
    until(lambda: confirmed(bench, target), "a slot was never confirmed that far", lambda: status(bench))
    until(lambda: bench.admin.execute(_NOTHING_LEFT).fetchone()[0], "something was left", lambda: status(bench))
    until(
        lambda: (
            (rows := status(bench))
            and all(row["state"] == "live" and not row["pending"] and row["coverage"] == 100 for row in rows)
        ),
        "the columns were never current",
        lambda: status(bench),
    )


_NOTHING_LEFT = """
SELECT coalesce(bool_and(cdc_embedder._spilled_from(c.id) IS NULL
                         AND coalesce(s.requested_at <= s.finished_at, s.requested_at IS NULL)), true)
  FROM cdc_embedder.embedding_column c LEFT JOIN cdc_embedder.scan s ON s.column_id = c.id
"""


def assert_every_vector_is_of_its_text(
    bench: Any, table: str = "documents", text: str = "body", target: str = "embedding", model: str = "fake"
) -> int:
    """Each row's stored vector is the fake model's of its present text, and NULL exactly where the text is."""
    rows = bench.admin.execute(f"SELECT {text}, {target}::real[] FROM {table}").fetchall()
    for present, stored in rows:
        if present is None:
            assert stored is None
        else:
            assert stored is not None, present
            assert np.allclose(stored, fake_vector(model, present, len(stored)), atol=2e-3), present
    return len(rows)
