"""Rule 9: one instance works, another waits ready and takes over, and never do two write.

The application goes on writing meanwhile, in threads. Triggers note every taking of a term, and for every vector the
session that wrote it and the term that held then: a session that wrote under two terms has outlived its own.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import re
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import pytest_asyncio

from cdc_embedder import catalog
from cdc_embedder.embedded import Server
from cdc_embedder.install import install
from cdc_embedder.rows import requests
from cdc_embedder.rows.fetch import Fetch
from cdc_embedder.rows.session import Connection, connect
from cdc_embedder.rows.writeback import Term, Write, WriteBack
from tests.configuring import one
from tests.documents import configure_documents, make_documents, make_model, target_type
from tests.servers import SERVICE_ROLE, Bench, bench_with
from tests.service import (
    Service,
    assert_every_vector_is_of_its_text,
    running,
    status,
    until,
    wait_caught_up,
)

each_plugin = pytest.mark.parametrize("bench", ["15-wal2json", "18-pgoutput"], indirect=True)

ROWS = 40


@contextmanager
def instance(bench: Any, **environment: str) -> Iterator[Service]:
    """A service that can be asked how it is, and that notices silence soon."""
    fast = {"CDC_EMBEDDER_HTTP": "127.0.0.1:0", "CDC_EMBEDDER_WAL_SENDER_TIMEOUT_S": "2"}
    with running(bench, **(fast | environment)) as service:
        service.wait_for_log("health is served at")
        yield service


def readiness(service: Service) -> tuple[int, dict[str, str]]:
    """What `/readyz` answers."""
    found = re.findall(r"health is served at http://127\.0\.0\.1:(\d+)/", service.log)
    with closing(http.client.HTTPConnection("127.0.0.1", int(found[-1]), timeout=60)) as connection:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def wait_until_it_is(service: Service, role: str) -> None:
    until(lambda: readiness(service)[1]["role"] == role, f"it never was {role}", lambda: readiness(service))


class Load:
    """An application at work: inserts, updates of text and of other columns, and deletes, from several sessions."""

    def __init__(self, bench: Any, sessions: int = 2) -> None:
        self._bench = bench
        self._ends = threading.Event()
        self._done = 0
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(sessions)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Stop, and raise what went wrong."""
        self._ends.set()
        for thread in self._threads:
            thread.join()
        assert self._errors == []

    def go_on(self, changes: int = 40) -> None:
        """Return when so many more changes were made."""
        goal = self._done + changes
        until(lambda: self._done >= goal or self._errors, "the application stood still")

    def _work(self, seed: int) -> None:
        choose = random.Random(seed)
        try:
            with psycopg.connect(self._bench.dsn_admin, autocommit=True) as session:
                while not self._ends.wait(0.01):
                    text, row = f"text {seed} {self._done} {choose.random()}", choose.randint(1, ROWS)
                    statement, parameters = choose.choice(
                        [
                            ("INSERT INTO documents (body) VALUES (%s)", (text,)),
                            ("UPDATE documents SET body = %s WHERE id = %s", (text, row)),
                            ("UPDATE documents SET body = %s WHERE id = %s", (text, row)),
                            ("UPDATE documents SET views = views + 1 WHERE id = %s", (row,)),
                            ("DELETE FROM documents WHERE id = (SELECT max(id) FROM documents WHERE id > %s)", (ROWS,)),
                        ]
                    )
                    session.execute(statement, parameters)
                    self._done += 1
        except BaseException as error:
            self._errors.append(error)


def prepare(bench: Any, **options: Any) -> None:
    """The documents, and triggers that note terms and writers."""
    make_model(bench, **options)
    make_documents(bench, ROWS)
    for statement in (
        "CREATE TABLE terms (term bigint, service text)",
        "CREATE TABLE written (pid int, term bigint)",
        "CREATE FUNCTION note_term() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS"
        " $$BEGIN INSERT INTO terms VALUES (NEW.term, NEW.service); RETURN NULL; END$$",
        "CREATE FUNCTION note_write() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS"
        " $$BEGIN INSERT INTO written SELECT pg_backend_pid(), term FROM cdc_embedder.leader; RETURN NULL; END$$",
        "CREATE TRIGGER note AFTER INSERT OR UPDATE ON cdc_embedder.leader FOR EACH ROW EXECUTE FUNCTION note_term()",
        "CREATE TRIGGER note AFTER UPDATE OF embedding ON documents FOR EACH ROW EXECUTE FUNCTION note_write()",
        "ALTER TABLE documents ENABLE ALWAYS TRIGGER note",
    ):
        bench.admin.execute(statement)


