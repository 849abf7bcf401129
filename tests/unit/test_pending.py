"""Rules 1 and 3 together: waiting keys and the watermark they hold, against a model that keeps everything.

The model remembers every commit, and for each key every request that no finished judgement has covered yet. From these
it tells afresh after every step what may be confirmed, what waits in which order, and which xid decides. Plain examples
of what an operator would ask about follow below it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from cdc_embedder.lsn import LSN
from cdc_embedder.pending import Entry, Key, Pending, Work
from cdc_embedder.watermark import Position, Watermark

COLUMNS = st.integers(0, 1)
KEYS = st.sampled_from([("1",), ("1",), ("2",), ("3",)])  # most of what can go wrong needs one key again and again
WORK = st.sampled_from(Work)
XIDS = st.integers(1, 9)


@dataclass(eq=False)
class Transaction:
    position: Position
    end: LSN | None = None


@dataclass(eq=False)
class Request:
    """A wish to have a key judged. `covered`: it was there when the key was taken, so that judgement answers it."""

    at: float
    transaction: Transaction | None = None
    xid: int | None = None
    covered: bool = False


@dataclass(eq=False)
class Asked:
    """A key with requests. It is in flight, delayed until a time, or queued with a number of its own."""

    work: Work
    queued: int
    requests: list[Request] = field(default_factory=list)
    in_flight: bool = False
    until: tuple[float, int] | None = None
    tries: int = 0

    @property
    def waits(self) -> bool:
        return not self.in_flight and self.until is None

    @property
    def xid(self) -> int | None:
        return next((request.xid for request in reversed(self.requests) if request.xid is not None), None)


class Waiting(RuleBasedStateMachine):
    """Two columns on one stream."""

    taken = Bundle("taken")

    @initialize()
    def connect(self) -> None:
        self.now = 0.0
        self.wal = 0
        self.numbers = 0
        self.watermark = Watermark()
        self.columns = (Pending(self.watermark), Pending(self.watermark))
        self.transactions: list[Transaction] = []
        self.flushed = 0
        self.asked: tuple[dict[Key, Asked], dict[Key, Asked]] = ({}, {})
        self.owners: dict[Entry, tuple[int, Asked]] = {}

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def confirm(self) -> None:
        """The model's watermark: passed are the commits before the first that is open or has a request left."""
        left = {r.transaction for asked in self.asked for one in asked.values() for r in one.requests}
        while self.transactions and self.transactions[0].end is not None and self.transactions[0] not in left:
            self.flushed = max(self.flushed, self.transactions.pop(0).end or 0)

    @property
    def open(self) -> Transaction | None:
        last = self.transactions[-1] if self.transactions else None
        return last if last is not None and last.end is None else None

    @rule(column=COLUMNS, key=KEYS, xid=XIDS)
    def change(self, column: int, key: Key, xid: int) -> None:
        transaction = self.open
        if transaction is None:
            transaction = Transaction(self.watermark.begin())
            self.transactions.append(transaction)
        self.columns[column].change(key, transaction.position, xid, self.now)
        one = self.asked[column].get(key)
        if one is None:
            one = self.asked[column][key] = Asked(Work.LIVE, self.number())
        elif one.work is not Work.LIVE:
            one.work, one.queued = Work.LIVE, self.number()
        one.requests.append(Request(self.now, transaction, xid))

    @rule()
    def commit(self) -> None:
        transaction = self.open
        if transaction is None:
            transaction = Transaction(self.watermark.begin())
            self.transactions.append(transaction)
        self.wal += 10
        transaction.end = LSN(self.wal)
        self.watermark.commit(transaction.position, LSN(self.wal))
        self.confirm()

    @rule(step=st.integers(-5, 5))
    def keepalive(self, step: int) -> None:
        self.wal += abs(step)
        server_end = max(0, self.wal + min(0, step))
        self.watermark.idle(LSN(server_end))
        if not self.transactions:
            self.flushed = max(self.flushed, server_end)

    @rule(column=COLUMNS, key=KEYS, work=WORK)
    def want(self, column: int, key: Key, work: Work) -> None:
        self.columns[column].want(key, work, self.now)
        one = self.asked[column].get(key)
        if one is None:
            one = self.asked[column][key] = Asked(work, self.number())
        one.requests.append(Request(self.now))

    @rule(target=taken, column=COLUMNS, work=WORK, limit=st.integers(1, 3))
    def take(self, column: int, work: Work, limit: int) -> object:
        entries = self.columns[column].take(work, limit, self.now)
        self.wake_model(column)
        mine = [(one.queued, key) for key, one in self.asked[column].items() if one.waits and one.work is work]
        assert [entry.key for entry in entries] == [key for _, key in sorted(mine)[:limit]]
        for entry in entries:
            one = self.asked[column][entry.key]
            assert (entry.reason.xid, entry.tries) == (one.xid, one.tries)
            one.in_flight = True
            for request in one.requests:
                request.covered = True
            self.owners[entry] = column, one
        return multiple(*entries)

    @rule(entry=consumes(taken))
    def finish(self, entry: Entry) -> None:
        column, one = self.owners.pop(entry)
        self.columns[column].finish([entry])
        if self.asked[column].get(entry.key) is not one:
            return  # forgotten by clear
        one.requests = [request for request in one.requests if not request.covered]
        one.in_flight, one.tries, one.queued = False, 0, self.number()
        if not one.requests:
            del self.asked[column][entry.key]
        self.confirm()

    @rule(entry=consumes(taken), delay=st.integers(0, 3))
    def give_back(self, entry: Entry, delay: int) -> None:
        column, one = self.owners.pop(entry)
        self.columns[column].give_back([entry], self.now, float(delay))
        if self.asked[column].get(entry.key) is not one:
            return
        one.in_flight, one.tries, one.queued = False, one.tries + 1, self.number()
        one.until = (self.now + delay, self.number()) if delay else None
        for request in one.requests:
            request.covered = False

    @rule(passes=st.integers(1, 2))
    def let_time_pass(self, passes: int) -> None:
        self.now += passes

    @rule(column=COLUMNS)
    def wake(self, column: int) -> None:
        due = self.columns[column].wake(self.now)
        self.wake_model(column)
        assert due == min((one.until[0] for one in self.asked[column].values() if one.until), default=None)

    def wake_model(self, column: int) -> None:
        delayed = [(one.until, one) for one in self.asked[column].values() if one.until and one.until[0] <= self.now]
        for _, one in sorted(delayed, key=lambda pair: pair[0]):
            one.until, one.queued = None, self.number()

    @rule(column=COLUMNS)
    def clear(self, column: int) -> None:
        self.columns[column].clear()
        self.asked[column].clear()
        self.confirm()

    @rule()
    def reconnect(self) -> None:
        self.watermark, self.transactions, self.flushed, self.wal = Watermark(), [], 0, 0
        for column in self.columns:
            column.rebase(self.watermark)
        for request in (r for asked in self.asked for one in asked.values() for r in one.requests):
            request.transaction = None

    @invariant()
    def what_is_confirmed_has_nothing_unfinished_at_or_before_it(self) -> None:
        assert self.watermark.flushed == self.flushed
        assert type(self.watermark.flushed) is LSN
        assert self.watermark.outstanding == len(self.transactions)

    @invariant()
    def a_key_has_one_entry_and_the_counters_count_them(self) -> None:
        for column, asked in zip(self.columns, self.asked, strict=True):
            assert len(column) == len(asked)
            for work in Work:
                mine = [one for one in asked.values() if one.work is work]
                assert column.unfinished(work) == len(mine)
                assert column.waiting(work) == sum(one.waits for one in mine)

    @invariant()
    def the_oldest_is_the_oldest_but_for_the_length_of_a_flight(self) -> None:
        for column, asked in zip(self.columns, self.asked, strict=True):
            since = [one.requests[0].at for one in asked.values()]
            assert (column.oldest is None) == (not since)
            if column.oldest is not None:
                assert column.oldest in since

    def teardown(self) -> None:
        """Whatever was in flight is given back or finished; then everything is worked off, and all is confirmed."""
        if not hasattr(self, "columns"):
            return
        self.commit()
        self.now += 1000
        for entry in list(self.owners):
            self.finish(entry)
        for index, column in enumerate(self.columns):
            while self.asked[index]:
                entries = [entry for work in Work for entry in column.take(work, 100, self.now)]
                assert entries
                column.finish(entries)
                for entry in entries:
                    del self.asked[index][entry.key]
            assert len(column) == sum(column.unfinished(work) + column.waiting(work) for work in Work) == 0
            assert column.wake(self.now) is None
            assert column.oldest is None
        assert self.watermark.flushed == self.wal
        assert self.watermark.outstanding == 0


