"""What outlives a process: who was with the model (rule 7), who may write (rule 9), how far a scan was (rule 10)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import psycopg
import pytest
import pytest_asyncio

from cdc_embedder import catalog
from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.database_errors import from_database
from cdc_embedder.errors import Temporary
from cdc_embedder.lane import Lane
from cdc_embedder.lsn import LSN
from cdc_embedder.pending import Pending
from cdc_embedder.routing import Route
from cdc_embedder.rows import crashes, requests, scan
from cdc_embedder.rows.crashes import Suspect
from cdc_embedder.rows.fetch import Fetch, Row, Verdict
from cdc_embedder.rows.requests import ScanRequest, Unfinished
from cdc_embedder.rows.session import Connection, connect
from cdc_embedder.rows.writeback import KILLED_THE_PROCESS, Term, Write, WriteBack
from cdc_embedder.watermark import Watermark
from tests.servers import Bench, make_bench

pytestmark = pytest.mark.asyncio

ONE, TWO = b"\x01" * 32, b"\x02" * 32


@pytest.fixture(params=["15", "18"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A fresh database on each server; the plugin makes no difference here."""
    yield from make_bench(request.getfixturevalue(f"pg{request.param}"), "pgoutput")


@pytest_asyncio.fixture
async def session(bench: Bench) -> AsyncIterator[Connection]:
    """A pinned session of the service's role."""
    connection = await connect(bench.dsn_service, "test")
    yield connection
    await connection.close()


@pytest_asyncio.fixture
async def column(bench: Bench, session: Connection) -> EmbeddingColumn:
    """A column of a table with two rows."""
    bench.admin.execute(
        "CREATE TABLE documents (id int PRIMARY KEY, body text, embedding real[]);"
        "INSERT INTO documents VALUES (1, 'one'), (2, 'two');"
        "INSERT INTO cdc_embedder.model (name, backend, dimensions) VALUES ('fake', 'fake', 4)"
    )
    bench.grant("documents", ["id"], ["body"], "embedding")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('documents', '{body}', 'embedding', 'fake')"
    )
    [found] = await catalog.load(session, bench.slot)
    assert found.fault is None
    return found


async def judged(session: Connection, column: EmbeddingColumn, key: str = "1") -> Row:
    [(_, row)] = await Fetch(session, column).rows([(key,)])
    return row


async def written(session: Connection, column: EmbeddingColumn, term: Term, error: str | None = None) -> set[int]:
    """Write a vector for row 1, or that it failed."""
    row = await judged(session, column)
    write = Write(("1",), row.fingerprint or b"", has_vector=error is None, error=error)
    return await WriteBack(session, column, term).write([write], np.full((1, 4), 0.5, np.float32))


async def term(session: Connection, slot: str = "s") -> Term:
    return Term(slot, await requests.take_term(session, slot, "a service"))


def one(bench: Bench, statement: str) -> Any:
    [value] = bench.admin.execute(statement).fetchone()  # type: ignore[misc]
    return value


async def blocked(bench: Bench, session: Connection) -> None:
    """Returns when the session waits for a lock."""
    waits = f"SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = {session.info.backend_pid}"
    while not await asyncio.to_thread(one, bench, waits):
        pass


async def test_what_another_service_left_with_the_model_is_suspected_and_ones_own_is_not(
    bench: Bench, session: Connection, column: EmbeddingColumn
) -> None:
    odd = ("é'\"\\", "NULL")
    await crashes.note(session, bench.slot, "dead", 1, column.id, [(("1",), ONE), (odd, TWO)])
    await crashes.note(session, bench.slot, "dead", 1, column.id, [(("2",), ONE), (odd, TWO)])
    await crashes.note(session, bench.slot, "alive", 1, column.id, [(("3",), ONE)])
    await crashes.note(session, "another_slot", "other", 1, column.id, [(("4",), ONE)])
    for _ in range(2):
        found = await crashes.suspects(session, bench.slot, "alive")
        assert found == {column.id: {("2",): Suspect(ONE, False), odd: Suspect(TWO, False)}}
    await crashes.clear(session, bench.slot, "alive")
    assert one(bench, "SELECT array_agg(service) FROM cdc_embedder.in_flight") == ["other"]


