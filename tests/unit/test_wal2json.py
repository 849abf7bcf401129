"""The wal2json decoder, on the bytes that PostgreSQL 15 sent."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_embedder.errors import Misconfigured, NotCarried, ProtocolError
from cdc_embedder.lsn import LSN
from cdc_embedder.wal.messages import Begin, Commit, Insert, LogicalMessage, Message, Origin, Relation, Truncate, Update
from cdc_embedder.wal.wal2json import Wal2JsonDecoder, options
from tests.capture import CHANGES, described, meaning, payloads

CAPTURE = "capture-wal2json-15"


def change(action: str, columns: str, **more: Any) -> bytes:
    members = {"action": action, "lsn": "0/10", "schema": "s", "table": "t", "pk": [{"name": "id", "type": "x"}]} | more
    return (json.dumps(members, ensure_ascii=False)[:-1] + f', "columns": [{columns}]}}').encode()


def column(value: str, type_: str = "text", name: str = "id") -> str:
    return f'{{"name": "{name}", "type": "{type_}", "value": {value}}}'


def decoded(decoder: Wal2JsonDecoder | None = None) -> list[Message]:
    decoder = decoder or Wal2JsonDecoder()
    return [message for payload in payloads(CAPTURE) for message in decoder.decode(payload)]


def test_the_workload_is_told_as_it_happened() -> None:
    assert meaning(decoded()) == CHANGES


def test_memoryviews_decode_as_bytes_do() -> None:
    decoder = Wal2JsonDecoder()
    assert [m for p in payloads(CAPTURE) for m in decoder.decode(memoryview(p))] == decoded()


def test_a_message_cut_at_any_byte_is_a_protocol_error() -> None:
    decoder = Wal2JsonDecoder()
    for payload in payloads(CAPTURE):
        for size in range(len(payload)):
            with pytest.raises(ProtocolError):
                decoder.decode(payload[:size])
        decoder.decode(payload)


@given(data=st.data())
def test_a_damaged_message_raises_nothing_but_a_protocol_error(data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(payloads(CAPTURE))))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(len(damaged), 200) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        Wal2JsonDecoder().decode(bytes(damaged))


@pytest.mark.parametrize(
    "members", ["[]", "{}", "null", '{"action":1}', '{"action":"I"}', '{"action":"B"}', "[" * 5000]
)
def test_json_of_another_shape_is_a_protocol_error(members: str) -> None:
    with pytest.raises(ProtocolError):
        Wal2JsonDecoder().decode(members.encode())


def test_an_unknown_action_stops_the_stream() -> None:
    with pytest.raises(ProtocolError, match="unknown kind"):
        Wal2JsonDecoder().decode(b'{"action":"X","lsn":"0/1"}')


def test_commits_carry_the_end_of_their_transaction() -> None:
    commits = [m for m in decoded() if isinstance(m, Commit)]
    assert [m.commit_lsn for m in decoded() if isinstance(m, Begin)] == [m.commit_lsn for m in commits]
    assert all(m.end_lsn > m.commit_lsn for m in commits)
    assert all(type(m.end_lsn) is LSN for m in commits)


def test_an_origin_is_told_by_number_after_its_begin() -> None:
    messages = decoded()
    at = messages.index(Origin(id=described(CAPTURE)["origin_id"]))
    assert isinstance(messages[at - 1], Begin)
    assert meaning(messages[at + 1 :])[0][2]["id"] == "10"
    assert sum(isinstance(m, Origin) for m in messages) == 1, "origin 0 is none"


def test_a_transaction_without_an_end_cannot_be_confirmed() -> None:
    with pytest.raises(ProtocolError, match="no lsn"):
        Wal2JsonDecoder().decode(b'{"action":"C","xid":1}')


@pytest.mark.parametrize(
    ("value", "type_", "text"),
    [
        ("9007199254740993", "bigint", "9007199254740993"),
        ("1.1000", "numeric", "1.1000"),
        ("-0.00", "numeric", "-0.00"),
        ("1e+100", "double precision", "1e+100"),
        ("123456789012345678901234567890.123456789", "numeric", "123456789012345678901234567890.123456789"),
        ("true", "boolean", "t"),
        ("false", "boolean", "f"),
        ('"true"', "text", "true"),
        ('""', "text", ""),
        ('"null"', "text", "null"),
        ('"dead"', "bytea", "\\xdead"),
        ('""', "bytea", "\\x"),
        (r'"\\xdead"', "my_bytes", "\\xdead"),
        (r'"a\"b\\c\u0007 é"', "text", 'a"b\\c\x07 é'),
    ],
)
def test_a_value_keeps_every_character(value: str, type_: str, text: str) -> None:
    (insert,) = Wal2JsonDecoder().decode(change("I", column(value, type_)))
    assert insert == Insert(Relation("s", "t", key_columns=("id",)), {"id": text})


def test_null_not_sent_and_empty_are_three_things() -> None:
    columns = ", ".join([column("1"), column("null", name="a"), column('""', name="b")])
    (update,) = Wal2JsonDecoder().decode(change("U", columns, identity=[{"name": "id", "type": "x", "value": 2}]))
    assert isinstance(update, Update)
    assert update.values == {"id": "1", "a": None, "b": ""}
    assert update.identity == {"id": "2"}


@pytest.mark.parametrize("action", "IU")
def test_a_key_that_json_cannot_carry_is_an_error_that_names_the_other_plugin(action: str) -> None:
    with pytest.raises(ProtocolError) as raised:
        Wal2JsonDecoder().decode(change(action, column("null", "double precision")))
    assert "pgoutput" in raised.value.hint


def test_a_new_primary_key_is_noticed() -> None:
    decoder = Wal2JsonDecoder()
    columns = f"{column('1')}, {column('2', name='other')}"
    (before,) = decoder.decode(change("I", columns))
    (after,) = decoder.decode(change("I", columns, pk=[{"name": "other", "type": "x"}]))
    assert isinstance(before, Insert)
    assert isinstance(after, Insert)
    assert (before.relation.key_columns, after.relation.key_columns) == (("id",), ("other",))


@pytest.mark.parametrize(("encoding", "codec"), [("UTF8", "utf-8"), ("LATIN1", "latin-1"), ("EUC_JP", "euc_jp")])
def test_the_bytes_are_in_the_servers_encoding(encoding: str, codec: str) -> None:
    text = "日本語" if codec == "euc_jp" else "é"
    payload = change("I", column(f'"{text}"')).decode().encode(codec)
    (insert,) = Wal2JsonDecoder(encoding).decode(payload)
    assert isinstance(insert, Insert)
    assert insert.values == {"id": text}


def test_an_encoding_that_cannot_be_read_is_refused_at_once() -> None:
    with pytest.raises(Misconfigured, match="MULE_INTERNAL"):
        Wal2JsonDecoder("MULE_INTERNAL")


def test_a_value_that_is_no_text_is_a_protocol_error_that_does_not_show_it() -> None:
    with pytest.raises(ProtocolError) as raised:
        Wal2JsonDecoder().decode(change("I", column('"secretX"')).replace(b"X", b"\xff"))
    assert "secret" not in raised.value.sentence


def test_a_value_that_is_no_text_in_the_servers_encoding_asks_for_the_other_plugin() -> None:
    payload = change("I", column('"secretX"')).replace(b"X", b"\x81")
    with pytest.raises(NotCarried) as raised:
        Wal2JsonDecoder("WIN1252").decode(payload)
    assert "secret" not in raised.value.sentence


def test_a_message_and_a_truncate_are_told() -> None:
    payload = b'{"action":"M","xid":null,"lsn":"0/10","transactional":false,"prefix":"p","content":"c"}'
    assert Wal2JsonDecoder().decode(payload) == (LogicalMessage(False, LSN(16), "p", b"c"),)
    assert Wal2JsonDecoder().decode(change("T", "")) == (Truncate((Relation("s", "t", key_columns=("id",)),)),)


def test_tables_are_listed_with_every_special_character_escaped() -> None:
    chosen = options([("public", "doc"), ("a b", 'c,d.e*f\\g"é')])
    assert chosen["add-tables"] == r"public.doc,a\ b.c\,d\.e\*f\\g\"é"
    assert "filter-tables" not in chosen
    assert chosen["actions"] == "insert,update"


def test_no_tables_means_nothing_and_not_everything() -> None:
    chosen = options([])
    assert "add-tables" not in chosen
    assert chosen["filter-tables"] == "*.*"


def test_origins_are_filtered_by_number() -> None:
    assert options([], filter_origins=[3, 4])["filter-origins"] == "3,4"
    assert "filter-origins" not in options([])
    with pytest.raises(ValueError, match="invalid literal"):
        options([], filter_origins=["name"])  # type: ignore[list-item]
