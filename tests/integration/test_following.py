"""Orders of things that no outside view shows, and that rules rest on."""

from __future__ import annotations

import time

import pytest

from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.following import Configuration
from cdc_embedder.rows.session import connect
from tests.servers import Bench

pytestmark = pytest.mark.asyncio


async def test_rule_10_changes_are_routed_before_the_barrier_is_taken(bench18: Bench) -> None:
    """A change that is passed over while a column comes to be served must be of a transaction before its barrier."""
    bench18.admin.execute("CREATE TABLE documents (id int PRIMARY KEY, body text, embedding vector(8))")
    bench18.grant("documents", ["id"], ["body"], "embedding")
    bench18.admin.execute("INSERT INTO cdc_embedder.model (name, backend, dimensions) VALUES ('fake', 'fake', 8)")
    bench18.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('documents', '{body}', 'embedding', 'fake')"
    )
    seen: list[tuple[bool, bool]] = []

    def changed() -> None:
        seen.extend((lane.served, lane.barrier is not None) for lane in configuration.lanes.values())

    session = await connect(bench18.dsn_service, "test")
    embedders = Embedders()
    configuration = Configuration(
        session,
        bench18.slot,
        "pgoutput",
        embedders,
        time.monotonic,
        changed,
        lambda column: column.published,
        scan_period_s=86400,
        suspects={},
    )
    await configuration.reload()
    assert seen[0] == (True, False)
    assert seen[-1] == (True, True)
    bench18.admin.execute("SELECT cdc_embedder.pause('documents')")
    await configuration.reload()
    assert seen[-1] == (False, False)
    scan = bench18.admin.execute(
        "SELECT counted, requested_at > coalesce(finished_at, '-infinity') FROM cdc_embedder.scan"
    )
    assert scan.fetchone() == (False, True)
    await session.close()
    embedders.close()
