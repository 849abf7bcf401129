"""The replication socket: the only module that reads from it and writes to it.

Batches of messages come out, confirmations go in, and the server is answered whatever the consumer does meanwhile.

1. Nothing is confirmed that did not arrive on this connection, and never less than before (rule 1): `confirm` refuses.
2. A status update goes out unasked every few seconds from a task of its own, so a consumer that does not iterate
   (back-pressure: nothing is read from the socket then) is not taken for dead.
3. A server that says nothing for `timeout_s`, not even when asked, is gone: a half-open connection shows no error.
4. We start at 0/0: the slot knows where it stands, and no other position of ours could be right.
5. A server that is shutting down waits until what it sent is confirmed. If that cannot be, we let go.

No blocking call of libpq is used: those hold the interpreter's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import psycopg
from psycopg import pq
from psycopg.errors import error_from_result

from cdc_embedder.conninfo import pinned
from cdc_embedder.database_errors import from_database
from cdc_embedder.errors import Misconfigured, Problem, ServerGone
from cdc_embedder.lsn import LSN, ZERO
from cdc_embedder.wal import slot as slots
from cdc_embedder.wal.diagnosis import explain, no_right
from cdc_embedder.wal.framing import Keepalive, parse, standby_status_update
from cdc_embedder.wal.messages import Commit, Message

PINS = {
    "search_path": "pg_catalog",  # type names in wal2json's output depend on it
    "DateStyle": "ISO, YMD",
    "TimeZone": "UTC",
    "IntervalStyle": "postgres",
    "extra_float_digits": "3",
    "bytea_output": "hex",  # wal2json cuts two characters off, whatever they are
    "xmlbinary": "base64",
    "lc_monetary": "C",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",  # would end the session before START_REPLICATION
    "tcp_keepalives_idle": "10",
    "tcp_user_timeout": "30000",
}
"""Rule 12 for this session: the text of a key must be the text that the fetch sees. Milliseconds; idle in seconds."""

BATCH_MESSAGES = 1000
BATCH_BYTES = 1 << 20
_STATUS_GAP_S = 0.1  # status updates in answer to `confirm`; the server may write its slot file for each
_STOPPING_PINGS = 10  # keepalives in a row that want a reply, answered and without any progress, within
_STOPPING_PINGS_S = 10.0


class Decoder(Protocol):
    """What turns one payload into messages: `Wal2JsonDecoder` or `PgOutputDecoder`."""

    def decode(self, payload: memoryview | bytes) -> Sequence[Message]: ...


class ReplicationStream:
    """A slot that is being read. Made by `open`; iterate `batches()` in one task, and `close` it in the end."""

    def __init__(self, connection: psycopg.AsyncConnection[Any], slot: str, decoder: Decoder, timeout_s: float) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._slot = slot
        self._decoder = decoder
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._flushed: LSN = ZERO
        self._confirmed_more = asyncio.Event()
        self._pings = 0
        self._pings_since = 0.0
        self._reply_wanted = False
        self.received: LSN = ZERO
        """The greatest position that arrived on this connection."""
        self.idle_through: LSN = ZERO
        """How far the server had decoded when the last batch was handed out: what may be confirmed when nothing is
        outstanding *and that batch was taken in*. Route a batch in the same step that receives it, without a task or
        an await in between; then any task may use this."""
        self._status_task = asyncio.create_task(self._send_statuses(), name="replication status updates")

    @classmethod
    async def open(
        cls,
        conninfo: str,
        slot: str,
        options: Mapping[str, str],
        decoder: Decoder,
        *,
        timeout_s: float = 60.0,
        client_encoding: str = "UTF8",
        on_warning: Callable[[str], None] | None = None,
    ) -> Self:
        """Connect and START_REPLICATION where the slot stands. `on_warning` gets the text of the server's WARNINGs.

        Raises SlotBusy, SlotLost (make it anew), PluginRefused, ServerGone, Misconfigured, each with its remedy.
        """
        pins = PINS | {"wal_sender_timeout": str(int(timeout_s * 1000))}
        pinned_info = pinned(conninfo, "stream", pins, replication="database", client_encoding=client_encoding)
        try:
            connection = await psycopg.AsyncConnection.connect(pinned_info, autocommit=True, prepare_threshold=None)
        except psycopg.Error as error:
            raise await _cannot_connect(conninfo, slot, error) from error
        try:
            if on_warning is not None:
                _forward_warnings(connection, on_warning)
            try:
                async with asyncio.timeout(timeout_s):
                    await _start(connection, slot, options)
            except TimeoutError:
                raise ServerGone(
                    f"the server did not start the replication stream within {timeout_s:.0f} seconds",
                    hint="look at the network, and at what stands between here and the server",
                ) from None
            return cls(connection, slot, decoder, timeout_s)
        except BaseException:
            await connection.close()
            raise

    async def batches(self) -> AsyncIterator[list[Message]]:
        """What arrived, in order, as lists of at most about 1,000 messages or 1 MB.

        An empty list says that only the position moved. Back-pressure: do not ask for the next. Raises ServerGone,
        ProtocolError, and what `diagnosis.explain` makes of the server's errors; the stream can only be closed then.
        """
        while True:
            batch, moved = self._drain()
            if batch or moved or self._reply_wanted:
                self.idle_through = self.received
                yield batch
                if self._reply_wanted:
                    self._send_status()
                await asyncio.sleep(0)  # a stream that never runs dry must not starve the other tasks
            else:
                await self._hear()

    def confirm(self, lsn: LSN) -> None:
        """Everything before `lsn` is durable: the next status update says so. A lower one than before changes nothing.

        Raises ValueError for a position that did not arrive on this connection (the server would believe it, and skip).
        """
        if lsn > self.received:
            raise ValueError(f"{lsn} cannot be confirmed: this connection has received {self.received}")
        if lsn > self._flushed:
            self._flushed = lsn
            self._confirmed_more.set()

    @property
    def confirmed(self) -> LSN:
        """What the latest or next status update says as flushed."""
        return self._flushed

    async def close(self, *, clean: bool) -> None:
        """Let go of the slot. `clean`: a last status update, then the end of the stream is agreed with the server
        (at most 5 seconds), so that the slot is free and has everything when this returns."""
        self._status_task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._status_task
        try:
            if clean and self._pgconn.status == pq.ConnStatus.OK:
                with contextlib.suppress(psycopg.Error, TimeoutError, OSError):
                    async with asyncio.timeout(5.0):
                        await self._finish()
        finally:
            await self._connection.close()

    def _drain(self) -> tuple[list[Message], bool]:
        """Everything that libpq holds, up to a batch, without waiting; and whether the server's position moved."""
        batch: list[Message] = []
        size, received = 0, self.received
        get, decode = self._pgconn.get_copy_data, self._decoder.decode
        try:
            while len(batch) < BATCH_MESSAGES and size < BATCH_BYTES:
                length, data = get(1)
                if length == 0:
                    self._pgconn.consume_input()  # what the socket has by now: libpq reads 16 kB at a time
                    length, data = get(1)
                    if length == 0:
                        break
                if length < 0:
                    raise self._ended()
                size += length
                frame = parse(data)
                if isinstance(frame, Keepalive):
                    self._pinged(frame)
                    received = max(received, frame.end)
                    continue
                self._pings = 0
                received = max(received, frame.end)
                for message in decode(frame.payload):
                    if type(message) is Commit:
                        received = max(received, message.end_lsn)
                    batch.append(message)
        except psycopg.Error as error:
            raise from_database(error, "reading the replication stream") from error
        moved = received > self.received
        self.received = received
        return batch, moved

    def _pinged(self, keepalive: Keepalive) -> None:
        """Rule 5 above. A server that stops asks again as soon as it is answered; one that lives asks every half minute
        at most, and never while our own updates arrive."""
        if not keepalive.reply_requested:
            return
        self._reply_wanted = True
        now = self._loop.time()
        if keepalive.end > self.received or now > self._pings_since + _STOPPING_PINGS_S:
            self._pings, self._pings_since = 0, now
        self._pings += 1
        if self._pings > _STOPPING_PINGS:
            raise ServerGone(
                "the server is stopping and waits for a confirmation that cannot be given yet",
                hint="the connection is given up so that it can; what was not confirmed comes again",
            )

    async def _hear(self) -> None:
        """Wait for bytes. Raises ServerGone after a silence (rule 3 above)."""
        silent_from = self._loop.time()
        if not await self._readable(self._timeout_s / 2):
            self._send_status(reply=True)
            if not await self._readable(self._timeout_s / 2):
                raise ServerGone(
                    f"the server sent nothing for {self._loop.time() - silent_from:.0f} seconds, though it was asked",
                    hint="the network or the server's machine is down; the connection is given up and made anew",
                )

    async def _readable(self, seconds: float) -> bool:
        """Whether bytes arrived in time. The reader is registered only meanwhile: data left unread would spin."""
        socket = self._pgconn.socket
        ready = asyncio.Event()
        self._loop.add_reader(socket, ready.set)
        try:
            async with asyncio.timeout(seconds):
                await ready.wait()
            return True
        except TimeoutError:
            return False
        finally:
            self._loop.remove_reader(socket)

    async def _send_statuses(self) -> None:
        """Rule 2 above: unasked and often enough for the server's timeout; soon after a confirmation."""
        interval = min(self._timeout_s / 3, 10.0)
        gap = min(_STATUS_GAP_S, interval / 2)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval - gap):
                    await self._confirmed_more.wait()
            self._send_status()
            await asyncio.sleep(gap)

    def _send_status(self, *, reply: bool = False) -> None:
        """Queue a status update and push it out. What the socket does not take now goes with the next one; a dead
        socket shows where it is read."""
        self._confirmed_more.clear()
        self._reply_wanted = False
        update = standby_status_update(self.received, self._flushed, self._flushed, reply=reply)
        with contextlib.suppress(psycopg.Error):
            self._pgconn.put_copy_data(update)
            self._pgconn.flush()

    def _ended(self) -> Problem:
        """Why there is no more: the server said goodbye, or an error."""
        result = self._pgconn.get_result()
        if result is None or result.status != pq.ExecStatus.FATAL_ERROR:
            return ServerGone("the server ended the replication stream: it is stopping")
        return explain(error_from_result(result, "utf-8"), self._slot, streaming=True)

    async def _finish(self) -> None:
        """CopyDone and its answer. What arrives meanwhile is dropped: it is not confirmed, so it comes again."""
        self._send_status()
        self._pgconn.put_copy_end()
        self._pgconn.flush()
        while True:
            length, _ = self._pgconn.get_copy_data(1)
            if length < 0:
                return
            if length == 0:
                if not await self._readable(self._timeout_s):
                    return
                self._pgconn.consume_input()


