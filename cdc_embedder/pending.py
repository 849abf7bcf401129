"""Rule 3: the keys that wait to be judged, one entry a key, newest wins. No I/O.

Memory holds keys only. An entry remembers the oldest commit that asked for it (it holds the watermark there) and
the xid of the latest commit in stream order (rule 2: by which snapshot it may be judged). A change to a key that is
being worked on makes it dirty: it waits again when that work ends, whatever came of it.

Three classes of work: live before repair before scan. A live change to a key that waits for a scan lifts it up; a
scan that meets a waiting key changes nothing about it.

Rule 8: what holds the watermark for too long is written to the backlog (`holding`, then `spilled` when that is durable)
and forgotten here, unless it is in flight; `restore` takes it up again. `finish` tells which backlog rows are settled.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from cdc_embedder.lsn import LSN, ZERO
from cdc_embedder.watermark import Position, Watermark

Key = tuple[str, ...]
"""The key columns' values in the text form of a pinned session, in key order."""


class Work(IntEnum):
    """Classes of work, most urgent first."""

    LIVE = 0
    REPAIR = 1
    SCAN = 2


@dataclass(slots=True, eq=False)
class Reason:
    """Why a key has to be judged: since when (monotonic seconds), and which transactions asked for it.

    `position` and `at` (when it committed, seconds since 1970) belong to the oldest such transaction, `xid` and `last`
    (its commit LSN) to the latest; a scan's wish has none of them. What is spilled keeps all but `position`. `seq`: the
    version of the backlog row that stands for the key as well.
    """

    since: float
    position: Position | None = None
    at: float | None = None
    xid: int | None = None
    last: LSN = ZERO
    seq: int | None = None


@dataclass(slots=True, eq=False)
class Entry:
    """A key that waits, is delayed or is in flight. `dirty` is what came while it was in flight.

    `wished`: a scan met the key while it was on a more urgent list; until it is judged the scan is not over.
    """

    key: Key
    work: Work
    reason: Reason
    in_flight: bool = False
    delayed: bool = False
    dirty: Reason | None = None
    wished: bool = False
    tries: int = 0

    @property
    def committed_at(self) -> float | None:
        """When the oldest change committed that it stands for (seconds since 1970); None where that is not known."""
        return self.reason.at


@dataclass(frozen=True, slots=True)
class Spill:
    """What the backlog has to know about a key, as it was when it was asked."""

    entry: Entry
    reason: Reason
    first: LSN
    last: LSN
    xid: int
    at: float | None

    @property
    def key(self) -> Key:
        return self.entry.key


