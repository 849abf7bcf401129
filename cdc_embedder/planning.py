"""`cdc-embedder plan`: what a new column would cost, before anything is configured. It writes nothing.

Rows are the planner's estimate where there are many, else counted. A sample of them is read and embedded on this
device: its tokens, its share over the model's limit and its rate are measured. What the disk needs is an estimate, by
the arithmetic of `growing`. Works before `init`, with the pre-filled models. Not for what is wrong with the server:
that is `doctor`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import psycopg
from rich.console import Console
from rich.table import Table

from cdc_embedder import planned_table
from cdc_embedder.adopting import embedders_of
from cdc_embedder.database_errors import from_database
from cdc_embedder.embedding.base import Embedder, InputType, ModelSpec
from cdc_embedder.embedding.isolation import embed_isolating
from cdc_embedder.errors import Problem
from cdc_embedder.growing import growth
from cdc_embedder.identifiers import split
from cdc_embedder.settings import Settings
from cdc_embedder.sizes import size
from cdc_embedder.verifying import Advance

MEASURED_SECONDS = 60.0
"""No batch of the sample begins later than this: what is measured by then has to do."""

LARGEST_BATCH = 256
"""Batches double up to so many texts: a slow model is measured with few, a fast one with full batches."""


@dataclass(frozen=True, slots=True)
class Index:
    name: str
    method: str
    bytes: int
    on_target: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """What embedding the sample told. `refused` texts would be recorded as failed."""

    texts: int
    tokens: int
    truncated: int
    refused: int
    seconds: float
    engine: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One column that might be. Shares are between 0 and 1, of the sample; None where it had no text."""

    table: str
    sources: list[str]
    target: str | None
    target_type: str
    model: str
    engine: str | None
    rows: int
    rows_estimated: bool
    sampled: int
    null_share: float
    embedded: int
    tokens_per_text: float | None
    max_tokens: int | None
    share_over_limit: float | None
    share_refused: float | None
    rows_per_s: float | None
    tokens_per_s: float | None
    minutes: float | None
    vector_bytes: int
    table_growth_bytes: int
    index_growth_bytes: int
    ledger_bytes: int
    wal_bytes: int
    indexes: list[Index]
    warnings: list[str]


def plan(
    settings: Settings, table: str, source: str, model: str, target: str | None, size: int, advance: Advance
) -> Plan:
    """Read what there is, draw `size` rows by chance, embed their texts. Raises Problem."""
    sources = split(source, ",")
    column = None if target is None else _single(target)
    try:
        with planned_table.connect(settings.dsn.get_secret_value()) as connection:
            found = planned_table.look(connection, table, sources, column)
            spec = planned_table.model(connection, model)
            rows, estimated = planned_table.count(connection, found)
            drawn = planned_table.draw(connection, found, sources, column, rows, size)
    except psycopg.Error as error:
        raise from_database(error, "planning") from error
    texts = [row["text"].decode(errors="replace") for row in drawn if row["text"] is not None]
    measured = _measure(settings, spec, texts, lambda done: advance(f"{table} by {spec.name}", done, len(texts)))
    null_share = 1 - len(texts) / len(drawn) if drawn else 0.0
    to_embed = round(rows * (1 - null_share))
    kind = found["target_kind"] or found["default_kind"]
    ordinary = [index["bytes"] for index in found["indexes"] if index["method"] not in planned_table.APPROXIMATE]
    full_pages, fillfactor = found["full_page_writes"] == "on", found["fillfactor"] or 100
    grown = growth(
        rows, to_embed, spec.dimensions, kind, found["heap_bytes"], ordinary, fillfactor, full_pages=full_pages
    )
    good = measured.texts - measured.refused if measured is not None else 0
    rate = good / measured.seconds if measured is not None and measured.seconds and good else None
    held = sum(row["held"] for row in drawn)
    return Plan(
        table=f"{found['schema']}.{found['name']}",
        sources=sources,
        target=column,
        target_type=found["target_type"] or ("real[]" if kind == "float4" else f"{kind}({spec.dimensions})"),
        model=spec.name,
        engine=None if measured is None else measured.engine,
        rows=rows,
        rows_estimated=estimated,
        sampled=len(drawn),
        null_share=null_share,
        embedded=good,
        tokens_per_text=measured.tokens / good if measured is not None and good else None,
        max_tokens=spec.max_tokens,
        share_over_limit=measured.truncated / good if measured is not None and good else None,
        share_refused=measured.refused / measured.texts if measured is not None else None,
        rows_per_s=rate,
        tokens_per_s=measured.tokens / measured.seconds if measured is not None and rate else None,
        minutes=to_embed / rate / 60 if rate else None,
        vector_bytes=grown.vector,
        table_growth_bytes=grown.table,
        index_growth_bytes=grown.indexes,
        ledger_bytes=grown.ledger,
        wal_bytes=grown.wal + grown.wal_of_pages,
        indexes=[Index(**index) for index in found["indexes"]],
        warnings=planned_table.warnings(found, spec, sources, column, len(texts), held),
    )