async def _start(connection: psycopg.AsyncConnection[Any], slot: str, options: Mapping[str, str]) -> None:
    """START_REPLICATION has a grammar of its own: no parameters, and in strings only the quote is special.

    Decoding happens in transactions: a role's `transaction_timeout` (17 and later) would end the session in the middle
    of every long one, for ever.
    """
    listed = ", ".join(f"{_quoted(name, chr(34))} {_quoted(value, chr(39))}" for name, value in options.items())
    command = f"START_REPLICATION SLOT {_quoted(slot, chr(34))} LOGICAL 0/0 ({listed})"
    try:
        if connection.info.server_version >= 170000:
            await connection.execute("SET transaction_timeout = 0")
        await connection.execute(command.encode())
    except psycopg.Error as error:
        if connection.closed:
            raise from_database(error, "starting the replication stream") from error
        raise explain(error, slot, await slots.look(connection, slot)) from error


async def _cannot_connect(conninfo: str, slot: str, error: psycopg.Error) -> Problem:
    """A refused connection has no SQLSTATE in libpq. A missing REPLICATION right shows where an ordinary session can be
    had and this one cannot."""
    problem = from_database(error, "connecting to the replication slot")
    try:
        plain = pinned(conninfo, "check", {})
        async with await psycopg.AsyncConnection.connect(plain, autocommit=True) as connection:
            around = await slots.look(connection, slot)
    except psycopg.Error:
        return problem
    return problem if around.can_replicate else no_right(around)


def _forward_warnings(connection: psycopg.AsyncConnection[Any], on_warning: Callable[[str], None]) -> None:
    def forward(diagnostic: psycopg.errors.Diagnostic) -> None:
        if diagnostic.severity_nonlocalized == "WARNING":
            on_warning(diagnostic.message_primary or "")

    connection.add_notice_handler(forward)


def _quoted(text: str, quote: str) -> str:
    if "\0" in text:
        raise Misconfigured("a name or an option of the replication slot holds a NUL character")
    return quote + text.replace(quote, quote * 2) + quote