def assert_one_wrote_at_a_time(bench: Any) -> list[int]:
    """Terms follow each other and no session wrote under two; returns the processes that had them, one after another.

    A process may need two terms: the slot can be busy for a moment longer than the lock.
    """
    terms = bench.admin.execute("SELECT term, service FROM terms ORDER BY term").fetchall()
    assert [term for term, _ in terms] == list(range(1, len(terms) + 1))
    writers = bench.admin.execute("SELECT pid, array_agg(DISTINCT term) FROM written GROUP BY pid").fetchall()
    assert writers
    assert [(pid, under) for pid, under in writers if len(under) != 1] == []
    return [process for process, _ in groupby(int(service.split("/")[1]) for _, service in terms)]


def assert_all_is_well(bench: Any) -> None:
    wait_caught_up(bench)
    assert assert_every_vector_is_of_its_text(bench) >= ROWS
    [row] = status(bench)
    assert row["failed"] == 0


def test_one_works_and_another_waits_ready_and_takes_over_from_one_that_was_killed(bench: Any) -> None:
    prepare(bench)
    with instance(bench) as first:
        wait_until_it_is(first, "working")
        assert readiness(first) == (200, {"status": "ready", "role": "working", "slot": bench.slot, "reason": ""})
        wait_caught_up(bench)
        with instance(bench) as second:
            reason = f"another instance serves the slot {bench.slot}; this one is ready to take over"
            second.wait_for_log(f"waiting: {reason}")
            assert readiness(second) == (
                200,
                {"status": "ready", "role": "waiting", "slot": bench.slot, "reason": reason},
            )
            with Load(bench) as load:
                load.go_on()
                first.kill()
                wait_until_it_is(second, "working")
                load.go_on()
            assert_all_is_well(bench)
            assert second.log.count(reason) == 1
            assert assert_one_wrote_at_a_time(bench) == [first.pid, second.pid]


@each_plugin
def test_one_that_is_frozen_loses_its_place_and_writes_nothing_when_it_goes_on(bench: Any) -> None:
    prepare(bench, delay_s=0.1)
    with instance(bench) as first:
        wait_until_it_is(first, "working")
        wait_caught_up(bench)
        with instance(bench) as second:
            wait_until_it_is(second, "waiting")
            with Load(bench) as load:
                load.go_on()
                first.signal(signal.SIGSTOP)
                wait_until_it_is(second, "working")
                load.go_on()
                first.signal(signal.SIGCONT)
                wait_until_it_is(first, "waiting")
                load.go_on()
                assert readiness(second)[1]["role"] == "working"
            assert_all_is_well(bench)
            assert second.stop() == 0
            wait_until_it_is(first, "working")
            bench.admin.execute("UPDATE documents SET body = 'after the second take-over ' || id")
            assert_all_is_well(bench)
            assert assert_one_wrote_at_a_time(bench) == [first.pid, second.pid, first.pid]


FREEZE = """
import os, pathlib, signal
from cdc_embedder import failpoints
sign = pathlib.Path(__file__).with_name("freeze")
def freeze(place):
    if place == "embedded" and sign.exists():
        sign.unlink()
        os.kill(os.getpid(), signal.SIGSTOP)
failpoints.hook = freeze
"""


def test_what_one_had_in_hand_when_it_was_frozen_is_not_written_any_more(bench18: Bench, tmp_path: Path) -> None:
    prepare(bench18)
    (tmp_path / "sitecustomize.py").write_text(FREEZE)
    sign = tmp_path / "freeze"
    with instance(bench18, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])) as first:
        wait_until_it_is(first, "working")
        wait_caught_up(bench18)
        with instance(bench18) as second:
            wait_until_it_is(second, "waiting")
            sign.touch()
            bench18.admin.execute("UPDATE documents SET body = 'in hand' WHERE id = 1")
            until(lambda: not sign.exists(), "it was never frozen")
            wait_until_it_is(second, "working")
            assert_all_is_well(bench18)
            first.signal(signal.SIGCONT)
            wait_until_it_is(first, "waiting")
            assert assert_one_wrote_at_a_time(bench18) == [first.pid, second.pid]


