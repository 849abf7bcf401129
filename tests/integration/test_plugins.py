"""Both output plugins tell one workload alike, read as the service reads them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from cdc_embedder.embedded import Server
from cdc_embedder.wal import pgoutput, wal2json
from cdc_embedder.wal.messages import Commit, Insert, Message, Update
from cdc_embedder.wal.stream import Decoder, ReplicationStream
from tests.capture import CHANGES, SETUP, TABLES, meaning, run_workload
from tests.capture import options as everything
from tests.servers import Bench

ORIGIN = "capture_origin"

pytestmark = pytest.mark.asyncio


class Workload:
    """A database in which the workload ran, and a slot for each plugin that saw it."""

    def __init__(self, server: Server, plugins: list[str]) -> None:
        self.database = f"t{uuid.uuid4().hex[:12]}"
        self.dsn = server.dsn(self.database)
        self.plugins = plugins
        self._server = server

    def run(self) -> None:
        with psycopg.connect(self._server.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(self.database)))
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(SETUP.encode())
            for plugin in self.plugins:
                connection.execute("SELECT pg_create_logical_replication_slot(%s, %s)", (self.slot(plugin), plugin))
            run_workload(connection)

    def slot(self, plugin: str) -> str:
        return f"{self.database}_{plugin}"

    def drop(self) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            for plugin in self.plugins:
                connection.execute("SELECT pg_drop_replication_slot(%s)", (self.slot(plugin),))
            connection.execute("SELECT pg_replication_origin_drop(%s)", (ORIGIN,))
        with psycopg.connect(self._server.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(self.database)))

    async def read(self, plugin: str, options: dict[str, str]) -> list[Message]:
        """Everything up to the workload's last commit; the slot stays where it is."""
        decoder: Decoder = pgoutput.PgOutputDecoder() if plugin == "pgoutput" else wal2json.Wal2JsonDecoder()
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            ((end,),) = connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchall()
        stream = await ReplicationStream.open(self.dsn, self.slot(plugin), options, decoder)
        messages: list[Message] = []
        try:
            async for batch in stream.batches():
                messages += batch
                if stream.received >= end:
                    return messages
        finally:
            await stream.close(clean=True)
        raise AssertionError("a stream has no end")


@pytest.fixture
def workload(bench: Bench) -> Iterator[Workload]:
    """On the server of 15-wal2json both plugins saw the workload, elsewhere pgoutput."""
    plugins = ["wal2json", "pgoutput"] if bench.plugin == "wal2json" else ["pgoutput"]
    workload = Workload(bench.server, plugins)
    workload.run()
    try:
        yield workload
    finally:
        workload.drop()


def changes(told: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """What is left of `CHANGES` where only inserts and updates are asked for."""
    kept: list[tuple[Any, ...]] = []
    for change in told:
        if change[0] in ("insert", "update") or (change == ("commit",) and kept and kept[-1] != change):
            kept.append(change)
    return kept


async def test_each_plugin_tells_everything_that_happened(workload: Workload) -> None:
    for plugin in workload.plugins:
        options = everything(plugin)
        assert meaning(await workload.read(plugin, options)) == CHANGES


async def test_the_options_of_the_service_bring_inserts_and_updates_and_nothing_else(workload: Workload) -> None:
    for plugin in workload.plugins:
        options = pgoutput.options("changes") if plugin == "pgoutput" else wal2json.options(TABLES)
        messages = await workload.read(plugin, options)
        assert {change[0] for change in meaning(messages)} <= {"insert", "update", "commit", "origin"}
        assert changes(meaning(messages)) == changes(CHANGES)


async def test_both_plugins_agree_on_where_transactions_end(workload: Workload) -> None:
    ends = []
    for plugin in workload.plugins:
        messages = await workload.read(plugin, everything(plugin))
        ends.append({m.end_lsn for m in messages if isinstance(m, Commit)})
    assert ends[-1] <= ends[0], "wal2json also tells of transactions without changes"


async def test_wal2json_without_tables_tells_of_no_change(workload: Workload) -> None:
    if "wal2json" in workload.plugins:
        messages = await workload.read("wal2json", wal2json.options([]))
        assert not [m for m in messages if isinstance(m, Insert | Update)]
        assert [m for m in messages if isinstance(m, Commit)]


async def test_wal2json_leaves_out_a_filtered_origin_and_only_that(workload: Workload) -> None:
    if "wal2json" in workload.plugins:
        with psycopg.connect(workload.dsn) as connection:
            ((origin,),) = connection.execute(
                "SELECT roident::int FROM pg_replication_origin WHERE roname = %s", (ORIGIN,)
            ).fetchall()
        messages = await workload.read("wal2json", wal2json.options(TABLES, filter_origins=[origin]))
        elsewhere = ("insert", "doc", {"id": "10", "body": "from elsewhere", "embedding": None})
        at = CHANGES.index(elsewhere)
        assert changes(meaning(messages)) == changes(CHANGES[:at] + CHANGES[at + 2 :])
