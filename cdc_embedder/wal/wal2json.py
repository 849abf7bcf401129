"""From the JSON of wal2json (format 2) to messages. No I/O.

Values are kept as the characters the server printed, never through a float or an int: 1.10 stays 1.10, and a bigint
past 2^53 keeps its last digit. Where JSON changes the text of a value it is put back as pgoutput would have sent it:
booleans (`t`, `f`) and bytea (`\\x…`). What JSON cannot carry (NaN and infinity arrive as null) is an error in a key.
The JSON is in the *server's* encoding, whatever client_encoding says. Source: https://github.com/eulerto/wal2json
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TypeVar

import msgspec

from cdc_embedder.errors import Misconfigured, NotCarried, ProtocolError
from cdc_embedder.lsn import LSN
from cdc_embedder.wal.encodings import CODECS
from cdc_embedder.wal.messages import (
    Begin,
    Commit,
    Delete,
    Insert,
    LogicalMessage,
    Message,
    Origin,
    Relation,
    Truncate,
    Update,
)
from cdc_embedder.wal.pgoutput import LONGEST_KEY

_T = TypeVar("_T")


def options(
    tables: Iterable[tuple[str, str]],
    *,
    filter_origins: Sequence[int] = (),
    message_prefixes: Sequence[str] = ("cdc_embedder",),
) -> dict[str, str]:
    """START_REPLICATION options for inserts and updates of exactly these (schema, table) pairs.

    A partitioned table is known here by its leaves. `filter_origins` are numeric ids (`roident`): wal2json takes a name
    without a word and filters nothing. Logical messages can only be kept out by naming prefixes that nobody else uses.
    """
    chosen = {
        "format-version": "2",
        "include-lsn": "true",
        "include-xids": "true",
        "include-origin": "true",
        "include-timestamp": "true",
        "include-pk": "true",
        "include-types": "true",
        "include-typmod": "false",
        "actions": "insert,update",
        "add-msg-prefixes": ",".join(_escape(prefix) for prefix in message_prefixes),
    }
    named = ",".join(f"{_escape(schema)}.{_escape(table)}" for schema, table in tables)
    chosen |= {"add-tables": named} if named else {"filter-tables": "*.*"}
    if filter_origins:
        chosen["filter-origins"] = ",".join(str(int(origin)) for origin in filter_origins)
    return chosen


def _escape(name: str) -> str:
    """Blanks, commas, periods, asterisks and backslashes mean something in wal2json's lists."""
    return "".join("\\" + char if char.isascii() and not (char.isalnum() or char == "_") else char for char in name)


class _Column(msgspec.Struct, gc=False):
    name: str
    type: str = ""
    value: msgspec.Raw = msgspec.Raw()


class _Event(msgspec.Struct, gc=False):
    action: str
    xid: int | None = None
    origin: int | None = None
    lsn: str | None = None
    nextlsn: str | None = None
    timestamp: str | None = None
    schema: str | None = None
    table: str | None = None
    columns: list[_Column] = []
    identity: list[_Column] = []
    pk: list[_Column] = []
    transactional: bool | None = None
    prefix: str | None = None
    content: str | None = None


