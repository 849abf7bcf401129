"""What all checks look at: the settings, a session that only reads, and what was read with it once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
from psycopg.rows import TupleRow, dict_row

from cdc_embedder import catalog
from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.errors import Problem
from cdc_embedder.installable import EMBED_SUFFIX
from cdc_embedder.rows.session import Connection, connect
from cdc_embedder.settings import Settings
from cdc_embedder.standby import open_standby
from cdc_embedder.wal import slot as slots
from cdc_embedder.wal.slot import Slot, Surroundings

SESSION = {"default_transaction_read_only": "on", "statement_timeout": "10000", "client_min_messages": "notice"}
"""Settings of the doctor's sessions."""


@dataclass(slots=True)
class Patient:
    """A service with its database. `schema` is the version of ours that is installed, None where there is none.

    `standby`: a session on the standby that the slot is on, if it is on one: `around` is what is there, then.
    `status`: the rows of the status view by column id; `reader`: the pid of the session that has the advisory lock;
    `notices`: message and hint of what the server said beside its answers.
    """

    settings: Settings
    connection: Connection
    around: Surroundings
    standby: Connection | None = None
    notices: list[tuple[str, str]] = field(default_factory=list)
    superuser: bool = False
    schema: int | None = None
    columns: list[EmbeddingColumn] = field(default_factory=list)
    status: dict[int, dict[str, Any]] = field(default_factory=dict)
    reader: int | None = None
    sql_embed: bool = False

    @property
    def version(self) -> int:
        """The server's, as in 180001."""
        return self.connection.info.server_version

    @property
    def slot(self) -> str:
        return self.settings.slot

    @property
    def embed_slot(self) -> str:
        return self.settings.slot + EMBED_SUFFIX

    @property
    def plugin(self) -> str:
        """The existing slot's, else the one that is asked for, which may be `auto`."""
        found = self.around.slot
        return found.plugin if found is not None and found.plugin else self.settings.output_plugin

    async def rows(self, query: LiteralString, *parameters: object) -> list[TupleRow]:
        cursor = await self.connection.execute(query, parameters or None)
        return await cursor.fetchall()

    async def one(self, query: LiteralString, *parameters: object) -> TupleRow:
        """The first row of a statement that has one."""
        return (await self.rows(query, *parameters))[0]

    async def find_slot(self, name: str) -> Slot | None:
        return await slots.inspect(self.home(name), name)

    def home(self, slot: str) -> Connection:
        """A session on the server that the slot is, or will be, on."""
        return self.standby if self.standby is not None and slot == self.slot else self.connection

    async def slot_rows(self, query: LiteralString, *parameters: object) -> list[TupleRow]:
        """The rows of a statement about slots, from each server that may have one of ours."""
        found = await self.rows(query, *parameters)
        if self.standby is not None:
            found += await (await self.standby.execute(query, parameters or None)).fetchall()
        return found

    async def read_schema(self) -> None:
        """What our tables say. Raises psycopg.Error where they cannot be read."""
        found = await self.one("SELECT coalesce(max(version), 0) FROM cdc_embedder.migration")
        self.schema = found[0]
        [self.sql_embed] = await self.one(
            "SELECT $1 OR coalesce(bool_or(enabled), false) FROM cdc_embedder.sql_embed", self.settings.sql_embed
        )
        self.columns = await catalog.load(self.connection, self.slot)

    async def read_status(self) -> None:
        """The rows of the status view, which may take longer than the doctor waits. Raises psycopg.Error."""
        cursor = self.connection.cursor(row_factory=dict_row)
        await cursor.execute("SELECT * FROM cdc_embedder.status")
        self.status = {row["id"]: row for row in await cursor.fetchall()}


async def admit(settings: Settings) -> Patient:
    """Connect as the service does, read-only. Raises Problem."""
    connection = await connect(settings.dsn.get_secret_value(), "doctor", **SESSION)
    try:
        standby = await _standby(settings, connection)
        patient = Patient(settings, connection, await slots.look(standby or connection, settings.slot), standby)
        connection.add_notice_handler(
            lambda told: patient.notices.append((told.message_primary or "", told.message_hint or ""))
        )
        patient.sql_embed = settings.sql_embed
        [patient.superuser] = await patient.one("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
        [patient.reader] = await patient.one(_READER, settings.slot)
    except BaseException:
        await connection.close()
        raise
    return patient


async def discharge(patient: Patient) -> None:
    """Close its sessions."""
    await patient.connection.close()
    if patient.standby is not None:
        await patient.standby.close()


async def _standby(settings: Settings, connection: Connection) -> Connection | None:
    """Where nothing good answers the check of the replication connection tells."""
    if settings.replication_dsn is None:
        return None
    try:
        return await open_standby(connection, settings.replication_dsn.get_secret_value(), **SESSION)
    except (Problem, psycopg.Error):
        return None


_READER = """
SELECT (SELECT l.pid FROM pg_locks l
         WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
           AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND (l.classid::int8 << 32 | l.objid::int8) = hashtextextended('cdc_embedder:' || $1, 0) LIMIT 1)
"""