async def test_who_was_there_again_with_the_same_text_is_guilty_until_sentenced_or_acquitted(
    bench: Bench, session: Connection, column: EmbeddingColumn
) -> None:
    async def dies(service: str, key: str, fingerprint: bytes) -> dict[Any, Suspect]:
        await crashes.note(session, bench.slot, service, 1, column.id, [((key,), fingerprint)])
        return (await crashes.suspects(session, bench.slot, "next"))[column.id]

    assert await dies("first", "1", ONE) == {("1",): Suspect(ONE, False)}
    assert await dies("second", "1", TWO) == {("1",): Suspect(TWO, False)}, "another text has not killed yet"
    assert await dies("third", "2", ONE) == {("1",): Suspect(TWO, False), ("2",): Suspect(ONE, False)}
    guilty = {("1",): Suspect(TWO, True), ("2",): Suspect(ONE, False)}
    assert await dies("fourth", "1", TWO) == guilty
    assert await dies("fifth", "3", ONE) == guilty | {("3",): Suspect(ONE, False)}, "who was not there stays guilty"
    await crashes.sentence(session, column.id, [("1",)])
    await crashes.acquit(session, column.id, [("2",), ("3",), ("never",)])
    await crashes.acquit(session, column.id, [])
    assert await crashes.suspects(session, bench.slot, "next") == {column.id: {("1",): Suspect(TWO, False)}}
    assert await dies("sixth", "1", TWO) == {("1",): Suspect(TWO, True)}


async def test_a_key_that_two_services_left_is_suspected_once_and_a_column_that_is_gone_is_not(
    bench: Bench, session: Connection, column: EmbeddingColumn
) -> None:
    for service in ("a", "b"):
        await crashes.note(session, bench.slot, service, 1, column.id, [(("1",), ONE), (("1",), ONE)])
    await crashes.note(session, bench.slot, "c", 1, column.id + 1, [(("1",), ONE)])
    assert await crashes.suspects(session, bench.slot, "me") == {column.id: {("1",): Suspect(ONE, False)}}
    bench.admin.execute("DELETE FROM cdc_embedder.embedding_column")
    assert await crashes.suspects(session, bench.slot, "me") == {}
    assert one(bench, "SELECT count(*) FROM cdc_embedder.in_flight") == 0


async def test_rule_7_a_row_that_killed_the_process_rests_a_minute_and_then_for_good(
    bench: Bench, session: Connection, column: EmbeddingColumn
) -> None:
    own = await term(session)
    retry_in = "SELECT extract(epoch FROM retry_at - clock_timestamp()) FROM cdc_embedder.ledger_1"
    assert await written(session, column, own, KILLED_THE_PROCESS) == {0}
    assert 50 < one(bench, retry_in) <= 60
    row = await judged(session, column)
    assert (row.verdict, row.failures, await scan.due(session, column, 10)) == (Verdict.DONE, 1, [])
    bench.admin.execute("UPDATE cdc_embedder.ledger_1 SET retry_at = clock_timestamp()")
    assert ((await judged(session, column)).verdict, await scan.due(session, column, 10)) == (Verdict.EMBED, [("1",)])
    assert await written(session, column, own, KILLED_THE_PROCESS) == {0}
    assert one(bench, retry_in) is None
    row = await judged(session, column)
    assert (row.verdict, row.failures, await scan.due(session, column, 10)) == (Verdict.DONE, 2, [])
    assert (await scan.page(session, column, None)).wanted == [("2",)], "no scan tries it either"
    seen = bench.admin.execute("SELECT key, error, attempts, retry_at FROM cdc_embedder.failed").fetchall()
    assert seen == [({"id": 1}, KILLED_THE_PROCESS, 2, None)]