@each_plugin
def test_a_rolling_restart_under_load_loses_nothing(bench: Any) -> None:
    prepare(bench)
    with ExitStack() as stack, Load(bench) as load:
        present = stack.enter_context(instance(bench))
        wait_until_it_is(present, "working")
        for _ in range(2):
            load.go_on()
            following = stack.enter_context(instance(bench))
            wait_until_it_is(following, "waiting")
            assert present.stop() == 0
            assert "stopped, confirmed through" in present.log
            wait_until_it_is(following, "working")
            present = following
        load.go_on()
        load.end()
        assert_all_is_well(bench)
        assert len(assert_one_wrote_at_a_time(bench)) == 3


def test_while_one_waits_it_keeps_one_idle_session_and_no_snapshot(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 5)
    with instance(bench18) as first:
        wait_until_it_is(first, "working")
        wait_caught_up(bench18)
        known = sessions(bench18).keys()
        with instance(bench18) as second:
            wait_until_it_is(second, "waiting")
            [pid] = until_seen(lambda: sessions(bench18).keys() - known)
            polls: dict[Any, set[tuple[str, Any]]] = {}

            def polled() -> bool:
                for found, (asked_at, state, snapshot) in sessions(bench18).items():
                    assert found == pid or found in known
                    if found == pid:
                        polls.setdefault(asked_at, set()).add((state, snapshot))
                return len(polls) > 4

            until(polled, "it never looked again", lambda: polls)
            asked_and_answered = list(polls.values())[1:-1]
            assert all(("idle", None) in seen for seen in asked_and_answered), polls
            assert second.stop() == 0


def sessions(bench: Bench) -> dict[int, tuple[Any, str, Any]]:
    """The services' sessions: when each was asked something last, its state, and the snapshot that it holds."""
    found = bench.admin.execute(
        "SELECT pid, query_start, state, coalesce(backend_xmin, backend_xid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'cdc-embedder%'"
    )
    return {pid: (asked_at, state, snapshot) for pid, asked_at, state, snapshot in found.fetchall()}


def until_seen(find: Any) -> Any:
    until(find, "it never appeared")
    return find()


@each_plugin
def test_two_services_with_slots_of_their_own_work_side_by_side(bench: Any) -> None:
    other = f"{bench.slot}_other"
    make_model(bench)
    make_documents(bench, 10)
    install(bench.dsn_admin, other, owner=SERVICE_ROLE)
    bench.admin.execute(f"CREATE TABLE notes (id int PRIMARY KEY, note text, v {target_type(bench)})")
    bench.grant("notes", ["id"], ["note"], "v")
    bench.admin.execute("INSERT INTO notes SELECT n, 'note ' || n FROM generate_series(1, 10) n")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('notes', '{note}', 'v', 'fake')"
    )
    columns = bench.admin.execute("SELECT source_table::text, slot FROM cdc_embedder.embedding_column ORDER BY id")
    assert columns.fetchall() == [("documents", bench.slot), ("notes", other)]
    with instance(bench) as first, instance(bench, CDC_EMBEDDER_SLOT=other) as second:
        for service in (first, second):
            wait_until_it_is(service, "working")
        wait_caught_up(bench)
        bench.admin.execute("UPDATE notes SET note = 'other ' || id; UPDATE documents SET body = 'other ' || id")
        wait_caught_up(bench)
        assert_every_vector_is_of_its_text(bench)
        assert_every_vector_is_of_its_text(bench, "notes", "note", "v")
        assert readiness(second)[1]["slot"] == other
        assert "waiting" not in first.log + second.log
        terms = bench.admin.execute("SELECT slot, term FROM cdc_embedder.leader").fetchall()
        assert dict(terms) == {bench.slot: 1, other: 1}
        assert [second.stop(), first.stop()] == [0, 0]
    bench.admin.execute("SELECT pg_replication_origin_drop(roname) FROM pg_replication_origin WHERE roname = %s",
                        (f"{other}_1",))  # fmt: skip


def test_without_a_server_none_is_ready_and_afterwards_one_works_and_the_other_waits(pg18: Server) -> None:
    with bench_with(pg18.bindir, "pgoutput", {}) as bench:
        make_model(bench)
        make_documents(bench, 5)
        with instance(bench) as first:
            wait_until_it_is(first, "working")
            with instance(bench) as second:
                wait_until_it_is(second, "waiting")
                bench.server.stop("fast")
                for service in (first, second):
                    wait_until_it_is(service, "none")
                    code, said = readiness(service)
                    assert (code, said["status"]) == (503, "not ready")
                    assert said["reason"]
                bench.server.start()
                bench.admin.close()
                bench.admin = psycopg.connect(bench.dsn_admin, autocommit=True)
                until(
                    lambda: (
                        sorted(readiness(service)[1]["role"] for service in (first, second)) == ["waiting", "working"]
                    ),
                    "they never shared the work again",
                    lambda: [readiness(service) for service in (first, second)],
                )
                bench.admin.execute("UPDATE documents SET body = 'after it ' || id")
                wait_caught_up(bench)
                assert assert_every_vector_is_of_its_text(bench) == 5


