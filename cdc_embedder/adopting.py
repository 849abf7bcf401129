"""Are the vectors that a column holds this model's? A sample of them is embedded anew, here, and compared.

`cdc-embedder adopt` asks this of a configured column before the service takes its vectors over, `cdc-embedder migrate`
of a column before it is configured. Not for taking them over: that is `rows.adoption`, in the service.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from cdc_embedder import catalog
from cdc_embedder.asking import session
from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.database_errors import from_database
from cdc_embedder.embedding.base import Embedder, InputType, ModelSpec
from cdc_embedder.embedding.isolation import embed_isolating
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.errors import ColumnFault, Problem
from cdc_embedder.identifiers import join, split
from cdc_embedder.rows import adoption, scan
from cdc_embedder.rows import expressions as e
from cdc_embedder.rows.session import connect
from cdc_embedder.settings import Settings
from cdc_embedder.verifying import least_cosine

BATCH = 256
"""Rows that are embedded at a time."""

Drawn = Sequence[tuple[bytes, list[float] | None]]
"""A text in UTF-8 and the vector beside it, which is None where it could not be adopted."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """`cosines` of stored and recomputed vectors, NaN for a text that the model refuses; `unfit` rows beside them.

    `lengths`: by how much of the recomputed length the stored one differs from it; of a model that gives unit length
    empty, since a vector of another length is unfit there.
    """

    label: str
    cosines: NDArray[np.float64]
    lengths: NDArray[np.float64]
    unfit: int
    threshold: float

    @property
    def below(self) -> int:
        return int(np.count_nonzero(~(self.cosines >= self.threshold)))

    @property
    def tolerance(self) -> float:
        """What a length may differ by: as much as a cosine may differ from 1."""
        return 1 - self.threshold

    @property
    def of_another_length(self) -> int:
        return int(np.count_nonzero(self.lengths > self.tolerance))

    @property
    def sentence(self) -> str:
        """The numbers, for people."""
        said = f"{self.label}: {len(self.cosines)} vectors compared with the model's"
        if len(self.cosines):
            least, mean = np.nan_to_num(self.cosines, nan=-1.0).min(), np.nan_to_num(self.cosines, nan=-1.0).mean()
            said += f", cosine at least {least:.6f}, {mean:.6f} on average, {self.below} below {self.threshold:g}"
        if len(self.lengths):
            worst = self.lengths.max()
            said += f", lengths off by {worst:.6f} at most, {self.of_another_length} by more than {self.tolerance:g}"
        if self.unfit:
            said += f"; {self.unfit} more cannot be kept (not of unit length, or not of the model's dimensions)"
        return said

    def check(self) -> None:
        """Raises Problem where the vectors are not the model's, or none can be kept."""
        if self.below:
            raise Problem(
                self.sentence,
                hint="The model's row does not say how they were made: look at its prompts, revision and source, or"
                " name another model. To have every row embedded anew, set on_existing to 'replace'",
            )
        if self.of_another_length:
            raise Problem(
                self.sentence,
                hint="They have the directions that the model gives, but not the lengths, and normalize = false leaves"
                " those alone: where theirs is 1, name a model with normalize = true. To have every row embedded anew,"
                " set on_existing to 'replace'",
            )
        if self.unfit and not len(self.cosines):
            raise Problem(
                self.sentence,
                hint="Name a model of their dimensions; for vectors that are not of unit length, one with normalize ="
                " false. To have every row embedded anew, set on_existing to 'replace'",
            )


def adopt(settings: Settings, table: str, target: str, size: int, threshold: float) -> list[str]:
    """Compare `size` rows of a configured column; set on_existing to 'adopt' where none is below `threshold`.

    Returns sentences for the operator. Raises Problem, and has changed nothing then.
    """
    name = join([*split(table), target])
    with session(settings.dsn.get_secret_value(), "adopt", f"adopting the vectors of {name}") as connection:
        found = connection.execute(
            "SELECT c.id, c.slot, s.finished_at IS NOT NULL AS over FROM cdc_embedder.embedding_column c"
            "  LEFT JOIN cdc_embedder.scan s ON s.column_id = c.id"
            " WHERE c.source_table = $1::regclass AND c.target_column = $2",
            (table, target),
        ).fetchone()
        if found is None:
            raise Problem(
                f"{name} is not a configured column", hint="configure it: cdc-embedder add … --on-existing ask"
            )
        if found["over"]:
            raise Problem(
                f"the first scan of {name} is over: what it held then was embedded, or adopted",
                hint="cdc-embedder remove leaves vectors in place; add --on-existing adopt takes them over",
            )
        column, drawn = asyncio.run(_draw(settings, found["id"], found["slot"], size))
        if not drawn:
            raise Problem(f"{name} holds no vector beside a text: there is nothing to adopt")
        embedders = embedders_of(settings)
        try:
            comparison = compare(embedders.get(column.model), column.model, drawn, column.label, threshold)
        finally:
            embedders.close()
        comparison.check()
        with connection.transaction():  # by way of 'ask': whatever was said before may have been said of another model
            for step in ("ask", "adopt"):
                connection.execute(
                    "UPDATE cdc_embedder.embedding_column SET on_existing = $2 WHERE id = $1", (found["id"], step)
                )
    return [
        comparison.sentence,
        *doubts(comparison, least_cosine(column)),
        f"{column.label} keeps its vectors: the service takes them over without embedding their rows, but for rows"
        " that were written since the column was configured",
    ]


