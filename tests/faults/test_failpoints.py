"""Killed at every place between received and confirmed, spilled and scanned: nothing is lost, nothing is wrong.

A kill at a random moment hits the one instant that matters almost never. Here the process kills itself at a named
place (see `failing`), the first time it comes there and a later time, and the test waits for its death.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

import cdc_embedder
from cdc_embedder import failpoints
from tests.documents import embedded_at, make_documents, make_model
from tests.servers import Bench
from tests.service import (
    PATIENCE_S,
    Service,
    assert_every_vector_is_of_its_text,
    running,
    status,
    until,
    wait_caught_up,
)

LIVE = ["received", "fetched", "embedded", "written", "confirmed"]
SPILL = ["spilling", "spilled", "settled"]
SCAN = ["scanned", "checkpoint"]

SOON = "cdc_embedder.pipeline.TRIAL_SECONDS=0.1 cdc_embedder.wal.stream._STATUS_GAP_S=0.01"
"""What was with the model when the process died is tried as soon as that; and what is confirmed is told at once, so
that a confirmation too many is not saved by dying before it was sent."""

STEPS = "cdc_embedder.rows.scan.PAGE=5 cdc_embedder.scanning.CHECKPOINT_SECONDS=0.02"
"""A scan in many pages, each of them noted."""

CASES = [("18-pgoutput", place) for place in LIVE + SPILL + SCAN] + [
    ("15-wal2json", place) for place in ("received", "confirmed")
]


class Load:
    """An application that changes the table in every way, one transaction a turn; never the same text twice.

    Two rows of five it never touches: those must not owe their vectors to a change that came later.
    """

    def __init__(self, bench: Bench, place: str, down: Path) -> None:
        self._bench = bench
        self._place = place
        self._down = down
        self._turn = 0

    def turn(self) -> None:
        self._turn += 1
        turn, admin = self._turn, self._bench.admin
        if self._place in SPILL:
            if turn % 2:
                self._down.touch()
            else:
                self._down.unlink(missing_ok=True)
        with admin.transaction():
            admin.execute("UPDATE documents SET body = %s || id WHERE id %% 5 = %s", (f"turn {turn} of ", turn % 3))
            admin.execute("UPDATE documents SET views = views + 1 WHERE id % 5 = 1")
            admin.execute("UPDATE documents SET body = NULL WHERE id %% 15 = %s", (turn % 3,))
            admin.execute("INSERT INTO documents (body) VALUES (%s), (NULL)", (f"new in {turn}",))
            admin.execute("UPDATE documents SET id = id + 100000 WHERE id = (SELECT min(id) FROM documents)")
            admin.execute("DELETE FROM documents WHERE id = (SELECT max(id) FROM documents WHERE id < 100000)")

    def until_killed(self, service: Service, *, reconcile: bool = False) -> None:
        """Turn after turn, until the process died by its own hand, and two after that."""
        deadline = time.monotonic() + PATIENCE_S
        until(lambda: service.exit_status is not None or "streaming from" in service.log, "no stream")
        while service.exit_status is None:
            assert time.monotonic() < deadline, f"{self._place} was never reached\n{service.log}"
            self.turn()
            if reconcile:
                self._bench.admin.execute("SELECT cdc_embedder.reconcile('documents')")
            self._wait_for_the_backlog(service)
        assert service.exit_status == -signal.SIGKILL, service.log
        self.turn()
        self.turn()
        self._down.unlink(missing_ok=True)

    def _wait_for_the_backlog(self, service: Service) -> None:
        """It fills while the model is down, and is emptied when that is back; elsewhere a moment is enough."""
        if self._place not in SPILL:
            time.sleep(0.1)
            return
        filled = self._down.exists()
        until(
            lambda: service.exit_status is not None or bool(backlog(self._bench)) is filled,
            "the backlog does not move",
            lambda: service.log,
        )


def backlog(bench: Bench) -> int:
    if bench.admin.execute("SELECT to_regclass('cdc_embedder.backlog_1')").fetchone() == (None,):
        return 0
    return int(bench.admin.execute("SELECT count(*) FROM cdc_embedder.backlog_1").fetchone()[0])  # type: ignore[index]


def assert_right(bench: Bench) -> None:
    """Everything was confirmed, each vector is of its row's text, and nothing is left over."""
    wait_caught_up(bench)
    assert assert_every_vector_is_of_its_text(bench) > 15
    assert backlog(bench) == 0
    assert bench.admin.execute("SELECT count(*) FROM cdc_embedder.failed").fetchone() == (0,)
    assert [row["pending"] for row in status(bench)] == [0]


