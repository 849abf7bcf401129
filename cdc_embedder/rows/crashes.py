"""What was with the model when a process died. Rule 7: a row that kills the process must not kill it for ever.

Before a batch is embedded its keys are noted in an unlogged table. The service that finds another one's note suspects
those rows: each is tried alone, and one that was there again when the process died is guilty. A suspicion holds for a
text, not for a row: when that has changed it is void.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cdc_embedder.pending import Key
from cdc_embedder.rows.session import Connection, jsonb


@dataclass(frozen=True, slots=True)
class Suspect:
    """The text with this fingerprint was with the model when the process died; `guilty`: alone, after it had before."""

    fingerprint: bytes
    guilty: bool


async def note(
    connection: Connection, slot: str, service: str, number: int, column: int, batch: Iterable[tuple[Key, bytes]]
) -> None:
    """These keys, with their texts' fingerprints, are with the model from now on, instead of those that the note of
    this number told of."""
    keys = json.dumps([[key, fingerprint.hex()] for key, fingerprint in batch], ensure_ascii=False)
    await connection.execute(
        "INSERT INTO cdc_embedder.in_flight (slot, service, number, column_id, keys) VALUES ($1, $2, $3, $4, $5)"
        " ON CONFLICT (slot, service, number) DO UPDATE SET column_id = excluded.column_id, keys = excluded.keys",
        (slot, service, number, column, keys),
    )


async def clear(connection: Connection, slot: str, service: str) -> None:
    """Nothing of this service is with the model."""
    await connection.execute("DELETE FROM cdc_embedder.in_flight WHERE slot = $1 AND service = $2", (slot, service))


async def suspects(connection: Connection, slot: str, service: str) -> dict[int, dict[Key, Suspect]]:
    """Suspect what another service left, and return all that are suspected, by column."""
    await connection.execute(
        "WITH found AS (DELETE FROM cdc_embedder.in_flight WHERE slot = $1 AND service <> $2 RETURNING column_id, keys)"
        " INSERT INTO cdc_embedder.suspect AS s (column_id, key, fingerprint, guilty)"
        " SELECT DISTINCT ON (1, 2) f.column_id, k.value -> 0, decode(k.value ->> 1, 'hex'), false"
        "   FROM found f CROSS JOIN jsonb_array_elements(f.keys::jsonb) AS k(value)"
        "  WHERE EXISTS (SELECT FROM cdc_embedder.embedding_column c WHERE c.id = f.column_id)"
        " ON CONFLICT (column_id, key) DO UPDATE"
        " SET guilty = s.fingerprint = excluded.fingerprint, fingerprint = excluded.fingerprint",
        (slot, service),
    )
    cursor = await connection.execute(
        "SELECT s.column_id, s.key, s.fingerprint, s.guilty FROM cdc_embedder.suspect s"
        " JOIN cdc_embedder.embedding_column c ON c.id = s.column_id WHERE c.slot = $1",
        (slot,),
    )
    found: dict[int, dict[Key, Suspect]] = {}
    for column, key, fingerprint, guilty in await cursor.fetchall():
        found.setdefault(column, {})[tuple(key)] = Suspect(bytes(fingerprint), guilty)
    return found


async def acquit(connection: Connection, column: int, keys: Sequence[Key]) -> None:
    """These keys were tried, or need no trial any more."""
    await connection.execute(
        "DELETE FROM cdc_embedder.suspect WHERE column_id = $1 AND key IN (SELECT jsonb_array_elements($2))",
        (column, jsonb([list(key) for key in keys])),
    )


async def sentence(connection: Connection, column: int, keys: Sequence[Key]) -> None:
    """The ledger has these keys as failed: they stay suspect, and have another trial when their time comes."""
    await connection.execute(
        "UPDATE cdc_embedder.suspect SET guilty = false"
        " WHERE column_id = $1 AND key IN (SELECT jsonb_array_elements($2))",
        (column, jsonb([list(key) for key in keys])),
    )