@pytest.mark.parametrize("how", ["asked for", "another text", "another generation"])
async def test_a_row_that_was_set_aside_for_good_comes_back_when_asked_for_or_with_another_text(
    bench: Bench, session: Connection, column: EmbeddingColumn, how: str
) -> None:
    own = await term(session)
    for _ in range(2):
        assert await written(session, column, own, KILLED_THE_PROCESS) == {0}
    if how == "asked for":
        assert one(bench, "SELECT cdc_embedder.retry_failed('documents')") == 1
        assert await scan.due(session, column, 10) == [("1",)]
    elif how == "another text":
        bench.admin.execute("UPDATE documents SET body = 'harmless' WHERE id = 1")
    else:
        bench.admin.execute("UPDATE cdc_embedder.model SET document_prompt = 'passage: '")
        [column] = await catalog.load(session, bench.slot)
    assert (await judged(session, column)).verdict is Verdict.EMBED
    assert await written(session, column, own) == {0}
    assert bench.admin.execute("SELECT state, attempts, error, retry_at FROM cdc_embedder.ledger_1").fetchall() == [
        ("current", 0, None, None)
    ]


async def test_rule_9_a_write_back_of_an_older_term_changes_nothing(
    bench: Bench, session: Connection, column: EmbeddingColumn
) -> None:
    first = await term(session)
    assert await written(session, column, first) == {0}
    before = bench.admin.execute("SELECT embedding, xmin::text FROM documents WHERE id = 1").fetchone()
    bench.admin.execute("DELETE FROM cdc_embedder.ledger_1")
    second = await term(session)
    assert (second.slot, second.number) == (first.slot, first.number + 1)
    for old in (first, replace(second, slot="never taken"), replace(second, number=second.number + 1)):
        assert await written(session, column, old) == set()
        assert await written(session, column, old, "refused") == set()
    assert bench.admin.execute("SELECT embedding, xmin::text FROM documents WHERE id = 1").fetchone() == before
    assert one(bench, "SELECT count(*) FROM cdc_embedder.ledger_1") == 0
    assert await written(session, column, second) == {0}
    assert await term(session, "another slot") == Term("another slot", 1)
    assert await written(session, column, second) == {0}, "every slot has its own terms"


async def test_rule_9_a_term_begins_after_the_write_back_in_flight(
    bench: Bench, session: Connection, column: EmbeddingColumn
) -> None:
    first = await term(session)
    other = await connect(bench.dsn_service, "test other")
    async with session.transaction():
        assert await written(session, column, first) == {0}
        with pytest.raises(psycopg.errors.LockNotAvailable) as refused:
            await requests.take_term(other, "s", "another service")
        assert isinstance(from_database(refused.value, "taking over"), Temporary)
        await other.execute("SET lock_timeout = 0")
        taking = asyncio.create_task(requests.take_term(other, "s", "another service"))
        await blocked(bench, other)
    assert await taking == first.number + 1
    assert one(bench, "SELECT embedding IS NOT NULL FROM documents WHERE id = 1")
    bench.admin.execute("UPDATE documents SET body = 'changed'")
    assert await written(session, column, first) == set()
    await other.close()


async def test_rule_9_a_write_back_that_waited_for_a_new_term_finds_its_own_over(
    bench: Bench, session: Connection, column: EmbeddingColumn
) -> None:
    """Its snapshot is older than the new term: the row's lock tells it."""
    first = await term(session)
    await session.execute("SET lock_timeout = 0")
    other = await connect(bench.dsn_service, "test other")
    async with other.transaction():
        await requests.take_term(other, "s", "another service")
        row = await judged(session, column)
        writing = asyncio.create_task(
            WriteBack(session, column, first).write(
                [Write(("1",), row.fingerprint or b"", has_vector=True)], np.full((1, 4), 0.5, np.float32)
            )
        )
        await blocked(bench, session)
    assert await writing == set()
    assert one(bench, "SELECT embedding IS NULL FROM documents WHERE id = 1")
    await other.close()