TestWaitingKeysHoldTheWatermarkAsTheModelSays = Waiting.TestCase
TestWaitingKeysHoldTheWatermarkAsTheModelSays.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None
)


@pytest.fixture
def watermark() -> Watermark:
    return Watermark()


@pytest.fixture
def pending(watermark: Watermark) -> Pending:
    return Pending(watermark)


def changed(pending: Pending, watermark: Watermark, key: str, xid: int, end: int) -> None:
    """A transaction that changes one row."""
    position = watermark.begin()
    pending.change((key,), position, xid, now=float(end))
    watermark.commit(position, LSN(end))


def test_a_thousand_changes_of_a_key_are_one_entry_with_the_oldest_position(
    pending: Pending, watermark: Watermark
) -> None:
    for turn in range(1, 1001):
        changed(pending, watermark, "hot", turn, turn)
    assert (len(pending), pending.waiting(Work.LIVE), pending.oldest, watermark.flushed) == (1, 1, 1.0, 0)
    pending.finish(pending.take(Work.LIVE, 10, 0.0))
    assert watermark.flushed == 1000


def test_the_xid_of_the_latest_commit_in_stream_order_decides_even_if_it_is_lower(
    pending: Pending, watermark: Watermark
) -> None:
    changed(pending, watermark, "a", 861, 1)
    changed(pending, watermark, "a", 860, 2)
    assert [entry.reason.xid for entry in pending.take(Work.LIVE, 1, 0.0)] == [860]


