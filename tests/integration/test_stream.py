"""The replication stream against real servers: what arrives, what is confirmed, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdc_embedder.errors import ServerGone, SlotBusy
from cdc_embedder.lsn import LSN, ZERO
from cdc_embedder.wal import pgoutput, slot, wal2json
from cdc_embedder.wal.diagnosis import SlotStuck
from cdc_embedder.wal.messages import Begin, Commit, Insert, Message
from cdc_embedder.wal.stream import BATCH_MESSAGES, Decoder, ReplicationStream
from tests.servers import Bench

pytestmark = pytest.mark.asyncio


async def ready(bench: Bench, columns: str = "id bigint PRIMARY KEY, body text") -> None:
    """A table `doc` that the slot delivers."""
    bench.admin.execute(f"CREATE TABLE doc ({columns})")
    bench.admin.execute(f"ALTER PUBLICATION {bench.slot} ADD TABLE doc")
    async with await psycopg.AsyncConnection.connect(bench.dsn_service, autocommit=True) as connection:
        assert await slot.create(connection, bench.slot, bench.plugin) == bench.plugin


async def open_stream(bench: Bench, dsn: str | None = None, **arguments: Any) -> ReplicationStream:
    decoder: Decoder = pgoutput.PgOutputDecoder()
    options = pgoutput.options(bench.slot)
    if bench.plugin == "wal2json":
        options, decoder = wal2json.options([("public", "doc")]), wal2json.Wal2JsonDecoder()
    return await ReplicationStream.open(dsn or bench.dsn_service, bench.slot, options, decoder, **arguments)


@asynccontextmanager
async def streaming(bench: Bench, dsn: str | None = None, **arguments: Any) -> AsyncIterator[ReplicationStream]:
    stream = await open_stream(bench, dsn, **arguments)
    try:
        yield stream
    finally:
        await stream.close(clean=False)


async def read_until(stream: ReplicationStream, enough: Callable[[list[Message]], bool]) -> list[Message]:
    messages: list[Message] = []
    async for batch in stream.batches():
        messages += batch
        if enough(messages):
            return messages
    raise AssertionError("a stream has no end")


def has_row(key: str) -> Callable[[list[Message]], bool]:
    """Whether a row with this key, and its commit, arrived."""

    def enough(messages: list[Message]) -> bool:
        return key in keys(messages) and isinstance(messages[-1], Commit)

    return enough


def keys(messages: list[Message]) -> list[str | None]:
    return [message.values["id"] for message in messages if isinstance(message, Insert)]


def last_commit(messages: list[Message]) -> LSN:
    return [message.end_lsn for message in messages if isinstance(message, Commit)][-1]


def confirmed(bench: Bench) -> LSN:
    return LSN.parse(of_slot(bench, "confirmed_flush_lsn::text"))


def of_slot(bench: Bench, expression: str) -> Any:
    """What pg_replication_slots says about the slot."""
    ((value,),) = bench.admin.execute(
        f"SELECT {expression} FROM pg_replication_slots WHERE slot_name = '{bench.slot}'".encode()
    ).fetchall()
    return value


def last_reply(bench: Bench) -> tuple[Any, ...]:
    """When the walsender heard from us last, and which position was said to be flushed."""
    (row,) = bench.admin.execute(
        "SELECT reply_time, flush_lsn::text FROM pg_stat_replication r"
        "  JOIN pg_replication_slots s ON s.active_pid = r.pid WHERE slot_name = %s",
        (bench.slot,),
    ).fetchall()
    return row


async def until(condition: Callable[[], bool]) -> None:
    """The server changes by itself: there is nobody who could set an event."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def confirm_when_idle(stream: ReplicationStream) -> None:
    """A consumer with nothing outstanding."""
    async for _ in stream.batches():
        stream.confirm(stream.idle_through)


async def test_a_committed_row_arrives_between_its_begin_and_commit(bench: Bench) -> None:
    await ready(bench)
    async with streaming(bench) as stream:
        bench.admin.execute("INSERT INTO doc VALUES (1, 'été')")
        messages = await read_until(stream, has_row("1"))
        begin = next(message for message in messages if isinstance(message, Begin))
        commit = next(message for message in messages if isinstance(message, Commit))
        assert begin.commit_lsn == commit.commit_lsn < commit.end_lsn
        (insert,) = [message for message in messages if isinstance(message, Insert)]
        assert (insert.relation.schema, insert.relation.name) == ("public", "doc")
        assert insert.values == {"id": "1", "body": "été"}