def print_plan(made: Plan, console: Console, *, as_json: bool) -> None:
    """A line a figure, then indexes and warnings; or as JSON, an object."""
    if as_json:
        print(json.dumps(asdict(made)))
        return
    lines = Table(box=None, show_header=False)
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for name, said in _lines(made):
        lines.add_row(name, said)
    console.print(lines)
    for warning in made.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)


def _lines(made: Plan) -> list[tuple[str, str]]:
    about = "about " if made.rows_estimated else ""
    lines = [
        ("column", f"{made.table}, {', '.join(made.sources)} → {made.target or 'a new column'} {made.target_type}"),
        ("model", made.model + (f", {made.engine}" if made.engine else "")),
        ("rows", f"{about}{made.rows:,}; {made.null_share:.1%} of {made.sampled:,} sampled have no text"),
    ]
    if made.tokens_per_text is not None and made.share_over_limit is not None:
        limit = f"{made.max_tokens} tokens" if made.max_tokens else "the model's limit"
        lines.append(
            ("tokens", f"{made.tokens_per_text:,.0f} a text, prompt included; {made.share_over_limit:.1%} over {limit}")
        )
    if made.share_refused:
        lines.append(("refused", f"{made.share_refused:.1%} of the texts: they would be recorded as failed"))
    if made.minutes is not None and made.rows_per_s is not None and made.tokens_per_s is not None:
        lines += [
            (
                "rate",
                f"{made.rows_per_s:,.1f} rows/s, {made.tokens_per_s:,.0f} tokens/s: {made.embedded:,} measured here",
            ),
            ("time", f"{made.minutes:,.1f} minutes on this device, the model alone"),
        ]
    return [
        *lines,
        ("vector", f"{made.vector_bytes:,} bytes a row"),
        ("table", f"+{size(made.table_growth_bytes)} at most (estimated); VACUUM gives the old versions' place back"),
        ("indexes", f"+{size(made.index_growth_bytes)} at most (estimated); {_told(made.indexes)}"),
        ("ledger", f"+{size(made.ledger_bytes)} (estimated)"),
        ("WAL", f"{size(made.wal_bytes)} (estimated, for one checkpoint)"),
    ]


def _told(indexes: list[Index]) -> str:
    return (
        ", ".join(f"{index.name} ({index.method}{', on the target' if index.on_target else ''})" for index in indexes)
        or "there are none"
    )


def _single(name: str) -> str:
    parts = split(name)
    if len(parts) != 1:
        raise Problem(f"{name} is not the name of a column", hint="the table is an argument of its own")
    return parts[0]


def _measure(settings: Settings, spec: ModelSpec, texts: list[str], advance: Callable[[int], None]) -> Measured | None:
    """Embed `texts` as documents, as many calls at once as the model has a use for. Raises Problem."""
    if not texts:
        return None
    embedders = embedders_of(settings)
    try:
        embedder = embedders.get(spec)
        embed_isolating(embedder, spec, texts[:1], InputType.DOCUMENT)  # a first call is slower than any later one
        return _timed(embedder, spec, texts, advance)
    finally:
        embedders.close()


def _timed(embedder: Embedder, spec: ModelSpec, texts: list[str], advance: Callable[[int], None]) -> Measured:
    began = time.monotonic()

    def one(batch: list[str]) -> tuple[int, int, int, int]:
        if time.monotonic() - began > MEASURED_SECONDS:
            return 0, 0, 0, 0
        outcome = embed_isolating(embedder, spec, batch, InputType.DOCUMENT)
        advance(len(batch))
        return len(batch), outcome.tokens, int(outcome.truncated.sum()), len(outcome.errors)

    with ThreadPoolExecutor(max(1, embedder.concurrency)) as pool:
        done = list(pool.map(one, _batches(texts)))
    embedded, tokens, truncated, refused = (sum(part[field] for part in done) for field in range(4))
    return Measured(embedded, tokens, truncated, refused, time.monotonic() - began, embedder.engine)


def _batches(texts: list[str]) -> list[list[str]]:
    batches, at, size = [], 0, 8
    while at < len(texts):
        batches.append(texts[at : at + size])
        at += size
        size = min(2 * size, LARGEST_BATCH)
    return batches
