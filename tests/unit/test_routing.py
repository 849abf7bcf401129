"""From messages to waiting lists: keys, origins, transactions that arrive in parts, and keys that cannot be told."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_embedder.errors import ProtocolError
from cdc_embedder.lsn import LSN
from cdc_embedder.pending import Entry, Key, Pending, Work
from cdc_embedder.routing import Route, Router
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
    Values,
)
from cdc_embedder.watermark import Watermark

DOCUMENT = Relation("public", "document", oid=100)
DOCUMENT_BY_NAME = Relation("public", "document")
OTHER = Relation("public", "other", oid=200)


class Stream:
    """One connection with a watermark, a router, and a column of the table `document` with the key `id`."""

    def __init__(self, *, key: tuple[str, ...] = ("id",), own: Iterable[str | int] = ()) -> None:
        self.watermark = Watermark()
        self.router = Router(self.watermark, own)
        self.route = self.another(key)
        self.router.serve([self.route])
        self.end = 0

    def another(self, key: tuple[str, ...]) -> Route:
        return Route(100, frozenset({("public", "document")}), key, Pending(self.watermark))

    def feed(self, *messages: Message) -> None:
        self.router.route(messages, now=1.0)

    def transaction(self, *messages: Message, xid: int = 7) -> None:
        self.end += 10
        self.feed(Begin(xid, LSN(self.end - 1)), *messages, Commit(LSN(self.end - 1), LSN(self.end)))

    def take(self) -> list[Entry]:
        return self.route.pending.take(Work.LIVE, 100, 1.0)

    @property
    def keys(self) -> list[Key]:
        return [entry.key for entry in self.take()]


def update(values: Values, identity: Values | None = None, relation: Relation = DOCUMENT) -> Update:
    return Update(relation, values, identity or {})


def insert(key: str, relation: Relation = DOCUMENT) -> Insert:
    return Insert(relation, {"id": key, "body": "text"})


@pytest.mark.parametrize("relation", [DOCUMENT, DOCUMENT_BY_NAME])
def test_inserts_and_updates_wait_under_their_key_with_the_transactions_xid(relation: Relation) -> None:
    stream = Stream()
    stream.transaction(insert("1", relation), update({"id": "2"}, relation=relation), xid=861)
    assert [(entry.key, entry.reason.xid) for entry in stream.take()] == [(("1",), 861), (("2",), 861)]
    assert (stream.router.changes, stream.watermark.flushed) == (2, 0)


@pytest.mark.parametrize(
    "message",
    [
        insert("1", OTHER),
        insert("1", Relation("public", "document", oid=200)),
        insert("1", Relation("other", "document")),
        Delete(DOCUMENT, {"id": "1"}),
        Truncate((DOCUMENT,)),
        LogicalMessage(True, LSN(5), "prefix", b"content"),
    ],
)
def test_what_asks_for_no_vector_lets_the_watermark_pass(message: Message) -> None:
    stream = Stream()
    stream.transaction(message)
    assert (stream.keys, stream.router.changes, stream.watermark.flushed) == ([], 0, 10)


@pytest.mark.parametrize(
    ("values", "identity", "key"),
    [
        ({"a": "1", "b": "2"}, {}, ("1", "2")),
        ({"a": "1", "b": "2"}, {"a": "8", "b": "9"}, ("1", "2")),
        ({"a": "1"}, {"a": "8", "b": "9"}, ("1", "9")),
        ({}, {"a": "8", "b": "9"}, ("8", "9")),
        ({"a": "", "b": "2"}, {"a": "8", "b": "9"}, ("", "2")),
    ],
)
def test_the_key_is_the_new_rows_and_what_was_not_sent_is_taken_from_the_old_identity(
    values: Values, identity: Values, key: Key
) -> None:
    stream = Stream(key=("a", "b"))
    stream.transaction(update(values, identity))
    assert stream.keys == [key]


@pytest.mark.parametrize("message", [update({"a": "1"}), update({"a": "1", "b": None}), Insert(DOCUMENT, {"b": "2"})])
def test_a_key_that_cannot_be_told_holds_the_watermark_until_a_scan_stands_for_it(message: Message) -> None:
    stream = Stream(key=("a", "b"))
    stream.transaction(message)
    stream.transaction()
    assert (stream.keys, stream.watermark.flushed, len(stream.route.missed)) == ([], 0, 1)
    stream.watermark.release(stream.route.missed[0])
    assert stream.watermark.flushed == 20


def test_an_insert_never_takes_its_key_from_elsewhere() -> None:
    stream = Stream(key=("a",))
    stream.transaction(update({"a": "1"}, {"a": "1"}), Insert(DOCUMENT, {"b": "2"}))
    assert (stream.keys, len(stream.route.missed)) == ([("1",)], 1)


@pytest.mark.parametrize("origin", [Origin(name="cdc_embedder_1"), Origin(id=3)])
def test_what_carries_our_own_origin_is_passed_over(origin: Origin) -> None:
    stream = Stream(own=("cdc_embedder_1", 3))
    stream.transaction(origin, insert("1"))
    assert (stream.keys, stream.watermark.flushed) == ([], 10)


@pytest.mark.parametrize("origin", [Origin(name="subscription"), Origin(id=4), Origin()])
def test_what_another_origin_brought_is_work(origin: Origin) -> None:
    stream = Stream(own=("cdc_embedder_1", 3))
    stream.transaction(origin, insert("1"))
    assert stream.keys == [("1",)]


def test_our_origin_ends_with_its_transaction() -> None:
    stream = Stream(own=(3,))
    stream.transaction(Origin(id=3), insert("1"))
    stream.transaction(insert("2"))
    assert stream.keys == [("2",)]


def test_another_origin_inside_the_transaction_ends_ours() -> None:
    stream = Stream(own=(3,))
    stream.transaction(Origin(id=3), insert("1"), Origin(id=4), insert("2"))
    assert (stream.keys, stream.router.echoes, stream.router.changes) == ([("2",)], 1, 1)


def test_without_origins_of_our_own_our_writes_are_heard() -> None:
    stream = Stream()
    stream.transaction(Origin(name="cdc_embedder_1"), insert("1"))
    assert stream.keys == [("1",)]


def test_a_transaction_that_is_only_half_read_can_be_worked_on_and_is_not_confirmed() -> None:
    stream = Stream()
    stream.feed(Begin(7, LSN(9)), insert("1"))
    stream.route.pending.finish(stream.take())
    stream.watermark.idle(LSN(5))
    assert stream.watermark.flushed == 0
    stream.feed(insert("2"))
    [second] = stream.take()
    assert second.reason.xid == 7
    stream.feed(Commit(LSN(9), LSN(10)))
    assert stream.watermark.flushed == 0
    stream.route.pending.finish([second])
    assert stream.watermark.flushed == 10


def test_a_row_that_fills_two_columns_holds_the_watermark_for_both() -> None:
    stream = Stream()
    other = stream.another(("id",))
    stream.router.serve([stream.route, other])
    stream.transaction(insert("1"))
    stream.route.pending.finish(stream.take())
    assert stream.watermark.flushed == 0
    other.pending.finish(other.pending.take(Work.LIVE, 1, 1.0))
    assert (stream.watermark.flushed, stream.router.changes) == (10, 2)


@pytest.mark.parametrize("relation", [DOCUMENT, DOCUMENT_BY_NAME])
def test_a_table_that_is_served_no_more_is_passed_over(relation: Relation) -> None:
    stream = Stream()
    stream.router.serve([])
    stream.transaction(insert("1", relation))
    assert (stream.keys, stream.watermark.flushed) == ([], 10)


def test_a_relation_without_identity_is_noted() -> None:
    stream = Stream()
    for letter, oid in (("d", 1), ("f", 2), ("n", 3), ("i", 4), ("n", None), (None, 5)):
        stream.feed(Relation("public", "t", oid=oid, replica_identity=letter))
    assert stream.router.unusable == {3}


def test_a_change_outside_of_a_transaction_is_refused() -> None:
    stream = Stream()
    stream.transaction()
    with pytest.raises(ProtocolError, match="outside of a transaction"):
        stream.feed(insert("1"))


def test_a_commit_without_its_transaction_is_refused() -> None:
    stream = Stream()
    with pytest.raises(ProtocolError, match="without its transaction"):
        stream.feed(Commit(LSN(9), LSN(10)))


CHANGES = st.one_of(
    st.sampled_from("123").map(insert),
    st.sampled_from("123").map(lambda key: insert(key, DOCUMENT_BY_NAME)),
    st.just(insert("1", OTHER)),
    st.just(Delete(DOCUMENT, {"id": "1"})),
    st.sampled_from([Origin(id=3), Origin(id=4)]),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(CHANGES, max_size=6), max_size=6), st.integers(1, 7))
def test_however_the_messages_are_cut_the_same_keys_wait(transactions: list[list[Message]], size: int) -> None:
    whole, cut = Stream(own=(3,)), Stream(own=(3,))
    messages: list[Message] = []
    for number, changes in enumerate(transactions, 1):
        whole.transaction(*changes, xid=number)
        messages += [Begin(number, LSN(0)), *changes, Commit(LSN(0), LSN(number * 10))]
    for at in range(0, len(messages), size):
        cut.feed(*messages[at : at + size])
    found = [[(entry.key, entry.reason.xid) for entry in stream.take()] for stream in (whole, cut)]
    assert found[0] == found[1]
    assert (whole.watermark.flushed, whole.router.changes) == (cut.watermark.flushed, cut.router.changes)
