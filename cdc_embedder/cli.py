"""The command line: each command is a few lines around something that can be imported and tested by itself.

Nothing heavy is imported at the top: `--help` and `status` never load torch.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, LiteralString

import typer
from rich.console import Console

from cdc_embedder import __version__
from cdc_embedder.errors import Problem

app = typer.Typer(
    name="cdc-embedder",
    help="A PostgreSQL column that fills itself with embeddings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(markup=False, emoji=False, highlight=False)
err = Console(markup=False, emoji=False, highlight=False, stderr=True, soft_wrap=True)

Config = Annotated[Path | None, typer.Option(help="TOML file of settings [env: CDC_EMBEDDER_CONFIG].")]
Dsn = Annotated[str | None, typer.Option(help="libpq conninfo or URI [env: CDC_EMBEDDER_DSN; empty: libpq's own].")]
Slot = Annotated[str | None, typer.Option(help="Replication slot [env: CDC_EMBEDDER_SLOT; default cdc_embedder].")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def main() -> None:
    """Run the command line; a Problem becomes one sentence on standard error and exit status 1."""
    try:
        app()
    except Problem as problem:
        err.print(f"cdc-embedder: {problem.sentence}")
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
) -> None:
    """Install or upgrade the schema cdc_embedder and make the (empty) publication; the slot is made by `run`."""
    from cdc_embedder.install import install

    settings = _settings(config, dsn=dsn, slot=slot)
    for sentence in install(settings.dsn.get_secret_value(), settings.slot, owner=owner,
                            published_everywhere=published_everywhere):  # fmt: skip
        out.print(sentence, soft_wrap=True)


@app.command()
def run(
    dsn: Dsn = None,
    replication_dsn: Annotated[str | None, typer.Option(help="Where the slot is read, if elsewhere.")] = None,
    slot: Slot = None,
    output_plugin: Annotated[str | None, typer.Option(help="auto, wal2json or pgoutput, for a new slot.")] = None,
    max_pending_keys: Annotated[int | None, typer.Option(help="Keys held in memory.")] = None,
    spill_after_s: Annotated[float | None, typer.Option(help="How long a key may hold the slot, seconds.")] = None,
    writers: Annotated[int | None, typer.Option(help="Sessions that write vectors at once.")] = None,
    scan_period_s: Annotated[float | None, typer.Option(help="Every row is compared so often, seconds.")] = None,
    wal_sender_timeout_s: Annotated[float | None, typer.Option(help="Silence that ends a connection, seconds.")] = None,
    http: Annotated[str | None, typer.Option(help="Where health is served: host:port, or off.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    allow_remote_code: Annotated[bool | None, typer.Option(help="Let models run code of their own.")] = None,
    api_key_envs: Annotated[str | None, typer.Option(help="Variables that models may take keys from.")] = None,
    base_urls: Annotated[str | None, typer.Option(help="URL prefixes that models may call.")] = None,
    config: Config = None,
) -> None:
    """Run the service in the foreground until SIGTERM or SIGINT."""
    flags = {name: value for name, value in locals().items() if name != "config"}
    settings = _settings(config, **flags)
    from cdc_embedder import logs
    from cdc_embedder.running import frames_of, run_until_signalled

    logs.set_up(settings.log_format, settings.log_level)
    try:
        run_until_signalled(settings)
    except Problem as problem:
        logging.getLogger("cdc_embedder").error("%s", problem.sentence)
        sys.exit(1)
    except Exception as error:
        logging.getLogger("cdc_embedder").critical("a bug, please report it: %s", frames_of(error))
        sys.exit(1)


@app.command()
def add(
    table: Annotated[str, typer.Argument(help="[SCHEMA.]TABLE, quoted as in SQL.")],
    source: Annotated[str, typer.Argument(help="Source columns, separated by commas.")],
    target: Annotated[str, typer.Argument(help="The column that shall hold the vector; added if missing.")],
    model: Annotated[str, typer.Option(help="A row of cdc_embedder.model.")] = "all-MiniLM-L6-v2",
    priority: Annotated[int, typer.Option(help="Higher goes first.")] = 0,
    on_existing: Annotated[str, typer.Option(help="Vectors that are there already: ask or replace.")] = "ask",
    keys_only: Annotated[bool, typer.Option("--keys-only", help="Publish the key columns alone.")] = False,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Configure a column: the same as an INSERT into cdc_embedder.embedding_column."""
    from cdc_embedder.identifiers import split

    columns, names = split(source, ","), split(target)
    if len(names) != 1:
        raise Problem(f"{target} is not the name of a column", hint="the table is an argument of its own")
    if on_existing not in ("ask", "replace", "adopt"):
        raise Problem(f"{on_existing} is nothing to do with vectors that are there already", hint="ask or replace")
    statement = (
        "SELECT cdc_embedder.add_embedding_column($1::regclass, $2, $3, $4, priority => $5, on_existing => $6,"
        " keys_only => $7) AS id"
    )
    found = _ask(_settings(config, dsn=dsn), "adding the column", statement,
                 (table, columns, names[0], model, priority, on_existing, keys_only))  # fmt: skip
    out.print(f"column {found['id']}: {table}.{target} will hold the vectors of {source} by {model}", soft_wrap=True)