def doubts(comparison: Comparison, least: float) -> list[str]:
    """What to know of vectors that are near enough to be kept, but not for `verify`, which takes `least`."""
    wrong = int(np.count_nonzero(comparison.cosines < least))
    if not wrong:
        return []
    return [f"{wrong} of them are kept, but cdc-embedder verify will call them wrong: below {least:g}"]


def compare(embedder: Embedder, spec: ModelSpec, drawn: Drawn, label: str, threshold: float) -> Comparison:
    """Embed the texts of `drawn` as documents, and compare. Raises EmbedderDown or ModelFault."""
    rows = [(text, vector) for text, vector in drawn if vector is not None]
    cosines: list[NDArray[np.float64]] = []
    lengths: list[NDArray[np.float64]] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        texts = [text.decode(errors="replace") for text, _ in batch]
        outcome = embed_isolating(embedder, spec, texts, InputType.DOCUMENT)
        a, b = np.array([vector for _, vector in batch], dtype=np.float64), outcome.vectors.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):  # a text that the model refuses has a vector of zeros
            stored, fresh = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
            cosines.append((a * b).sum(axis=1) / (stored * fresh))
            if not spec.normalize:
                lengths.append(np.where(fresh > 0, abs(stored / fresh - 1), 0))
    none = np.empty(0)
    return Comparison(
        label, np.concatenate(cosines or [none]), np.concatenate(lengths or [none]), len(drawn) - len(rows), threshold
    )


def sample(
    table: e.Composed,
    columns: Sequence[str],
    text: e.Composed,
    no_text: e.Composed,
    vector: e.Composed,
    fit: e.Composed,
    size: int,
) -> sql.Composed:
    """The statement that draws `size` rows with text and vector by chance, as `Drawn`; expressions are of the row `t`.

    For sessions that have nothing but pg_catalog on their search path.
    """
    return sql.SQL(
        "SELECT convert_to({text}, 'UTF8') AS text, CASE WHEN {fit} THEN CAST({vector} AS real[]) END AS vector"
        " FROM (SELECT {columns} FROM {table} t WHERE NOT {no_text} AND {vector} IS NOT NULL"
        " ORDER BY random() LIMIT {size}) t"
    ).format(
        text=text,
        no_text=no_text,
        fit=fit,
        vector=vector,
        columns=sql.SQL(", ").join(sql.Identifier("t", name) for name in columns),
        table=table,
        size=sql.Literal(size),
    )


def embedders_of(settings: Settings) -> Embedders:
    """The models of this machine, as the settings allow them."""
    return Embedders(
        device=settings.device,
        allow_remote_code=settings.allow_remote_code,
        api_key_envs=tuple(settings.allowed_api_key_envs),
        base_urls=settings.allowed_base_urls,
    )


async def _draw(settings: Settings, id: int, slot: str, size: int) -> tuple[EmbeddingColumn, Drawn]:
    connection = await connect(
        settings.dsn.get_secret_value(), "adopt", default_transaction_read_only="on", statement_timeout="0"
    )
    try:
        column = next((column for column in await catalog.load(connection, slot) if column.id == id), None)
        if column is None:
            raise Problem("the column was removed meanwhile")
        if column.fault is not None:
            raise ColumnFault(f"{column.label} cannot be served: {column.fault}")
        vector = e.target(column)
        statement = sample(
            e.table(column),
            scan.needed_columns(column),
            e.text(column),
            e.is_null(column),
            vector,
            adoption.fit(column, vector),
            size,
        )
        cursor = await connection.execute(statement)
        return column, [(text, vector) for text, vector in await cursor.fetchall()]
    except psycopg.Error as error:
        raise from_database(error, "drawing a sample") from error
    finally:
        await connection.close()
