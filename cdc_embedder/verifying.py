"""`cdc-embedder verify`: is every stored vector the model's vector of its row's present text? No service is needed.

Each row is compared with the ledger, and what the ledger vouches for is recomputed: every row, or a random sample.
It only reads. Beside a service that works, rows that wait are found stale or missing, unless they are waited for first.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psycopg
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from cdc_embedder import catalog
from cdc_embedder.asking import NAMES, Row, session
from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.database_errors import from_database
from cdc_embedder.embedding.base import InputType
from cdc_embedder.embedding.isolation import embed_isolating
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.errors import ColumnFault, Problem, ServerGone
from cdc_embedder.identifiers import column_of, join, split
from cdc_embedder.pausing import configured
from cdc_embedder.pending import Key
from cdc_embedder.rows import audit
from cdc_embedder.rows.audit import Evidence, Finding
from cdc_embedder.rows.session import Connection, connect
from cdc_embedder.settings import Settings
from cdc_embedder.status import unbroken
from cdc_embedder.waiting import Tell, wait_for_pending

LEAST_COSINE = 0.9999
"""Below this a vector is wrong: what float32 leaves between two runs of one model is ten times less."""

LEAST_COSINE_HALF = 0.99
"""The same where the model computes or the column stores in half precision."""

BATCH = 256
"""Rows that are recomputed at a time."""


@dataclass(slots=True)
class Report:
    """One column's numbers. `null` counts rows without text; one that holds a vector is in wrong or stale too.

    `error`: why the column could not be verified; the numbers say nothing then.
    """

    id: int
    source_table: str
    target_column: str
    rows: int = 0
    null: int = 0
    current: int = 0
    pending: int = 0
    failed: int = 0
    missing: int = 0
    stale: int = 0
    wrong: int = 0
    orphaned: int = 0
    error: str = ""

    @property
    def good(self) -> bool:
        """Nothing missing, stale or wrong. An orphan costs space, not truth; a failure is in the ledger, and told."""
        return not (self.missing or self.stale or self.wrong or self.error)

    @property
    def name(self) -> str:
        """Table and column, to be pasted into a command."""
        return column_of(self.source_table, self.target_column)

    def as_object(self) -> dict[str, Any]:
        """For JSON: `error` is there only where there is one, and the numbers, which are not known then, are None."""
        found = asdict(self)
        if self.error:
            return found | dict.fromkeys(NUMBERS)
        del found["error"]
        return found


NUMBERS = ("rows", "null", "current", "pending", "failed", "missing", "stale", "wrong", "orphaned")


Advance = Callable[[str, int, int], None]
"""Called with a column's name, its rows done since the last call, and its rows as far as known."""