async def test_what_is_confirmed_reaches_the_slot(bench: Bench) -> None:
    await ready(bench)
    async with streaming(bench) as stream:
        bench.admin.execute("INSERT INTO doc VALUES (1)")
        end = last_commit(await read_until(stream, has_row("1")))
        stream.confirm(end)
        await until(lambda: confirmed(bench) == end)


async def test_a_lower_flush_lsn_is_never_sent(bench: Bench) -> None:
    """Rule 1. pg_stat_replication shows what was sent last, whatever the slot makes of it."""
    await ready(bench)
    async with streaming(bench, timeout_s=3.0) as stream:
        bench.admin.execute("INSERT INTO doc VALUES (1)")
        first = last_commit(await read_until(stream, has_row("1")))
        bench.admin.execute("INSERT INTO doc VALUES (2)")
        second = last_commit(await read_until(stream, has_row("2")))
        stream.confirm(second)
        await until(lambda: confirmed(bench) == second)
        stream.confirm(first)
        stream.confirm(ZERO)
        assert stream.confirmed == second
        before = last_reply(bench)
        await until(lambda: last_reply(bench)[0] > before[0])
        assert last_reply(bench)[1] == str(second)


async def test_a_position_that_did_not_arrive_is_refused(bench: Bench) -> None:
    """Rule 1: the server would accept it, and silently skip everything before it."""
    await ready(bench)
    async with streaming(bench) as stream:
        with pytest.raises(ValueError, match="has received"):
            stream.confirm(LSN(1))
        bench.admin.execute("INSERT INTO doc VALUES (1)")
        await read_until(stream, has_row("1"))
        stream.confirm(stream.received)
        with pytest.raises(ValueError, match="has received"):
            stream.confirm(LSN(stream.received + 1))


async def test_what_was_not_confirmed_comes_again_and_nothing_else(bench: Bench) -> None:
    await ready(bench)
    for key in (1, 2, 3):
        bench.admin.execute(f"INSERT INTO doc VALUES ({key})")
    stream = await open_stream(bench)
    messages = await read_until(stream, has_row("3"))
    ends = [message.end_lsn for message in messages if isinstance(message, Commit)]
    stream.confirm(ends[-3])
    await stream.close(clean=True)
    async with streaming(bench) as again:
        assert keys(await read_until(again, has_row("3"))) == ["2", "3"]


async def test_a_clean_close_leaves_the_slot_free_and_up_to_date(bench: Bench) -> None:
    await ready(bench)
    stream = await open_stream(bench)
    bench.admin.execute("INSERT INTO doc VALUES (1)")
    end = last_commit(await read_until(stream, has_row("1")))
    stream.confirm(end)
    bench.admin.execute("INSERT INTO doc SELECT g, repeat('x', 1000) FROM generate_series(2, 20000) g")
    await stream.close(clean=True)
    assert confirmed(bench) == end
    await until(lambda: not of_slot(bench, "active"))


async def test_the_position_follows_wal_of_other_databases(bench: Bench) -> None:
    """An idle database must not pin the log of a busy server."""
    await ready(bench)
    async with streaming(bench, timeout_s=3.0) as stream:
        consumer = asyncio.create_task(confirm_when_idle(stream))
        with psycopg.connect(bench.server.dsn("postgres"), autocommit=True) as other:
            other.execute("CREATE TABLE IF NOT EXISTS elsewhere AS SELECT generate_series(1, 1000)")
            other.execute("DROP TABLE elsewhere")
            (text,) = other.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone() or ("",)
        target = LSN.parse(text)
        await until(lambda: confirmed(bench) >= target)
        consumer.cancel()
        await asyncio.wait([consumer])


