"""Rule 7 while the service runs: what is with the model is noted, so that the next process knows what this one died of.

A note for each call of the model, overwritten by the next call and removed when there is none. How suspects are tried
is told by `pipeline`; what is stored, by `rows.crashes`.
"""

from __future__ import annotations

from collections.abc import Sequence

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.lane import Lane
from cdc_embedder.pending import Key
from cdc_embedder.rows import crashes
from cdc_embedder.rows.session import Connection


class Watch:
    """Notes for one slot, by the process called `service`."""

    def __init__(self, connection: Connection, slot: str, service: str) -> None:
        self._connection = connection
        self._slot = slot
        self._service = service
        self._notes = 0
        self._over: list[int] = []

    async def note(self, column: EmbeddingColumn, batch: Sequence[tuple[Key, bytes]]) -> int:
        """These keys, with their texts' fingerprints, go to the model now; returns the note's number."""
        if self._over:
            number = self._over.pop()
        else:
            self._notes = number = self._notes + 1
        await crashes.note(self._connection, self._slot, self._service, number, column.id, batch)
        return number

    def over(self, number: int) -> None:
        """The call is over. Its note stands until another one overwrites it."""
        self._over.append(number)

    async def clear(self) -> None:
        """Remove the notes, unless a call is going on."""
        if self._notes and len(self._over) == self._notes:
            self._notes, self._over = 0, []
            await crashes.clear(self._connection, self._slot, self._service)

    async def acquit(self, lane: Lane, keys: Sequence[Key]) -> None:
        """These keys were tried, or need no trial."""
        for key in keys:
            lane.suspects.pop(key, None)
        await crashes.acquit(self._connection, lane.column.id, keys)

    async def sentence(self, lane: Lane, keys: Sequence[Key]) -> None:
        """The ledger has these as failed; they stay suspect."""
        for key in keys:
            if (suspect := lane.suspects.get(key)) is not None:
                lane.suspects[key] = crashes.Suspect(suspect.fingerprint, guilty=False)
        await crashes.sentence(self._connection, lane.column.id, keys)
