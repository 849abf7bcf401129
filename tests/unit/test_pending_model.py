"""Rules 1 and 3 together: waiting keys and the watermark they hold, against a model that keeps everything.

The model remembers every commit, and for each key every request that no finished judgement has covered yet. From these
it tells afresh after every step what may be confirmed, what waits in which order, and which xid decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    wished: bool = False
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
        elif work is Work.SCAN and one.work is not Work.SCAN:
            one.wished = True
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
                wishes = sum(one.wished for one in asked.values()) if work is Work.SCAN else 0
                assert column.unfinished(work) == len(mine) + wishes
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