async def test_a_slot_is_elsewhere_when_it_was_served_but_not_here(bench: Bench, session: Connection) -> None:
    assert not await requests.elsewhere(session, "s"), "never served"
    await requests.progress(session, "s", LSN(30), LSN(10), LSN(20), "me")
    assert not await requests.elsewhere(session, "s")
    moves = (
        "system_identifier = system_identifier + 1",
        "timeline = timeline + 1",
        "database_oid = (database_oid::int8 + 1)::oid",
    )
    for move in moves:
        bench.admin.execute(f"UPDATE cdc_embedder.progress SET {move}")
        assert await requests.elsewhere(session, "s"), move
        assert not await requests.elsewhere(session, "another")
        await requests.progress(session, "s", LSN(3), LSN(1), LSN(2), "me")
        assert not await requests.elsewhere(session, "s"), "this place is known by now, and the other is still noted"
        bench.admin.execute("DELETE FROM cdc_embedder.progress WHERE received = '0/1E'")
        await requests.progress(session, "s", LSN(30), LSN(10), LSN(20), "me")
    known = bench.admin.execute(
        "SELECT received - '0/0', embedded_through - '0/0', confirmed - '0/0' FROM cdc_embedder.progress"
    )
    assert known.fetchall() == [(30, 10, 20)]


async def test_the_timeline_is_the_one_that_the_server_writes_on(bench: Bench, session: Connection) -> None:
    await requests.progress(session, "s", LSN(3), LSN(1), LSN(2), "me")
    assert one(bench, "SELECT timeline = (pg_control_checkpoint()).timeline_id FROM cdc_embedder.progress")
    await requests.progress(session, "s", LSN(2), LSN(0), LSN(1), "another")
    assert bench.admin.execute(
        "SELECT received - '0/0', embedded_through - '0/0', confirmed - '0/0', service FROM cdc_embedder.progress"
    ).fetchall() == [(3, 1, 2, "another")], "a position does not go back"


def lane_of(column: EmbeddingColumn, counted: bool) -> Lane:
    pending = Pending(Watermark())
    lane = Lane(column, pending, Route(column.table_oid, column.relations, ("id",), pending))
    lane.scan.counted = counted
    return lane


async def requested(session: Connection, column: EmbeddingColumn) -> ScanRequest:
    return (await requests.scans(session))[column.id]


def unfinished(request: str, generation: int = 1) -> Unfinished:
    return Unfinished(request, generation, ["id integer"], ["é'\"\\"], True, [5, 4, 3, 2, 1])


async def test_a_pass_that_was_broken_off_goes_on_where_it_was(session: Connection, column: EmbeddingColumn) -> None:
    request, none = await requests.scan_started(session, column.id)
    assert none is None
    position = unfinished(request)
    await requests.scan_checkpoint(session, column.id, position)
    assert await requests.scan_started(session, column.id) == (request, position)
    assert (await requested(session, column)).wanted
    await requests.want_scan(session, [column.id], "again", uncover=False)
    assert await requests.scan_started(session, column.id) == (request, position), "an open request stays as it is"
    await requests.scan_finished(session, lane_of(column, counted=True), request)
    found = await requested(session, column)
    assert (found.wanted, found.started, found.counted) == (False, True, True)
    assert await requests.scan_started(session, column.id) == (request, None)


async def test_a_pass_that_answered_another_request_is_not_gone_on_with(
    bench: Bench, session: Connection, column: EmbeddingColumn
) -> None:
    request, _ = await requests.scan_started(session, column.id)
    await requests.scan_checkpoint(session, column.id, unfinished("2020-01-01 00:00:00+00"))
    assert one(bench, "SELECT unfinished IS NULL FROM cdc_embedder.scan")
    await requests.scan_checkpoint(session, column.id, unfinished(request))
    bench.admin.execute("UPDATE cdc_embedder.scan SET requested_at = requested_at + interval '1 s'")
    [_, none] = await requests.scan_started(session, column.id)
    assert none is None


