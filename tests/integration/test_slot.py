"""The replication slot against real servers: made whole or not at all, and every refusal explained."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import psycopg
import pytest
from psycopg.rows import TupleRow

from cdc_embedder.errors import Misconfigured, Problem, SlotBusy, Temporary
from cdc_embedder.rows import session
from cdc_embedder.wal import pgoutput, slot, wal2json
from cdc_embedder.wal.diagnosis import propose
from cdc_embedder.wal.slot import PluginRefused, SlotLost
from cdc_embedder.wal.stream import Decoder, ReplicationStream
from tests.integration.test_stream import until
from tests.servers import Bench

pytestmark = pytest.mark.asyncio

Connection = psycopg.AsyncConnection[TupleRow]


@asynccontextmanager
async def service(bench: Bench) -> AsyncIterator[Connection]:
    """A session as the service has it: least privileges, its timeouts, raw parameters."""
    connection = await session.connect(bench.dsn_service, "test")
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def reading(bench: Bench, name: str | None = None) -> AsyncIterator[ReplicationStream]:
    decoder: Decoder = pgoutput.PgOutputDecoder()
    options = pgoutput.options(bench.slot)
    if bench.plugin == "wal2json":
        options, decoder = wal2json.options([]), wal2json.Wal2JsonDecoder()
    stream = await ReplicationStream.open(bench.dsn_service, name or bench.slot, options, decoder)
    try:
        yield stream
    finally:
        await stream.close(clean=False)


@contextmanager
def server_setting(bench: Bench, name: str, value: str) -> Iterator[None]:
    """ALTER SYSTEM and back again; the server tells when it has read it."""
    bench.admin.execute(f"ALTER SYSTEM SET {name} = {value}".encode())
    reload(bench)
    try:
        yield
    finally:
        bench.admin.execute(f"ALTER SYSTEM RESET {name}".encode())
        reload(bench)


def reload(bench: Bench) -> None:
    loaded = "SELECT pg_conf_load_time()"
    before = bench.admin.execute(loaded).fetchone()
    bench.admin.execute("SELECT pg_reload_conf()")
    while bench.admin.execute(loaded).fetchone() == before:
        pass


def slots(bench: Bench) -> list[str]:
    found = bench.admin.execute("SELECT slot_name FROM pg_replication_slots WHERE database = current_database()")
    return [name for (name,) in found.fetchall()]


def remedied(problem: Problem, *parts: str) -> None:
    for part in parts:
        assert part in problem.sentence


async def test_a_new_slot_is_as_it_was_asked_for(bench: Bench) -> None:
    async with service(bench) as connection:
        assert await slot.inspect(connection, bench.slot) is None
        assert await slot.create(connection, bench.slot, bench.plugin) == bench.plugin
        made = await slot.inspect(connection, bench.slot)
        assert made is not None
        assert (made.name, made.plugin, made.database) == (bench.slot, bench.plugin, bench.database)
        assert (made.active, made.active_pid, made.lost, made.logical) == (False, None, False, True)
        assert made.confirmed_flush_lsn is not None
        assert made.restart_lsn is not None
        assert made.restart_lsn <= made.confirmed_flush_lsn
        assert made.failover is (connection.info.server_version >= 170000)
        async with reading(bench):
            active = await slot.inspect(connection, bench.slot)
            assert active is not None
            assert active.active
            assert active.active_pid
        assert await slot.drop(connection, bench.slot) is True
        assert await slot.drop(connection, bench.slot) is False
        assert slots(bench) == []


async def test_the_plugin_is_chosen_by_what_the_server_has(bench: Bench) -> None:
    async with service(bench) as connection:
        expected = "wal2json" if bench.server.bindir.joinpath("../lib/wal2json.so").exists() else "pgoutput"
        assert await slot.create(connection, bench.slot, "auto") == expected
        assert slots(bench) == [bench.slot]


async def test_a_plugin_that_the_server_has_and_does_not_allow_is_not_chosen(listing: Bench) -> None:
    async with service(listing) as connection:
        with server_setting(listing, "output_plugin_libraries", "pgoutput"):
            assert await slot.create(connection, listing.slot, "auto") == "pgoutput"
            assert slots(listing) == [listing.slot]


async def test_a_plugin_that_is_not_allowed_is_explained_with_the_statement_that_allows_it(listing: Bench) -> None:
    async with service(listing) as connection:
        with server_setting(listing, "output_plugin_libraries", "pgoutput, test_decoding"):
            with pytest.raises(PluginRefused) as raised:
                await slot.create(connection, listing.slot, "wal2json")
            remedied(
                raised.value,
                "does not allow",
                "ALTER SYSTEM SET output_plugin_libraries = pgoutput, test_decoding, wal2json",
            )
            assert raised.value.sqlstate == "42501"
            assert slots(listing) == []


async def test_a_slot_whose_plugin_is_refused_by_now_is_explained(listing: Bench) -> None:
    async with service(listing) as connection:
        await slot.create(connection, listing.slot, listing.plugin)
        others = "pgoutput" if listing.plugin == "wal2json" else "test_decoding"
        with server_setting(listing, "output_plugin_libraries", others), pytest.raises(PluginRefused) as raised:
            async with reading(listing):
                pass
        remedied(raised.value, listing.plugin)


async def test_a_plugin_that_is_allowed_and_not_installed_is_explained(listing: Bench) -> None:
    async with service(listing) as connection:
        with (
            server_setting(listing, "output_plugin_libraries", "pgoutput, no_such_plugin"),
            pytest.raises(PluginRefused, match="no output plugin no_such_plugin") as raised,
        ):
            await slot.create(connection, listing.slot, "no_such_plugin")
        assert raised.value.sqlstate == "58P01"
        assert slots(listing) == []


async def test_an_open_transaction_is_named_and_no_slot_is_left(bench: Bench) -> None:
    with psycopg.connect(bench.dsn_admin, application_name="long report") as other:
        other.execute("SELECT pg_current_xact_id()")
        async with service(bench) as connection:
            with pytest.raises(Temporary, match=rf"pid {other.info.backend_pid} .*long report") as raised:
                await slot.create(connection, bench.slot, bench.plugin, timeout_s=0.5)
            remedied(raised.value, "pg_terminate_backend")
            assert slots(bench) == []
            other.rollback()
            assert await slot.blockers(connection) == []
            assert await slot.create(connection, bench.slot, bench.plugin) == bench.plugin


async def test_creation_outlasts_the_sessions_own_timeouts(bench: Bench) -> None:
    """The service's sessions have a lock_timeout, and the wait for a transaction counts as one for a lock."""
    with psycopg.connect(bench.dsn_admin) as other:
        other.execute("SELECT pg_current_xact_id()")
        async with service(bench) as connection:
            await connection.execute("SET lock_timeout = 50")
            await connection.execute("SET statement_timeout = 50")
            creating = asyncio.create_task(slot.create(connection, bench.slot, bench.plugin))
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = %s"
            pid = connection.info.backend_pid
            await until(lambda: bench.admin.execute(waiting, (pid,)).fetchone() != (0,))
            await asyncio.sleep(0.2)
            other.rollback()
            assert await creating == bench.plugin
            ((timeout,),) = await (await connection.execute("SHOW lock_timeout")).fetchall()
            assert timeout == "50ms"


