"""Rules 1, 3 and 8 together: waiting keys, the watermark they hold and what is spilled, against two models.

The first, `Waiting`, remembers every commit, and for each key every request that no finished judgement has covered yet.
From these it tells afresh after every step what may be confirmed, what waits in which order, and which xid decides.

The second, `Losing`, knows nothing of how it is done: it has the server's log, a backlog table, snapshots that see as
little as they may, processes that die and streams that begin again; and no change may be lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from cdc_embedder.lsn import LSN
from cdc_embedder.pending import Entry, Key, Pending, Spill, Work
from cdc_embedder.watermark import Position, Watermark

COLUMNS = st.sampled_from([0, 0, 0, 1])
KEYS = st.sampled_from([("1",), ("1",), ("1",), ("2",), ("3",)])  # most of what can go wrong needs one key repeatedly
WORK = st.sampled_from(Work)
AGES = st.sampled_from([0, 0, 0, 1, 2])
RARELY = st.sampled_from([False, False, False, False, True])
"""What sets all back is rare, else nothing would ever get far."""


def xid_of(number: int) -> int:
    """Unique, and in no order: a transaction may have taken its xid long before it commits."""
    return number * 7919 % 10007


@dataclass(eq=False)
class Transaction:
    position: Position
    xid: int
    end: LSN | None = None


@dataclass(eq=False)
class Request:
    """A wish to have a key judged, by a transaction or not. `covered`: that judgement is under way."""

    at: float
    transaction: Transaction | None = None
    xid: int | None = None
    last: int = 0
    seq: int | None = None


@dataclass(eq=False)
class Group:
    """Requests that one judgement will answer."""

    since: float
    requests: list[Request] = field(default_factory=list)

    @property
    def transactions(self) -> list[Transaction]:
        return [request.transaction for request in self.requests if request.transaction is not None]

    @property
    def xid(self) -> int | None:
        """That of the latest commit; what came from the backlog is older than any that came from the stream."""
        named = [request for request in self.requests if request.xid is not None]
        latest = max((request.last for request in named), default=0)
        own = [request.xid for request in named if request.last == latest]
        return own[-1 if latest else 0] if own else None

    @property
    def seq(self) -> int | None:
        return next((request.seq for request in reversed(self.requests) if request.seq is not None), None)


@dataclass(eq=False)
class Asked:
    """A key with requests. It is in flight, delayed until a time, or queued with a number of its own."""

    work: Work
    queued: int
    group: Group
    later: Group | None = None
    in_flight: bool = False
    wished: bool = False
    until: tuple[float, int] | None = None
    tries: int = 0

    @property
    def waits(self) -> bool:
        return not self.in_flight and self.until is None

    @property
    def groups(self) -> list[Group]:
        return [self.group] if self.later is None else [self.group, self.later]

    def ask(self, now: float, request: Request) -> None:
        group = self.group
        if self.in_flight:
            group = self.later = self.later or Group(now)
        if request.transaction is not None and not group.transactions:
            group.since = now
        group.requests.append(request)


@dataclass(eq=False)
class Written:
    """Keys that were written to the backlog, and memory was not told yet."""

    column: int
    spills: list[tuple[Spill, int, Asked, Group, Transaction]]


class Waiting(RuleBasedStateMachine):
    """Two columns on one stream."""

    taken = Bundle("taken")
    written = Bundle("written")

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
        left = {
            t for asked in self.asked for one in asked.values() for group in one.groups for t in group.transactions[:1]
        }
        while self.transactions and self.transactions[0].end is not None and self.transactions[0] not in left:
            self.flushed = max(self.flushed, self.transactions.pop(0).end or 0)

    @property
    def open(self) -> Transaction:
        if not self.transactions or self.transactions[-1].end is not None:
            self.wal += 10
            self.transactions.append(Transaction(self.watermark.begin(LSN(self.wal)), xid_of(self.number())))
        return self.transactions[-1]

    def ask(self, column: int, key: Key, work: Work, request: Request) -> Asked:
        one = self.asked[column].get(key)
        if one is None:
            one = self.asked[column][key] = Asked(work, self.number(), Group(self.now))
        one.ask(self.now, request)
        return one

    @rule(column=COLUMNS, key=KEYS)
    def change(self, column: int, key: Key) -> None:
        transaction = self.open
        self.columns[column].change(key, transaction.position, transaction.xid, self.now)
        one = self.ask(
            column, key, Work.LIVE, Request(self.now, transaction, transaction.xid, transaction.position.commit)
        )
        if one.work is not Work.LIVE:
            one.work, one.queued = Work.LIVE, self.number()

    @rule()
    def commit(self) -> None:
        transaction = self.open
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
        one = self.ask(column, key, work, Request(self.now))
        if work is Work.SCAN and one.work is not Work.SCAN:
            one.wished = True

    @rule(column=COLUMNS, key=KEYS, visible=st.booleans(), known=st.booleans())
    def restore(self, column: int, key: Key, visible: bool, known: bool) -> None:
        one = self.asked[column].get(key)
        present = [group.seq for group in one.groups if group.seq is not None] if one is not None else []
        seq = present[-1] if known and present else self.number()
        xid = None if visible else xid_of(self.number())
        self.columns[column].restore(key, seq, xid, None, self.now)
        if seq not in present:
            self.ask(column, key, Work.REPAIR, Request(self.now, xid=xid, seq=seq))

    @rule(target=taken, column=COLUMNS, work=WORK, limit=st.integers(1, 3))
    def take(self, column: int, work: Work, limit: int) -> object:
        entries = self.columns[column].take(work, limit, self.now)
        self.wake_model(column)
        mine = [(one.queued, key) for key, one in self.asked[column].items() if one.waits and one.work is work]
        assert [entry.key for entry in entries] == [key for _, key in sorted(mine)[:limit]]
        for entry in entries:
            one = self.asked[column][entry.key]
            assert (entry.reason.xid, entry.reason.seq, entry.tries) == (one.group.xid, one.group.seq, one.tries)
            one.in_flight = True
            self.owners[entry] = column, one
        return multiple(*entries)

    @rule(entry=consumes(taken))
    def finish(self, entry: Entry) -> None:
        column, one = self.owners.pop(entry)
        settled = self.columns[column].finish([entry])
        if self.asked[column].get(entry.key) is not one:
            assert settled == []  # forgotten by clear
            return
        assert settled == ([(entry.key, one.group.seq)] if one.group.seq is not None else [])
        one.in_flight, one.tries, one.queued = False, 0, self.number()
        if one.later is None:
            del self.asked[column][entry.key]
        else:
            one.group, one.later = one.later, None
        self.confirm()

    @rule(entry=consumes(taken), delay=st.integers(0, 3))
    def give_back(self, entry: Entry, delay: int) -> None:
        column, one = self.owners.pop(entry)
        self.columns[column].give_back([entry], self.now, float(delay))
        if self.asked[column].get(entry.key) is not one:
            return
        one.in_flight, one.tries, one.queued = False, one.tries + 1, self.number()
        one.until = (self.now + delay, self.number()) if delay else None
        if one.later is not None:
            one.group.requests += one.later.requests
            one.later = None
        self.confirm()

    @rule(target=written, column=COLUMNS, age=AGES, limit=st.integers(1, 4))
    def holding(self, column: int, age: int, limit: int) -> Written:
        due = [
            (
                one,
                group,
                (key, group.transactions[0].position.commit, group.transactions[-1].position.commit, group.xid),
            )
            for key, one in self.asked[column].items()
            for group in one.groups
            if group.transactions and group.since <= self.now - age
        ]
        found = self.columns[column].holding(self.now - age, limit)
        assert len(found) <= limit + 1, "a key that is in flight and changed again brings two"
        assert age > 0 or len(found) >= min(limit, len(due))
        known = []
        for spill in found:
            said = spill.key, spill.first, spill.last, spill.xid
            place = next(n for n, (*_, expected) in enumerate(due) if expected == said)
            one, group, _ = due.pop(place)
            known.append((spill, self.number(), one, group, group.transactions[-1]))
        return Written(column, known)

    @rule(written=consumes(written))
    def spilled(self, written: Written) -> None:
        self.columns[written.column].spilled([(spill, seq) for spill, seq, *_ in written.spills])
        asked = self.asked[written.column]
        for spill, seq, one, group, latest in written.spills:
            if asked.get(spill.key) is not one or group not in one.groups or group.transactions[-1:] != [latest]:
                continue
            for request in group.requests:
                request.transaction = None
            group.requests.append(Request(self.now, seq=seq))
            if not one.in_flight:
                del asked[spill.key]
        self.confirm()

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

    @rule(column=COLUMNS, really=RARELY)
    def clear(self, column: int, really: bool) -> None:
        if not really:
            return
        self.columns[column].clear()
        self.asked[column].clear()
        self.confirm()

    @rule(really=RARELY)
    def reconnect(self, really: bool) -> None:
        if not really:
            return
        self.watermark, self.transactions, self.flushed = Watermark(), [], 0
        for column, asked in zip(self.columns, self.asked, strict=True):
            column.rebase(self.watermark)
            for key, one in list(asked.items()):
                if one.group.transactions and not one.in_flight:
                    del asked[key]
                for group in one.groups:
                    for request in group.requests:
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
            since = [one.group.since for one in asked.values()]
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
            assert_empty(column, self.now)
        assert self.watermark.flushed == self.wal
        assert self.watermark.outstanding == 0


def assert_empty(column: Pending, now: float) -> None:
    assert len(column) == sum(column.unfinished(work) + column.waiting(work) for work in Work) == 0
    assert column.wake(now) is None
    assert column.oldest is None
    assert column.holding(now, 10) == []


@dataclass(eq=False)
class Logged:
    """A committed transaction in the server's log. `visible`: every snapshot from now on sees it."""

    order: int
    keys: list[Key]
    visible: bool = False
    judged: set[Key] = field(default_factory=set)

    @property
    def xid(self) -> int:
        return xid_of(self.order)

    @property
    def commit(self) -> LSN:
        return LSN(10 * self.order)

    @property
    def end(self) -> LSN:
        return LSN(10 * self.order + 5)