@pytest.mark.parametrize("how", ["events were missed", "somebody asked", "another generation"])
async def test_a_new_request_voids_the_pass_that_was_broken_off(
    bench: Bench, session: Connection, column: EmbeddingColumn, how: str
) -> None:
    request, _ = await requests.scan_started(session, column.id)
    await requests.scan_checkpoint(session, column.id, unfinished(request))
    if how == "events were missed":
        await requests.want_scan(session, [column.id], "missed")
    elif how == "somebody asked":
        bench.admin.execute("SELECT cdc_embedder.reconcile('documents')")
    else:
        bench.admin.execute("UPDATE cdc_embedder.model SET document_prompt = 'passage: '")
    await requests.scan_checkpoint(session, column.id, unfinished(request))  # of the pass that is void
    again, none = await requests.scan_started(session, column.id)
    assert (again != request, none) == (True, None)
    await requests.scan_finished(session, lane_of(column, counted=True), request)
    assert (await requested(session, column)).wanted, "the pass that ends answers the older request"


async def test_a_doubt_that_comes_while_the_first_scan_ends_is_not_lost(
    session: Connection, column: EmbeddingColumn
) -> None:
    request, _ = await requests.scan_started(session, column.id)
    await requests.want_scan(session, [column.id], "missed")
    await requests.scan_finished(session, lane_of(column, counted=True), request)
    found = await requested(session, column)
    assert (found.wanted, found.counted) == (True, False)


async def test_missed_events_void_what_a_scan_has_counted_and_a_routine_request_does_not(
    session: Connection, column: EmbeddingColumn
) -> None:
    request, _ = await requests.scan_started(session, column.id)
    await requests.scan_finished(session, lane_of(column, counted=True), request)
    await requests.want_scan(session, [column.id], "routine", uncover=False)
    found = await requested(session, column)
    assert (found.wanted, found.counted) == (True, True)
    await requests.want_scan(session, [column.id], "missed")
    found = await requested(session, column)
    assert (found.wanted, found.counted) == (True, False)


async def test_a_scan_that_nobody_asked_for_is_noted_and_ends_too(
    bench: Bench, session: Connection, column: EmbeddingColumn
) -> None:
    bench.admin.execute("UPDATE cdc_embedder.scan SET requested_at = NULL")
    request, none = await requests.scan_started(session, column.id)
    assert none is None
    await requests.scan_checkpoint(session, column.id, unfinished(request))
    assert await requests.scan_started(session, column.id) == (request, unfinished(request))
    await requests.scan_finished(session, lane_of(column, counted=True), request)
    assert one(bench, "SELECT finished_at IS NOT NULL AND unfinished IS NULL FROM cdc_embedder.scan")
    assert await requests.scan_started(session, column.id + 1) == ("epoch", None), "the column is gone"


async def test_the_storage_of_a_table_is_another_after_a_rewrite_and_is_remembered(
    bench: Bench, session: Connection, column: EmbeddingColumn
) -> None:
    assert (await requested(session, column)).storage is None
    await requests.note_storage(session, column)
    assert (await requested(session, column)).storage == column.storage
    bench.admin.execute("VACUUM FULL documents")
    [again] = await catalog.load(session, bench.slot)
    assert again.storage != column.storage
    bench.admin.execute("INSERT INTO documents VALUES (3, 'three'); ALTER TABLE documents ADD more int")
    assert [one.storage for one in await catalog.load(session, bench.slot)] == [again.storage]


async def test_the_publication_is_made_where_it_is_missing_and_lets_inserts_and_updates_pass(
    bench: Bench, session: Connection
) -> None:
    assert not await requests.make_publication(session, bench.slot)
    bench.admin.execute(f"DROP PUBLICATION {bench.slot}; GRANT CREATE ON DATABASE {bench.database} TO cdc_service")
    assert await requests.make_publication(session, bench.slot)
    assert bench.admin.execute(
        "SELECT pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot, puballtables FROM pg_publication"
        " WHERE pubname = %s",
        (bench.slot,),
    ).fetchall() == [(True, True, False, False, True, False)]