async def test_a_forgotten_prepared_transaction_is_named(bench: Bench) -> None:
    with psycopg.connect(bench.dsn_admin, autocommit=True) as other:
        other.execute(f"BEGIN; SELECT pg_current_xact_id(); PREPARE TRANSACTION '{bench.database}'".encode())
        try:
            async with service(bench) as connection:
                (sentence,) = await slot.blockers(connection)
                assert f"the prepared transaction '{bench.database}'" in sentence
        finally:
            other.execute(f"ROLLBACK PREPARED '{bench.database}'".encode())


async def test_a_role_without_the_right_is_explained_at_creation_and_at_start(bench: Bench) -> None:
    async with service(bench) as connection:
        await slot.create(connection, bench.slot, bench.plugin)
        bench.admin.execute("ALTER ROLE cdc_service NOREPLICATION")
        try:
            with pytest.raises(Misconfigured) as raised:
                await slot.create(connection, f"{bench.slot}_2", bench.plugin)
            remedied(raised.value, "cdc_service", "ALTER ROLE", "REPLICATION")
            with pytest.raises(Misconfigured) as raised:
                async with reading(bench):
                    pass
            remedied(raised.value, "cdc_service", "ALTER ROLE", "REPLICATION")
        finally:
            bench.admin.execute("ALTER ROLE cdc_service REPLICATION")