@dataclass
class Row:
    """A row of the backlog: its latest change decides when it may be judged."""

    seq: int
    latest: Logged


class Losing(RuleBasedStateMachine):
    """One column, one slot. What the machine does is what the stages of the service do: a rule is a step of theirs."""

    taken = Bundle("taken")

    @initialize()
    def install(self) -> None:
        self.log: list[Logged] = []
        self.backlog: dict[Key, Row] = {}
        self.confirmed = 0
        self.seqs = 0
        self.start()

    def start(self) -> None:
        """A process: what it had in memory is new, what is durable is not."""
        self.now = 0.0
        self.pending = Pending(Watermark())
        self.in_flight: dict[Entry, list[Logged]] = {}
        self.spills: list[tuple[Spill, int]] = []
        self.paged: list[tuple[Key, int, int | None]] = []
        self.settled: list[tuple[Key, int]] = []
        self.drained = 0
        self.stream()

    def stream(self) -> None:
        """A connection: the slot sends what was not confirmed, once more."""
        self.watermark = Watermark()
        self.pending.rebase(self.watermark)
        self.next = len([one for one in self.log if one.end <= self.confirmed])
        self.open: tuple[Logged, Position, int] | None = None

    def see(self, logged: Logged) -> None:
        """It ends, and so have all from which it took over a row's lock."""
        logged.visible = True
        for one in self.log[: logged.order - 1]:
            if not one.visible and not set(one.keys).isdisjoint(logged.keys):
                self.see(one)

    def latest(self, key: Key, xid: int | None) -> int:
        """The order of the transaction with this xid."""
        return next((one.order for one in self.log if one.xid == xid and key in one.keys), 0)

    @rule(keys=st.lists(KEYS, min_size=1, max_size=3))
    def write(self, keys: list[Key]) -> None:
        logged = Logged(len(self.log) + 1, keys)
        for one in self.log:
            if not one.visible and not set(one.keys).isdisjoint(keys):
                self.see(one)
        self.log.append(logged)

    @rule(number=st.integers(0, 20))
    def end_a_transaction(self, number: int) -> None:
        if waiting := [one for one in self.log if not one.visible]:
            self.see(waiting[number % len(waiting)])

    @rule(steps=st.integers(1, 4))
    def receive(self, steps: int) -> None:
        """A begin, a change or a commit."""
        for _ in range(steps):
            if self.open is None:
                if self.next == len(self.log):
                    return
                self.open = self.log[self.next], self.watermark.begin(self.log[self.next].commit), 0
                continue
            logged, position, done = self.open
            if done < len(logged.keys):
                self.pending.change(logged.keys[done], position, logged.xid, self.now)
                self.open = logged, position, done + 1
            else:
                self.watermark.commit(position, logged.end)
                self.next, self.open = self.next + 1, None

    @rule()
    def confirm(self) -> None:
        self.confirmed = max(self.confirmed, self.watermark.flushed)

    @rule(keys=st.lists(KEYS, min_size=1, max_size=2))
    def write_and_receive(self, keys: list[Key]) -> None:
        self.write(keys)
        self.receive(10_000)

    @rule(really=RARELY)
    def lose_the_stream(self, really: bool) -> None:
        if really:
            self.stream()

    @rule(really=RARELY)
    def die(self, really: bool) -> None:
        if really:
            self.start()

    @rule(key=KEYS, work=st.sampled_from([Work.REPAIR, Work.SCAN]))
    def want(self, key: Key, work: Work) -> None:
        self.pending.want(key, work, self.now)

    @rule(target=taken, work=WORK, limit=st.integers(1, 3))
    def fetch(self, work: Work, limit: int) -> object:
        """The snapshot sees what everybody sees, and the entry's transaction (else it is given back); no more."""
        entries = self.pending.take(work, limit, self.now)
        for entry in entries:
            order = self.latest(entry.key, entry.reason.xid)
            self.in_flight[entry] = [
                one for one in self.log if entry.key in one.keys and (one.visible or one.order <= order)
            ]
        return multiple(*entries)

    @rule(entry=consumes(taken))
    def finish(self, entry: Entry) -> None:
        """It was judged, and what came of it is durable."""
        if entry in self.in_flight:
            for logged in self.in_flight.pop(entry):
                self.see(logged)
                logged.judged.add(entry.key)
            self.settled += self.pending.finish([entry])

    @rule(entry=consumes(taken), delay=st.integers(0, 2))
    def give_back(self, entry: Entry, delay: int) -> None:
        if self.in_flight.pop(entry, None) is not None:
            self.pending.give_back([entry], self.now, float(delay))

    @rule(age=AGES, limit=st.integers(1, 4))
    def spill(self, age: int, limit: int) -> None:
        """The statement: rows of one key are one, with the later transaction's xid and seq."""
        if self.spills:
            return
        for spill in self.pending.holding(self.now - age, limit):
            self.seqs += 1
            self.spills.append((spill, self.seqs))
            latest = next(one for one in self.log if one.commit == spill.last)
            assert latest.xid == spill.xid
            row = self.backlog.get(spill.key)
            if row is None or row.latest.order <= latest.order:
                self.backlog[spill.key] = Row(self.seqs, latest)

    @rule()
    def spilled(self) -> None:
        self.pending.spilled(self.spills)
        self.spills = []

    @rule(limit=st.integers(1, 3))
    def page(self, limit: int) -> None:
        if self.paged:
            return
        rows = sorted((row.seq, key, row.latest) for key, row in self.backlog.items() if row.seq > self.drained)
        self.paged = [(key, seq, None if logged.visible else logged.xid) for seq, key, logged in rows[:limit]]
        self.drained = rows[:limit][-1][0] if rows else 0

    @rule()
    def restore(self) -> None:
        for key, seq, xid in self.paged:
            self.pending.restore(key, seq, xid, None, self.now)
        self.paged = []

    @rule()
    def remove(self) -> None:
        for key, seq in self.settled:
            if key in self.backlog and self.backlog[key].seq == seq:
                del self.backlog[key]
        self.settled = []

    @rule()
    def let_time_pass(self) -> None:
        self.now += 1.0

    @invariant()
    def every_change_is_judged_or_in_the_backlog_or_holds_the_watermark(self) -> None:
        passed = max(self.confirmed, self.watermark.flushed)
        for logged in self.log:
            for key in logged.keys:
                row = self.backlog.get(key)
                assert (
                    key in logged.judged
                    or (row is not None and row.latest.order >= logged.order)
                    or logged.end > passed
                ), f"transaction {logged.order} is passed, and its change of {key} is lost"

    def teardown(self) -> None:
        """Everybody ends, all arrives, and the rest is judged: then nothing is left anywhere."""
        if not hasattr(self, "log"):
            return
        for logged in self.log:
            logged.visible = True
        for entry in list(self.in_flight):
            self.finish(entry)
        self.spilled()
        self.receive(10_000)
        for _ in range(100):
            self.now += 10.0
            for work in Work:
                for entry in self.pending.take(work, 100, self.now):
                    self.in_flight[entry] = [one for one in self.log if entry.key in one.keys]
                    self.finish(entry)
            self.remove()
            self.restore()
            self.page(100)
            if not self.backlog and not len(self.pending):
                break
        assert not self.backlog, "the backlog is not empty"
        assert_empty(self.pending, self.now)
        assert (self.watermark.outstanding, self.pending.take(Work.LIVE, 1, self.now)) == (0, [])
        assert all(set(logged.keys) <= logged.judged for logged in self.log)
        assert max(self.confirmed, self.watermark.flushed) == (self.log[-1].end if self.log else 0)


TestWaitingKeysHoldTheWatermarkAsTheModelSays = Waiting.TestCase
TestWaitingKeysHoldTheWatermarkAsTheModelSays.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None
)
TestNoChangeIsLostOnAnyWay = Losing.TestCase
TestNoChangeIsLostOnAnyWay.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
