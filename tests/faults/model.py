"""The model of the model-based test: an application and its rows, the real service, faults, and what must hold.

`World` is driven by `machine`, one operation after another. Beside the database it keeps what the rows should be: the
application's own view of its commits. After each operation, in one snapshot, it checks what must always hold; at the
end of an example it heals every fault and waits for what must hold in the end. The numbers are those of the checks:

1. The rows and texts are the application's. No statement of the application fails on us.
2. A stored vector is NULL, or of a text of this very row, or the application's own; never is a newer text's vector
   followed by an older one's.
3. Where the ledger says current for the present text and generation, the vector is that of the present text.
4. What the slot is confirmed through is done: the row is current, failed, in the backlog, or a scan is wanted.
5. The slot's position never moves back, but for a server's restart or a new slot.
6. The process dies of nothing but our signals and shows no traceback.

In the end: each vector is that of its text, and NULL exactly where the text is; the ledger knows it; nothing failed,
waits or is spilled; the slot is confirmed to the end; one walsender, no open transaction; a reconcile changes no row,
and no ledger row is an orphan after it.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from psycopg.types.json import Jsonb

from cdc_embedder.embedding.fake import fake_vector
from tests.configuring import one
from tests.documents import target_type
from tests.servers import SERVICE_ROLE, Bench
from tests.service import Service, status, until

Connection = psycopg.Connection[Any]

MODELS = ("fake", "other")
SEPARATORS = ("\n\n", " / ")
DIMENSIONS = 8
KEYS = range(1, 7)
BULK = range(1001, 2201)
"""The keys of large transactions: more than CDC_EMBEDDER_MAX_PENDING_KEYS."""

LARGE = 3
"""How many large transactions an example may have: they slow every check down."""

IDLE_BYTES = 1024
"""What the service's own report of itself may have written since the slot was confirmed the last time."""

ENVIRONMENT = {
    "CDC_EMBEDDER_LOG_LEVEL": "info",
    "CDC_EMBEDDER_MAX_PENDING_KEYS": "1000",
}

KILLED = "the process died"
"""How the ledger's error begins for a row that was with the model at two kills in a row (rule 7)."""


class Violation(AssertionError):
    """Something that must hold does not."""


@cache
def vector(model: str, text: str) -> np.ndarray:
    """The oracle."""
    return fake_vector(model, text, DIMENSIONS)


def same(stored: Any, expected: np.ndarray | None) -> bool:
    if stored is None or expected is None:
        return stored is None and expected is None
    return len(stored) == len(expected) and bool(np.abs(np.asarray(stored) - expected).max() < 1e-5)


def number(lsn: str) -> int:
    high, low = lsn.split("/")
    return int(high, 16) << 32 | int(low, 16)


def _short(value: Any) -> Any:
    """For people: long texts by their first letter and their length."""
    if isinstance(value, str) and len(value) > 20:
        return f"{value[0]}*{len(value)}"
    if isinstance(value, (tuple, list, frozenset)):
        return type(value)(map(_short, value))
    return value


Texts = tuple[str | None, str | None]
"""Title and body."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as the application knows it, with the texts that it ever had, in order (committed, also under another key).

    `number` stands for the row whatever its key is. `scribbled`: texts whose vectors the application itself has written
    into the target. `moved`: it once had another key.
    """

    title: str | None = None
    body: str | None = None
    views: int = 0
    number: int = field(default_factory=itertools.count().__next__)
    texts: tuple[Texts, ...] = ()
    scribbled: frozenset[str] = frozenset()
    moved: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """A configured column: where its vectors go, and the text they are of."""

    target: str
    sources: tuple[str, ...]

    def text(self, title: str | None, body: str | None, separator: str) -> str | None:
        texts = {"title": title, "body": body}
        parts = [text for name in self.sources if (text := texts[name]) is not None]
        return separator.join(parts) if parts else None

    @property
    def fingerprint(self) -> str:
        """The product's expression, written down once more."""
        length = "int4send(octet_length({0})) || " if len(self.sources) > 1 else ""
        part = (
            "CASE WHEN {0} IS NULL THEN '\\x00'::bytea ELSE '\\x01'::bytea || "
            + length
            + "convert_to({0}, getdatabaseencoding()) END"
        )
        return f"sha256({' || '.join(part.format(f't.{name}') for name in self.sources)})"


