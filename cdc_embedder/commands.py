"""The commands of an operator's day: how it is, why it is so, stop, go on, try again. And what every command shares.

Not for installing, running and configuring: those are in `cli`, which takes these in. Nothing heavy is imported at the
top: `--help` and `status` never load torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, LiteralString

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from cdc_embedder.errors import Problem
from cdc_embedder.logs import harmless

operating = typer.Typer()


class _Console(Console):
    """What is printed steers no terminal, whatever names hold."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


out = _Console(markup=False, emoji=False, highlight=False)
err = _Console(markup=False, emoji=False, highlight=False, stderr=True, soft_wrap=True)

Config = Annotated[Path | None, typer.Option(dir_okay=False, help="TOML file of settings [env: CDC_EMBEDDER_CONFIG].")]
Dsn = Annotated[str | None, typer.Option(help="libpq conninfo or URI [env: CDC_EMBEDDER_DSN; empty: libpq's own].")]
Slot = Annotated[str | None, typer.Option(help="Replication slot [env: CDC_EMBEDDER_SLOT; default cdc_embedder].")]
ReplicationDsn = Annotated[str | None, typer.Option(help="Where the slot is read, if elsewhere.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Either = "[SCHEMA.]TABLE or [SCHEMA.]TABLE.COLUMN, quoted as in SQL"


def read_settings(config: Path | None, **flags: Any) -> Any:
    """The settings, flags first. Raises Problem."""
    from cdc_embedder.settings import load

    return load(config, **flags)


def ask(settings: Any, doing: str, statement: LiteralString, parameters: Sequence[Any] = ()) -> dict[str, Any]:
    """The row of one statement in the operator's own name and search path; notices are shown. Raises Problem."""
    from cdc_embedder.asking import session

    with session(settings.dsn.get_secret_value(), "cli", doing, err.print) as connection:
        [row] = connection.execute(statement, parameters).fetchall()
    return row


def table_and_column(name: str) -> tuple[str, str]:
    """The quoted table and the column of `[SCHEMA.]TABLE.COLUMN`. Raises Problem."""
    from cdc_embedder.identifiers import join, split

    parts = split(name)
    if not 2 <= len(parts) <= 3:
        raise Problem(f"{name} is not of the form [SCHEMA.]TABLE.COLUMN")
    return join(parts[:-1]), parts[-1]


@operating.command()
def status(
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second until interrupted.")] = False,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Show how every configured column is doing."""
    from cdc_embedder import status as view

    view.show(read_settings(config, dsn=dsn).dsn.get_secret_value(), out, as_json=as_json, watch=watch)


@operating.command()
def doctor(
    as_json: Json = False,
    no_model: Annotated[bool, typer.Option("--no-model", help="Load no model.")] = False,
    slot: Slot = None,
    replication_dsn: ReplicationDsn = None,
    device: Device = None,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Look for everything that can be wrong, and say what to do; exit status 1 if anything is."""
    from cdc_embedder.doctor import examine, print_findings

    settings = read_settings(config, dsn=dsn, slot=slot, replication_dsn=replication_dsn, device=device)
    findings = examine(settings, model=not no_model)
    print_findings(findings, out, as_json=as_json)
    if any(finding.level == "error" for finding in findings):
        sys.exit(1)


@operating.command()
def failed(
    name: Annotated[str | None, typer.Argument(help=f"{Either}; everything where not given.")] = None,
    error: Annotated[str | None, typer.Option(help="Only rows whose error contains this; case does not count.")] = None,
    key: Annotated[str | None, typer.Option(help="Only rows with this value in their key.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many rows.")] = 50,
    show: Annotated[bool, typer.Option("--show", help="Print all there is about each row.")] = False,
    as_json: Json = False,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """List the rows that could not be embedded: which, why, and when they are tried again."""
    from cdc_embedder import failures

    found = failures.find(read_settings(config, dsn=dsn).dsn.get_secret_value(), name, error, key, limit)
    failures.print_found(found, out, as_json=as_json, whole=show)


@operating.command()
def retry(
    table: Annotated[str, typer.Argument(help="[SCHEMA.]TABLE, quoted as in SQL.")],
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Have the failed rows of a table tried again at once."""
    found = ask(read_settings(config, dsn=dsn), "requesting another try",
                "SELECT cdc_embedder.retry_failed($1::regclass) AS rows", (table,))  # fmt: skip
    out.print(f"{found['rows']} failed row(s) of {table} are tried again", soft_wrap=True)


@operating.command()
def pause(
    name: Annotated[str, typer.Argument(help=f"{Either}.")],
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Stop filling a column, or all of a table: nothing is lost, `resume` scans for what changed meanwhile."""
    from cdc_embedder import pausing

    columns = pausing.pause(read_settings(config, dsn=dsn).dsn.get_secret_value(), name, err.print)
    out.print(f"{columns} column(s) paused until: cdc-embedder resume {name}", soft_wrap=True)


@operating.command()
def resume(
    name: Annotated[str | None, typer.Argument(help=f"{Either}.")] = None,
    slot: Annotated[
        bool, typer.Option("--slot", help="Have a slot that was given up beyond the limit on WAL made anew.")
    ] = False,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Go on with what was paused, or with a slot that was given up; a scan finds what changed meanwhile."""
    from cdc_embedder import pausing

    if slot == (name is not None):
        raise Problem("resume what", hint="name a table or a column, or give --slot alone")
    settings = read_settings(config, dsn=dsn)
    if name is not None:
        columns = pausing.resume(settings.dsn.get_secret_value(), name, err.print)
        out.print(f"{columns} column(s) go on; a scan finds what changed meanwhile", soft_wrap=True)
    elif ask(settings, "taking the slot again", "SELECT cdc_embedder.take_slot_again() AS taken")["taken"]:
        out.print("the running service makes the slot anew, and scans every table", soft_wrap=True)
    else:
        out.print("no slot was given up: nothing to do")


@operating.command()
def reconcile(
    table: Annotated[str | None, typer.Argument(help="[SCHEMA.]TABLE; every configured table where not given.")] = None,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Have the service compare every row with the ledger, and embed what differs."""
    found = ask(read_settings(config, dsn=dsn), "requesting a scan",
                "SELECT cdc_embedder.reconcile($1::regclass) AS columns", (table,))  # fmt: skip
    out.print(f"a scan of {found['columns']} column(s) is requested")


@operating.command()
def verify(
    columns: Annotated[
        list[str] | None, typer.Argument(help="[SCHEMA.]TABLE.COLUMN, quoted as in SQL; every column where not given.")
    ] = None,
    as_json: Json = False,
    wait: Annotated[bool, typer.Option("--wait", help="First wait for the service to embed what is pending.")] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Recompute so many rows a column, drawn by chance, instead of all.")
    ] = None,
    device: Device = None,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """Recompute stored vectors and compare; exit status 1 if any is missing, stale or wrong, or cannot be verified."""
    from cdc_embedder import verifying

    names = [table_and_column(name) for name in columns or []]
    settings = read_settings(config, dsn=dsn, device=device)

    def tell(sentence: str) -> None:
        if err.is_terminal:
            err.print(sentence)

    with verifying.progress_bar(err) as advance:
        reports = verifying.verify(settings, names, wait=wait, sample=sample, advance=advance, tell=tell)
    verifying.print_reports(reports, out, as_json=as_json)
    for report in reports:
        if report.error:
            err.print(f"cdc-embedder: {report.name} cannot be verified: {report.error}")
    if not all(report.good for report in reports):
        sys.exit(1)


@operating.command()
def plan(
    table: Annotated[str, typer.Argument(help="[SCHEMA.]TABLE, quoted as in SQL.")],
    source: Annotated[str, typer.Argument(help="Source columns, separated by commas.")],
    model: Annotated[
        str, typer.Option(help="A row of cdc_embedder.model, or a pre-filled model.")
    ] = "all-MiniLM-L6-v2",
    target: Annotated[
        str | None, typer.Option(help="The column that shall hold the vector; a new one where not given.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Rows that are read, and embedded for a minute at most.")] = 1000,
    as_json: Json = False,
    device: Device = None,
    dsn: Dsn = None,
    config: Config = None,
) -> None:
    """What a new column would cost: rows, tokens, minutes, WAL, disk. A sample is embedded here; nothing is written."""
    from cdc_embedder.planning import plan as make_plan
    from cdc_embedder.planning import print_plan
    from cdc_embedder.verifying import progress_bar

    settings = read_settings(config, dsn=dsn, device=device)
    with progress_bar(err) as advance:
        made = make_plan(settings, table, source, model, target, sample, advance)
    print_plan(made, out, as_json=as_json)
