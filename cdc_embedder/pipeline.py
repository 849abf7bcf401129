"""The only place where the stages meet: to follow a row, read this file, and `writing` for its end.

    stream ─messages→ router ─keys→ Pending ─keys→ fetch ─texts→ embed ─vectors→ write ─done→ watermark → stream

Stages overlap: while the model works on one batch, the next is being fetched and the last one written; so many calls
are made at once as the model says are worth it. A batch leaves as soon as the device is free. What comes back without
a decision waits again, its commit unconfirmed. Beside the stages keys are spilled to the backlog before they hold the
slot for too long, and taken up again (`spilling`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import psycopg

from cdc_embedder import failpoints
from cdc_embedder.batch import Batch, Chunk, Stage
from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.database_errors import from_database
from cdc_embedder.embedding.base import Embedder, InputType
from cdc_embedder.embedding.isolation import Outcome, embed_isolating
from cdc_embedder.errors import ColumnFault, EmbedderDown, Problem, ServerGone, Temporary
from cdc_embedder.following import Configuration
from cdc_embedder.lane import Lane
from cdc_embedder.metering import Meters
from cdc_embedder.pending import Entry, Key, Work
from cdc_embedder.querying import Queries
from cdc_embedder.routing import Router
from cdc_embedder.rows import scan
from cdc_embedder.rows.fetch import Fetch, Verdict
from cdc_embedder.rows.session import Connection, wait_until_flushed
from cdc_embedder.scheduling import Candidate, Scheduler
from cdc_embedder.suspecting import Watch
from cdc_embedder.wal.stream import ReplicationStream

if TYPE_CHECKING:
    from cdc_embedder.tracing import Tracing

log = logging.getLogger(__name__)

now = time.monotonic

CONFIRM_SECONDS = 0.1
"""How often it is looked whether more may be confirmed."""

SPILL_SHARE = 0.75
"""Of the keys that may be held in memory: from here on the oldest are spilled; at the limit reading pauses."""

INVISIBLE_SECONDS = 0.0005
"""First wait for a transaction that is decoded and not visible yet; doubles up to RETRY_SECONDS."""

RETRY_SECONDS = 2.0
"""Longest wait before a row that was locked, or a statement that was refused for the moment, is tried again."""

GATHER_SECONDS = 0.005
"""A column's live batches begin so far apart: a row that comes alone goes at once, a steady stream of them is gathered,
which spares the server most of what a row costs by itself. Not where a full batch waits."""

LIVE_SECONDS = 1.0
"""For so long after a live change or a query other work leaves a call of the model free, and takes small batches."""

BESIDE_LIVE = 0.1
"""The share of a full batch that is small."""

RETRY_AHEAD = 3 * scan.PAGE
"""Keys of repair work, the backlog's among them, beyond which no failed row is tried again."""

RETRY_POLL_SECONDS = 5.0
"""How often the ledgers are asked for failed rows whose time has come."""

TRIAL_SECONDS = 5.0
"""How long the model has been loaded before suspects are tried, alone: what kills us every few seconds is not a row."""

STUCK_SECONDS = 120.0
"""After so long without progress, though there is work and nobody to wait for, the process is of no use any more.
Longer than a statement may take."""

CLEAR_SECONDS = 0.1
"""After so long without a call of the model the note of the last one is removed."""


