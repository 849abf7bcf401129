"""The last stage: vectors to rows. What was written is done; what was not waits again, to be judged anew (rule 4)."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from typing import Any

import psycopg

from cdc_embedder import failpoints
from cdc_embedder.batch import Batch, Stage
from cdc_embedder.database_errors import from_database
from cdc_embedder.errors import Problem
from cdc_embedder.following import Configuration
from cdc_embedder.pipeline import RETRY_SECONDS, Pipeline, now
from cdc_embedder.rows.writeback import KILLED_THE_PROCESS, Write
from cdc_embedder.rows.writers import Writers
from cdc_embedder.suspecting import Watch


class Writing:
    """Writes what `pipeline` has embedded."""

    def __init__(self, pipeline: Pipeline, configuration: Configuration, writers: Writers, watch: Watch) -> None:
        self._pipeline = pipeline
        self._configuration = configuration
        self._writers = writers
        self._watch = watch

    def runs(self) -> list[Coroutine[Any, Any, None]]:
        """As many runs as there are sessions to write with, each until the pipeline has stopped."""
        return [self._run() for _ in range(self._writers.at_once)]

    async def _run(self) -> None:
        """Urgent work goes first: no batch is written whole before another one's turn."""
        while (chunk := (await self._pipeline.to_write.get())[2]) is not None:
            began = now()
            written = await self._write(chunk.batch, chunk.rows)
            elapsed = now() - began
            self._pipeline.meters.stages["writing"] += elapsed
            rows = len(chunk.batch.writes[chunk.rows])
            chunk.batch.stages.append(Stage("writing", began, began + elapsed, rows))
            if written:
                chunk.batch.lane.write_size.took(rows, elapsed)
            self._pipeline.done_with(chunk.batch, rows)
            self._pipeline.written()

    async def _write(self, batch: Batch, chunk: slice) -> bool:
        """Write part of a batch; whether the statement succeeded."""
        try:
            done = await self._writers.write(batch.column, batch.writes[chunk], batch.vectors[chunk])
        except psycopg.Error as error:
            await self._not_written(batch, chunk, from_database(error, f"writing {batch.column.label}", of_rows=True))
            return False
        await self._written(batch, chunk, done)
        return True

    async def _written(self, batch: Batch, chunk: slice, done: set[int]) -> None:
        failpoints.reached("written")
        lane, meter = batch.lane, batch.lane.meter
        entries, writes = batch.entries[chunk], batch.writes[chunk]
        committed = [at for index in done if (at := entries[index].committed_at) and writes[index].has_vector]
        self._pipeline.judged(batch, (entry for index, entry in enumerate(entries) if index in done))
        if killers := [writes[index].key for index in done if writes[index].error is KILLED_THE_PROCESS]:
            await self._watch.sentence(lane, killers)
        meter.guard_misses += len(entries) - len(done)
        meter.retried += len(entries) - len(done)
        for index, entry in enumerate(entries):
            if index not in done:
                batch.pending.give_back([entry], now(), min(RETRY_SECONDS, 0.02 * 2 ** min(entry.tries, 7)))
        for index in done:
            write = writes[index]
            if write.error is not None:
                meter.failed += 1
                lane.scan.failed += lane.scan.running
                lane.last_error = write.error
            elif write.has_vector:
                meter.embedded += 1
                meter.truncated += write.truncated
                lane.scan.current += lane.scan.running
            else:
                meter.cleared += 1
        if committed:
            present = time.time()
            meter.commit_to_vector.observe(*(max(0.0, present - at) for at in committed))
        if not done:
            self._configuration.wake.set()

    async def _not_written(self, batch: Batch, chunk: slice, problem: Problem) -> None:
        """Rule 5: contention is requeued whole. A row that the database refuses is found by halving."""
        entries, writes = batch.entries[chunk], batch.writes[chunk]
        if self._writers.blames_a_row(problem):
            await self._configuration.reload()
        if self._writers.blames_a_row(problem) and batch.lane.column is batch.column and not batch.lane.fault:
            if len(writes) > 1:
                middle = chunk.start + len(writes) // 2
                for part in (slice(chunk.start, middle), slice(middle, chunk.start + len(writes))):
                    await self._write(batch, part)
                return
            if writes[0].error is None:
                state = problem.sqlstate
                refused = f"the database refused the row with SQLSTATE {state}: a constraint or a trigger of the table"
                batch.writes[chunk] = [Write(writes[0].key, writes[0].fingerprint, False, keep=True, error=refused)]
                await self._write(batch, chunk)
                return
        batch.lane.meter.retried += len(entries)
        batch.pending.give_back(entries, now(), RETRY_SECONDS)
        await self._pipeline.trouble(batch.lane, problem)
