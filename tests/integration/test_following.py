"""Orders of things that no outside view shows, and that rules rest on."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from cdc_embedder.catalog import SqlEmbed
from cdc_embedder.embedding.base import ModelSpec
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.following import Configuration
from cdc_embedder.lsn import LSN
from cdc_embedder.metering import Meters
from cdc_embedder.pipeline import Pipeline
from cdc_embedder.querying import Queries
from cdc_embedder.routing import Router
from cdc_embedder.rows.session import Connection, connect
from cdc_embedder.rows.writeback import Term
from cdc_embedder.scanning import Pass
from cdc_embedder.spilling import Spiller
from cdc_embedder.suspecting import Watch
from cdc_embedder.wal.messages import Begin, Commit, Insert, Relation
from tests.servers import Bench

pytestmark = pytest.mark.asyncio


async def test_rule_10_changes_are_routed_before_the_barrier_is_taken(bench18: Bench) -> None:
    """A change that is passed over while a column comes to be served must be of a transaction before its barrier."""
    make_column(bench18)
    seen: list[tuple[bool, bool]] = []
    offered: list[tuple[set[str], bool]] = []

    def changed() -> None:
        seen.extend((lane.served, lane.barrier is not None) for lane in configuration.lanes.values())

    async with await connect(bench18.dsn_service, "test") as session:
        configuration = made(
            bench18, session, changed, lambda models, terms: offered.append((set(models), terms.enabled))
        )
        await configuration.reload()
        assert seen[0] == (True, False)
        assert offered[-1][1] is False
        assert "fake" in offered[-1][0]
        assert seen[-1] == (True, True)
        bench18.admin.execute("SELECT cdc_embedder.pause('documents')")
        await configuration.reload()
        assert seen[-1] == (False, False)
    scan = bench18.admin.execute(
        "SELECT counted, requested_at > coalesce(finished_at, '-infinity') FROM cdc_embedder.scan"
    )
    assert scan.fetchone() == (False, True)


async def test_a_column_that_is_removed_holds_no_commit_whose_keys_could_not_be_told(bench18: Bench) -> None:
    make_column(bench18)
    async with await connect(bench18.dsn_service, "test") as session:
        configuration = made(bench18, session)
        await configuration.reload()
        [lane] = configuration.lanes.values()
        watermark = configuration.watermark
        router = Router(watermark)
        router.serve([lane.route])
        documents = Relation("public", "documents", lane.column.table_oid)
        router.route([Begin(7, LSN(10)), Insert(documents, {"body": "no key"}), Commit(LSN(10), LSN(20))], 0.0)
        assert (len(lane.route.missed), watermark.flushed) == (1, LSN(0))
        bench18.admin.execute("DELETE FROM cdc_embedder.embedding_column")
        await configuration.reload()
        assert watermark.flushed == LSN(20)


@pytest.mark.parametrize("reader", ["scan", "backlog", "failed rows"])
async def test_keys_that_were_being_read_when_the_column_changed_are_not_put_beside_the_new_ones(
    bench18: Bench, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """They may be of another shape. The reader is made to wait for a lock, and the lane gets another column then."""
    monkeypatch.setattr("cdc_embedder.pipeline.RETRY_POLL_SECONDS", 0.2)
    make_column(bench18)
    async with (
        await connect(bench18.dsn_service, "test") as session,
        await connect(bench18.dsn_service, "reading", lock_timeout="0") as reading,
        await psycopg.AsyncConnection.connect(bench18.dsn_admin) as other,
    ):
        configuration = made(bench18, session)
        await configuration.reload()
        [lane] = configuration.lanes.values()
        await becomes(lambda: lane.embedder is not None)
        watch = Watch(session, bench18.slot, "test")
        embedders, meters = Embedders(), Meters()
        pipeline = Pipeline(configuration, session, 1, watch, Queries(embedders), meters, None, 1000)
        bench18.admin.execute(
            "INSERT INTO documents VALUES (1, 'text');"
            " INSERT INTO cdc_embedder.backlog_1 VALUES (2, '0/0', '0/0', NULL, 1);"
            " INSERT INTO cdc_embedder.ledger_1 (key_1, fingerprint, generation, state, attempts, error, retry_at)"
            " VALUES (3, '\\x00', 1, 'failed', 1, '', now())"
        )
        lane.backlog, term = 1, Term(bench18.slot, 1)
        begun = await Pass.begin(reading, lane, time.monotonic(), 60.0, term)
        table, work = {
            "scan": ("documents", partial(begun.page, reading, time.monotonic)),
            "backlog": ("cdc_embedder.backlog_1", partial(Spiller(pipeline, term, 60.0).drain, reading)),
            "failed rows": ("cdc_embedder.ledger_1", partial(pipeline.retry, reading)),
        }[reader]
        await other.execute(f"LOCK TABLE {table}")
        task = asyncio.create_task(work())
        waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        await becomes(lambda: bench18.admin.execute(waiting).fetchall())
        monkeypatch.setattr("cdc_embedder.pipeline.RETRY_POLL_SECONDS", 600.0)
        lane.column = replace(lane.column, priority=lane.column.priority + 1)
        lane.served = reader == "failed rows"  # the others would look again at once
        await other.rollback()
        await becomes(lambda: reading.info.transaction_status is TransactionStatus.IDLE)
        await asyncio.sleep(0.1)
        assert len(lane.pending) == 0
        task.cancel()
        await asyncio.wait({task})


async def becomes(true: Callable[[], object]) -> None:
    async with asyncio.timeout(60.0):
        for pause in itertools.repeat(0.01):
            if true():
                return
            await asyncio.sleep(pause)


def make_column(bench: Bench) -> None:
    bench.admin.execute("CREATE TABLE documents (id int PRIMARY KEY, body text, embedding vector(8))")
    bench.grant("documents", ["id"], ["body"], "embedding")
    bench.admin.execute("INSERT INTO cdc_embedder.model (name, backend, dimensions) VALUES ('fake', 'fake', 8)")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('documents', '{body}', 'embedding', 'fake')"
    )


def made(
    bench: Bench,
    session: Connection,
    changed: Callable[[], None] = lambda: None,
    offer: Callable[[dict[str, ModelSpec], SqlEmbed], None] = lambda models, terms: None,
) -> Configuration:
    return Configuration(
        session,
        bench.slot,
        "pgoutput",
        Embedders(),
        time.monotonic,
        changed,
        lambda column: column.published,
        scan_period_s=86400,
        suspects={},
        offer=offer,
        meters=Meters(),
    )
