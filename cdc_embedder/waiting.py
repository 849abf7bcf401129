"""Waiting until the running service has embedded what is committed now, as an operator's command may want to."""

from __future__ import annotations

import time
from collections.abc import Callable

import psycopg

from cdc_embedder.asking import Row
from cdc_embedder.errors import Misconfigured
from cdc_embedder.identifiers import column_of

STANDSTILL_SECONDS = 60.0
"""How long a column that is waited for may be stopped, paused or in error: a service may just be starting."""

PAGE_HEADER = 24
"""Bytes by which the WAL's insert position can lie beyond the end of the last record; no commit is as short."""


Tell = Callable[[str], None]


def wait_for_pending(
    connection: psycopg.Connection[Row],
    ids: list[int],
    standstill: float = STANDSTILL_SECONDS,
    tell: Tell = lambda sentence: None,
) -> None:
    """Return when what is committed now is embedded or has failed, in these columns. Raises Misconfigured.

    It is embedded through it, no scan is wanted, nothing is pending. A column that does not work for
    `standstill` seconds is not waited for any longer; one that its operator paused, or whose table was dropped, not at
    all. `tell` is told what is waited for, whenever that is another column than before.
    """
    target = connection.execute("SELECT pg_current_wal_insert_lsn()::text AS lsn").fetchall()[0]["lsn"]
    worked: dict[int, float] = {}
    told = ""
    locked = False
    while True:
        # as in wait_until_embedded: has the service note how far a slot on a standby is
        locked = locked or connection.execute(_LOCK).fetchall()[0]["locked"]
        waiting = [row for row in connection.execute(_WAITING, (ids, target, PAGE_HEADER)).fetchall() if row["waits"]]
        if not waiting:
            if locked:
                connection.execute("SELECT pg_advisory_unlock_shared(1667523429, 2)")
            return
        awaited = ", ".join(column_of(row["source_table"], row["target_column"]) for row in waiting)
        if awaited != told:
            tell(f"waiting for {awaited}")
            told = awaited
        now = time.monotonic()
        for row in waiting:
            if row["state"] in ("live", "backfilling"):
                worked[row["id"]] = now
            elif now - worked.setdefault(row["id"], now) >= standstill:
                name = column_of(row["source_table"], row["target_column"])
                reason = f": {row['reason']}" if row["reason"] else ""
                raise Misconfigured(
                    f"{name} is not waited for, it is {row['state']}{reason}",
                    hint="verify without --wait says how it stands",
                )
        time.sleep(0.2)


_LOCK = "SELECT pg_catalog.pg_try_advisory_lock_shared(1667523429, 2) AS locked"
"""Tried for and not waited for: any role could hold it, and whoever does is seen by the service as well."""

_WAITING = """
SELECT s.id, s.source_table, s.target_column, s.state, s.reason,
       s.state <> 'live' OR coalesce(s.pending, 0) > 0
       OR coalesce(n.requested_at > n.finished_at, n.requested_at IS NOT NULL)
       OR coalesce(pg_wal_lsn_diff($2::pg_lsn, s.embedded_through) > $3, true) AS waits
  FROM cdc_embedder.status s
  JOIN cdc_embedder.embedding_column c ON c.id = s.id
  LEFT JOIN cdc_embedder.scan n ON n.column_id = s.id
 WHERE s.id = ANY ($1) AND c.enabled
   AND EXISTS (SELECT FROM pg_catalog.pg_class t WHERE t.oid OPERATOR(pg_catalog.=) c.source_table)
 ORDER BY s.id
"""