async def test_batches_are_bounded(bench: Bench) -> None:
    await ready(bench)
    bench.admin.execute("INSERT INTO doc SELECT generate_series(1, 5000)")
    bench.admin.execute("INSERT INTO doc SELECT g, repeat('x', 100000) FROM generate_series(5001, 5050) g")
    sizes, rows = [], 0
    async with streaming(bench) as stream:
        async for batch in stream.batches():
            sizes.append(len(batch))
            rows += len(keys(batch))
            if rows == 5050:
                break
    assert max(sizes) <= BATCH_MESSAGES + 1, "a begin and its origin may be the last"
    assert sizes[-1] <= 12, "1 MB, and the message that made it full"


async def test_a_consumer_that_does_not_iterate_is_not_taken_for_dead(bench: Bench) -> None:
    """The server has more to send than the sockets hold, and hears of us all the same."""
    await ready(bench)
    bench.admin.execute("INSERT INTO doc SELECT g, repeat('x', 2000) FROM generate_series(1, 20000) g")
    async with streaming(bench, timeout_s=2.0) as stream:
        before = of_slot(bench, "active_pid")
        await asyncio.sleep(5.0)
        assert of_slot(bench, "active_pid") == before
        messages = await read_until(stream, has_row("20000"))
        assert len(keys(messages)) == 20000


async def test_a_second_reader_is_told_who_holds_the_slot(bench: Bench) -> None:
    await ready(bench)
    async with streaming(bench):
        with pytest.raises(SlotBusy, match=f"pid {of_slot(bench, 'active_pid')}") as raised:
            await open_stream(bench)
        assert raised.value.sqlstate == "55006"


async def test_settings_of_role_and_database_do_not_change_the_text_of_keys(bench: Bench) -> None:
    """Rule 12."""
    hostile = {
        "DateStyle": "German",
        "TimeZone": "Asia/Tokyo",
        "extra_float_digits": "-15",
        "bytea_output": "escape",
        "IntervalStyle": "sql_standard",
        "client_encoding": "LATIN1",
        "statement_timeout": "1",
        "idle_session_timeout": "1",
    }
    await ready(bench, "id bytea, t timestamptz, f float8, i interval, é text, PRIMARY KEY (id, t, f, i)")
    try:
        for name, value in hostile.items():
            bench.admin.execute(f"ALTER ROLE cdc_service IN DATABASE {bench.database} SET {name} = '{value}'")
        async with streaming(bench) as stream:
            bench.admin.execute(
                r"INSERT INTO doc VALUES ('\x00ff', '2024-02-03 04:05:06+00', 0.1::float8 + 0.2, '1 day 2:00', '☃')"
            )
            (insert,) = [m for m in await read_until(stream, has_row("\\x00ff")) if isinstance(m, Insert)]
        assert insert.values == {
            "id": "\\x00ff",
            "t": "2024-02-03 04:05:06+00",
            "f": "0.30000000000000004",
            "i": "1 day 02:00:00",
            "é": "☃",
        }
    finally:
        bench.admin.execute(f"ALTER ROLE cdc_service IN DATABASE {bench.database} RESET ALL")


async def test_a_terminated_session_is_a_server_gone_and_nothing_is_lost(bench: Bench) -> None:
    await ready(bench)
    bench.admin.execute("INSERT INTO doc VALUES (1)")
    async with streaming(bench) as stream:
        await read_until(stream, has_row("1"))
        of_slot(bench, "pg_terminate_backend(active_pid)")
        with pytest.raises(ServerGone):
            await read_until(stream, has_row("2"))
    async with streaming(bench) as stream:
        assert keys(await read_until(stream, has_row("1"))) == ["1"]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_server_that_stops_is_not_held_up_by_what_cannot_be_confirmed_yet(bench: Bench, mode: str) -> None:
    """A walsender waits for a confirmation of all it has sent: one that never comes would block a fast stop."""
    await ready(bench)
    bench.admin.execute("INSERT INTO doc VALUES (1)")
    async with streaming(bench) as stream:
        first = last_commit(await read_until(stream, has_row("1")))
        stream.confirm(first)  # a walsender that was never told anything does not wait
        await until(lambda: confirmed(bench) == first)
        bench.admin.execute("INSERT INTO doc VALUES (2)")
        await read_until(stream, has_row("2"))
        restart = asyncio.create_task(asyncio.to_thread(bench.restart, mode))
        with pytest.raises(ServerGone):
            await read_until(stream, has_row("3"))
        await stream.close(clean=False)
        await restart
    async with streaming(bench) as stream:
        # servers before 17 do not write a confirmation down when they stop, and none does when it crashes
        assert keys(await read_until(stream, has_row("2")))[-1] == "2"


