"""Opening the stream, and opening it again when what it must deliver changed.

pgoutput follows the publication; wal2json is told its tables when the stream starts, so a new table (or partition, or
name) means another start. Every start begins at what was confirmed, with a watermark of its own: positions of an
earlier connection are never used on a later one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.following import Configuration
from cdc_embedder.lsn import LSN, ZERO
from cdc_embedder.pipeline import Pipeline
from cdc_embedder.preparation import Taken
from cdc_embedder.routing import Router
from cdc_embedder.wal import pgoutput, wal2json
from cdc_embedder.wal.encodings import CODECS
from cdc_embedder.wal.stream import ReplicationStream
from cdc_embedder.watermark import Watermark

log = logging.getLogger(__name__)

Tables = frozenset[tuple[str, str]]


class Reading:
    """The reading end of one session."""

    def __init__(
        self,
        dsn: str,
        taken: Taken,
        origins: Sequence[tuple[str, int]],
        timeout_s: float,
        *,
        binary: bool,
        opened: Callable[[], None],
    ) -> None:
        """`binary`: pgoutput may send values so where that is enough to read the keys. `opened` is called whenever a
        stream was."""
        self._may_be_binary = binary
        self._binary = False
        self._opened = opened
        self._dsn = dsn
        self._taken = taken
        self._origins = origins
        self._timeout_s = timeout_s
        self._streamed: Tables | None = None
        self._again = asyncio.Event()
        self.streaming = asyncio.Event()
        """A stream was opened."""
        self._changes = 0
        self._echoes = 0
        self._received = self._confirmed = ZERO
        self._router: Router | None = None

    def attach(self, configuration: Configuration, pipeline: Pipeline) -> None:
        """What the stream feeds."""
        self._configuration = configuration
        self._pipeline = pipeline

    def covers(self, column: EmbeddingColumn) -> bool | None:
        """Whether the stream delivers the table's changes; None where it is about to be started again for it."""
        if column.unlogged:
            return False
        if self._streamed is None:
            return None
        if self._taken.plugin == "pgoutput":
            return column.published
        return True if column.relations <= self._streamed else None

    @property
    def changes(self) -> int:
        """Changes of watched tables that were received."""
        return self._changes + (self._router.changes if self._router is not None else 0)

    @property
    def echoes(self) -> int:
        """Changes of our own that were passed over by their replication origin."""
        return self._echoes + (self._router.echoes if self._router is not None else 0)

    def changed(self) -> None:
        """The configuration was looked at: route by it, and start again where other tables are to be delivered."""
        if self._router is not None:
            self._router.serve(lane.route for lane in self._pipeline.lanes if lane.served)
        if self._streamed is not None and self._taken.plugin == "wal2json" and self._tables() != self._streamed:
            self._again.set()
        if self._streamed is not None and self._binary and not self._binary_is_enough():
            self._again.set()
        self._pipeline.wake()

    def position(self) -> tuple[LSN, LSN, int]:
        """Received and confirmed on the last connection, and changes of watched tables on all of them."""
        stream = self._pipeline.stream
        if stream is not None:
            self._received, self._confirmed = stream.received, stream.confirmed
        return self._received, self._confirmed, self.changes

    async def run(self) -> None:
        """Read until cancelled, one stream after another. Raises what the streams raise."""
        while True:
            stream, router = await self._open()
            self._opened()
            self.streaming.set()
            self._configuration.wake.set()
            reader, again = (
                asyncio.create_task(self._pipeline.read(stream, router)),
                asyncio.create_task(self._again.wait()),
            )
            try:
                await asyncio.wait({reader, again}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (reader, again):
                    task.cancel()
                await asyncio.wait({reader, again})
            if not reader.cancelled():
                reader.result()  # a stream never ends by itself: this raises why it did
            self._changes += router.changes
            self._echoes += router.echoes
            self._router = None
            await self.close()

    async def close(self, *, clean: bool = True) -> None:
        """Let go of the slot; `clean`: in agreement with the server, which has then what was confirmed."""
        stream = self._pipeline.stream
        if stream is not None:
            self.position()
            self._pipeline.stream = None
            await stream.close(clean=clean)

    async def _open(self) -> tuple[ReplicationStream, Router]:
        """Start the stream where the slot stands; the waiting keys will be asked for again by it."""
        self._again.clear()
        watermark = self._configuration.watermark = Watermark()
        for lane in self._pipeline.lanes:
            lane.pending.rebase(watermark)
            lane.route.missed.clear()
        tables = self._tables()
        taken = self._taken
        encoding = taken.server_encoding if taken.server_encoding in CODECS else "UTF8"
        router = Router(watermark, [mark for origin in self._origins for mark in origin])
        router.serve(lane.route for lane in self._pipeline.lanes if lane.served)
        self._binary = taken.plugin == "pgoutput" and self._binary_is_enough()
        if taken.plugin == "wal2json":
            options = wal2json.options(sorted(tables), filter_origins=[id for _, id in self._origins])
            decoder: wal2json.Wal2JsonDecoder | pgoutput.PgOutputDecoder = wal2json.Wal2JsonDecoder(
                taken.server_encoding
            )
        else:
            options = pgoutput.options(taken.slot, binary=self._binary)
            decoder = pgoutput.PgOutputDecoder(
                server_encoding=encoding, own_origins=[name for name, _ in self._origins]
            )
        stream = await ReplicationStream.open(
            self._dsn,
            taken.slot,
            options,
            decoder,
            timeout_s=self._timeout_s,
            client_encoding=encoding,
            on_warning=self._warned,
        )
        self._pipeline.stream, self._router, self._streamed = stream, router, tables
        how = f"{taken.plugin}, binary" if self._binary else taken.plugin
        log.info("streaming from the slot %s (%s), %d table(s)", taken.slot, how, len(tables))
        return stream, router

    def _warned(self, message: str) -> None:
        """PostgreSQL 18 passes changes over, with a warning, where the publication is missing (rule 10)."""
        log.warning("the server warns: %s", message)
        if self._taken.plugin == "pgoutput":
            self._configuration.doubt("the server warned that changes were passed over")

    def _binary_is_enough(self) -> bool:
        """Whether every key can be read from its binary form."""
        types = {key.type.partition("(")[0] for lane in self._pipeline.lanes for key in lane.column.key}
        return self._may_be_binary and types <= pgoutput.BINARY_TYPES

    def _tables(self) -> Tables:
        """What wal2json must deliver: every name that a configured table or a partition of it has, or was known by."""
        return frozenset(
            name for lane in self._pipeline.lanes if not lane.column.unlogged for name in lane.route.relations
        )
