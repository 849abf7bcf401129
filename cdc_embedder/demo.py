"""`cdc-embedder demo`: everything once, on real parts, on a machine that has only this package and its extras.

An embedded PostgreSQL, the standard library's docstrings, the configuration table, the service as a process of its own,
live changes with their commit-to-vector times, a search. Nothing here is a short cut: what it does, an application does
with the same SQL. Not a benchmark: it measures single rows, by looking for them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg
from psycopg.rows import TupleRow
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cdc_embedder.corpus import Docstring, standard_library
from cdc_embedder.database_errors import from_database
from cdc_embedder.embedded import Server, embedded_bindir
from cdc_embedder.embedding.base import InputType, finish
from cdc_embedder.embedding.registry import Embedders, builtin_spec
from cdc_embedder.errors import Problem
from cdc_embedder.install import install

MODEL = "all-MiniLM-L6-v2"

SLOT = "cdc_embedder"

_LOOK_EVERY_S = 0.005
"""How often a vector is looked for: the resolution of the times that are shown."""

_PATIENCE_S = 60.0
"""After so long without a vector something is broken; a single row takes well under a second."""

Connection = psycopg.Connection[TupleRow]

CONFIGURE = """\
INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)
VALUES ('documentation', '{name,body}', 'embedding', 'all-MiniLM-L6-v2')"""

_NEW = [
    ("pancakes.flip", "Turn the pancake over once its upper side has stopped bubbling."),
    ("garden.water", "Water the tomatoes every evening, and twice a day while it is hot."),
    ("bicycle.repair_tyre", "Find the hole under water, roughen the rubber, glue a patch on it."),
]

_CHANGED = [
    ("pancakes.flip", "Throw the pancake up in the air and catch it with the pan, if the ceiling allows."),
    ("bicycle.repair_tyre", "Mend a flat tyre by replacing the inner tube."),
]


@dataclass(frozen=True, slots=True)
class _Service:
    """The running service, and where its log goes."""

    process: subprocess.Popen[bytes]
    log: Path

    def problem(self, message: str) -> Problem:
        """`message` with the end of the log, which goes away with the demo."""
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        return Problem(message, hint="\n".join(["The end of the service's log:", *lines]))

    def check(self) -> None:
        """Raise Problem where it is gone."""
        if (status := self.process.poll()) is not None:
            raise self.problem(f"the service left with status {status}")


def demo(question: str, keep: bool, rows: int = 2000) -> int:
    """Run it all; returns the exit status. With `keep` it goes on until it is interrupted. Raises Problem."""
    try:
        _run(Console(), question, keep, rows)
    except psycopg.Error as error:
        raise from_database(error, "the demo's own database") from error
    return 0


def _run(out: Console, question: str, keep: bool, rows: int) -> None:
    started = time.monotonic()
    with _signals_unwind(), _directory() as directory, _server(directory, out) as server:
        dsn = server.dsn("demo", "demo")
        with psycopg.connect(dsn, autocommit=True) as connection:
            _prepare(connection, dsn, standard_library(rows), out)
            with _service(dsn, directory / "service.log") as service:
                _backfill(connection, service, out)
                _live(connection, service, out)
                _search(connection, question, out)
                out.print(f"\ndone after {time.monotonic() - started:.0f} s")
                if keep:
                    _stay(server, dsn, service, out)


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """SIGTERM and a closed terminal leave through every `finally`, as Ctrl-C does, so that no server stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(_number: int, _frame: FrameType | None) -> None:
        sys.exit(0)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _directory() -> Iterator[Path]:
    """A temporary directory that the server's user may enter."""
    with tempfile.TemporaryDirectory(prefix="cdc-embedder-demo-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def _server(directory: Path, out: Console) -> Iterator[Server]:
    """PostgreSQL with a database that belongs to an ordinary role, which may replicate."""
    server = Server(embedded_bindir(), directory / "server")
    try:
        server.start()
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("CREATE ROLE demo LOGIN REPLICATION")
            connection.execute("CREATE DATABASE demo OWNER demo")
            version = connection.info.parameter_status("server_version")
        with psycopg.connect(server.dsn("demo"), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        out.print(f"[bold]1[/] an embedded PostgreSQL {version} with wal_level = logical", highlight=False)
        yield server
    finally:
        server.stop("fast")


def _prepare(connection: Connection, dsn: str, texts: list[Docstring], out: Console) -> None:
    """Table, texts, schema, and the one INSERT that configures the column."""
    connection.execute(
        "CREATE TABLE documentation (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
        " module text NOT NULL, name text NOT NULL UNIQUE, body text NOT NULL, embedding vector(384))"
    )
    with connection.cursor().copy("COPY documentation (module, name, body) FROM STDIN") as copy:
        for docstring in texts:
            copy.write_row((docstring.module, docstring.name, docstring.text))
    out.print(f"[bold]2[/] a table of {len(texts):,} docstrings of Python's standard library", highlight=False)
    install(dsn, SLOT)
    connection.execute(CONFIGURE)
    out.print("[bold]3[/] cdc-embedder init, and one INSERT:", highlight=False)
    for line in CONFIGURE.splitlines():
        out.print(f"  {line}", style="cyan", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _service(dsn: str, log: Path) -> Iterator[_Service]:
    """`cdc-embedder run` as anybody would start it; in a session of its own, so that Ctrl-C reaches only us."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CDC_EMBEDDER_", "PG"))}
    environment |= {
        "CDC_EMBEDDER_DSN": dsn,
        "CDC_EMBEDDER_SLOT": SLOT,
        "HF_HUB_OFFLINE": "1",
        "CDC_EMBEDDER_HTTP": "off",
    }
    command = [sys.executable, "-m", "cdc_embedder", "run"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield _Service(process, log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _backfill(connection: Connection, service: _Service, out: Console) -> None:
    """Show how far the `status` view says it is, until every row has its vector."""
    out.print(f"[bold]4[/] cdc-embedder run, as process {service.process.pid}", highlight=False)
    columns = (TextColumn("  embedding"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out) as progress:
        task = progress.add_task("", total=None)
        while not progress.finished:
            service.check()
            status = _status(connection)
            if status["state"] in ("error", "paused") or status["failed"]:
                raise service.problem(f"the column is {status['state']}: {status['reason'] or status['last_error']}")
            progress.update(task, total=status["rows"] - status["null"], completed=status["current"])
            time.sleep(0.2)


def _status(connection: Connection) -> dict[str, Any]:
    row = connection.execute("SELECT to_jsonb(s) FROM cdc_embedder.status s").fetchone()
    assert row is not None, "the configured column"
    found: dict[str, Any] = row[0]
    return found


def _live(connection: Connection, service: _Service, out: Console) -> None:
    """Insert and update single rows, and show how long after each commit its vector was there."""
    out.print("[bold]5[/] changes while it runs, each in a transaction of its own", highlight=False)
    shown = Table(box=None, header_style="bold")
    shown.add_column(" statement")
    shown.add_column("row")
    shown.add_column("commit to vector", justify="right")
    for name, body in _NEW:
        connection.execute("INSERT INTO documentation (module, name, body) VALUES ('live', %s, %s)", (name, body))
        shown.add_row(" INSERT", name, f"{_until_embedded(connection, service, name, None) * 1000:.0f} ms")
    for name, body in _CHANGED:
        before = _vector(connection, name)
        connection.execute("UPDATE documentation SET body = %s WHERE name = %s", (body, name))
        shown.add_row(" UPDATE", name, f"{_until_embedded(connection, service, name, before) * 1000:.0f} ms")
    out.print(shown)


def _until_embedded(connection: Connection, service: _Service, name: str, before: str | None) -> float:
    """Seconds from now, just after the commit, until the row has another vector than `before`."""
    start = time.monotonic()
    while _vector(connection, name) == before:
        service.check()
        if time.monotonic() - start > _PATIENCE_S:
            raise service.problem(f"{name} has no vector of its text after {_PATIENCE_S:.0f} s")
        time.sleep(_LOOK_EVERY_S)
    return time.monotonic() - start


def _vector(connection: Connection, name: str) -> str | None:
    row = connection.execute("SELECT embedding::text FROM documentation WHERE name = %s", (name,)).fetchone()
    return None if row is None else row[0]


def _search(connection: Connection, question: str, out: Console) -> None:
    """Embed the question here, as an application would, and let pgvector find its neighbours."""
    out.print("[bold]6[/] SELECT name, body FROM documentation ORDER BY embedding <=> … LIMIT 8", highlight=False)
    found = nearest(connection, question, 8)
    width = max(len(name) for name, *_ in found)
    shown = Table(box=None, header_style="bold", title=Text(f' "{question}"'), title_justify="left")
    for heading in (" name", "score", "documentation"):
        shown.add_column(heading, no_wrap=True)
    for name, score, body in found:
        first = Text(body.splitlines()[0])
        first.truncate(max(out.width - width - 13, 10), overflow="ellipsis")
        shown.add_row(f" {name}", f"{score:.3f}", first)
    out.print(shown)


def nearest(connection: Connection, question: str, k: int) -> list[tuple[str, float, str]]:
    """Name, cosine similarity and text of the `k` rows nearest to the question."""
    spec = builtin_spec(MODEL)
    assert spec is not None, MODEL
    embedders = Embedders()
    try:
        vectors, _ = finish(embedders.get(spec).embed([question], InputType.QUERY).vectors, spec)
    finally:
        embedders.close()
    vector = str(vectors[0].tolist())
    return connection.execute(
        "SELECT name, 1 - (embedding <=> %(vector)s::vector), body FROM documentation"
        " WHERE embedding IS NOT NULL ORDER BY embedding <=> %(vector)s::vector LIMIT %(k)s",
        {"vector": vector, "k": k},
    ).fetchall()


def _stay(server: Server, dsn: str, service: _Service, out: Console) -> None:
    """Print how to go on by hand, and keep everything running until Ctrl-C. Raises Problem where the service ends."""
    psql = shutil.which("psql") or str(server.bindir / "psql")
    lines = [
        "",
        "It goes on running until Ctrl-C. In another terminal:",
        f"  {shlex.quote(psql)} {shlex.quote(dsn)}",
        "and there, for example:",
        "  SELECT state, rows, current, pending, coverage, lag_bytes FROM cdc_embedder.status;",
        "  UPDATE documentation SET body = 'Wash the dishes and dry them.' WHERE name = 'pancakes.flip';",
        "  SELECT a.name FROM documentation a, documentation b WHERE b.name = 'pancakes.flip'"
        " ORDER BY a.embedding <=> b.embedding LIMIT 5;",
        f"The service's log: {service.log}",
    ]
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    try:
        service.process.wait()
    except KeyboardInterrupt:
        return
    service.check()