async def test_a_server_that_stops_gets_the_confirmation_it_waits_for(bench: Bench) -> None:
    await ready(bench)
    stream = await open_stream(bench)
    bench.admin.execute("INSERT INTO doc VALUES (1)")
    stream.confirm(last_commit(await read_until(stream, has_row("1"))))
    restart = asyncio.create_task(asyncio.to_thread(bench.restart, "fast"))
    with pytest.raises(ServerGone, match="it is stopping"):
        await confirm_when_idle(stream)
    await stream.close(clean=True)
    await restart


async def test_a_publication_that_is_gone_is_reported_and_not_passed_over(bench: Bench) -> None:
    """wal2json needs none; servers before 18 stop the stream, 18 warns and skips."""
    await ready(bench)
    warnings: list[str] = []
    async with streaming(bench, on_warning=warnings.append) as stream:
        bench.admin.execute("INSERT INTO doc VALUES (1)")
        await read_until(stream, has_row("1"))
        bench.admin.execute(f"DROP PUBLICATION {bench.slot}")
        bench.admin.execute("INSERT INTO doc VALUES (2)")
        if bench.plugin == "wal2json":
            assert keys(await read_until(stream, has_row("2"))) == ["2"]
        elif bench.admin.info.server_version < 180000:
            with pytest.raises(SlotStuck, match=bench.slot) as raised:
                await read_until(stream, has_row("2"))
            assert raised.value.sqlstate == "42704"
            assert raised.value.for_ever
        else:
            await read_until(stream, lambda _: bool(warnings))
            assert bench.slot in warnings[0]


async def test_reading_can_be_cancelled_and_the_stream_closed_cleanly(bench: Bench) -> None:
    await ready(bench)
    stream = await open_stream(bench)
    consumer = asyncio.create_task(confirm_when_idle(stream))
    await until(lambda: stream.received > ZERO)
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    await stream.close(clean=True)
    async with streaming(bench):
        pass


async def test_a_connection_that_went_silent_is_given_up(bench: Bench) -> None:
    """Half open: the network swallows everything in both directions, and no error ever shows."""
    await ready(bench)
    async with swallowing_proxy(bench.server.port) as (port, swallow):
        dsn = make_conninfo(bench.dsn_service, host="127.0.0.1", port=str(port))
        async with streaming(bench, dsn, timeout_s=1.0) as stream:
            bench.admin.execute("INSERT INTO doc VALUES (1)")
            await read_until(stream, has_row("1"))
            swallow.set()
            with pytest.raises(ServerGone, match="sent nothing"):
                await read_until(stream, has_row("2"))


async def test_a_silent_server_is_asked_before_it_is_given_up(bench: Bench) -> None:
    """Nothing happens for three timeouts, and the connection stays."""
    await ready(bench)
    async with streaming(bench, timeout_s=1.0) as stream:
        consumer = asyncio.create_task(read_until(stream, has_row("1")))
        await asyncio.sleep(3.5)
        bench.admin.execute("INSERT INTO doc VALUES (1)")
        assert keys(await consumer) == ["1"]


async def test_a_server_that_cannot_be_reached_is_gone(bench: Bench) -> None:
    assert "port" in conninfo_to_dict(bench.dsn_service)
    with pytest.raises(ServerGone):
        await open_stream(bench, make_conninfo(bench.dsn_service, host="127.0.0.1", port="1"))


@asynccontextmanager
async def swallowing_proxy(port: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """Forwards to the server until the event is set; from then on reads everything and passes nothing on."""
    swallow = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if not swallow.is_set():
                    writer.write(data)
                    await writer.drain()
        if not swallow.is_set():  # a goodbye is swallowed too
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        writers.extend((writer, server_writer))
        for pair in ((reader, server_writer), (server_reader, writer)):
            tasks.add(asyncio.create_task(forward(*pair)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], swallow
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.close()