def test_a_change_in_flight_comes_back_and_holds_only_from_its_own_commit(
    pending: Pending, watermark: Watermark
) -> None:
    changed(pending, watermark, "a", 1, 10)
    taken = pending.take(Work.LIVE, 1, 0.0)
    changed(pending, watermark, "a", 2, 20)
    assert pending.take(Work.LIVE, 1, 0.0) == []
    pending.finish(taken)
    assert watermark.flushed == 10
    again = pending.take(Work.LIVE, 1, 0.0)
    assert [entry.reason.xid for entry in again] == [2]
    pending.finish(again)
    assert watermark.flushed == 20


def test_what_is_given_back_keeps_its_position_and_takes_the_newer_xid(pending: Pending, watermark: Watermark) -> None:
    changed(pending, watermark, "a", 1, 10)
    taken = pending.take(Work.LIVE, 1, 0.0)
    changed(pending, watermark, "a", 2, 20)
    pending.give_back(taken, 0.0)
    assert watermark.flushed == 0
    [entry] = pending.take(Work.LIVE, 1, 0.0)
    assert (entry.reason.xid, entry.tries) == (2, 1)
    pending.finish([entry])
    assert watermark.flushed == 20


def test_a_scan_that_meets_a_waiting_change_erases_neither_its_xid_nor_its_class(
    pending: Pending, watermark: Watermark
) -> None:
    changed(pending, watermark, "a", 7, 10)
    pending.want(("a",), Work.SCAN, 1.0)
    assert (pending.unfinished(Work.SCAN), pending.take(Work.SCAN, 1, 1.0)) == (0, [])
    assert [entry.reason.xid for entry in pending.take(Work.LIVE, 1, 1.0)] == [7]


def test_a_live_change_lifts_a_key_out_of_the_scan_once(pending: Pending, watermark: Watermark) -> None:
    pending.want(("a",), Work.SCAN, 0.0)
    changed(pending, watermark, "a", 7, 10)
    assert (pending.waiting(Work.SCAN), pending.waiting(Work.LIVE)) == (0, 1)
    assert pending.take(Work.SCAN, 10, 0.0) == []
    assert len(pending.take(Work.LIVE, 10, 0.0)) == 1