class Pending:
    """The waiting keys of one column. Every method is O(1) a key, amortized."""

    def __init__(self, watermark: Watermark) -> None:
        self._watermark = watermark
        self._entries: dict[Key, Entry] = {}  # in order of `reason.since`
        self._queues: tuple[deque[Entry], ...] = (deque(), deque(), deque())
        self._waiting = [0, 0, 0]
        self._unfinished = [0, 0, 0]
        self._wishes = 0
        self._delayed: list[tuple[float, int, Entry]] = []
        self._delays = 0

    def __len__(self) -> int:
        return len(self._entries)

    def waiting(self, work: Work) -> int:
        """How many keys of this class could be taken now."""
        return self._waiting[work]

    def unfinished(self, work: Work) -> int:
        """How many keys of this class wait, are delayed or are in flight; for scans, those they wished for too."""
        return self._unfinished[work] + (self._wishes if work is Work.SCAN else 0)

    @property
    def oldest(self) -> float | None:
        """Since when the oldest key waits, give or take the time of one batch in flight; None where none does."""
        for entry in self._entries.values():
            return entry.reason.since
        return None

    def change(self, key: Key, position: Position, xid: int, now: float) -> None:
        """A transaction of the stream changed the row with this key."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._add(key, Work.LIVE, now)
        elif entry.work is not Work.LIVE:
            self._lift(entry)
        if entry.in_flight:
            reason = entry.dirty = entry.dirty or Reason(now)
        else:
            reason = entry.reason
        if reason.position is None:
            reason.position, reason.since = position, now
            reason.at = _older(reason.at, position.at)
            self._watermark.hold(position)
            if reason is entry.reason:
                self._entries[key] = self._entries.pop(key)
        reason.xid, reason.last = xid, position.commit

    def want(self, key: Key, work: Work, now: float) -> None:
        """A scan or a retry wants the row with this key judged; what is known about it already stays."""
        entry = self._entries.get(key)
        if entry is None:
            self._add(key, work, now)
            return
        if work is Work.SCAN and entry.work is not Work.SCAN and not entry.wished:
            entry.wished = True
            self._wishes += 1
        if entry.in_flight and entry.dirty is None:
            entry.dirty = Reason(now)

    def take(self, work: Work, limit: int, now: float) -> list[Entry]:
        """Up to `limit` waiting keys of a class, oldest first; they are in flight until finished or given back."""
        self.wake(now)
        queue = self._queues[work]
        taken: list[Entry] = []
        while queue and len(taken) < limit:
            entry = queue.popleft()
            if entry.work is not work:
                continue  # lifted to another class, and queued there
            entry.in_flight = True
            self._waiting[work] -= 1
            taken.append(entry)
        return taken

    def finish(self, entries: Iterable[Entry]) -> list[tuple[Key, int]]:
        """A fetch judged these keys done, and what it saw is durable. Dirty ones wait again; forgotten ones do not.

        Returns (key, seq) of the backlog rows that are settled by it.
        """
        settled = []
        for entry in entries:
            if self._entries.get(entry.key) is not entry:
                continue
            entry.in_flight, entry.tries = False, 0
            if entry.reason.seq is not None:
                settled.append((entry.key, entry.reason.seq))
            if entry.reason.position is not None:
                self._watermark.release(entry.reason.position)
            del self._entries[entry.key]
            if entry.dirty is None:
                self._unfinished[entry.work] -= 1
                self._wishes -= entry.wished
            else:
                entry.reason, entry.dirty = entry.dirty, None
                self._entries[entry.key] = entry
                self._enqueue(entry)
        return settled

    def give_back(self, entries: Iterable[Entry], now: float, delay_s: float = 0.0) -> None:
        """Nothing was decided about these keys: they wait again, `delay_s` at least, their position still held."""
        for entry in entries:
            if self._entries.get(entry.key) is not entry:
                continue
            entry.in_flight = False
            entry.tries += 1
            if entry.dirty is not None:
                self._merge(entry, entry.dirty)
                entry.dirty = None
            if delay_s > 0:
                entry.delayed = True
                self._delays += 1
                heapq.heappush(self._delayed, (now + delay_s, self._delays, entry))
            else:
                self._enqueue(entry)

    def wake(self, now: float) -> float | None:
        """Queue the delayed keys whose time has come; returns the time of the next one, or None."""
        while self._delayed and self._delayed[0][0] <= now:
            entry = heapq.heappop(self._delayed)[2]
            entry.delayed = False
            self._enqueue(entry)
        return self._delayed[0][0] if self._delayed else None

    def holding(self, since: float, limit: int) -> list[Spill]:
        """Up to `limit` of the keys that hold the watermark since `since` or longer, oldest first."""
        found: list[Spill] = []
        for entry in self._entries.values():
            if entry.reason.since > since or len(found) >= limit:
                break
            for reason in _reasons(entry):
                if reason.position is not None and reason.xid is not None and reason.since <= since:
                    found.append(Spill(entry, reason, reason.position.commit, reason.last, reason.xid, reason.at))
        return found

    def spilled(self, spills: Sequence[tuple[Spill, int]]) -> None:
        """The backlog has these keys durably, as rows of the given seq: they hold the watermark no longer.

        A key that was changed again meanwhile holds it still, and is to be spilled again.
        """
        gone = False
        for spill, seq in spills:
            entry, reason = spill.entry, spill.reason
            if self._entries.get(entry.key) is not entry or not any(reason is held for held in _reasons(entry)):
                continue  # judged meanwhile: the backlog's row will be found done
            if reason.xid != spill.xid or reason.position is None:
                continue
            self._watermark.release(reason.position)
            reason.position, reason.seq = None, seq
            if not entry.in_flight:
                self._forget(entry)
                gone = True
        if gone:
            self._compact()

    def restore(self, key: Key, seq: int, xid: int | None, at: float | None, now: float) -> None:
        """The backlog says that the row with this key has to be judged. `xid`: None where it is visible to all;
        `at`: when the oldest change committed, None where that is not known."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._add(key, Work.REPAIR, now)
            entry.reason.xid, entry.reason.seq, entry.reason.at = xid, seq, at
            return
        if any(reason.seq == seq for reason in _reasons(entry)):
            return
        reason = entry.reason
        if entry.in_flight:
            reason = entry.dirty = entry.dirty or Reason(now)
        reason.seq, reason.at = seq, _older(reason.at, at)
        if reason.xid is None:
            reason.xid = xid

    def clear(self) -> None:
        """Forget every key: the column is no longer served, and nothing of it holds the watermark."""
        for entry in self._entries.values():
            for reason in _reasons(entry):
                if reason.position is not None:
                    self._watermark.release(reason.position)
        self._entries.clear()
        self._delayed.clear()
        for queue in self._queues:
            queue.clear()
        self._waiting = [0, 0, 0]
        self._unfinished = [0, 0, 0]
        self._wishes = 0

    def rebase(self, watermark: Watermark) -> None:
        """The stream starts again from what was confirmed, so that every commit held here arrives once more.

        The keys that wait for such a commit are forgotten until then. The others stay, and those in flight, which hold
        nothing until the new stream asks for them again.
        """
        self._watermark = watermark
        for entry in list(self._entries.values()):
            if entry.reason.position is not None and not entry.in_flight:
                self._forget(entry)
            for reason in _reasons(entry):
                reason.position = None
        self._compact()

    def _forget(self, entry: Entry) -> None:
        """Of an entry that waits or is delayed; `_compact` is to follow."""
        del self._entries[entry.key]
        self._unfinished[entry.work] -= 1
        self._waiting[entry.work] -= not entry.delayed
        self._wishes -= entry.wished

    def _add(self, key: Key, work: Work, now: float) -> Entry:
        entry = self._entries[key] = Entry(key, work, Reason(now))
        self._unfinished[work] += 1
        self._enqueue(entry)
        return entry

    def _enqueue(self, entry: Entry) -> None:
        self._queues[entry.work].append(entry)
        self._waiting[entry.work] += 1

    def _lift(self, entry: Entry) -> None:
        """Make it live; its place in the queue of its old class is passed over there."""
        waits = not entry.in_flight and not entry.delayed
        self._unfinished[entry.work] -= 1
        self._unfinished[Work.LIVE] += 1
        if waits:
            self._waiting[entry.work] -= 1
        entry.work = Work.LIVE
        if waits:
            self._enqueue(entry)

    def _compact(self) -> None:
        """Forget the places of entries that are not here any more: nothing might ever take them."""

        def here(entry: Entry) -> bool:
            return self._entries.get(entry.key) is entry

        self._queues = tuple(deque(filter(here, queue)) for queue in self._queues)
        self._delayed = [place for place in self._delayed if here(place[2])]
        heapq.heapify(self._delayed)

    def _merge(self, entry: Entry, later: Reason) -> None:
        """The older commit keeps its hold, the later xid decides about visibility; one of the backlog's is no later."""
        if later.xid is not None and (entry.reason.xid is None or later.last >= entry.reason.last):
            entry.reason.xid, entry.reason.last = later.xid, later.last
        if later.seq is not None:
            entry.reason.seq = later.seq
        entry.reason.at = _older(entry.reason.at, later.at)
        if later.position is None:
            return
        if entry.reason.position is None:
            entry.reason.position = later.position
        else:
            self._watermark.release(later.position)


def _older(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else min(one, other)


def _reasons(entry: Entry) -> list[Reason]:
    return [entry.reason] if entry.dirty is None else [entry.reason, entry.dirty]
