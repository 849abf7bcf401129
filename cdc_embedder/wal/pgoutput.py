"""From the bytes of pgoutput (protocol 1) to messages. No I/O.

Values arrive as text in `client_encoding`, which is the database's own; what is not valid in it (in an SQL_ASCII
database: not UTF-8) becomes lone surrogates (PEP 383), which no key may hold. Where every key is of a type in
`BINARY_TYPES` they may be asked for in binary, which costs the server far less for vectors: values of other types are
passed over then. So is what a transaction of our own origin changed, but for its count. A relation is described before
its first change and again after every change to it, so the cache lives as long as the connection: one decoder a
connection. Not for protocol 2 and up: streamed transactions could still be aborted, and what is not committed is not
ours to read.
Source: https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from struct import Struct, error
from uuid import UUID

from cdc_embedder.errors import ProtocolError
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
    Skipped,
    Truncate,
    Update,
    Values,
)

_Columns = tuple[tuple[str | None, "Binary | None"], ...]
"""Name and reader of a relation's columns; no name: not wanted, no reader: its binary form is not understood here."""

_INT16 = Struct("!H").unpack_from
_INT32 = Struct("!I").unpack_from
POSTGRES_EPOCH = 946_684_800.0
"""2000-01-01 UTC, from which PostgreSQL counts, in seconds since 1970."""

_BEGIN = Struct("!xQqI")
_COMMIT = Struct("!xBQQq")
_ORIGIN = Struct("!xQ")
_MESSAGE = Struct("!xBQ")
_COLUMN_TYPE = Struct("!Ii")

_PROTOCOL = 1

_OWN = (Skipped(),)

Binary = Callable[[memoryview | bytes, str], str]
"""A value's binary form, and the session's codec, to its text form."""


def _integer(data: memoryview | bytes, codec: str) -> str:
    return str(int.from_bytes(data, "big", signed=True))


def _uuid(data: memoryview | bytes, codec: str) -> str:
    return str(UUID(bytes=bytes(data)))


def _text(data: memoryview | bytes, codec: str) -> str:
    return str(data, codec, "surrogateescape")


_BINARY: dict[int, Binary] = {
    **dict.fromkeys((20, 21, 23), _integer),
    2950: _uuid,
    **dict.fromkeys((19, 25, 1043), _text),
}
"""By oid of the type. Only where the text form of a pinned session follows from the binary one without doubt."""

BINARY_TYPES = frozenset(("bigint", "smallint", "integer", "uuid", "name", "text", "character varying"))
"""The same types, as `format_type` has them, without a length."""

LONGEST_KEY = 1 << 20
"""Bytes. A longer value fits into no index: it is no key, and nobody reads it."""


def options(publication: str, *, messages: bool = False, binary: bool = False) -> dict[str, str]:
    """START_REPLICATION options for one publication. `messages`: logical messages too."""
    name = '"' + publication.replace('"', '""') + '"'  # the value is a list of identifiers
    chosen = {"proto_version": str(_PROTOCOL), "publication_names": name}
    return chosen | ({"messages": "true"} if messages else {}) | ({"binary": "true"} if binary else {})


