"""From messages to keys: which waiting list each change belongs on. No I/O.

Rules 1 and 3 meet here: a transaction opens a position in the watermark, each changed key of a served column holds
it, the commit closes it. Nothing is decided from the values that travel: only the key is taken from a message. Changes
that carry our own replication origin are our write-backs, and nothing else (the write-back sees to that): passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cdc_embedder.errors import ProtocolError
from cdc_embedder.pending import Key, Pending
from cdc_embedder.wal.messages import Begin, Commit, Insert, Message, Origin, Relation, Skipped, Update, Values
from cdc_embedder.watermark import Position, Watermark


@dataclass(eq=False, slots=True)
class Route:
    """Where changes of one table go for one column. `missed` holds commits whose keys could not be told."""

    table_oid: int
    relations: frozenset[tuple[str, str]]
    key: tuple[str, ...]
    pending: Pending
    missed: list[Position] = field(default_factory=list)


class Router:
    """Fed with the messages of one connection, in order."""

    def __init__(self, watermark: Watermark, own_origins: Iterable[str | int] = ()) -> None:
        self._watermark = watermark
        self._own = frozenset(own_origins)
        self._by_oid: dict[int, list[Route]] = {}
        self._by_name: dict[tuple[str, str], list[Route]] = {}
        self._position: Position | None = None
        self._xid = 0
        self._echo = False
        self.changes = 0
        """Changes put on a waiting list so far."""
        self.echoes = 0
        """Changes of our own that were passed over so far."""
        self.unusable: set[int] = set()
        """Oids of relations that were described without a usable replica identity."""

    def serve(self, routes: Iterable[Route]) -> None:
        """From now on, changes go to these routes."""
        self._by_oid, self._by_name = {}, {}
        for route in routes:
            self._by_oid.setdefault(route.table_oid, []).append(route)
            for name in route.relations:
                self._by_name.setdefault(name, []).append(route)

    def route(self, messages: Sequence[Message], now: float) -> None:
        """Put every changed key where it belongs. Raises ProtocolError where the stream makes no sense."""
        for message in messages:
            match message:
                case Insert() | Update():
                    if self._echo:
                        self.echoes += 1
                    else:
                        self._change(message, now)
                case Skipped():
                    self.echoes += 1
                case Begin():
                    if self._position is not None:
                        raise ProtocolError("a transaction arrived inside another one")
                    self._position = self._watermark.begin(message.commit_lsn, message.committed_at)
                    self._xid, self._echo = message.xid, False
                case Commit():
                    if self._position is None:
                        raise ProtocolError("a commit arrived without its transaction")
                    self._watermark.commit(self._position, message.end_lsn)
                    self._position = None
                case Origin():
                    self._echo = message.name in self._own or message.id in self._own
                case Relation():
                    if message.replica_identity == "n" and message.oid is not None:
                        self.unusable.add(message.oid)
                case _:
                    pass  # deletes and truncates take the vector with the row; logical messages are not ours

    def _change(self, message: Insert | Update, now: float) -> None:
        relation = message.relation
        if relation.oid is not None:
            routes = self._by_oid.get(relation.oid)
        else:
            routes = self._by_name.get((relation.schema, relation.name))
        if not routes:
            return
        if self._position is None:
            raise ProtocolError("a change arrived outside of a transaction")
        identity: Values = message.identity if type(message) is Update else {}
        for route in routes:
            key = _key(route.key, message.values, identity)
            if key is None:
                self._watermark.hold(self._position)
                route.missed.append(self._position)
            else:
                route.pending.change(key, self._position, self._xid, now)
            self.changes += 1


def _key(columns: tuple[str, ...], values: Values, identity: Values) -> Key | None:
    """The new row's key. A key column that is not sent did not change: its value is in the old identity then.

    None when a column is nowhere: it had another name, or was no key column, when the change was written; or when its
    value is not valid UTF-8 (lone surrogates).
    """
    parts = []
    for column in columns:
        value = values.get(column)
        if value is None:
            value = identity.get(column)
            if value is None:
                return None
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            return None
        parts.append(value)
    return tuple(parts)