def test_a_delayed_key_is_not_taken_before_its_time(pending: Pending) -> None:
    pending.want(("a",), Work.REPAIR, 0.0)
    pending.give_back(pending.take(Work.REPAIR, 1, 0.0), 0.0, delay_s=5.0)
    assert (pending.take(Work.REPAIR, 1, 4.9), pending.wake(4.9), pending.unfinished(Work.REPAIR)) == ([], 5.0, 1)
    assert len(pending.take(Work.REPAIR, 1, 5.0)) == 1


def test_keys_of_a_lost_connection_stay_and_hold_nothing(pending: Pending, watermark: Watermark) -> None:
    changed(pending, watermark, "a", 7, 10)
    changed(pending, watermark, "b", 7, 10)
    [first] = pending.take(Work.LIVE, 1, 0.0)
    again = Watermark()
    pending.rebase(again)
    again.idle(LSN(10))
    assert (again.flushed, len(pending)) == (10, 2)
    changed(pending, again, "a", 7, 20)
    pending.finish([first])
    assert again.flushed == 10
    pending.finish(pending.take(Work.LIVE, 10, 0.0))
    assert again.flushed == 20


def test_work_that_ends_after_its_column_was_cleared_changes_nothing(pending: Pending, watermark: Watermark) -> None:
    changed(pending, watermark, "a", 7, 10)
    taken = pending.take(Work.LIVE, 1, 0.0)
    pending.clear()
    assert watermark.flushed == 10
    changed(pending, watermark, "a", 8, 20)
    pending.finish(taken)
    pending.give_back(taken, 0.0)
    assert (watermark.flushed, len(pending), pending.waiting(Work.LIVE)) == (10, 1, 1)


def test_all_that_comes_in_flight_is_one_request_held_by_its_oldest_commit(
    pending: Pending, watermark: Watermark
) -> None:
    changed(pending, watermark, "a", 1, 10)
    taken = pending.take(Work.LIVE, 1, 0.0)
    changed(pending, watermark, "a", 2, 20)
    changed(pending, watermark, "a", 3, 30)
    pending.want(("a",), Work.SCAN, 0.0)
    pending.finish(taken)
    assert watermark.flushed == 10
    [again] = pending.take(Work.LIVE, 1, 0.0)
    assert again.reason.xid == 3
    pending.finish([again])
    assert (watermark.flushed, watermark.outstanding, len(pending)) == (30, 0, 0)


def test_a_scan_that_meets_a_change_in_flight_does_not_erase_its_xid(pending: Pending, watermark: Watermark) -> None:
    changed(pending, watermark, "a", 7, 10)
    taken = pending.take(Work.LIVE, 1, 0.0)
    pending.want(("a",), Work.SCAN, 0.0)
    pending.give_back(taken, 0.0)
    assert [entry.reason.xid for entry in pending.take(Work.LIVE, 1, 0.0)] == [7]


@pytest.mark.parametrize("again", [False, True])
def test_what_came_in_flight_is_let_go_with_the_rest(pending: Pending, watermark: Watermark, again: bool) -> None:
    changed(pending, watermark, "a", 1, 10)
    taken = pending.take(Work.LIVE, 1, 0.0)
    changed(pending, watermark, "a", 2, 20)
    if again:
        watermark = Watermark()
        pending.rebase(watermark)
        pending.finish(taken)
        changed(pending, watermark, "a", 2, 20)
        pending.finish(pending.take(Work.LIVE, 1, 0.0))
    else:
        pending.clear()
    assert (watermark.flushed, watermark.outstanding) == (20, 0)


def test_tries_count_what_was_given_back_since_the_last_judgement(pending: Pending, watermark: Watermark) -> None:
    changed(pending, watermark, "a", 1, 10)
    for _ in range(3):
        pending.give_back(pending.take(Work.LIVE, 1, 0.0), 0.0)
    taken = pending.take(Work.LIVE, 1, 0.0)
    changed(pending, watermark, "a", 2, 20)
    assert [entry.tries for entry in taken] == [3]
    pending.finish(taken)
    assert [entry.tries for entry in pending.take(Work.LIVE, 1, 0.0)] == [0]