class Wal2JsonDecoder:
    """Decodes the messages of one connection. `server_encoding` as `SHOW server_encoding` prints it.

    >>> Wal2JsonDecoder().decode(b'{"action":"C","lsn":"0/1550528","nextlsn":"0/1550558"}')
    (Commit(commit_lsn=LSN(0/1550528), end_lsn=LSN(0/1550558)),)
    """

    def __init__(self, server_encoding: str = "UTF8") -> None:
        """Raises Misconfigured for an encoding that Python cannot read."""
        if server_encoding not in CODECS:
            raise Misconfigured(
                f"wal2json sends its JSON in the server's encoding {server_encoding}, which cannot be read here",
                hint="set output_plugin to pgoutput, which converts to UTF-8, and drop the wal2json slot",
            )
        self._codec = CODECS[server_encoding]
        self._event = msgspec.json.Decoder(_Event).decode
        self._string = msgspec.json.Decoder(str).decode
        self._relations: dict[tuple[str, str], tuple[Relation, frozenset[str]]] = {}

    def decode(self, payload: memoryview | bytes) -> Sequence[Message]:
        """The messages that one payload holds: one, or a begin and its origin. Raises ProtocolError, nothing else."""
        try:
            return self._messages(self._event(self._text(payload)))
        except (msgspec.DecodeError, ValueError, RecursionError) as cause:
            # not str(cause): it may quote the row
            raise NotCarried(
                f"a wal2json message of {len(payload)} bytes is cut short or damaged",
                hint="of types in schemas whose names need quotes it makes no JSON: a slot with pgoutput is needed",
            ) from cause

    def _text(self, payload: memoryview | bytes) -> memoryview | bytes | str:
        if self._codec is None:
            return payload
        try:
            return str(payload, self._codec)
        except UnicodeDecodeError:
            raise NotCarried(
                f"a value of a changed row is no text in the database's encoding ({self._codec})",
                hint="a slot with pgoutput is needed, where that concerns one value only",
            ) from None

    def _messages(self, event: _Event) -> Sequence[Message]:
        match event.action:
            case "I":
                relation, key = self._relation(event)
                return (Insert(relation, self._values(event.columns, key)),)
            case "U":
                relation, key = self._relation(event)
                values = self._values(event.columns, key)
                return (Update(relation, values, self._values(event.identity, key)),)
            case "B":
                at = None if event.timestamp is None else datetime.fromisoformat(event.timestamp).timestamp()
                begin = Begin(_given(event.xid, "xid"), _lsn(event.lsn), at)
                return (begin, Origin(id=event.origin)) if event.origin else (begin,)
            case "C":
                return (Commit(_lsn(event.lsn), _lsn(event.nextlsn)),)
            case "D":
                relation, key = self._relation(event)
                return (Delete(relation, self._values(event.identity, key)),)
            case "T":
                return (Truncate((self._relation(event)[0],)),)
            case "M":
                content = _given(event.content, "content").encode(self._codec or "utf-8")
                transactional = _given(event.transactional, "transactional")
                return (LogicalMessage(transactional, _lsn(event.lsn), _given(event.prefix, "prefix"), content),)
            case kind:
                raise ProtocolError(
                    f"wal2json sent a message of an unknown kind ({kind[:8]!r})",
                    hint="it may come from a newer version of the plugin; skipping it could lose rows",
                )

    def _relation(self, event: _Event) -> tuple[Relation, frozenset[str]]:
        """The relation, and its primary key."""
        name = (_given(event.schema, "schema"), _given(event.table, "table"))
        key = tuple(column.name for column in event.pk)
        known = self._relations.get(name)
        if known is None or known[0].key_columns != key:
            known = self._relations[name] = (Relation(*name, key_columns=key), frozenset(key))
        return known

    def _values(self, columns: list[_Column], key: frozenset[str]) -> dict[str, str | None]:
        values: dict[str, str | None] = {}
        for column in columns:
            name = column.name
            if len(memoryview(column.value)) <= LONGEST_KEY:
                value = values[name] = self._value(column)
                if value is None and name in key:
                    raise NotCarried(
                        f"the value of the key column {name!r} did not arrive: it is NaN or infinite",
                        hint="JSON has no such numbers: a slot with pgoutput is needed",
                    )
        return values

    def _value(self, column: _Column) -> str | None:
        raw = bytes(column.value)
        match raw[:1]:
            case b'"':
                text = self._string(raw)
                return "\\x" + text if column.type == "bytea" else text
            case b"n":
                return None
            case b"t" | b"f":
                return chr(raw[0])
            case b"":
                raise ProtocolError(f"the column {column.name!r} came without its value")
            case _:
                return raw.decode()


def _lsn(text: str | None) -> LSN:
    return LSN.parse(_given(text, "lsn"))


def _given(value: _T | None, what: str) -> _T:
    if value is None:
        raise ProtocolError(f"a wal2json message has no {what}")
    return value