class PgOutputDecoder:
    """Decodes the messages of one connection, in order.

    >>> PgOutputDecoder().decode(bytes.fromhex("43 00 0000000001550528 0000000001550558 0000000000000000"))
    (Commit(commit_lsn=LSN(0/1550528), end_lsn=LSN(0/1550558)),)
    """

    def __init__(self, *, server_encoding: str = "UTF8", own_origins: Collection[str] = ()) -> None:
        """`server_encoding`: which the session has as its client_encoding, too."""
        self._codec = CODECS[server_encoding] or "utf-8"
        self._own_origins = frozenset(own_origins)
        self._own = False
        self._relations: dict[int, tuple[Relation, _Columns]] = {}

    def decode(self, payload: memoryview | bytes) -> Sequence[Message]:
        """The messages that one payload holds: none or one. Raises ProtocolError, and nothing else."""
        try:
            if self._own and payload[0] in (0x49, 0x55):
                return _OWN
            message, end = self._message(payload)
        except (error, IndexError, UnicodeDecodeError) as cause:
            raise ProtocolError(f"a pgoutput message of {len(payload)} bytes is cut short or damaged") from cause
        if end != len(payload):
            raise ProtocolError(f"a pgoutput message of {len(payload)} bytes ends after {end}")
        return () if message is None else (message,)

    def _message(self, data: memoryview | bytes) -> tuple[Message | None, int]:
        """The message, and where in `data` it ends."""
        match data[0]:
            case 0x49:  # I
                return self._insert(data)
            case 0x55:  # U
                return self._update(data)
            case 0x42:  # B
                commit_lsn, microseconds, xid = _BEGIN.unpack_from(data)
                return Begin(xid, LSN(commit_lsn), microseconds / 1e6 + POSTGRES_EPOCH), _BEGIN.size
            case 0x43:  # C
                self._own = False
                _, commit_lsn, end_lsn, _ = _COMMIT.unpack_from(data)
                return Commit(LSN(commit_lsn), LSN(end_lsn)), _COMMIT.size
            case 0x52:  # R
                return self._relation(data)
            case 0x4F:  # O
                _ORIGIN.unpack_from(data)
                name, end = _string(data, _ORIGIN.size, self._codec)
                self._own = name in self._own_origins
                return Origin(name=name), end
            case 0x44:  # D
                return self._delete(data)
            case 0x54:  # T
                return self._truncate(data)
            case 0x4D:  # M
                return _logical_message(data, self._codec)
            case 0x59:  # Y: names a type; keys travel as text, so nobody needs it
                _, end = _string(data, _string(data, 5, self._codec)[1], self._codec)
                return None, end
            case kind:
                raise ProtocolError(
                    f"pgoutput sent a message of an unknown kind ({chr(kind)!r})",
                    hint="it belongs to a newer protocol than was asked for; skipping it could lose rows",
                )

    def _insert(self, data: memoryview | bytes) -> tuple[Message, int]:
        relation, columns = self._described(_INT32(data, 1)[0])
        _expect(data, 5, 0x4E)  # N
        values, end = _tuple(data, 6, columns, self._codec)
        return Insert(relation, values), end

    def _update(self, data: memoryview | bytes) -> tuple[Message, int]:
        relation, columns = self._described(_INT32(data, 1)[0])
        identity: Values = {}
        at = 5
        if data[5] == 0x4B:  # K: old key
            identity, at = _tuple(data, 6, _key_only(relation, columns), self._codec)
        elif data[5] == 0x4F:  # O: old row, under REPLICA IDENTITY FULL
            identity, at = _tuple(data, 6, columns, self._codec)
        _expect(data, at, 0x4E)  # N
        values, end = _tuple(data, at + 1, columns, self._codec)
        return Update(relation, values, identity), end

    def _delete(self, data: memoryview | bytes) -> tuple[Message, int]:
        relation, columns = self._described(_INT32(data, 1)[0])
        if data[5] == 0x4B:  # K
            columns = _key_only(relation, columns)
        else:
            _expect(data, 5, 0x4F)  # O
        identity, end = _tuple(data, 6, columns, self._codec)
        return Delete(relation, identity), end

    def _truncate(self, data: memoryview | bytes) -> tuple[Message, int]:
        (count,) = _INT32(data, 1)
        end = 6 + 4 * count
        if end != len(data):
            raise ProtocolError(f"a truncate of {count} relations has {len(data)} bytes")
        return Truncate(tuple(self._described(_INT32(data, at)[0])[0] for at in range(6, end, 4))), end

    def _relation(self, data: memoryview | bytes) -> tuple[Message, int]:
        (oid,) = _INT32(data, 1)
        schema, at = _string(data, 5, self._codec)
        name, at = _string(data, at, self._codec)
        identity = chr(data[at])
        (count,) = _INT16(data, at + 1)
        at += 3
        columns: list[str] = []
        key: list[str] = []
        readers: list[Binary | None] = []
        for _ in range(count):
            in_key = data[at] & 1
            column, at = _string(data, at + 1, self._codec)
            (type_oid, _) = _COLUMN_TYPE.unpack_from(data, at)
            at += _COLUMN_TYPE.size
            columns.append(column)
            readers.append(_BINARY.get(type_oid))
            if in_key:
                key.append(column)
        if at != len(data):
            raise ProtocolError(f"a relation of {count} columns ends after {at} of {len(data)} bytes")
        relation = Relation(schema or "pg_catalog", name, oid, identity, tuple(columns), tuple(key))
        self._relations[oid] = (relation, tuple(zip(columns, readers, strict=True)))
        return relation, at

    def _described(self, oid: int) -> tuple[Relation, _Columns]:
        try:
            return self._relations[oid]
        except KeyError:
            raise ProtocolError(f"a change of relation {oid} arrived before its description") from None


def _key_only(relation: Relation, columns: _Columns) -> _Columns:
    """In an old key, every other column says NULL without being NULL: those must not be taken for values."""
    return tuple((name if name in relation.key_columns else None, reader) for name, reader in columns)


def _tuple(data: memoryview | bytes, at: int, columns: _Columns, codec: str) -> tuple[dict[str, str | None], int]:
    """The values of the columns that have a name here, and where the tuple ends (past the data, if that was cut)."""
    (count,) = _INT16(data, at)
    if count != len(columns):
        raise ProtocolError(f"a row has {count} columns where its relation has {len(columns)}")
    at += 2
    values: dict[str, str | None] = {}
    for name, reader in columns:
        kind = data[at]
        at += 1
        if kind == 0x62 or kind == 0x74:  # b: binary, t: text
            end = at + 4 + _INT32(data, at)[0]
            read = reader if kind == 0x62 else _text
            if name is not None and read is not None and end - at <= LONGEST_KEY:
                values[name] = read(data[at + 4 : end], codec)
            at = end
        elif kind == 0x6E:  # n: NULL
            if name is not None:
                values[name] = None
        elif kind != 0x75:  # u: unchanged TOAST, not sent
            raise ProtocolError(f"a column value of an unknown kind ({chr(kind)!r})")
    return values, at


def _logical_message(data: memoryview | bytes, codec: str) -> tuple[Message, int]:
    flags, lsn = _MESSAGE.unpack_from(data)
    prefix, at = _string(data, _MESSAGE.size, codec)
    (length,) = _INT32(data, at)
    end = at + 4 + length
    return LogicalMessage(bool(flags & 1), LSN(lsn), prefix, bytes(data[at + 4 : end])), end


def _expect(data: memoryview | bytes, at: int, kind: int) -> None:
    if data[at] != kind:
        raise ProtocolError(f"a row starts with {chr(data[at])!r} instead of {chr(kind)!r}")


def _string(data: memoryview | bytes, at: int, codec: str) -> tuple[str, int]:
    """A NUL-terminated string, and where the next field starts."""
    end = bytes(data[at:]).find(0)
    if end < 0:
        raise IndexError("a string without its end")
    return str(data[at : at + end], codec), at + end + 1