def test_one_that_finishes_its_batch_before_it_stops_is_not_ready(bench18: Bench) -> None:
    make_model(bench18, delay_s=3)
    make_documents(bench18, 1, configure=False)
    with instance(bench18) as service:
        wait_until_it_is(service, "working")
        configure_documents(bench18)
        service.wait_for_log("is served: model")
        until(lambda: one(bench18.admin, "SELECT count(*) FROM cdc_embedder.in_flight"), "the model was never called")
        service.signal(signal.SIGTERM)
        wait_until_it_is(service, "none")
        assert readiness(service) == (
            503,
            {"status": "not ready", "role": "none", "slot": bench18.slot, "reason": "stopping"},
        )
        assert service.wait() == 0
    assert assert_every_vector_is_of_its_text(bench18) == 1


@pytest_asyncio.fixture
async def session(bench18: Bench) -> AsyncIterator[Connection]:
    """A session of an instance; patient, so that what it waits for is seen."""
    connection = await connect(bench18.dsn_service, "test", lock_timeout="60000")
    yield connection
    await connection.close()


async def write_under(session: Connection, bench: Bench, term: int) -> set[int]:
    """Write a vector to the only row, as the leader with that term would."""
    [column] = await catalog.load(session, bench.slot)
    [(_, row)] = await Fetch(session, column).rows([("1",)])
    vector = np.zeros((1, 8), np.float32)
    vector[0, 0] = 1
    write = Write(("1",), row.fingerprint or b"", has_vector=True)
    writer = WriteBack(session, column, Term(bench.slot, term))
    return await writer.write([write], vector)


async def wait_until_it_waits(bench: Bench, session: Connection, task: asyncio.Task[Any]) -> None:
    """Returns when the task waits for a lock on that session, or has failed."""
    waits, pid = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = %s", session.info.backend_pid
    await asyncio.to_thread(until, lambda: task.done() or one(bench.admin, waits, pid), "it did not wait")
    assert not task.done(), task.result()


def stored(bench: Bench) -> Any:
    return one(bench.admin, "SELECT embedding::real[] FROM documents")


@pytest.mark.asyncio
async def test_a_write_of_an_earlier_term_changes_nothing(bench18: Bench, session: Connection) -> None:
    make_model(bench18)
    make_documents(bench18, 1)
    assert await write_under(session, bench18, 1) == set()
    assert await requests.take_term(session, bench18.slot, "first") == 1
    assert await requests.take_term(session, "another_slot", "other") == 1
    assert await requests.take_term(session, bench18.slot, "second") == 2
    assert await write_under(session, bench18, 1) == set()
    assert stored(bench18) is None
    assert one(bench18.admin, "SELECT count(*) FROM cdc_embedder.ledger_1") == 0
    assert await write_under(session, bench18, 2) == {0}
    assert stored(bench18) == [1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.asyncio
async def test_a_write_that_meets_a_taking_over_waits_and_changes_nothing(bench18: Bench, session: Connection) -> None:
    make_model(bench18)
    make_documents(bench18, 1)
    term = await requests.take_term(session, bench18.slot, "first")
    with psycopg.connect(bench18.dsn_service) as successor:
        successor.execute("UPDATE cdc_embedder.leader SET term = term + 1")
        writing = asyncio.create_task(write_under(session, bench18, term))
        await wait_until_it_waits(bench18, session, writing)
        successor.commit()
        assert await writing == set()
    assert stored(bench18) is None


@pytest.mark.asyncio
async def test_a_term_is_not_taken_before_what_its_predecessor_writes_is_done(
    bench18: Bench, session: Connection
) -> None:
    make_model(bench18)
    make_documents(bench18, 1)
    term = await requests.take_term(session, bench18.slot, "first")
    predecessor = await connect(bench18.dsn_service, "test")
    async with predecessor.transaction():
        assert await write_under(predecessor, bench18, term) == {0}
        taking = asyncio.create_task(requests.take_term(session, bench18.slot, "second"))
        await wait_until_it_waits(bench18, session, taking)
    assert await taking == term + 1
    await predecessor.close()
    assert stored(bench18) is not None