class Pipeline:
    """One connection's worth of work. `stop` makes the stages finish what they have in hand, in order.

    `writers` is how many tasks take from `to_write`, where the most urgent chunk comes first, and None at the end.
    """

    def __init__(
        self,
        configuration: Configuration,
        fetcher: Connection,
        writers: int,
        watch: Watch,
        queries: Queries,
        meters: Meters,
        tracing: Tracing | None,
        max_pending: int,
    ) -> None:
        self._configuration = configuration
        self._fetcher = fetcher
        self._writers = writers
        self._watch = watch
        self._queries = queries
        self.meters = meters
        self._tracing = tracing
        self._trial = False
        self._live_until = 0.0
        self._judged = False
        self._confirmable = asyncio.Event()
        self.max_pending = max_pending
        self._scheduler = Scheduler()
        self._fetches: dict[int, tuple[EmbeddingColumn, Fetch]] = {}
        self._work = asyncio.Event()
        self.room = asyncio.Event()
        self.full = asyncio.Event()
        self.settled = asyncio.Event()
        self._stopping = asyncio.Event()
        self._calls: Counter[Embedder] = Counter()
        self._patient: Counter[Embedder] = Counter()  # those of the calls that are not for live changes
        self._begun = 0
        self._ended = asyncio.Event()
        self.to_write: asyncio.PriorityQueue[tuple[int, int, Chunk | None]] = asyncio.PriorityQueue(maxsize=4)
        self._chunks = itertools.count()
        self.stream: ReplicationStream | None = None
        self.progressed = now()
        """When something was last read, embedded or written."""

    @property
    def lanes(self) -> list[Lane]:
        return list(self._configuration.lanes.values())

    @property
    def held(self) -> int:
        """Live keys in memory, of all columns; scans and repairs are bounded each for itself."""
        return sum(lane.pending.unfinished(Work.LIVE) for lane in self._configuration.lanes.values())

    @property
    def crowded(self) -> bool:
        """Whether memory is short: the oldest keys are to be spilled."""
        return self.held >= self.max_pending * SPILL_SHARE

    def wake(self) -> None:
        """Something may have become possible: there is work, or a model, or room."""
        self._work.set()

    def stop(self) -> None:
        """Take no more keys; what is in hand is embedded, written and confirmed."""
        self._stopping.set()
        self._work.set()

    def confirm(self) -> None:
        """There may be more to confirm."""
        self._confirmable.set()

    def judged(self, batch: Batch, entries: Iterable[Entry]) -> None:
        """These keys are done, and what says so is to be flushed before they are confirmed."""
        self._judged = True
        self.settle(batch.lane, batch.pending.finish(entries))

    def done_with(self, batch: Batch, rows: int) -> None:
        """So many rows of a batch were written, or given back."""
        batch.unwritten -= rows
        if self._tracing is not None and batch.unwritten <= 0:
            self._tracing.batch(batch)

    def written(self) -> None:
        """Something was written, or given back."""
        self.progressed = now()
        self.confirm()
        self.room.set()
        self._work.set()

    def stuck(self) -> bool:
        """Whether a key could be judged, nothing is with a model, and nothing has moved for STUCK_SECONDS.

        A model may take as long as it likes, and a statement as long as the session lets it.
        """
        if self._calls.total() or now() - self.progressed < STUCK_SECONDS:
            return False
        return any(
            lane.ready(now()) and lane.embedder is not None and not self._queries.busy(lane.embedder)
            for lane in self.lanes
            if any(lane.pending.waiting(work) for work in Work)
        )

    async def confirming(self, connection: Connection) -> None:
        """For ever: tell the stream how far the slot may be confirmed."""
        while True:
            await self._confirmable.wait()
            self._confirmable.clear()
            await self.confirm_once(connection)
            await asyncio.sleep(CONFIRM_SECONDS)

    async def confirm_once(self, connection: Connection) -> None:
        """Confirm what is finished, when all that its verdicts rested on is flushed.

        A row may have been found done because of a commit that the application made with synchronous_commit = off: a
        crash of the server could take it back, and what was confirmed would be judged by nobody.
        """
        stream, watermark = self.stream, self._configuration.watermark
        if stream is None:
            return
        watermark.idle(stream.idle_through)
        through = watermark.flushed
        if through <= stream.confirmed:
            return
        if self._judged:
            self._judged = False
            await wait_until_flushed(connection)
        if self.stream is stream:
            stream.confirm(through)
            failpoints.reached("confirmed")

    async def read(self, stream: ReplicationStream, router: Router) -> None:
        """Route what the stream delivers, until cancelled. Raises what the stream raises."""
        async for messages in stream.batches():
            if messages:
                router.route(messages, now())
                self._work.set()
                if router.unusable or any(lane.route.missed for lane in self.lanes):
                    router.unusable.clear()
                    self._configuration.wake.set()
            failpoints.reached("received")
            self.confirm()
            while self.crowded:
                self.full.set()
                if self.held < self.max_pending:
                    break
                self.room.clear()
                await self.room.wait()

    async def fetch(self) -> None:
        """Take the keys whose turn it is and judge them; what needs it goes through the model, to those who write.

        Keys are taken as late as can be, when the model is free for another call: what waits longest goes first.
        """
        async with asyncio.TaskGroup() as group:
            while not self._stopping.is_set():
                chosen = self._choose()
                if chosen is None:
                    await self._idle()
                    continue
                lane = self._configuration.lanes[chosen.column]  # type: ignore[index]
                embedder = lane.embedder
                batch = await self._judge(lane, chosen)
                if batch is None or embedder is None:
                    continue
                if batch.alone:
                    await self._no_call()
                self._calls[embedder] += 1
                self._patient[embedder] += chosen.work is not Work.LIVE
                self._begun += 1
                group.create_task(self._call(batch, embedder))
                if batch.alone:
                    await self._no_call()
        for _ in range(self._writers):
            await self.to_write.put((len(Work), next(self._chunks), None))

    async def _no_call(self) -> None:
        """Wait until nothing is with a model."""
        while self._calls.total():
            await self._ended.wait()

    async def _call(self, batch: Batch, embedder: Embedder) -> None:
        """Texts to vectors in a worker thread."""
        try:
            if await self._embed(batch, embedder):
                start, rows, batch.unwritten = 0, batch.lane.write_size.rows, len(batch.writes)
                while start < len(batch.writes):
                    chunk = Chunk(batch, slice(start, start + rows))
                    await self.to_write.put((batch.chosen.work, next(self._chunks), chunk))
                    start += rows
            else:
                self.done_with(batch, 0)
        finally:
            self.progressed = now()
            self._calls -= Counter((embedder,))
            self._patient -= Counter({embedder: int(batch.chosen.work is not Work.LIVE)})
            self._ended.set()
            self._ended.clear()
            self._work.set()
        begun = self._begun
        await asyncio.sleep(CLEAR_SECONDS)  # the next call overwrites the note anyway
        if begun == self._begun and not self._calls.total():
            await self._watch.clear()

    async def retry(self, connection: Connection) -> None:
        """For ever: count failed rows, and put them on the waiting list again when their time has come."""
        while True:
            await asyncio.sleep(RETRY_POLL_SECONDS)
            for lane in self.lanes:
                if not lane.served:
                    continue
                column = lane.column
                try:
                    lane.failed_rows = await scan.failed(connection, column)
                    if not lane.ready(now()) or lane.pending.unfinished(Work.REPAIR) >= RETRY_AHEAD:
                        continue
                    due = await scan.due(connection, column, scan.PAGE)
                except psycopg.Error as error:
                    await self.trouble(
                        lane, from_database(error, f"looking for failed rows of {column.label}", of_rows=True)
                    )
                    continue
                if lane.column is not column:
                    continue  # the key may be another one
                for key in due:
                    lane.pending.want(key, Work.REPAIR, now())
                if due:
                    self._work.set()

    def _choose(self) -> Candidate | None:
        present = now()
        candidates = []
        for id, lane in self._configuration.lanes.items():
            if not lane.ready(present) or lane.embedder is None:
                continue
            if self._queries.busy(lane.embedder):
                continue
            at_once = 1 if lane.breaker.state(present) == "half-open" else lane.embedder.concurrency
            if self._calls[lane.embedder] >= at_once:
                continue
            lane.pending.wake(present)
            crowd = self._patient[lane.embedder] >= max(1, at_once - 1) and self._urgent(present)
            may = (Work.LIVE,) if crowd else Work
            candidates += [
                Candidate(id, work, lane.column.priority)
                for work in may
                if lane.pending.waiting(work) > 0 and (work is not Work.LIVE or not self._gathers(lane, present))
            ]
        chosen = self._scheduler.choose(candidates)
        if chosen is not None and chosen.work is Work.LIVE:
            self._live_until = present + LIVE_SECONDS
            self._configuration.lanes[chosen.column].next_live = present + GATHER_SECONDS  # type: ignore[index]
        return chosen

    def _urgent(self, present: float) -> bool:
        """Whether somebody waits, or did a moment ago."""
        return present < max(self._live_until, self._queries.latest + LIVE_SECONDS)

    @staticmethod
    def _gathers(lane: Lane, present: float) -> bool:
        """Whether live changes are to wait for more of them."""
        return present < lane.next_live and lane.pending.waiting(Work.LIVE) < lane.embed_size.rows

    async def _idle(self) -> None:
        """Until something wakes us, or a delayed key or a resting embedder is due."""
        self._work.clear()
        present = now()
        times = [lane.pending.wake(present) for lane in self.lanes] + [
            lane.breaker.until for lane in self.lanes if lane.breaker.state(present) == "open"
        ]
        times += [lane.next_live for lane in self.lanes if lane.pending.waiting(Work.LIVE) and lane.next_live > present]
        due = min((time for time in times if time is not None), default=present + 1.0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.001, due - present)):  # wait_for of 3.11 can swallow a cancellation
                await self._work.wait()

    async def _judge(self, lane: Lane, chosen: Candidate) -> Batch | None:
        column, pending = lane.column, lane.pending
        share = BESIDE_LIVE if chosen.work is not Work.LIVE and self._urgent(now()) else 1.0
        limit = lane.embed_size.part(share)
        if lane.breaker.state(now()) == "half-open":
            limit = 1
        entries = pending.take(chosen.work, limit, now())
        if not entries:
            return None
        began = now()
        try:
            read = await self._fetch_of(column).rows([entry.key for entry in entries])
        except psycopg.Error as error:
            lane.meter.retried += len(entries)
            pending.give_back(entries, now(), RETRY_SECONDS)
            await self.trouble(lane, from_database(error, f"reading {column.label}", of_rows=True))
            return None
        self.meters.stages["fetching"] += now() - began
        self.progressed = now()
        done, invisible, later = [], [], []
        batch = Batch(lane, column, pending, [], [], chosen, share=share)
        batch.stages.append(Stage("fetching", began, now(), len(entries)))
        for entry, (snapshot, row) in zip(entries, read, strict=True):
            if entry.reason.xid is not None and not snapshot.sees(entry.reason.xid):
                invisible.append(entry)
            elif row.verdict is Verdict.DONE:
                done.append(entry)
            elif row.verdict is Verdict.LATER:
                later.append(entry)
            else:
                batch.entries.append(entry)
                batch.rows.append(row)
        failpoints.reached("fetched")
        if lane.suspects:
            current = [
                e.key for e, (_, r) in zip(entries, read, strict=True) if r.verdict is Verdict.DONE and not r.failures
            ]
            await self._try_suspects(batch, current)
        lane.meter.unchanged += len(done)
        lane.meter.retried += len(invisible)
        self.settle(lane, pending.finish(done))
        self._judged = True
        pending.give_back(later, now())
        for entry in invisible:
            pending.give_back([entry], now(), min(RETRY_SECONDS, INVISIBLE_SECONDS * 2 ** min(entry.tries, 10)))
        if done:
            self.confirm()
            self.room.set()
        return batch if batch.entries else None

    async def _try_suspects(self, batch: Batch, current: list[Key]) -> None:
        """Rule 7: what was with the model when a process died is tried alone, after everything else."""
        suspects, lane = batch.lane.suspects, batch.lane
        void = [key for key in current if key in suspects]
        others: list[int] = []
        alone: list[int] = []
        for index, (entry, row) in enumerate(zip(batch.entries, batch.rows, strict=True)):
            suspect = suspects.get(entry.key)
            if suspect is not None and (row.verdict is not Verdict.EMBED or row.fingerprint != suspect.fingerprint):
                void.append(entry.key)
                suspect = None
            (others if suspect is None or suspect.guilty else alone).append(index)
        if void:
            await self._watch.acquit(lane, void)
        early = lane.embedder is None or now() < lane.loaded + TRIAL_SECONDS
        self._trial = bool(alone) and not early and not (others and self._trial)  # every other batch at the most
        batch.alone = self._trial
        kept = alone[:1] if self._trial else others
        rest = [entry for index, entry in enumerate(batch.entries) if index not in kept]
        batch.pending.give_back(rest, now(), 0.0 if self._trial else TRIAL_SECONDS / 10)
        batch.entries[:] = [batch.entries[index] for index in kept]
        batch.rows[:] = [batch.rows[index] for index in kept]

    def _fetch_of(self, column: EmbeddingColumn) -> Fetch:
        known = self._fetches.get(column.id)
        if known is None or known[0] is not column:
            known = self._fetches[column.id] = (column, Fetch(self._fetcher, column))
        return known[1]

    async def _embed(self, batch: Batch, embedder: Embedder) -> bool:
        """Fill in writes and vectors; False where the model could not be asked and the keys wait again."""
        started = now()
        texts, where, errors = batch.texts()
        outcome = None
        if texts and (outcome := await self._ask(batch, embedder, texts, where)) is None:
            return False
        elapsed = now() - started
        self._scheduler.account(batch.chosen, elapsed + 1e-6 * len(batch.rows))
        if outcome is not None:
            lane = batch.lane
            lane.embed_size.took(len(batch.entries), elapsed, batch.share)
            lane.breaker.succeeded()
            lane.trouble = ""
            failpoints.reached("embedded")
            if lane.suspects and (tried := [key for n in where if (key := batch.entries[n].key) in lane.suspects]):
                await self._watch.acquit(lane, tried)
        batch.decide(outcome, where, errors)
        return True

    async def _ask(self, batch: Batch, embedder: Embedder, texts: list[str], where: list[int]) -> Outcome | None:
        """The model's answer to the rows at `where`; None where there is none, and the keys wait again."""
        lane, column = batch.lane, batch.column
        if lane.embedder is not embedder or lane.column.model != column.model or lane.breaker.state(now()) == "open":
            batch.pending.give_back(batch.entries, now(), INVISIBLE_SECONDS)
            return None
        meter, began = self.meters.model(column.model.name), now()
        note = await self._watch.note(column, [(batch.entries[n].key, batch.rows[n].fingerprint or b"") for n in where])
        try:
            outcome = await asyncio.to_thread(embed_isolating, embedder, column.model, texts, InputType.DOCUMENT)
            batch.stages.append(Stage("embedding", began, now(), len(texts)))
            batch.tokens = outcome.tokens
            self.meters.called(column.model.name, len(texts), outcome.tokens, outcome.spent, began, now())
            return outcome
        except EmbedderDown as problem:
            meter.errors += 1
            self._down(batch, problem)
        except Problem as problem:
            meter.errors += 1
            lane.meter.retried += len(batch.entries)
            batch.pending.give_back(batch.entries, now(), RETRY_SECONDS)
            await self._configuration.fail(lane, problem)
        finally:
            self._watch.over(note)
        return None

    def _down(self, batch: Batch, problem: EmbedderDown) -> None:
        """Trouble of the device or the network: nothing is counted against a row; the column rests, its keys wait."""
        lane = batch.lane
        rest = lane.breaker.failed(now(), problem.retry_after)
        lane.trouble = lane.last_error = problem.sentence
        log.warning("%s: %s; trying again in %.1f s", lane.column.label, problem.sentence, rest)
        lane.meter.retried += len(batch.entries)
        batch.pending.give_back(batch.entries, now())

    def settle(self, lane: Lane, settled: list[tuple[Key, int]]) -> None:
        """These rows of the backlog may be removed."""
        if settled:
            lane.settled += settled
            self.settled.set()

    async def trouble(self, lane: Lane, problem: Problem) -> None:
        """Raise what concerns the connection, note what passes, pause the column for the rest."""
        if isinstance(problem, ServerGone):
            raise problem
        if isinstance(problem, Temporary):
            full = (problem.sqlstate or "").startswith("53")  # disk, memory: somebody has to know
            log.log(logging.WARNING if full else logging.INFO, "%s; trying again", problem.sentence)
            return
        await self._configuration.fail(lane, problem if isinstance(problem, ColumnFault) else ColumnFault(str(problem)))
        self._configuration.wake.set()
