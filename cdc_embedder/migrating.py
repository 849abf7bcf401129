"""`cdc-embedder migrate pgml`: generated columns that call pgml.embed become columns that the service fills.

The plan is read from the catalog alone, so that it works whether PostgresML still runs or its library is gone. Applied,
each column is one transaction under a short lock: the model's row, DROP EXPRESSION (which rewrites nothing and leaves
every vector in place) and the row of embedding_column, which says that the vectors are adopted. Before the first of
them a sample of every column is compared with fresh vectors. Not for deciding what to do: see `migration_plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import psycopg
from psycopg import sql

from cdc_embedder.adopting import Comparison, compare, doubts, embedders_of, sample
from cdc_embedder.asking import session
from cdc_embedder.embedding.base import ModelSpec
from cdc_embedder.errors import Problem
from cdc_embedder.migration_plan import Connection, Step, plan, resolve, statements
from cdc_embedder.rows import adoption
from cdc_embedder.settings import Settings
from cdc_embedder.verifying import LEAST_COSINE, LEAST_COSINE_HALF

LOCK_TIMEOUT = "2s"
"""How long a column's transaction waits for its table: everybody else who comes to it waits behind."""

Show = Callable[[str], None]


def migrate(
    settings: Settings, names: Sequence[tuple[str, str]], *, apply: bool, size: int, threshold: float, show: Show
) -> bool:
    """Show the plan for the columns `names` (table, column), or for all; with `apply` carry it out.

    False where a column is left alone although it was named, or is left alone beside others that were to be applied.
    Raises Problem: before anything was changed where a sample says so, else with the columns before it migrated.
    """
    with session(settings.dsn.get_secret_value(), "migrate", "migrating") as connection:
        wanted = [resolve(connection, table, column) for table, column in names]
        connection.execute("SET search_path = pg_catalog")
        steps = plan(connection, wanted)
        for step in steps:
            _show(connection, step, show)
        clear = [step for step in steps if not step.unclear]
        if not steps:
            show("no generated column calls pgml.embed")
        elif not apply:
            show("nothing was changed: --apply compares a sample of each column with fresh vectors, and carries it out")
        else:
            _check(settings, connection, clear, size, threshold, show)
            connection.add_notice_handler(lambda notice: show(_notice(notice)))
            for step in clear:
                _apply(connection, step)
                show(f"{step.label}: migrated; the service keeps its vectors, and embeds what is written from now on")
    return len(clear) == len(steps) or not (apply or names)


def _show(connection: Connection, step: Step, show: Show) -> None:
    row = step.row
    if step.unclear:
        show(f"{step.label}: left alone: {step.unclear}")
        return
    assert step.spec is not None
    rows = "never analyzed" if row["rows"] is None else f"about {row['rows']} rows"
    show(f"{step.label}: {row['type']}, {rows}, {row['expression']}")
    show(f"  model {step.spec.name}{' (a new row)' if step.new else ''}, {_made(step.spec)}")
    for dependent in row["dependents"] or []:
        show(f"  stays: {dependent}")
    if row["not_null"]:
        show("  its NOT NULL goes: a new row has no vector until it is embedded")
    if not row["owned"]:
        show(f"  to be applied as the table's owner, {row['owner']}, or as a superuser")
    for statement in statements(connection, step):
        show(f"  {statement.as_string(connection)};")


def _made(spec: ModelSpec) -> str:
    length = "of unit length" if spec.normalize else "of the length that the model gives them"
    return f"{spec.dimensions} dimensions, {length}, document prompt {spec.document_prompt!r}"


def _check(
    settings: Settings, connection: Connection, steps: list[Step], size: int, threshold: float, show: Show
) -> None:
    """Compare a sample of every column, before anything is changed. Raises Problem where one does not hold."""
    if strange := [step for step in steps if not step.row["owned"]]:
        raise Problem(
            f"{strange[0].label} belongs to {strange[0].row['owner']}",
            hint="Run it as the owner of the tables, who also needs INSERT on cdc_embedder.model and embedding_column,"
            " or as a superuser",
        )
    embedders = embedders_of(settings)
    try:
        for step in steps:
            assert step.spec is not None
            assert step.recipe is not None
            text = sql.SQL("CAST({} AS text)").format(sql.Identifier("t", step.recipe.column))
            vector = sql.Identifier("t", step.row["name"])
            statement = sample(
                sql.Identifier(step.row["schema"], step.row["table"]),
                [step.recipe.column, step.row["name"]],
                text,
                sql.SQL("({} IS NULL)").format(text),
                vector,
                adoption.fitting(vector, step.row["kind"], step.spec.dimensions, normalized=step.spec.normalize),
                size,
            )
            drawn = [(row["text"], row["vector"]) for row in connection.execute(statement).fetchall()]
            comparison = compare(embedders.get(step.spec), step.spec, drawn, step.label, threshold)
            _accept(comparison, step, show)
    finally:
        embedders.close()


def _accept(comparison: Comparison, step: Step, show: Show) -> None:
    assert step.spec is not None
    comparison.check()
    show(comparison.sentence)
    half = step.row["kind"] == "halfvec" or step.spec.dtype in ("bfloat16", "float16")
    for sentence in doubts(comparison, LEAST_COSINE_HALF if half else LEAST_COSINE):
        show(sentence)


def _apply(connection: Connection, step: Step) -> None:
    try:
        with connection.transaction():
            connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT)))
            for statement in statements(connection, step):
                connection.execute(statement)
    except psycopg.errors.LockNotAvailable:
        raise Problem(
            f"{step.label} was not migrated: its table is in use, and the lock was not waited for any longer",
            hint="Nothing of it was changed: try again when no long transaction runs",
        ) from None


def _notice(notice: psycopg.errors.Diagnostic) -> str:
    return ". ".join(filter(None, (notice.message_primary, notice.message_hint)))
