"""The command line: each command is a few lines around something that can be imported and tested by itself.

Nothing heavy is imported at the top: `--help` and `status` never load torch.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Annotated

import typer

from cdc_embedder import __version__
from cdc_embedder.commands import (
    Config,
    Device,
    Dsn,
    Json,
    ReplicationDsn,
    Slot,
    ask,
    err,
    operating,
    out,
    read_settings,
    table_and_column,
)
from cdc_embedder.errors import ColumnFault, Misconfigured, Problem

app = typer.Typer(
    name="cdc-embedder",
    help="A PostgreSQL column that fills itself with embeddings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
migrate = typer.Typer(help="Come here from another system.", no_args_is_help=True)
app.add_typer(operating)
app.add_typer(migrate, name="migrate")

Sample = Annotated[int, typer.Option(min=1, help="Rows that are compared, drawn by chance.")]
Threshold = Annotated[float, typer.Option(min=-1.0, max=1.0, help="The least cosine of stored and fresh vector.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def main() -> None:
    """Run the command line; a Problem becomes one sentence on standard error and exit status 1, and so does a bug."""
    try:
        app()
    except Problem as problem:
        err.print(f"cdc-embedder: {problem.sentence}")
        sys.exit(1)
    except Exception as error:
        from cdc_embedder.logs import frames_of

        err.print(f"cdc-embedder: a bug, please report it: {frames_of(error)}")
        sys.exit(1)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """A PostgreSQL column that fills itself with embeddings."""
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
def init(
    dsn: Dsn = None,
    slot: Slot = None,
    config: Config = None,
    owner: Annotated[
        str | None, typer.Option(help="Role that shall own it all: the service's (run by a superuser).")
    ] = None,
    published_everywhere: Annotated[
        bool, typer.Option(help="Install although a FOR ALL TABLES publication would publish our tables too.")
    ] = False,
    pgml: Annotated[bool, typer.Option("--pgml", help="Also install PostgresML's names, in the schema pgml.")] = False,
) -> None:
    """Install or upgrade the schema cdc_embedder and make the (empty) publication; the slot is made by `run`."""
    from cdc_embedder.install import install

    settings = read_settings(config, dsn=dsn, slot=slot)
    for sentence in install(settings.dsn.get_secret_value(), settings.slot, owner=owner,
                            published_everywhere=published_everywhere, pgml=pgml):  # fmt: skip
        out.print(sentence, soft_wrap=True)


@app.command()
def run(
    dsn: Dsn = None,
    replication_dsn: ReplicationDsn = None,
    slot: Slot = None,
    output_plugin: Annotated[str | None, typer.Option(help="auto, wal2json or pgoutput, for a new slot.")] = None,
    max_pending_keys: Annotated[int | None, typer.Option(help="Keys held in memory.")] = None,
    spill_after_s: Annotated[float | None, typer.Option(help="How long a key may hold the slot, seconds.")] = None,
    writers: Annotated[int | None, typer.Option(help="Sessions that write vectors at once.")] = None,
    scan_period_s: Annotated[float | None, typer.Option(help="Every row is compared so often, seconds.")] = None,
    wal_sender_timeout_s: Annotated[float | None, typer.Option(help="Silence that ends a connection, seconds.")] = None,
    wal_warn_bytes: Annotated[int | None, typer.Option(help="WAL held back that is worth a warning.")] = None,
    wal_alarm_bytes: Annotated[int | None, typer.Option(help="WAL held back that is worth an error.")] = None,
    wal_limit_bytes: Annotated[int | None, typer.Option(help="WAL held back at which the slot is given up.")] = None,
    wal_limit_then: Annotated[str | None, typer.Option(help="After that: wait, or renew.")] = None,
    auto_migrate: Annotated[bool | None, typer.Option(help="Bring an older schema up to date.")] = None,
    http: Annotated[str | None, typer.Option(help="Where HTTP is served: host:port, or off.")] = None,
    http_max_bytes: Annotated[int | None, typer.Option(help="Largest request over HTTP, bytes.")] = None,
    sql_embed: Annotated[bool | None, typer.Option(help="Let SQL ask for vectors: cdc_embedder.embed.")] = None,
    traces: Annotated[bool | None, typer.Option(help="OpenTelemetry spans, one a batch.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    device: Device = None,
    allow_remote_code: Annotated[bool | None, typer.Option(help="Let models run code of their own.")] = None,
    api_key_envs: Annotated[str | None, typer.Option(help="Variables that models may take keys from.")] = None,
    base_urls: Annotated[str | None, typer.Option(help="URL prefixes that models may call.")] = None,
    config: Config = None,
) -> None:
    """Run the service in the foreground until SIGTERM or SIGINT."""
    flags = {name: value for name, value in locals().items() if name != "config"}
    settings = read_settings(config, **flags)
    from cdc_embedder import logs
    from cdc_embedder.running import run_until_signalled
    from cdc_embedder.settings import misspelt

    logs.set_up(settings.log_format, settings.log_level)
    logs.catch_all()
    for sentence in misspelt():
        logging.getLogger("cdc_embedder").warning("%s", sentence)
    try:
        run_until_signalled(settings)
    except Problem as problem:
        logging.getLogger("cdc_embedder").error("%s", _ended_by(problem).sentence)
        sys.exit(1)
    except Exception as error:
        logging.getLogger("cdc_embedder").critical("a bug, please report it: %s", logs.frames_of(error))
        sys.exit(1)


def _ended_by(problem: Problem) -> Problem:
    """A right that is missing ends no column alone only where it is one on what is ours."""
    if problem.sqlstate != "42501" or not isinstance(problem, ColumnFault):
        return problem
    return Misconfigured(
        str(problem),
        hint="run it as the role that owns the schema cdc_embedder, which cdc-embedder init --owner ROLE makes that"
        " role's at the first install; cdc-embedder doctor --no-model says whose it is",
        sqlstate=problem.sqlstate,
    )


@app.command()
def add(
    table: Annotated[str, typer.Argument(help="[SCHEMA.]TABLE, quoted as in SQL.")],
    source: Annotated[str, typer.Argument(help="Source columns, separated by commas.")],
    target: Annotated[str, typer.Argument(help="The column that shall hold the vector; added if missing.")],
    model: Annotated[str, typer.Option(help="A row of cdc_embedder.model.")] = "all-MiniLM-L6-v2",
    priority: Annotated[int, typer.Option(help="Higher goes first.")] = 0,
    on_existing: Annotated[
        str, typer.Option(help="Vectors that are there already: ask, replace, or adopt (unchecked; see `adopt`).")
    ] = "ask",
    keys_only: Annotated[bool, typer.Option("--keys-only", help="Publish the key columns alone.")] = False,
    separator: Annotated[str | None, typer.Option(help="Between several source columns; a blank line.")] = None,
    template: Annotated[
        str | None, typer.Option(help="How the text is made of the columns: '{title}: {body}'.")
    ] = None,
    when_stale: Annotated[
        str, typer.Option(help="keep the old vector until the new one is there, or clear it.")
    ] = "keep",
    protect: Annotated[bool, typer.Option("--protect", help="Refuse the application's own writes to it.")] = False,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Configure a column: the same as an INSERT into cdc_embedder.embedding_column."""
    from cdc_embedder.identifiers import split

    columns, names = split(source, ","), split(target)
    if len(names) != 1:
        raise Problem(f"{target} is not the name of a column", hint="the table is an argument of its own")
    if on_existing not in ("ask", "replace", "adopt"):
        raise Problem(f"{on_existing} is nothing to do with vectors that are there", hint="ask, replace or adopt")
    if when_stale not in ("keep", "clear"):
        raise Problem(f"{when_stale} is nothing to do with a vector whose text changed", hint="keep or clear")
    statement = (
        "SELECT cdc_embedder.add_embedding_column($1::regclass, $2, $3, $4, priority => $5, on_existing => $6,"
        " keys_only => $7, separator => $8, template => $9, when_stale => $10, protect => $11) AS id"
    )
    found = ask(read_settings(config, dsn=dsn), "adding the column", statement,
                 (table, columns, names[0], model, priority, on_existing, keys_only, separator, template, when_stale,
                  protect))  # fmt: skip
    out.print(f"column {found['id']}: {table}.{target} will hold the vectors of {source} by {model}", soft_wrap=True)