@contextmanager
def progress_bar(console: Console) -> Iterator[Advance]:
    """A bar a column on `console` where that is a terminal; elsewhere nothing."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bars: dict[str, TaskID] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name)
            progress.update(bars[name], advance=done, total=total)

        yield advance


def print_reports(reports: list[Report], console: Console, *, as_json: bool) -> None:
    """A line a column that could be verified; or as JSON, a list of objects: of one that could not, without numbers."""
    if as_json:
        print(json.dumps([report.as_object() for report in reports]))
        return
    if not reports:
        console.print("no column is configured: INSERT INTO cdc_embedder.embedding_column, or cdc-embedder add")
    verified = [report for report in reports if not report.error]
    if not verified:
        return
    out = Table(box=None, header_style="bold")
    out.add_column("column", overflow="fold")
    for name in NUMBERS:
        out.add_column(name, justify="right", no_wrap=True)
    for report in verified:
        out.add_row(report.name, *(f"{getattr(report, name):,}" for name in NUMBERS))
    with unbroken(console):
        console.print(out)


def verify(
    settings: Settings,
    names: Sequence[tuple[str, str]],
    *,
    wait: bool,
    sample: int | None,
    advance: Advance,
    tell: Tell = lambda sentence: None,
) -> list[Report]:
    """Verify the columns `names` (table, target), or all, in order of id: one that cannot be is in the way of no other.

    `tell` is told what is waited for. Raises Problem.
    """
    with session(settings.dsn.get_secret_value(), "verify", "verifying") as connection:
        ids = _chosen(connection, names)
        if wait:
            wait_for_pending(connection, ids, tell=tell)
        told = connection.execute(
            "SELECT s.*, c.slot AS served_by FROM cdc_embedder.status s"
            "  JOIN cdc_embedder.embedding_column c ON c.id = s.id WHERE s.id = ANY ($1) ORDER BY s.id",
            (ids,),
        ).fetchall()
    return asyncio.run(_verify(settings, told, sample, advance))


def _chosen(connection: psycopg.Connection[Row], names: Sequence[tuple[str, str]]) -> list[int]:
    """The ids of the named columns; of all where none is named."""
    if not names:
        return [row["id"] for row in connection.execute("SELECT id FROM cdc_embedder.embedding_column").fetchall()]
    ids = []
    for table, target in names:
        found = [row for row in configured(connection, split(table), target) if row["present"] or not row["there"]]
        if not found:
            raise Problem(f"{join([*split(table), target])} is not a configured column", hint=NAMES)
        ids += [row["id"] for row in found]
    return ids


async def _verify(settings: Settings, told: list[Row], sample: int | None, advance: Advance) -> list[Report]:
    embedders = Embedders(
        device=settings.device,
        allow_remote_code=settings.allow_remote_code,
        api_key_envs=tuple(settings.allowed_api_key_envs),
        base_urls=settings.allowed_base_urls,
    )
    reports = []
    connection = await connect(settings.dsn.get_secret_value(), "verify", default_transaction_read_only="on")
    try:
        columns = {column.id: column for slot in {row["served_by"] for row in told}
                   for column in await catalog.load(connection, slot)}  # fmt: skip
        for row in told:
            column = columns.get(row["id"])
            if column is None:
                continue  # removed since
            report = Report(row["id"], row["source_table"], row["target_column"], pending=row["pending"] or 0)
            try:
                if column.fault is not None:
                    raise ColumnFault(column.fault)
                verification = Verification(connection, column, embedders, report, sample, row["engine"] or "")
                await verification.run(_steps(advance, report, row["rows"] or 0))
            except psycopg.Error as error:
                problem = from_database(error, "reading its rows")
                if connection.closed or isinstance(problem, ServerGone):
                    raise problem from error
                report.error = problem.sentence
            except ServerGone:
                raise
            except Problem as problem:
                report.error = problem.sentence
            reports.append(report)
    except psycopg.Error as error:
        raise from_database(error, "verifying") from error
    finally:
        await connection.close()
        embedders.close()
    return reports


def _steps(advance: Advance, report: Report, expected: int) -> Callable[[int], None]:
    return lambda done: advance(report.name, done, max(report.rows, expected))


class Verification:
    """The verification of one column; `report` fills while it runs."""

    def __init__(
        self,
        connection: Connection,
        column: EmbeddingColumn,
        embedders: Embedders,
        report: Report,
        sample: int | None,
        engine: str,
    ) -> None:
        """`engine`: how the service says that it runs the model."""
        self._connection = connection
        self._column = column
        self._embedders = embedders
        self._report = report
        self._sample = None if sample is None else Sample(sample)
        self._evidences = audit.Evidences(connection, column)
        self._engine = engine

    async def run(self, advance: Callable[[int], None]) -> None:
        """All pages, then the sample where there is one, then the ledger. Raises psycopg.Error as it comes, Problem."""
        after: Key | None = None
        while True:
            page = await audit.page(self._connection, self._column, after)
            self._count(page)
            if self._sample is None:
                advance(page.rows - len(page.vouched))
                await self._recompute(page.vouched, advance)
            else:
                self._sample.offer(page.vouched)
                self._report.current += len(page.vouched)
                advance(page.rows)
            after = page.last
            if after is None:
                break
        if self._sample is not None:
            self._report.current -= len(self._sample.drawn)
            await self._recompute(self._sample.drawn, lambda done: None)
        await self._orphans()

    def _count(self, page: audit.Page) -> None:
        report = self._report
        report.rows += page.rows
        report.null += page.null
        report.failed += page.failed
        report.missing += page.missing
        report.stale += page.stale
        report.wrong += page.wrong

    async def _recompute(self, keys: list[Key], advance: Callable[[int], None]) -> None:
        """Judge `keys`, which the ledger vouched for a moment ago, for good."""
        waiting = keys
        while waiting:
            batch, waiting = waiting[:BATCH], waiting[BATCH:]
            found = await self._evidences.read(batch)
            later = [key for key, row in zip(batch, found, strict=True) if row.finding is Finding.LATER]
            waiting = later + waiting
            vouched = [row for row in found if row.finding is Finding.VOUCHED]
            self._note_changes(found)
            if vouched:
                wrong = await asyncio.to_thread(self._wrong, vouched)
                self._report.wrong += wrong
                self._report.current += len(vouched) - wrong
            advance(len(batch) - len(later))

    def _note_changes(self, found: list[Evidence]) -> None:
        """Rows that somebody changed since their page was read."""
        report = self._report
        for row in found:
            match row.finding:
                case Finding.ABSENT:
                    report.rows -= 1
                case Finding.EMPTY:
                    report.null += 1
                case Finding.FAILED:
                    report.failed += 1
                case Finding.MISSING:
                    report.missing += 1
                case Finding.STALE:
                    report.stale += 1
                case Finding.WRONG:
                    report.wrong += 1

    def _wrong(self, rows: list[Evidence]) -> int:
        """How many of `rows` hold another vector than the model gives. Blocks while it computes."""
        texts, stored = [], []
        for row in rows:
            if row.text is not None and row.vector is not None and len(row.vector) == self._column.model.dimensions:
                texts.append(row.text.decode(errors="replace"))
                stored.append(row.vector)
        if not texts:
            return len(rows)
        embedder = self._embedders.get(self._column.model)
        outcome = embed_isolating(embedder, self._column.model, texts, InputType.DOCUMENT)
        a, b = np.array(stored, dtype=np.float64), outcome.vectors.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        right = cosine >= least_cosine(
            self._column, f"{self._engine}; {embedder.engine}"
        )  # false for NaN: a zero vector, or a text that the model refuses
        return len(rows) - int(np.count_nonzero(right))

    async def _orphans(self) -> None:
        after: Key | None = None
        while True:
            after, orphaned = await audit.orphans(self._connection, self._column, after)
            self._report.orphaned += orphaned
            if after is None:
                return


class Sample:
    """`size` keys, each of those offered with the same chance (reservoir sampling, algorithm R)."""

    def __init__(self, size: int) -> None:
        self.drawn: list[Key] = []
        self._size = size
        self._offered = 0
        self._random = random.Random()

    def offer(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._offered += 1
            if len(self.drawn) < self._size:
                self.drawn.append(key)
            elif (place := self._random.randrange(self._offered)) < self._size:
                self.drawn[place] = key


def least_cosine(column: EmbeddingColumn, engine: str = "") -> float:
    """What the cosine of stored and recomputed vector must reach; `engine` tells how the model was run, both times."""
    half = (
        column.model.dtype in ("bfloat16", "float16")
        or "float16" in engine  # as bfloat16 is, too
        or (column.target is not None and column.target.kind == "halfvec")
    )
    return LEAST_COSINE_HALF if half else LEAST_COSINE
