"""The one vocabulary that both output plugins are decoded into. No I/O, nothing plugin-specific.

Only what the service needs travels on: which relation, which values the key columns have. Three things that
PostgreSQL distinguishes stay distinct: a value (its text as the server printed it), NULL (`None`), and a
column that was not sent because its TOASTed value did not change (absent from the mapping).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cdc_embedder.lsn import LSN

Values = Mapping[str, str | None]
"""Column name → the value's text form, or None for NULL. A column that was not sent is absent."""


@dataclass(frozen=True, slots=True)
class Begin:
    """A committed transaction starts. `commit_lsn` is where its commit record begins; `xid` has 32 bits.

    `committed_at`: by the server's clock, seconds since 1970; None where the plugin was not asked for it.
    """

    xid: int
    commit_lsn: LSN
    committed_at: float | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """The transaction is complete. `end_lsn` is the only position that may be confirmed for it (rule 1)."""

    commit_lsn: LSN
    end_lsn: LSN


@dataclass(frozen=True, slots=True)
class Relation:
    """A table as the stream describes it. wal2json has no oid: there it is None."""

    schema: str
    name: str
    oid: int | None = None
    replica_identity: str | None = None
    columns: tuple[str, ...] = ()
    key_columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Insert:
    relation: Relation
    values: Values


@dataclass(frozen=True, slots=True)
class Update:
    """`values` is the new row; `identity` the old identity columns where the server sent them, else empty."""

    relation: Relation
    values: Values
    identity: Values


@dataclass(frozen=True, slots=True)
class Delete:
    relation: Relation
    identity: Values


@dataclass(frozen=True, slots=True)
class Truncate:
    relations: tuple[Relation, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """The open transaction was replayed or written under this replication origin.

    pgoutput tells the name, wal2json the numeric id (`roident`).
    """

    name: str | None = None
    id: int | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """An insert or update of a transaction of our own origin, unread."""


@dataclass(frozen=True, slots=True)
class LogicalMessage:
    transactional: bool
    lsn: LSN
    prefix: str
    content: bytes


Message = Begin | Commit | Relation | Insert | Update | Delete | Truncate | Origin | Skipped | LogicalMessage