COLUMNS = (Column("embedding", ("body",)), Column("summary", ("title", "body")))


@dataclass(frozen=True, slots=True)
class Configured:
    """What the configuration table says of a column, and whether a scan of it is wanted."""

    id: int
    model: str
    separator: str
    generation: int
    enabled: bool
    scan_wanted: bool


Change = tuple[str, int, Any]
"""What one statement does: kind, key, argument; see Transaction.apply."""


@dataclass(eq=False)
class Transaction:
    """A transaction of the application: what it changed, seen by nobody before it commits, and what it has locked."""

    connection: Connection
    rows: dict[int, Row]
    vector_type: str
    changed: dict[int, Row | None] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    savepoints: list[dict[int, Row | None]] = field(default_factory=list)

    def row(self, key: int) -> Row | None:
        return self.changed[key] if key in self.changed else self.rows.get(key)

    def apply(self, change: Change) -> None:
        kind, key, argument = change
        getattr(self, f"_{kind}")(key, argument)

    def _put(self, key: int, body: str | None) -> None:
        self._execute(
            "INSERT INTO documents (id, body) VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
            (key, body),
        )
        self._set(key, replace(self.row(key) or Row(), body=body))

    def _title(self, key: int, title: str | None) -> None:
        self._execute("UPDATE documents SET title = %s WHERE id = %s", (title, key))
        if row := self.row(key):
            self._set(key, replace(row, title=title))

    def _touch(self, key: int, _: object) -> None:
        self._execute("UPDATE documents SET views = views + 1 WHERE id = %s", (key,))
        if row := self.row(key):
            self._set(key, replace(row, views=row.views + 1))

    def _save_whole(self, key: int, text: str | None) -> None:
        """As an ORM that writes every column of a row back, with the vector of whatever text it once read."""
        stored = None if text is None else vector(MODELS[0], text).tolist()
        self._execute(
            f"UPDATE documents SET body = body, embedding = %s::real[]::{self.vector_type} WHERE id = %s", (stored, key)
        )
        if row := self.row(key):
            self._set(key, replace(row, scribbled=row.scribbled | {text or ""}))

    def _rekey(self, key: int, other: int) -> None:
        self._execute("UPDATE documents SET id = %s WHERE id = %s", (other, key))
        row = self.row(key)
        assert row is not None
        self._set(key, None)
        self._set(other, replace(row, moved=True))

    def _delete(self, key: int, _: object) -> None:
        self._execute("DELETE FROM documents WHERE id = %s", (key,))
        self._set(key, None)

    def _lock(self, key: int, _: object) -> None:
        self._execute("SELECT FROM documents WHERE id = %s FOR UPDATE", (key,))
        self.held.add(key)

    def _savepoint(self, _: int, __: object) -> None:
        self._execute(f"SAVEPOINT s{len(self.savepoints)}")
        self.savepoints.append(dict(self.changed))

    def _undo(self, _: int, __: object) -> None:
        if self.savepoints:
            self.changed = self.savepoints.pop()
            self._execute(f"ROLLBACK TO s{len(self.savepoints)}")

    def _execute(self, statement: str, parameters: tuple[Any, ...] = ()) -> None:
        self.connection.execute(statement, parameters)

    def _set(self, key: int, row: Row | None) -> None:
        self.held.add(key)
        self.changed[key] = row


