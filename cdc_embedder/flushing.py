"""Before PostgreSQL 17: have what sessions wait for flushed, which nothing else might for seconds.

There an emitted message lies in the server's buffers until some commit flushes it. Who waits for us, from `embed` or
`wait_until_embedded`, holds a shared advisory lock; we look for it now and then, and flush while requests come. Where
nobody waits nothing is written.
"""

from __future__ import annotations

import asyncio
import math
import time

from cdc_embedder.rows.session import Connection, one

TICK_SECONDS = 0.004
EXPECT_SECONDS = 5.0
LOOK_SECONDS = 0.2
"""Every TICK_SECONDS for EXPECT_SECONDS after a request; otherwise every LOOK_SECONDS, if anybody waits."""

_SOMEBODY_WAITS = (
    "SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database AND d.datname = current_database()"
    " WHERE l.locktype = 'advisory' AND (l.classid, l.objid, l.objsubid) = (1667523429, 1, 2) AND l.granted LIMIT 1"
)
_UNFLUSHED = "SELECT WHERE pg_current_wal_insert_lsn() > pg_current_wal_flush_lsn()"


class Flusher:
    """`expect` says that requests come, and that more may."""

    def __init__(self) -> None:
        self._asked_at = -math.inf

    def expect(self) -> None:
        self._asked_at = time.monotonic()

    async def run(self, session: Connection) -> None:
        """For ever. Raises psycopg.Error as it comes."""
        while True:
            expected = time.monotonic() < self._asked_at + EXPECT_SECONDS
            await asyncio.sleep(TICK_SECONDS if expected else LOOK_SECONDS)
            if not expected:
                expected = await one(session, _SOMEBODY_WAITS) is not None
            if expected and await one(session, _UNFLUSHED) is not None:
                await session.execute("SELECT pg_logical_emit_message(true, 'cdc-embedder flush', '')")
