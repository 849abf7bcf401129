"""Requests from SQL: read from a slot of their own, answered into a table (see sql/functions/embed.sql).

The slot is persistent, so that no request waits for other transactions to end before it can be heard, and is moved on
as it is read: a request lives for seconds. Trouble here is told and tried again, and ends nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import time
from contextlib import AsyncExitStack

import numpy as np
import psycopg

from cdc_embedder.catalog import SqlEmbed, model_spec
from cdc_embedder.database_errors import from_database
from cdc_embedder.embedding.base import InputType
from cdc_embedder.errors import EmbedderDown, Misconfigured, Problem, TextRejected
from cdc_embedder.flushing import Flusher
from cdc_embedder.installable import EMBED_SUFFIX, LONGEST_EMBED_SLOT
from cdc_embedder.querying import Answered, Queries, TooManyRequests, UnknownModel
from cdc_embedder.rows import binary, requests
from cdc_embedder.rows.session import Connection, connect, one
from cdc_embedder.wal import pgoutput
from cdc_embedder.wal import slot as slots
from cdc_embedder.wal.diagnosis import SlotLost, SlotStuck
from cdc_embedder.wal.messages import LogicalMessage
from cdc_embedder.wal.stream import ReplicationStream

log = logging.getLogger(__name__)

PREFIX = "cdc_embedder.embed"

LONGEST_RETRY_SECONDS = 30.0
SWEEP_SECONDS = 2.0
"""How often answers are swept, where any are left."""

_SIGNATURE = 32
_CODES: dict[type[Problem], str] = {UnknownModel: "42704", TextRejected: "22023", TooManyRequests: "53400"}


class Answering:
    """What SQL asks of one service; nothing before `want` says that it may."""

    def __init__(self, dsn: str, replication_dsn: str, slot: str, queries: Queries, timeout_s: float) -> None:
        self._dsn = dsn
        self._replication_dsn = replication_dsn
        self._service_slot = slot
        self._slot = slot + EMBED_SUFFIX
        self._queries = queries
        self.flusher = Flusher()
        self._terms: SqlEmbed
        self._on, self._off = asyncio.Event(), asyncio.Event()
        self._timeout_s = timeout_s
        self._answered_at: float | None = None
        self._allowance = 0.0
        self._allowed_at = 0.0
        self._told = ""
        self._failures = 0
        self._requests: set[asyncio.Task[None]] = set()

    def want(self, wanted: bool, terms: SqlEmbed) -> None:
        """Whether SQL may ask from now on, and on which terms; may change at any time."""
        self._terms = terms
        now, then = (self._on, self._off) if wanted else (self._off, self._on)
        then.clear()
        now.set()

    async def run(self) -> None:
        """For ever. Nothing but a bug of ours leaves it."""
        while True:
            try:
                await self._turn()
            except (Problem, psycopg.Error, ExceptionGroup) as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():  # a TaskGroup whose child failed just then says only that
                    raise asyncio.CancelledError from error
                self._tell(error)
                self._failures += 1
                await asyncio.sleep(min(LONGEST_RETRY_SECONDS, 2.0**self._failures / 4))

    def _tell(self, error: Exception) -> None:
        """Once, until something else is wrong."""
        if isinstance(error, ExceptionGroup):
            parts = [part for part in error.exceptions if not isinstance(part, (Problem, psycopg.Error))]
            if parts:
                raise error
            error = error.exceptions[0]
        problem = error if isinstance(error, Problem) else None
        if isinstance(error, psycopg.Error):
            problem = from_database(error, "answering SQL")
        sentence = f"SQL is not answered: {problem.sentence if problem else error}; trying again"
        if sentence != self._told:
            log.warning("%s", sentence)
        self._told = sentence

    async def _turn(self) -> None:
        """Serve while it is wanted; where it is not, see to it that no slot is left, and wait."""
        async with AsyncExitStack() as stack:
            session = await self._connect(stack, "answer", synchronous_commit="off")
            if not self._on.is_set():
                await self._off.wait()
                if await slots.inspect(session, self._slot) is not None and await slots.drop(session, self._slot):
                    log.info("dropped the slot %s: embedding from SQL is turned off", self._slot)
                while not self._on.is_set() and not await _swept(session):
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(SWEEP_SECONDS):
                            await self._on.wait()
                await session.close()
                await self._on.wait()
                return
            await self._prepare(session)
            stream = await ReplicationStream.open(
                self._replication_dsn,
                self._slot,
                pgoutput.options(self._slot, messages=True),
                pgoutput.PgOutputDecoder(),
                timeout_s=self._timeout_s,
            )
            stack.push_async_callback(stream.close, clean=False)
            log.info("SQL is answered: reading the slot %s", self._slot)
            self._told, self._failures = "", 0
            self._answered_at = time.monotonic()  # somebody may have, before us
            try:
                async with asyncio.TaskGroup() as group:
                    work = [group.create_task(self._listen(stream, session)), group.create_task(self._sweep(session))]
                    await self._off.wait()
                    for task in work:
                        task.cancel()
            finally:
                for request in self._requests:
                    request.cancel()
                await asyncio.gather(*self._requests, return_exceptions=True)

    async def _connect(self, stack: AsyncExitStack, purpose: str, **settings: str) -> Connection:
        connection = await connect(self._dsn, purpose, **settings)
        stack.push_async_callback(connection.close)
        return connection

    async def _prepare(self, session: Connection) -> None:
        """The publication, empty and before the slot; then the slot."""
        if len(self._service_slot) > LONGEST_EMBED_SLOT:
            raise Misconfigured(
                f"the slot {self._service_slot} has too long a name for another one named after it",
                hint=f"{LONGEST_EMBED_SLOT} characters leave room for {EMBED_SUFFIX}",
            )
        try:
            await requests.make_publication(session, self._slot)
        except psycopg.errors.InsufficientPrivilege as error:
            raise Misconfigured(f"there is no publication {self._slot}", hint="cdc-embedder init makes it") from error
        found = await slots.inspect(session, self._slot)
        if found is not None and (found.invalidation_reason or found.plugin != "pgoutput"):
            await slots.drop(session, self._slot)
            found = None
        if found is None:
            await slots.create(session, self._slot, "pgoutput", timeout_s=self._timeout_s)

    async def _listen(self, stream: ReplicationStream, session: Connection) -> None:
        ahead = await _ahead(session)
        try:
            async for messages in stream.batches():
                for message in messages:
                    if isinstance(message, LogicalMessage) and message.prefix == PREFIX:
                        self.flusher.expect()
                        task = asyncio.create_task(self._answer(message.content, ahead, session))
                        self._requests.add(task)
                        task.add_done_callback(self._requests.discard)
                stream.confirm(stream.received)
        except (SlotLost, SlotStuck):
            await stream.close(clean=False)
            await slots.drop(session, self._slot)
            raise

    async def _answer(self, content: bytes, ahead: float, session: Connection) -> None:
        """One request, if it is a genuine one of ours that somebody still waits for. `ahead`: see `_ahead`."""
        signature, payload, secret = content[:_SIGNATURE], content[_SIGNATURE:], self._terms.secret
        if not hmac.compare_digest(signature, _sha256(secret, _sha256(secret, payload))):
            log.debug("a request without the right signature is passed over")
            return
        asked: str | None = None
        try:
            request = json.loads(payload)
            if request["slot"] != self._slot:
                return
            asked = request["id"]
            if request["until"] < time.time() + ahead:
                return
            row = request.get("row")  # the functions of an earlier release send none
            self._allow(len(request["texts"]))
            answered = await self._queries.embed(
                request["model"],
                request["texts"],
                InputType(request["input_type"]),
                prompt=request["prompt"],
                normalize=request["normalize"],
                via="sql",
                row=None if row is None else model_spec(row),
            )
            given: Answered | Problem = answered
        except Problem as problem:
            given = problem
        except Exception as error:  # its message may quote the text
            log.error("a request from SQL failed: %s", type(error).__name__)
            given = Problem("the service could not embed this: its log says more")
        if asked is None:
            return
        try:
            await _give(session, asked, given)
        except psycopg.Error as error:
            log.warning("%s", from_database(error, "answering SQL").sentence)
        self._answered_at = time.monotonic()

    def _allow(self, texts: int) -> None:
        """So many texts a second, and as many at once after a second without any. Raises TooManyRequests."""
        now, rate = time.monotonic(), self._terms.max_texts_per_s
        self._allowance = min(rate, self._allowance + (now - self._allowed_at) * rate)
        self._allowed_at = now
        if self._allowance <= 0:
            wait = 1 - self._allowance / rate
            raise TooManyRequests(f"more than {rate} texts a second are asked for from SQL", retry_after=wait)
        self._allowance -= texts

    async def _sweep(self, session: Connection) -> None:
        """Sweep as long as there is anything to be swept; an idle service asks for nothing."""
        while True:
            if self._answered_at is not None:
                self._answered_at = None
                if not await _swept(session):
                    self._answered_at = time.monotonic()
            await asyncio.sleep(SWEEP_SECONDS)


async def _swept(session: Connection) -> bool:
    """Remove answers that were read, or that nobody read in time. Whether none is left."""
    await session.execute("DELETE FROM cdc_embedder.answer WHERE made_at < clock_timestamp() - interval '10 seconds'")
    return await one(session, "SELECT FROM cdc_embedder.answer LIMIT 1") is None


async def _ahead(session: Connection) -> float:
    """By how much the server's clock is ahead of ours, in seconds."""
    asked = time.time()
    row = await one(session, "SELECT extract(epoch FROM clock_timestamp())::float8")
    assert row is not None
    return float(row[0]) - asked


async def _give(session: Connection, request: str, given: Answered | Problem) -> None:
    """Write an answer. One that is there already is of another reading of the same request."""
    problem: tuple[str | None, str | None, str | None]
    if isinstance(given, Answered):
        vectors, problem = given.vectors, (None, None, None)
    else:
        code = "57P03" if isinstance(given, EmbedderDown) else _CODES.get(type(given), "55000")
        vectors, problem = np.empty((0, 0), np.float32), (code, str(given), given.hint)
    cursor = session.cursor(binary=True)
    binary.register(cursor)
    await cursor.execute(
        "INSERT INTO cdc_embedder.answer (id, vectors, dimensions, sqlstate, message, hint)"
        " VALUES ($1::uuid, $2::real[], $3::int, $4::text, $5::text, $6::text) ON CONFLICT (id) DO NOTHING",
        (request, binary.vectors(vectors, "float4", 0), vectors.shape[1], *problem),
        prepare=True,
    )


def _sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()
