"""The pgoutput decoder, on the bytes that PostgreSQL 15 and 18 sent."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_embedder.errors import ProtocolError
from cdc_embedder.lsn import LSN
from cdc_embedder.wal.messages import Begin, Commit, Insert, Message, Origin, Relation, Skipped, Update
from cdc_embedder.wal.pgoutput import LONGEST_KEY, PgOutputDecoder, options
from tests.capture import CHANGES, ODD, meaning, payloads

CAPTURES = ["capture-pgoutput-15", "capture-pgoutput-18"]

NAME = ODD[1]
TABLE = Relation("public", "t", 7, "d", ("id", "body", "note"), ("id",))
RELATION = b"R\0\0\0\7public\0t\0d\0\3" + b"".join(
    bytes([flag]) + name + b"\0\0\0\0\x19\xff\xff\xff\xff" for flag, name in [(1, b"id"), (0, b"body"), (0, b"note")]
)


def row(*values: bytes | None) -> bytes:
    return struct.pack("!H", len(values)) + b"".join(
        b"n" if value is None else b"u" if value == b"unchanged" else b"t" + struct.pack("!I", len(value)) + value
        for value in values
    )


def decoded(stem: str, decoder: PgOutputDecoder | None = None) -> list[Message]:
    decoder = decoder or PgOutputDecoder()
    return [message for payload in payloads(stem) for message in decoder.decode(payload)]


@pytest.mark.parametrize("stem", CAPTURES)
def test_the_workload_is_told_as_it_happened(stem: str) -> None:
    assert meaning(decoded(stem)) == CHANGES


@pytest.mark.parametrize("stem", CAPTURES)
def test_memoryviews_decode_as_bytes_do(stem: str) -> None:
    decoder = PgOutputDecoder()
    assert [m for p in payloads(stem) for m in decoder.decode(memoryview(p))] == decoded(stem)


@pytest.mark.parametrize("stem", CAPTURES)
def test_a_message_cut_at_any_byte_is_a_protocol_error(stem: str) -> None:
    decoder = PgOutputDecoder()
    for payload in payloads(stem):
        for size in range(len(payload)):
            with pytest.raises(ProtocolError):
                decoder.decode(payload[:size])
        decoder.decode(payload)


@pytest.mark.parametrize("stem", CAPTURES)
def test_a_message_with_a_byte_too_many_is_a_protocol_error(stem: str) -> None:
    decoder = PgOutputDecoder()
    for payload in payloads(stem):
        with pytest.raises(ProtocolError):
            decoder.decode(payload + b"\0")
        decoder.decode(payload)


@given(data=st.data())
def test_a_damaged_message_raises_nothing_but_a_protocol_error(data: st.DataObject) -> None:
    messages = payloads(CAPTURES[0])
    number = data.draw(st.integers(0, len(messages) - 1))
    damaged = bytearray(messages[number])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(len(damaged), 200) - 1))] = data.draw(st.integers(0, 255))
    decoder = PgOutputDecoder()
    for payload in messages[:number]:
        decoder.decode(payload)
    with contextlib.suppress(ProtocolError):
        decoder.decode(bytes(damaged))


@pytest.mark.parametrize("stem", CAPTURES)
def test_commits_carry_the_end_of_their_transaction(stem: str) -> None:
    messages = decoded(stem)
    begins = [m for m in messages if isinstance(m, Begin)]
    commits = [m for m in messages if isinstance(m, Commit)]
    assert [b.commit_lsn for b in begins] == [c.commit_lsn for c in commits]
    assert all(c.end_lsn > c.commit_lsn for c in commits)
    assert sorted(c.end_lsn for c in commits) == [c.end_lsn for c in commits]
    assert all(type(c.end_lsn) is LSN for c in commits)


@pytest.mark.parametrize("stem", CAPTURES)
def test_a_relation_is_described_with_its_key_and_identity(stem: str) -> None:
    described = {m.name: m for m in decoded(stem) if isinstance(m, Relation)}
    assert described[NAME].schema == "Odd, schema"
    assert described[NAME].columns == ("Key, 1", 'bo"dy')
    assert described["by_index"].key_columns == ("code",)
    assert described["doc"].key_columns == ("id",)
    assert {name: described[name].replica_identity for name in ("doc", "whole", "by_index")} == {
        "doc": "d",
        "whole": "f",
        "by_index": "i",
    }
    assert described["composite"].columns == ("tenant", "Doc Id", "words"), "the latest description counts"


@pytest.mark.parametrize("stem", CAPTURES)
def test_an_origin_is_told_by_name_inside_its_transaction(stem: str) -> None:
    messages = decoded(stem)
    at = messages.index(Origin(name="capture_origin"))
    assert isinstance(messages[at - 1], Begin)
    assert meaning(messages[at + 1 :])[0][2]["id"] == "10"


def test_null_unchanged_and_empty_are_three_things() -> None:
    decoder = PgOutputDecoder()
    decoder.decode(RELATION)
    (update,) = decoder.decode(b"U\0\0\0\7N" + row(b"1", None, b"unchanged"))
    assert update == Update(TABLE, {"id": "1", "body": None}, {})
    (update,) = decoder.decode(b"U\0\0\0\7N" + row(b"1", b"", b"unchanged"))
    assert update == Update(TABLE, {"id": "1", "body": ""}, {})


def test_an_old_key_holds_the_key_and_no_false_nulls() -> None:
    decoder = PgOutputDecoder()
    decoder.decode(RELATION)
    (update,) = decoder.decode(b"U\0\0\0\7K" + row(b"1", None, None) + b"N" + row(b"2", b"x", None))
    assert update == Update(TABLE, {"id": "2", "body": "x", "note": None}, {"id": "1"})


def test_an_unchanged_key_column_is_found_in_the_old_row() -> None:
    decoder = PgOutputDecoder()
    decoder.decode(RELATION)
    (update,) = decoder.decode(b"U\0\0\0\7O" + row(b"1", b"a", None) + b"N" + row(b"unchanged", b"b", None))
    assert update == Update(TABLE, {"body": "b", "note": None}, {"id": "1", "body": "a", "note": None})


@pytest.mark.parametrize("kind", b"KPprbScEAXz\0\xff")
def test_an_unknown_message_stops_the_stream(kind: int) -> None:
    with pytest.raises(ProtocolError, match="unknown kind"):
        PgOutputDecoder().decode(bytes([kind]) + b"\0" * 40)


def test_a_change_of_a_relation_that_was_never_described_stops_the_stream() -> None:
    with pytest.raises(ProtocolError, match="before its description"):
        PgOutputDecoder().decode(b"I\0\0\0\7N" + row(b"1", None, None))


def test_a_row_that_does_not_fit_its_relation_stops_the_stream() -> None:
    decoder = PgOutputDecoder()
    decoder.decode(RELATION)
    with pytest.raises(ProtocolError, match="2 columns"):
        decoder.decode(b"I\0\0\0\7N" + row(b"1", None))


def binary(*values: bytes | None) -> bytes:
    return row(*values).replace(b"t\0", b"b\0")


@pytest.mark.parametrize(
    ("type_oid", "sent", "text"),
    [
        (21, b"\x80\0", "-32768"),
        (23, b"\xff\xff\xff\xff", "-1"),
        (20, b"\x7f" + b"\xff" * 7, "9223372036854775807"),
        (2950, bytes(range(240, 256)), "f0f1f2f3-f4f5-f6f7-f8f9-fafbfcfdfeff"),
        (25, "é☃".encode(), "é☃"),
        (1043, b"", ""),
        (19, b"name", "name"),
    ],
)
def test_a_binary_key_is_read_as_the_server_prints_it(type_oid: int, sent: bytes, text: str) -> None:
    decoder = PgOutputDecoder()
    decoder.decode(RELATION.replace(b"\0\0\0\x19", struct.pack("!I", type_oid), 1))
    (update,) = decoder.decode(b"U\0\0\0\7K" + binary(sent, None, None) + b"N" + binary(sent, b"body", None))
    assert update == Update(
        Relation("public", "t", 7, "d", ("id", "body", "note"), ("id",)),
        {"id": text, "body": "body", "note": None},
        {"id": text},
    )


def test_a_binary_value_of_another_type_is_passed_over_and_nothing_else() -> None:
    decoder = PgOutputDecoder()
    decoder.decode(RELATION.replace(b"\0\0\0\x19", struct.pack("!I", 1700), 1))
    (insert,) = decoder.decode(b"I\0\0\0\7N" + binary(b"whatever", b"body", None))
    assert insert == Insert(TABLE, {"body": "body", "note": None})
    (insert,) = decoder.decode(b"I\0\0\0\7N" + row(b"1.5", b"body", None))
    assert insert == Insert(TABLE, {"id": "1.5", "body": "body", "note": None}), "a type without a binary form"


def test_what_a_transaction_of_our_own_origin_changed_is_counted_and_not_read() -> None:
    decoder = PgOutputDecoder(own_origins=["ours"])
    begin, end = b"B" + bytes(20), b"C" + bytes(25)
    changes = [RELATION, b"I\0\0\0\7N" + row(b"1", b"", b""), b"U\0\0\0\7N" + row(b"1", b"", b"")]
    for origin in (b"O" + bytes(8) + b"theirs\0", b"O" + bytes(8) + b"ours\0", None):
        told = [decoder.decode(payload) for payload in (begin, *([origin] if origin else []), *changes, end)]
        kinds = [type(message) for (message,) in told]
        read = [Skipped, Skipped] if origin and b"ours" in origin else [Insert, Update]
        assert kinds == [Begin, *([Origin] if origin else []), Relation, *read, Commit]


def test_a_value_that_is_no_text_stops_nothing_and_can_be_told_from_one_that_is() -> None:
    decoder = PgOutputDecoder()
    decoder.decode(RELATION)
    (insert,) = decoder.decode(b"I\0\0\0\7N" + row(b"1", b"no text\xff", None))
    assert isinstance(insert, Insert)
    assert "no text\udcff" in insert.values.values()


def test_values_are_in_the_servers_encoding() -> None:
    decoder = PgOutputDecoder(server_encoding="LATIN1")
    decoder.decode(RELATION)
    (insert,) = decoder.decode(b"I\0\0\0\7N" + row(b"1", "é".encode("latin-1"), None))
    assert isinstance(insert, Insert)
    assert "é" in insert.values.values()


def test_a_value_that_is_too_long_for_a_key_is_passed_over() -> None:
    decoder = PgOutputDecoder()
    decoder.decode(RELATION)
    (insert,) = decoder.decode(b"I\0\0\0\7N" + row(b"1", b"x" * (LONGEST_KEY + 1), None))
    assert isinstance(insert, Insert)
    assert max(len(value or "") for value in insert.values.values()) == 1


def test_a_publication_name_is_quoted_as_an_identifier() -> None:
    assert options('My "Pub", 2') == {"proto_version": "1", "publication_names": '"My ""Pub"", 2"'}
    assert options("p", messages=True)["messages"] == "true"