@app.command()
def remove(
    column: Annotated[str, typer.Argument(help="[SCHEMA.]TABLE.COLUMN, quoted as in SQL.")],
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Stop filling a column; its vectors stay."""
    from cdc_embedder import pausing

    table, target = table_and_column(column)
    pausing.remove(read_settings(config, dsn=dsn).dsn.get_secret_value(), table, target, err.print)
    out.print(f"{column} is not filled any more; its vectors stay", soft_wrap=True)


@app.command()
def adopt(
    column: Annotated[str, typer.Argument(help="[SCHEMA.]TABLE.COLUMN, quoted as in SQL; a configured column.")],
    sample: Sample = 100,
    threshold: Threshold = 0.99,
    device: Device = None,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Keep the vectors that a column holds: a sample is compared with the model's, then the service takes them over."""
    from cdc_embedder.adopting import adopt as adopt_column

    table, target = table_and_column(column)
    for sentence in adopt_column(read_settings(config, dsn=dsn, device=device), table, target, sample, threshold):
        out.print(sentence, soft_wrap=True)


@migrate.command()
def pgml(
    columns: Annotated[
        list[str] | None, typer.Argument(help="[SCHEMA.]TABLE.COLUMN, quoted as in SQL; every one where not given.")
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without this the plan is shown.")] = False,
    sample: Sample = 100,
    threshold: Threshold = 0.99,
    device: Device = None,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Turn generated columns that call pgml.embed into columns that the service fills; their vectors stay."""
    from cdc_embedder.migrating import migrate as migrate_columns

    names = [table_and_column(name) for name in columns or []]
    settings = read_settings(config, dsn=dsn, device=device)
    done = migrate_columns(settings, names, apply=apply, size=sample, threshold=threshold,
                           show=lambda sentence: out.print(sentence, soft_wrap=True))  # fmt: skip
    if not done:
        sys.exit(1)


@app.command()
def embed(
    texts: Annotated[list[str], typer.Argument(help="Texts to embed.")],
    model: Annotated[
        str, typer.Option(help="A pre-filled model, or with a DSN a row of cdc_embedder.model.")
    ] = "all-MiniLM-L6-v2",
    input_type: Annotated[
        str, typer.Option(help="Which prompt goes before the text: none, query or document.")
    ] = "none",
    as_json: Json = False,
    device: Device = None,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Embed texts here and now, and print the vectors."""
    from cdc_embedder.searching import embed_texts

    vectors = embed_texts(read_settings(config, dsn=dsn, device=device), model, texts, input_type)
    if as_json:
        print(json.dumps(vectors))
        return
    for vector in vectors:
        print("[" + ",".join(f"{value:.6g}" for value in vector) + "]")


@app.command()
def search(
    column: Annotated[str, typer.Argument(help="[SCHEMA.]TABLE.COLUMN, quoted as in SQL.")],
    question: Annotated[str, typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many rows.")] = 10,
    as_json: Json = False,
    device: Device = None,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Find the rows whose vectors are nearest to the question's."""
    from cdc_embedder.searching import print_found, search_column

    table, target = table_and_column(column)
    found = search_column(read_settings(config, dsn=dsn, device=device), table, target, question, k)
    print_found(found, out, as_json=as_json)


@app.command()
def demo(
    question: Annotated[str, typer.Argument(help="What to search the documentation for.")] = "read a csv file",
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running, and print how to try it in psql.")] = False,
    rows: Annotated[int, typer.Option(min=10, help="How many docstrings.")] = 2000,
) -> None:
    """An embedded PostgreSQL, the standard library's docstrings, the real service, a search."""
    from cdc_embedder.demo import demo as run_demo

    sys.exit(run_demo(question, keep, rows))


@app.command()
def uninstall(
    yes: Yes = False,
    dsn: Dsn = None,
    replication_dsn: ReplicationDsn = None,
    slot: Slot = None,
    config: Config = None,
) -> None:
    """Remove slot, publication, origins and schema; tables and their vectors stay."""
    from cdc_embedder.uninstall import uninstall as remove_all
    from cdc_embedder.uninstall import uninstall_plan

    settings = read_settings(config, dsn=dsn, replication_dsn=replication_dsn, slot=slot)
    standby = settings.replication_dsn.get_secret_value() if settings.replication_dsn is not None else None
    plan = uninstall_plan(settings.dsn.get_secret_value(), settings.slot, standby)
    if not plan:
        out.print("nothing to remove")
        return
    for sentence in plan:
        out.print(sentence, soft_wrap=True)
    if not yes and not typer.confirm("Remove all this?"):
        raise typer.Exit(1)
    for sentence in remove_all(settings.dsn.get_secret_value(), settings.slot, standby):
        out.print(sentence, soft_wrap=True)