async def test_a_server_without_free_slots_is_explained(bench: Bench) -> None:
    ((free,),) = bench.admin.execute(
        "SELECT current_setting('max_replication_slots')::int - count(*) FROM pg_replication_slots"
    ).fetchall()
    made = []
    async with service(bench) as connection:
        try:
            for number in range(free):
                made.append(f"{bench.slot}_{number}")
                bench.admin.execute("SELECT pg_create_physical_replication_slot(%s)", (made[-1],))
            with pytest.raises(Misconfigured) as raised:
                await slot.create(connection, bench.slot, bench.plugin)
            remedied(raised.value, "replication slots are in use", "raise max_replication_slots")
            assert raised.value.sqlstate == "53400"
        finally:
            for name in made:
                bench.admin.execute("SELECT pg_drop_replication_slot(%s)", (name,))


async def test_a_slot_of_another_database_is_refused_with_another_name(bench: Bench) -> None:
    with psycopg.connect(bench.server.dsn("postgres"), autocommit=True) as other:
        other.execute("SELECT pg_create_logical_replication_slot(%s, %s)", (bench.slot, bench.plugin))
        try:
            with pytest.raises(Misconfigured) as raised:
                async with reading(bench):
                    pass
            remedied(raised.value, "belongs to database 'postgres'", f"--slot {bench.slot}_{bench.database}")
        finally:
            other.execute("SELECT pg_drop_replication_slot(%s)", (bench.slot,))


async def test_a_physical_slot_of_that_name_is_refused(bench: Bench) -> None:
    bench.admin.execute("SELECT pg_create_physical_replication_slot(%s)", (bench.slot,))
    try:
        with pytest.raises(Misconfigured, match="is a physical one"):
            async with reading(bench):
                pass
    finally:
        bench.admin.execute("SELECT pg_drop_replication_slot(%s)", (bench.slot,))


async def test_a_missing_slot_has_to_be_made_anew(bench: Bench) -> None:
    with pytest.raises(SlotLost, match="does not exist"):
        async with reading(bench):
            pass


async def test_a_slot_that_the_server_gave_up_has_to_be_made_anew(bench: Bench) -> None:
    async with service(bench) as connection:
        await slot.create(connection, bench.slot, bench.plugin)
        with server_setting(bench, "max_slot_wal_keep_size", "'1MB'"):
            for _ in range(3):
                bench.admin.execute("SELECT pg_logical_emit_message(false, 'x', 'x')")
                bench.admin.execute("SELECT pg_switch_wal()")
            bench.admin.execute("CHECKPOINT")
            found = await slot.inspect(connection, bench.slot)
            assert found is not None
            assert found.lost
            with pytest.raises(SlotLost, match="gave up") as raised:
                async with reading(bench):
                    pass
            assert raised.value.sqlstate == "55000"
        assert await slot.drop(connection, bench.slot)


async def test_a_slot_in_use_is_not_dropped(bench: Bench) -> None:
    async with service(bench) as connection:
        await slot.create(connection, bench.slot, bench.plugin)
        async with reading(bench):
            with pytest.raises(SlotBusy, match="in use by pid"):
                await slot.drop(connection, bench.slot, timeout_s=0.3)
        assert await slot.drop(connection, bench.slot)


async def test_a_name_that_is_taken_or_impossible_is_explained(bench: Bench) -> None:
    async with service(bench) as connection:
        with pytest.raises(Misconfigured, match="cannot be the name"):
            await slot.create(connection, "Not-A-Name", bench.plugin)
        await slot.create(connection, bench.slot, bench.plugin)
        with pytest.raises(Temporary, match="somebody else"):
            await slot.create(connection, bench.slot, bench.plugin)


async def test_a_server_that_logs_too_little_is_explained(bench: Bench) -> None:
    bench.admin.execute("ALTER SYSTEM SET wal_level = replica")
    bench.restart()
    try:
        async with service(bench) as connection:
            with pytest.raises(Misconfigured) as raised:
                await slot.create(connection, bench.slot, bench.plugin)
            remedied(raised.value, "wal_level is replica", "ALTER SYSTEM SET wal_level = logical", "restart")
            assert raised.value.sqlstate == "55000"
    finally:
        bench.admin.execute("ALTER SYSTEM RESET wal_level")
        bench.restart()


@pytest.mark.parametrize(
    ("name", "database", "proposed"),
    [
        ("cdc_embedder", "app", "cdc_embedder_app"),
        ("s", "My-DB é", "s_my_db__"),
        ("x" * 63, "y" * 63, "x" * 22 + "_" + "y" * 40),
    ],
)
async def test_a_proposed_name_is_a_valid_one(name: str, database: str, proposed: str) -> None:
    assert propose(name, database) == proposed
    assert len(proposed) <= 63