@pytest.mark.parametrize(("bench", "place"), CASES, indirect=["bench"])
def test_killed_at_any_place_the_next_one_finds_everything(bench: Any, place: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    down, armed = tmp_path / "down", tmp_path / "armed"
    make_model(bench, down_while_exists=str(down), delay_s=0.1 if place in SCAN else 0.0)
    make_documents(bench, 60 if place in SCAN else 20)
    load = Load(bench, place, down)
    common = {"CDC_EMBEDDER_SPILL_AFTER_S": "0.2", "CDC_TEST_SET": f"{SOON} {STEPS}" if place in SCAN else SOON}
    with running(bench, "tests.faults.failing", CDC_TEST_KILL_AT=place, CDC_TEST_KILL_AFTER="1", **common) as service:
        load.until_killed(service)
    later = {"CDC_TEST_KILL_AT": place, "CDC_TEST_KILL_AFTER": "2", "CDC_TEST_KILL_WHEN": str(armed)}
    with running(bench, "tests.faults.failing", **later, **common) as service:
        assert_right(bench)
        if place == "checkpoint":
            assert "goes on after" in service.log
        armed.touch()
        load.until_killed(service, reconcile=place in SCAN)
    with running(bench, "tests.faults.failing", **common) as service:
        assert_right(bench)
        if place not in SCAN:
            assert "scan of" not in service.log, "it was a scan that found what the stream should have told again"


@pytest.mark.parametrize("end", ["finishes", "aborts"])
def test_killed_in_the_middle_of_a_write_back_the_server_ends_it_alone(bench18: Any, end: str) -> None:
    """The statement is in the user's trigger when the process dies; nobody hears of its end."""
    make_model(bench18)
    make_documents(bench18, 20)
    with running(bench18) as service:
        wait_caught_up(bench18)
        assert service.stop() == 0
    bench18.admin.execute(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " WHILE EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711) LOOP"
        " PERFORM pg_sleep(0.02); END LOOP; RETURN NEW; END $$;"  # no wait for a lock: that would end after a second
        "CREATE TRIGGER wait BEFORE UPDATE OF embedding ON documents FOR EACH ROW EXECUTE FUNCTION wait()"
    )
    before = embedded_at(bench18)
    with (
        psycopg.connect(bench18.dsn_admin) as holder,
        running(bench18, "tests.faults.failing", CDC_TEST_SET=SOON) as service,
    ):
        holder.execute("SELECT pg_advisory_xact_lock(4711)")
        bench18.admin.execute("UPDATE documents SET body = 'in the middle ' || id WHERE id % 2 = 0")
        until(lambda: writing(bench18), "it never came to the trigger", lambda: service.log)
        service.kill()
        pids = writing(bench18)
        assert pids, "the server ended the statement with its client"
        if end == "aborts":
            for pid in pids:
                bench18.admin.execute("SELECT pg_terminate_backend(%s, 10000)", (pid,))
        holder.rollback()
    until(lambda: not writing(bench18), "the statement never ended")
    written = {id for id, at in embedded_at(bench18).items() if at != before[id]}
    assert bool(written) is (end == "finishes")
    between = embedded_at(bench18)
    with running(bench18, "tests.faults.failing", CDC_TEST_SET=SOON) as service:
        assert_right(bench18)
        assert "scan of" not in service.log
    assert {id: at for id, at in embedded_at(bench18).items() if id in written} == {id: between[id] for id in written}


def writing(bench: Bench) -> list[int]:
    """Sessions of ours that are inside the trigger."""
    rows = bench.admin.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'cdc-embedder write%' AND wait_event = 'PgSleep'"
        " AND datname = current_database()"
    ).fetchall()
    return [row[0] for row in rows]


def test_the_list_of_places_is_the_places_that_there_are() -> None:
    code = "".join(path.read_text() for path in Path(cdc_embedder.__file__).parent.rglob("*.py"))
    found = re.findall(r'failpoints\.reached\("(\w+)"\)', code)
    told = re.search(r"key's way: (.*?)\. Each", failpoints.__doc__ or "", re.DOTALL)
    assert told is not None
    listed = re.findall(r"\w+", re.sub(r"for (the backlog|a scan)", "", " ".join(told.group(1).split())))
    assert sorted(found) == sorted(listed) == sorted(LIVE + SPILL + SCAN)


def test_in_production_nothing_is_called() -> None:
    asked = "import cdc_embedder.__main__, cdc_embedder.service, cdc_embedder.failpoints as f; print(f.hook)"
    answer = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert answer.stdout == "None\n"
