"""Commit to vector: how long after a row's commit its vector is visible to others.

The server's log is the observer: every commit record in it carries its time. A row's latency is the commit of the
write-back (the `xmin` of its ledger row) minus the commit of its INSERT, read with pg_waldump when all is over. Nothing
polls, so nothing is disturbed. (`track_commit_timestamp` would not do: a session with a replication origin keeps the
time of its first commit there.) Both times are taken just before the commit is flushed, so what a flush takes cancels
out. As a check, where commits are slow enough, a reader polls too: from COMMIT's return to the sight of the vector.

At a rate that the model cannot serve latency has no meaning but the length of the queue: `unseen` says how many rows
had no vector when the patience after the last commit was over.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from contextlib import nullcontext
from datetime import datetime
from typing import Any

import psycopg

from benchmarks import stage
from benchmarks.environment import idle_share
from benchmarks.measuring import percentile
from benchmarks.results import Result
from tests.servers import Bench

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"rates": [10, 100, 500], "seconds": 7.0, "repetitions": 2, "backfill": 100_000,
                 "models": ["fake", "all-MiniLM-L6-v2"], "model_backfill": 1_500, "model_repetitions": 1},
    "quick": {"rates": [100], "seconds": 2.0, "repetitions": 1, "backfill": 20_000,
              "models": ["fake", "all-MiniLM-L6-v2"], "model_backfill": 150, "model_repetitions": 1},
    "tiny": {"rates": [50], "seconds": 1.0, "repetitions": 1, "backfill": 2_000, "models": ["fake"]},
}  # fmt: skip

CONNECTIONS = 4
PATIENCE_S = 5.0
POLLED_RATE = 20
"""Commits a second up to which a reader polls too: faster ones would wait for it."""


def run(settings: dict[str, Any]) -> Result:
    result = Result("latency", "Commit to vector", settings)
    texts = [text for text in stage.texts(4000, seed=2) if len(text) < 100]
    with stage.database() as bench:
        stage.make_model(bench, "fake")
        for model in settings["models"]:
            repetitions = settings["repetitions" if model == "fake" else "model_repetitions"]
            _model(bench, result, model, settings, texts, repetitions)
    for rate in settings["rates"]:
        for model in settings["models"]:
            busy, idle = f"{model}, {rate}/s, backfill", f"{model}, {rate}/s, idle"
            goal = "<= 2" if model == "fake" else ""
            result.ratio(f"{model}, {rate}/s: p50 during a backfill / idle", "p50_ms", busy, idle, goal)
            result.ratio(f"{model}, {rate}/s: p99 during a backfill / idle", "p99_ms", busy, idle, goal)
    result.notes.append("inserts from four sessions, one row a transaction; texts below 100 bytes")
    return result


def _model(bench: Bench, result: Result, model: str, settings: dict[str, Any], texts: list[str], repeat: int) -> None:
    live = f"live_{model.replace('-', '_').lower()}"
    stage.make_table(bench, live)
    column = stage.configure(bench, live, model)
    with stage.serving(bench):
        stage.wait_live(bench, column)
        _drive(bench, live, 50, 1.0, texts, [])
        _drain(bench, live, column)
        for repetition in range(repeat):
            for rate in settings["rates"]:
                before = idle_share()
                found = _measure(bench, live, column, rate, settings["seconds"], texts)
                result.add(f"{model}, {rate}/s, idle", repetition, before, found)
                _drain(bench, live, column)
                found = _during_backfill(bench, live, column, rate, model, settings, texts)
                result.add(f"{model}, {rate}/s, backfill", repetition, before, found)
                _drain(bench, live, column)
    stage.drop(bench, live)


def _drain(bench: Bench, live: str, column: int) -> None:
    """Nothing of one measurement may wait before the next: rows that are gone are passed over, one that is new comes
    after them."""
    bench.admin.execute(f"DELETE FROM {live}")
    row = bench.admin.execute(f"INSERT INTO {live} (body) VALUES ('drained') RETURNING id").fetchone()
    assert row is not None
    stage.wait_written(bench, column, row[0], 1)


def _during_backfill(
    bench: Bench, live: str, column: int, rate: int, model: str, settings: dict[str, Any], texts: list[str]
) -> dict[str, float]:
    """For as long as the backfill runs, so that every commit meets it, or as an idle run takes, if that is shorter."""
    stage.make_table(bench, "backfilled")
    if model == "fake":
        rows = settings["backfill"]
        stage.fill(bench, "backfilled", rows, a_transaction=20_000)
    else:
        rows = settings["model_backfill"]
        stage.fill_with(bench, "backfilled", stage.texts(rows, seed=3))
    bench.admin.execute("VACUUM ANALYZE backfilled")
    stage.settle(bench)
    other = stage.configure(bench, "backfilled", model)
    stage.wait_started(bench, other)
    found = _measure(bench, live, column, rate, settings["seconds"], texts, until_written=(other, rows))
    stage.drop(bench, "backfilled")
    return found


def _measure(
    bench: Bench,
    live: str,
    column: int,
    rate: int,
    seconds: float,
    texts: list[str],
    until_written: tuple[int, int] | None = None,
) -> dict[str, float]:
    sent: list[Sent] = []
    stopped = threading.Event()
    polled: list[float] = []
    started = _position(bench)
    watching = nullcontext() if rate > POLLED_RATE else Reader(bench, live, sent, polled)
    with watching:
        thread = threading.Thread(target=_drive, args=(bench, live, rate, seconds, texts, sent, stopped))
        began = time.monotonic()
        thread.start()
        if until_written is not None:
            other, rows = until_written
            end = f"SELECT FROM cdc_embedder.ledger_{other} WHERE key_1 = %s"
            while thread.is_alive() and not bench.admin.execute(end, (rows,)).rowcount:
                time.sleep(0.05)
            stopped.set()
        thread.join()
        took = time.monotonic() - began
        latencies = _seen(bench, column, sent, started)
    found = {
        "p50_ms": percentile(latencies, 0.50) * 1e3,
        "p95_ms": percentile(latencies, 0.95) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
        "rows": len(sent),
        "unseen": len(sent) - len(latencies),
        "achieved_per_s": len(sent) / took,
    }
    return found | ({"polled_p50_ms": percentile(polled, 0.5) * 1e3} if polled else {})


class Sent:
    """A row that was committed: its id, its transaction, and when COMMIT returned."""

    __slots__ = ("at", "id", "xid")

    def __init__(self, id: int, xid: int, at: float) -> None:
        self.id, self.xid, self.at = id, xid, at


def _drive(
    bench: Bench,
    table: str,
    rate: int,
    seconds: float,
    texts: list[str],
    sent: list[Sent],
    stopped: threading.Event | None = None,
) -> None:
    """Commit rows at fixed times; a session that is late does not wait."""
    began = time.monotonic() + 0.05

    def session(number: int) -> None:
        insert = f"INSERT INTO {table} (body) VALUES (%s) RETURNING id, pg_current_xact_id()::text::bigint"
        with psycopg.connect(bench.dsn_admin, autocommit=True) as connection:
            for turn in range(number, int(rate * seconds), CONNECTIONS):
                time.sleep(max(0.0, began + turn / rate - time.monotonic()))
                if stopped is not None and stopped.is_set():
                    return
                row = connection.execute(insert, (texts[turn % len(texts)],), prepare=True).fetchone()
                assert row is not None
                sent.append(Sent(row[0], row[1], time.monotonic()))

    threads = [threading.Thread(target=session, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _seen(bench: Bench, column: int, sent: list[Sent], started: str) -> list[float]:
    """Seconds from commit to commit, of the rows that have a vector before the patience is over."""
    written = f"SELECT key_1, xmin::text::bigint FROM cdc_embedder.ledger_{column} WHERE key_1 = ANY(%s)"
    ids = [row.id for row in sent]
    deadline = time.monotonic() + PATIENCE_S
    while len(rows := bench.admin.execute(written, (ids,)).fetchall()) < len(sent) and time.monotonic() < deadline:
        time.sleep(0.1)
    commits = _commits(bench, started)
    inserted = {row.id: commits[row.xid] for row in sent}
    return [commits[xid] - inserted[id] for id, xid in rows]


def _position(bench: Bench) -> str:
    row = bench.admin.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    return str(row[0])


def _commits(bench: Bench, since: str) -> dict[int, float]:
    """When each transaction since the position `since` committed, in seconds of the epoch."""
    bench.admin.execute("SELECT pg_logical_emit_message(true, 'benchmark', '')")  # flushes what lies before it
    done = subprocess.run(
        [str(bench.server.bindir / "pg_waldump"), "--path", str(bench.server.data / "pg_wal"), "--rmgr", "Transaction",
         "--start", since, "--end", _position(bench)],
        env=os.environ | {"TZ": "UTC"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return dict(map(commit, filter(_COMMIT.search, done.stdout.splitlines())))


_COMMIT = re.compile(r"tx:\s*(\d+),.* desc: COMMIT (\S+ \S+) UTC")


def commit(line: str) -> tuple[int, float]:
    """Transaction and time from a line of pg_waldump about a commit."""
    found = _COMMIT.search(line)
    assert found is not None
    return int(found[1]), datetime.fromisoformat(found[2] + "+00:00").timestamp()


class Reader:
    """Polls for the vector of the latest row that was sent, every half millisecond."""

    def __init__(self, bench: Bench, table: str, sent: list[Sent], polled: list[float]) -> None:
        self._dsn, self._sent, self._polled = bench.dsn_admin, sent, polled
        self._see = f"SELECT FROM {table} WHERE id = %s AND embedding IS NOT NULL"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        looked: Sent | None = None
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._ended.is_set():
                if self._sent and self._sent[-1] is not looked:
                    looked = self._sent[-1]
                    while not connection.execute(self._see, (looked.id,), prepare=True).rowcount:
                        if self._ended.wait(0.0005):
                            return
                    self._polled.append(time.monotonic() - looked.at)
                else:
                    time.sleep(0.0002)