@app.command()
def remove(
    column: Annotated[str, typer.Argument(help="[SCHEMA.]TABLE.COLUMN, quoted as in SQL.")],
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Stop filling a column; its vectors stay."""
    table, target = _table_and_column(column)
    _ask(_settings(config, dsn=dsn), "removing the column",
         "SELECT cdc_embedder.remove_embedding_column($1::regclass, $2)", (table, target))  # fmt: skip
    out.print(f"{column} is not filled any more; its vectors stay", soft_wrap=True)


@app.command()
def reconcile(
    table: Annotated[str | None, typer.Argument(help="[SCHEMA.]TABLE; every configured table where not given.")] = None,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Have the service compare every row with the ledger, and embed what differs."""
    found = _ask(_settings(config, dsn=dsn), "requesting a scan",
                 "SELECT cdc_embedder.reconcile($1::regclass) AS columns", (table,))  # fmt: skip
    out.print(f"a scan of {found['columns']} column(s) is requested")


@app.command()
def verify(
    columns: Annotated[
        list[str] | None, typer.Argument(help="[SCHEMA.]TABLE.COLUMN, quoted as in SQL; every column where not given.")
    ] = None,
    as_json: Json = False,
    wait: Annotated[bool, typer.Option("--wait", help="First wait for the service to embed what is pending.")] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Recompute so many rows a column, drawn by chance, instead of all.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, …")] = None,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Recompute stored vectors and compare; exit status 1 if any is missing, stale or wrong."""
    from cdc_embedder import verifying

    names = [_table_and_column(name) for name in columns or []]
    settings = _settings(config, dsn=dsn, device=device)
    with verifying.progress_bar(err) as advance:
        reports = verifying.verify(settings, names, wait=wait, sample=sample, advance=advance)
    verifying.print_reports(reports, out, as_json=as_json)
    if not all(report.good for report in reports):
        sys.exit(1)


@app.command()
def status(
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second until interrupted.")] = False,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Show how every configured column is doing."""
    from cdc_embedder import status as view

    view.show(_settings(config, dsn=dsn).dsn.get_secret_value(), out, as_json=as_json, watch=watch)


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
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, …")] = None,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Embed texts here and now, and print the vectors."""
    from cdc_embedder.searching import embed_texts

    vectors = embed_texts(_settings(config, dsn=dsn, device=device), model, texts, input_type)
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
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, …")] = None,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Find the rows whose vectors are nearest to the question's."""
    from cdc_embedder.searching import print_found, search_column

    table, target = _table_and_column(column)
    found = search_column(_settings(config, dsn=dsn, device=device), table, target, question, k)
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
def uninstall(yes: Yes = False, dsn: Dsn = None, slot: Slot = None, config: Config = None) -> None:
    """Remove slot, publication, origins and schema; tables and their vectors stay."""
    from cdc_embedder.uninstall import uninstall as remove_all
    from cdc_embedder.uninstall import uninstall_plan

    settings = _settings(config, dsn=dsn, slot=slot)
    plan = uninstall_plan(settings.dsn.get_secret_value(), settings.slot)
    if not plan:
        out.print("nothing to remove")
        return
    for sentence in plan:
        out.print(sentence, soft_wrap=True)
    if not yes and not typer.confirm("Remove all this?"):
        raise typer.Exit(1)
    for sentence in remove_all(settings.dsn.get_secret_value(), settings.slot):
        out.print(sentence, soft_wrap=True)


def _settings(config: Path | None, **flags: Any) -> Any:
    from cdc_embedder.settings import load

    return load(config, **flags)


def _ask(settings: Any, doing: str, statement: LiteralString, parameters: Sequence[Any]) -> dict[str, Any]:
    """The row of one statement in the operator's own name and search path; notices are shown. Raises Problem."""
    from cdc_embedder.asking import session

    def show(notice: Any) -> None:
        err.print(". ".join(filter(None, (notice.message_primary, notice.message_hint))))

    with session(settings.dsn.get_secret_value(), "cli", doing) as connection:
        connection.add_notice_handler(show)
        [row] = connection.execute(statement, parameters).fetchall()
    return row


def _table_and_column(name: str) -> tuple[str, str]:
    from cdc_embedder.identifiers import join, split

    parts = split(name)
    if not 2 <= len(parts) <= 3:
        raise Problem(f"{name} is not of the form [SCHEMA.]TABLE.COLUMN")
    return join(parts[:-1]), parts[-1]