class World:
    """A database, the application's knowledge of it, and the service. `do` names an operation: a method above it."""

    def __init__(self, bench: Bench, folder: Path, spill_after_s: float) -> None:
        self.bench = bench
        self.rows: dict[int, Row] = {}
        self.open: dict[int, Transaction] = {}
        self.operations: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.trace: list[str] = []
        self._began = time.monotonic()
        self._confirmed: int | None = None
        self._written: dict[int, tuple[str, int]] = {}
        self._seen: dict[tuple[int, str], int] = {}
        self._kills = self._large = 0
        self._bulks = itertools.count()
        self._down = folder / "embedder-down"
        self._thaw: threading.Timer | None = None
        self._type = target_type(bench, DIMENSIONS)
        admin = bench.admin
        admin.execute(
            f"CREATE TABLE documents (id bigint PRIMARY KEY, title text, body text, views int NOT NULL DEFAULT 0,"
            f" embedding {self._type}, summary {self._type})"
        )
        # An unchanged long text is not in the stream.
        admin.execute("ALTER TABLE documents ALTER body SET STORAGE EXTERNAL")
        bench.grant("documents", ["id"], ["title", "body"], "embedding")
        bench.grant("documents", ["id"], ["title", "body"], "summary")
        for model in MODELS:
            admin.execute(
                "INSERT INTO cdc_embedder.model (name, backend, dimensions, options) VALUES (%s, 'fake', %s, %s)",
                (model, DIMENSIONS, Jsonb({"down_while_exists": str(self._down)})),
            )
        for column in COLUMNS:
            self._add(column)
        self._app = self._connect()
        self.service = Service(bench, CDC_EMBEDDER_SPILL_AFTER_S=str(spill_after_s), **ENVIRONMENT).start()

    # The application.

    def change(self, change: Change) -> None:
        """One statement, by itself."""
        self._transaction([change], "COMMIT", explicit=False)

    def transaction(self, changes: list[Change], end: str) -> None:
        """Several statements, committed, prepared and committed, or rolled back."""
        self._transaction(changes, end)

    def begin(self, session: int) -> None:
        """A transaction that stays open over steps."""
        if session not in self.open:
            connection = self._connect()
            connection.execute("BEGIN")
            self.open[session] = Transaction(connection, self.rows, self._type)

    def work(self, session: int, change: Change) -> None:
        """One statement in a transaction that is open."""
        self.begin(session)
        if aimed := self._aim(self.open[session], change):
            self.open[session].apply(aimed)

    def end(self, session: int, end: str) -> None:
        """End a transaction that is open."""
        if session in self.open:
            transaction = self.open.pop(session)
            self._end(transaction, end)
            transaction.connection.close()

    def bulk(self, kind: str) -> None:
        """A transaction of more rows than the service holds keys in memory; TRUNCATE where it need not wait."""
        if kind == "truncate":
            if not self.open:
                self._app.execute("TRUNCATE documents")
                self.rows.clear()
            return
        self._large += 1
        if self._large > LARGE:
            return
        name = f"bulk {next(self._bulks)} "
        first, last = BULK[0], BULK[-1]
        if kind == "delete":
            self._app.execute("DELETE FROM documents WHERE id BETWEEN %s AND %s", (first, last))
            for key in BULK:
                self.rows.pop(key, None)
            return
        self._app.execute(
            "INSERT INTO documents (id, body) SELECT n, %s || n FROM generate_series(%s::int, %s::int) n"
            " ON CONFLICT (id) DO UPDATE SET body = excluded.body",
            (name, first, last),
        )
        for key in BULK:
            row = self.rows.get(key, Row())
            body = f"{name}{key}"
            self.rows[key] = replace(row, body=body, texts=(*row.texts, (row.title, body)))

    def rest(self, seconds: float) -> None:
        """Let the service work."""
        time.sleep(seconds)

    # The configuration.

    def configure(self, what: str, which: int) -> None:
        """Change the configuration of a column, or ask something of the service."""
        column = COLUMNS[which]
        configured = self._configured().get(column.target)
        if what == "add" and configured is None:
            self._add(column)
        elif configured is None:
            return
        elif what == "remove":
            self._configure("DELETE FROM cdc_embedder.embedding_column WHERE id = %s", configured.id)
        elif what == "pause":
            self._configure("UPDATE cdc_embedder.embedding_column SET enabled = false WHERE id = %s", configured.id)
        elif what == "resume":
            self._configure("UPDATE cdc_embedder.embedding_column SET enabled = true WHERE id = %s", configured.id)
        elif what == "separator":
            other = SEPARATORS[configured.separator == SEPARATORS[0]]
            self._configure(
                "UPDATE cdc_embedder.embedding_column SET separator = %s WHERE id = %s", other, configured.id
            )
        elif what == "model":
            other = MODELS[configured.model == MODELS[0]]
            self._configure("UPDATE cdc_embedder.embedding_column SET model = %s WHERE id = %s", other, configured.id)
        elif what == "reconcile":
            self._configure("SELECT cdc_embedder.reconcile('documents')")
        elif what == "retry":
            self._configure("SELECT cdc_embedder.retry_failed('documents')")

    # Faults.

    def embedder(self, how: str) -> None:
        """Make the models fail, slow, or well again."""
        self.faults[f"embedder {how}"] += 1
        if how == "down":
            self._down.touch()
        else:
            self._down.unlink(missing_ok=True)
            delay = {"slow": 0.2, "well": 0.0}[how]
            self._configure("UPDATE cdc_embedder.model SET options = options || %s", Jsonb({"delay_s": delay}))

    def process(self, how: str) -> None:
        """Kill, stop, leave dead, start or freeze the service."""
        self.faults[f"service {how}"] += 1
        if how in ("kill -9", "dead"):
            self._kill()
        elif how == "SIGTERM":
            self._terminate()
        elif how == "SIGSTOP":
            self._freeze(0.4)
        if how != "dead":
            self._start()

    def cut(self, which: int) -> None:
        """End one of the service's sessions on the server."""
        self.faults["session cut"] += 1
        self.bench.admin.execute(
            "SELECT pg_terminate_backend(pid) FROM ("
            "  SELECT pid, row_number() OVER (ORDER BY application_name, pid) - 1 AS n, count(*) OVER () AS sessions"
            "    FROM pg_stat_activity WHERE usename = %s AND datname = %s"
            ") s WHERE n = %s %% sessions",
            (SERVICE_ROLE, self.bench.database, which),
        )

    def server(self, mode: str) -> None:
        """Restart the server; open transactions are lost with it."""
        self.faults[f"server {mode}"] += 1
        self._wait_thawed()
        for transaction in self.open.values():
            transaction.connection.close()
        self.open.clear()
        self._app.close()
        self.bench.restart(mode)
        self._app = self._connect()
        self._confirmed = None

    def drop_slot(self, how: str) -> None:
        """Drop the slot while the service is dead, or from under it."""
        self.faults[f"slot dropped, {how}"] += 1
        if how == "service dead":
            self._kill()
        for _ in range(100):
            self.bench.admin.execute(
                "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots"
                " WHERE slot_name = %s AND active",
                (self.bench.slot,),
            )
            try:
                self.bench.admin.execute(
                    "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s",
                    (self.bench.slot,),
                )
                break
            except psycopg.errors.ObjectInUse:
                time.sleep(0.01)
        self._confirmed = None
        self._start()

    # What must hold.

    def do(self, operation: str, *arguments: Any) -> None:
        """One operation and the checks after it. Raises Violation with everything that is known."""
        self.operations[operation] += 1
        self._note(f"{operation}{_short(arguments)!r}")
        with self._explained():
            getattr(self, operation)(*arguments)
            self.check()

    def check(self) -> None:
        """What must always hold."""
        if self.service.exit_status is not None and not self._dead:
            raise Violation(f"6: the service left with status {self.service.exit_status}")
        if "Traceback" in self.service.log:
            raise Violation("6: the service shows a traceback")
        # In this order: what the snapshot sees is at least as new as the position.
        confirmed = self._confirmed_flush()
        if confirmed is not None:
            if self._confirmed is not None and confirmed < self._confirmed:
                raise Violation(f"5: the slot went back from {self._confirmed:X} to {confirmed:X}")
            self._confirmed = confirmed
        for problem in self._problems(confirmed):
            raise Violation(problem)

    def fresh(self) -> None:
        """The beginning of an example: no rows, and a service that streams."""
        self.trace.clear()
        self._seen.clear()
        self._kills = self._large = 0
        self._note("fresh")
        with self._explained():
            self._app.execute("DELETE FROM documents")  # a TRUNCATE would have everything scanned
            self.rows.clear()
            self._start()
            until(self._active, "the slot was never taken")
            self.check()

    def settle(self) -> None:
        """The end of an example: faults are healed, transactions ended, and then all must come right."""
        self._note("settle")
        with self._explained():
            self._wait_thawed()
            for session, end in zip(list(self.open), itertools.cycle(("COMMIT", "ROLLBACK"))):
                self.end(session, end)
            self._down.unlink(missing_ok=True)
            self._configure("UPDATE cdc_embedder.model SET options = options || %s", Jsonb({"delay_s": 0}))
            configured = self._configured()
            for column in COLUMNS:
                if column.target not in configured:
                    self._add(column)
            self._configure("UPDATE cdc_embedder.embedding_column SET enabled = true WHERE NOT enabled")
            self._start()
            self._wait_for(self._unsettled, self._position(self.bench.admin))
            before = self._versions()
            self._configure("SELECT cdc_embedder.reconcile('documents')")
            self._wait_for(self._scan_wanted)
            if before != self._versions():
                raise Violation("in the end: a scan wrote rows that were current")
            for column, id in ((column, self._configured()[column.target].id) for column in COLUMNS):
                orphans = one(
                    self.bench.admin,
                    f"SELECT count(*) FROM cdc_embedder.ledger_{id} WHERE key_1 NOT IN (SELECT id FROM documents)",
                )
                if orphans:
                    raise Violation(f"in the end: {orphans} ledger rows of {column.target} have no row after a scan")

    def close(self) -> None:
        """Nothing of ours remains but the database."""
        self._wait_thawed()
        for connection in (self._app, *(transaction.connection for transaction in self.open.values())):
            connection.close()
        self.open.clear()
        self.service.end()

    def _problems(self, confirmed: int | None) -> Iterator[str]:
        """Checks 1 to 4, in one snapshot."""
        admin = self.bench.admin
        with admin.transaction():
            admin.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            configured = self._configured()
            for column in COLUMNS:
                yield from self._problems_of(column, configured.get(column.target), confirmed)
            self._note_versions()

    def _note_versions(self) -> None:
        """Where each row's last commit lies, ours or the service's own: not after the present position.

        The service may rest on a later commit than the application's, which the slot holds and would tell of again.
        """
        versions: dict[int, str] = dict(self.bench.admin.execute("SELECT id, xmin::text FROM documents").fetchall())
        position = self._position(self.bench.admin)
        self._written = {
            key: self._written[key] if self._written.get(key, ("", 0))[0] == xmin else (xmin, position)
            for key, xmin in versions.items()
        }

    def _problems_of(self, column: Column, configured: Configured | None, confirmed: int | None) -> Iterator[str]:
        found = self._read(column, configured)
        if [(key, title, body, views) for key, title, body, views, *_ in found] != [
            (key, row.title, row.body, row.views) for key, row in sorted(self.rows.items())
        ]:
            yield f"1: the rows are not the application's: {_short(found)}, but {self.rows.keys()}"
        for key, title, body, _, version, stored, state, same_text, generation, same_vector, spilled in found:
            row = self.rows[key]
            right = configured is not None and same(stored, self._expected(column, configured, title, body))
            if stored is not None and not self._goes_on(column, row, stored, right):
                texts = _short(row.texts)
                yield f"2: {column.target} of {key} is of none of its texts, or of an older one: {texts} {stored}"
            if configured is None:
                continue
            told = bool(same_text) and generation == configured.generation
            # An orphan of the ledger may lie under the key of a new row or a moved one: its digest gives it away.
            own = not (row.scribbled or row.moved or stored is None)
            if told and state in ("current", "truncated") and not right and (same_vector or own):
                yield f"3: the ledger says that {column.target} of {key} is current, and it is not: {stored}"
            done = right or spilled or (told and state == "failed")
            excused = not configured.enabled or configured.scan_wanted
            xmin, position = self._written.get(key, ("", 0))
            if xmin == version and confirmed is not None and confirmed >= position and not done and not excused:
                texts = _short((title, body))
                yield f"4: {confirmed:X} is confirmed, not {column.target} of {key} of {position:X}: {texts} {stored}"

    def _read(self, column: Column, configured: Configured | None) -> list[tuple[Any, ...]]:
        target = f"t.{column.target}::real[]"
        if configured is None:
            told, joins = "NULL, NULL, NULL, NULL, NULL", ""
        else:
            told = (
                f"l.state, l.fingerprint = {column.fingerprint}, l.generation,"
                f" l.vector_digest IS NOT DISTINCT FROM hash_array_extended({target}, 0), b.key_1 IS NOT NULL"
            )
            joins = (
                f"LEFT JOIN cdc_embedder.ledger_{configured.id} l ON l.key_1 = t.id"
                f" LEFT JOIN cdc_embedder.backlog_{configured.id} b ON b.key_1 = t.id"
            )
        return self.bench.admin.execute(
            f"SELECT t.id, t.title, t.body, t.views, t.xmin::text, {target}, {told}"
            f" FROM documents t {joins} ORDER BY t.id"
        ).fetchall()

    @staticmethod
    def _expected(column: Column, configured: Configured, title: str | None, body: str | None) -> np.ndarray | None:
        text = column.text(title, body, configured.separator)
        return None if text is None else vector(configured.model, text)

    def _goes_on(self, column: Column, row: Row, stored: Any, right: bool) -> bool:
        """Whether the vector is of the text that was last seen to have one, or of a later one. `right`: of the last."""
        if column.target == "embedding" and any(same(stored, vector(MODELS[0], text)) for text in row.scribbled):
            return True
        seen = 0 if row.scribbled else self._seen.get((row.number, column.target), 0)
        for place, texts in enumerate(row.texts[seen:], seen):
            if self._is_of(column, texts, stored) if not right else self._alike(column, texts, row.texts[-1]):
                self._seen[row.number, column.target] = place
                return True
        return False

    @staticmethod
    def _alike(column: Column, some: Texts, others: Texts) -> bool:
        return any(column.text(*some, separator) == column.text(*others, separator) for separator in SEPARATORS)

    @staticmethod
    def _is_of(column: Column, texts: Texts, stored: Any) -> bool:
        possible = {column.text(*texts, separator) for separator in SEPARATORS} - {None}
        return any(same(stored, vector(model, text)) for text in possible for model in MODELS if text is not None)

    def _configured(self) -> dict[str, Configured]:
        rows = self.bench.admin.execute(
            "SELECT c.target_column, c.id, c.model, c.separator, c.generation, c.enabled,"
            " coalesce(s.requested_at > s.finished_at, s.requested_at IS NOT NULL)"
            " FROM cdc_embedder.embedding_column c JOIN cdc_embedder.scan s ON s.column_id = c.id"
        ).fetchall()
        return {target: Configured(*values) for target, *values in rows}

    def _wait_for(self, reason_against: Callable[..., str], *arguments: Any) -> None:
        """Wait until there is none."""
        reason = ""

        def over() -> bool:
            nonlocal reason
            self.check()
            reason = reason_against(*arguments)
            return not reason

        until(over, "in the end it never came right", lambda: reason)

    def _scan_wanted(self) -> str:
        wanted = [target for target, configured in self._configured().items() if configured.scan_wanted]
        return f"a scan for {wanted} is wanted" if wanted else ""

    def _unsettled(self, target: int) -> str:
        """Why it is not over yet."""
        admin = self.bench.admin
        confirmed_flush = self._confirmed_flush()
        if confirmed_flush is None or confirmed_flush < target:
            return f"the slot is confirmed through {confirmed_flush or 0:X}, the application was at {target:X}"
        if reason := self._scan_wanted():
            return reason
        for column in COLUMNS:
            configured = self._configured()[column.target]
            found = self._read(column, configured)
            for key, title, body, _, _, stored, state, same_text, generation, same_vector, _ in found:
                expected = self._expected(column, configured, title, body)
                if state == "failed":
                    self._forgive(configured.id)
                    return f"{column.target} of {key} failed"
                if not same(stored, expected):
                    return f"{column.target} of {key} is not the vector of {_short((title, body))}: {stored}"
                told = state is not None and same_text and same_vector and generation == configured.generation
                if expected is not None and not told:
                    return f"the ledger does not know that {column.target} of {key} is current"
            if spilled := one(admin, f"SELECT count(*) FROM cdc_embedder.backlog_{configured.id}"):
                return f"{spilled} keys of {column.target} are in the backlog"
        for told in status(self.bench):
            if told["state"] != "live" or told["pending"] or told["failed"] or told["coverage"] != 100:
                return f"status says {told}"
        if (lag := self._position(admin) - confirmed_flush) > IDLE_BYTES:
            return f"the slot is {lag} bytes behind"
        if (senders := one(admin, "SELECT count(*) FROM pg_stat_replication")) != 1:
            return f"there are {senders} walsenders"
        if open := one(admin, "SELECT count(*) FROM pg_stat_activity WHERE usename = %s AND state LIKE 'idle in%%'",
                       SERVICE_ROLE):  # fmt: skip
            return f"{open} sessions of the service are in a transaction"
        return ""

    def _forgive(self, column: int) -> None:
        """A row that was with the model at two of our kills is set aside, as it should be: it is tried again."""
        errors = {
            error
            for (error,) in self.bench.admin.execute(
                f"SELECT error FROM cdc_embedder.ledger_{column} WHERE state = 'failed'"
            )
        }
        if self._kills < 2 or any(not (error or "").startswith(KILLED) for error in errors):
            raise Violation(f"in the end: rows failed, after {self._kills} kills: {errors}")
        self._configure("SELECT cdc_embedder.retry_failed('documents')")

    def _versions(self) -> list[tuple[Any, ...]]:
        return self.bench.admin.execute("SELECT id, xmin::text, ctid::text FROM documents ORDER BY id").fetchall()

    # How it is done.

    def _connect(self) -> Connection:
        return psycopg.connect(self.bench.dsn_admin, autocommit=True, options="-c statement_timeout=30s")

    def _transaction(self, changes: list[Change], end: str, *, explicit: bool = True) -> None:
        transaction = Transaction(self._app, self.rows, self._type)
        if explicit:
            self._app.execute("BEGIN")
        for change in changes:
            if aimed := self._aim(transaction, change):
                transaction.apply(aimed)
        self._end(transaction, end if explicit else "")

    def _end(self, transaction: Transaction, end: str) -> None:
        connection = transaction.connection
        if end == "PREPARE":
            connection.execute("PREPARE TRANSACTION 'prepared'")
            connection.execute("COMMIT PREPARED 'prepared'")
        elif end:
            connection.execute(end)
        if end == "ROLLBACK":
            return
        for key, row in transaction.changed.items():
            if row is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = replace(row, texts=(*row.texts, (row.title, row.body)))

    def _aim(self, transaction: Transaction, change: Change) -> Change | None:
        """The change at rows that are there, and not locked by another session: our statement would wait for it."""
        kind, key, argument = change
        if kind in ("savepoint", "undo"):
            return change
        held = {key for other in self.open.values() if other is not transaction for key in other.held}
        free = [key for key in KEYS if key not in held]
        present = [key for key in free if transaction.row(key) is not None]
        absent = [key for key in free if transaction.row(key) is None]
        if kind == "put":
            return change if key in free else None
        if not present or (kind == "rekey" and not absent):
            return None
        if kind == "rekey":
            argument = absent[argument % len(absent)]
        return kind, present[key % len(present)], argument

    def _add(self, column: Column) -> None:
        self.bench.admin.execute(
            "INSERT INTO cdc_embedder.embedding_column"
            " (source_table, source_columns, target_column, model, on_existing)"
            " VALUES ('documents', %s, %s, %s, 'replace')",
            (list(column.sources), column.target, MODELS[0]),
        )

    def _configure(self, statement: str, *parameters: Any) -> None:
        self._app.execute(statement, parameters or None)

    @property
    def _dead(self) -> bool:
        return self.service.exit_status == -signal.SIGKILL and self._killed

    _killed = False

    def _kill(self) -> None:
        self._wait_thawed()
        if self.service.exit_status is None:
            self.service.kill()
            self._killed = True
            self._kills += 1

    def _start(self) -> None:
        if self._dead:
            self._killed = False
            self.service.start()

    def _terminate(self) -> None:
        """SIGTERM, once there is somebody to hear it; a clean stop is no fault of the process."""
        self._wait_thawed()
        if self.service.exit_status is not None:
            return
        if not self._active():
            return
        if (left := self.service.stop()) != 0:
            raise Violation(f"6: the service left with status {left} on SIGTERM")
        self.service.start()

    def _freeze(self, seconds: float) -> None:
        self._wait_thawed()
        if self.service.exit_status is None:
            self.service.signal(signal.SIGSTOP)
            self._thaw = threading.Timer(seconds, self.service.signal, (signal.SIGCONT,))
            self._thaw.start()

    def _wait_thawed(self) -> None:
        if self._thaw is not None:
            self._thaw.join()
            self._thaw = None

    def _active(self) -> bool:
        return bool(
            one(self.bench.admin, "SELECT active FROM pg_replication_slots WHERE slot_name = %s", self.bench.slot)
        )

    def _confirmed_flush(self) -> int | None:
        lsn = one(
            self.bench.admin,
            "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s",
            self.bench.slot,
        )
        return None if lsn is None else number(lsn)

    @staticmethod
    def _position(connection: Connection) -> int:
        return number(one(connection, "SELECT pg_current_wal_insert_lsn()::text"))

    def _note(self, what: str) -> None:
        self.trace.append(f"{time.monotonic() - self._began:8.3f} {what}")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Any failure is a violation, and tells the example's steps and the end of the service's log."""
        try:
            yield
        except Exception as error:
            what = error if isinstance(error, Violation) else f"{type(error).__name__}: {error}"
            self._note("VIOLATION")
            log = "\n".join(self.service.log.splitlines()[-150:])
            steps = "\n".join(self.trace)
            raise Violation(f"{what}\n\nsteps:\n{steps}\n\ntables:\n{self._tables()}\n\nlog:\n{log}") from error

    def _tables(self) -> str:
        """What the service keeps, as far as it can be read."""
        lines = []
        try:
            backlogs = [f"backlog_{configured.id}" for configured in self._configured().values()]
            ledgers = [f"ledger_{configured.id}" for configured in self._configured().values()]
            for table in ("scan", "column_state", "in_flight", "suspect", *backlogs, *ledgers):
                rows = self.bench.admin.execute(f"SELECT to_jsonb(t) FROM cdc_embedder.{table} t LIMIT 8").fetchall()
                lines += [f"{table} {row}" for (row,) in rows]
        except psycopg.Error as error:
            lines.append(str(error))
        return "\n".join(lines)
