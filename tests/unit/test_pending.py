"""Rule 3 by example: one entry a key, newest wins, and what it holds. The whole is in `test_pending_model`."""

from __future__ import annotations

import pytest

from cdc_embedder.lsn import LSN
from cdc_embedder.pending import Pending, Spill, Work
from cdc_embedder.watermark import Watermark


@pytest.fixture
def watermark() -> Watermark:
    return Watermark()


@pytest.fixture
def pending(watermark: Watermark) -> Pending:
    return Pending(watermark)


def changed(pending: Pending, watermark: Watermark, key: str, xid: int, end: int, at: float | None = None) -> None:
    """A transaction that changes one row."""
    position = watermark.begin(LSN(end - 1), at)
    pending.change((key,), position, xid, now=float(end))
    watermark.commit(position, LSN(end))


def spill(pending: Pending, since: float = 1000.0, limit: int = 100, seq: int = 7) -> list[tuple[Spill, int]]:
    """What the backlog would be given, with the seqs of its rows; `spilled` is still to be called."""
    return [(found, seq + n) for n, found in enumerate(pending.holding(since, limit))]


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
    assert (pending.unfinished(Work.SCAN), pending.take(Work.SCAN, 1, 1.0)) == (1, [])
    taken = pending.take(Work.LIVE, 1, 1.0)
    assert [entry.reason.xid for entry in taken] == [7]
    pending.finish(taken)
    assert pending.unfinished(Work.SCAN) == 0, "the scan waits for a key that was judged"


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


def test_keys_that_wait_for_a_commit_are_forgotten_until_the_new_stream_brings_it_again(
    pending: Pending, watermark: Watermark
) -> None:
    changed(pending, watermark, "a", 7, 10)
    [first] = pending.take(Work.LIVE, 1, 0.0)
    changed(pending, watermark, "b", 7, 10)
    changed(pending, watermark, "c", 7, 10)
    [_, third] = pending.take(Work.LIVE, 2, 0.0)
    pending.give_back([third], 0.0, delay_s=5.0)
    pending.want(("d",), Work.SCAN, 0.0)
    again = Watermark()
    pending.rebase(again)
    again.idle(LSN(10))
    assert (again.flushed, len(pending)) == (10, 3), "a and b are in flight, d is a scan's"
    assert ([pending.waiting(work) for work in Work], pending.wake(0.0)) == ([0, 0, 1], None)
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
        assert watermark.flushed == 0
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


def test_a_live_change_to_a_delayed_key_lifts_it_and_leaves_its_delay(pending: Pending, watermark: Watermark) -> None:
    pending.want(("a",), Work.SCAN, 0.0)
    pending.give_back(pending.take(Work.SCAN, 1, 0.0), 0.0, delay_s=5.0)
    changed(pending, watermark, "a", 7, 1)
    assert [pending.unfinished(work) for work in Work] == [1, 0, 0]
    assert [pending.waiting(work) for work in Work] == [0, 0, 0]
    assert pending.take(Work.LIVE, 1, 4.0) == []
    assert len(pending.take(Work.LIVE, 10, 5.0)) == 1


def test_what_holds_the_watermark_for_too_long_is_found_oldest_first(pending: Pending, watermark: Watermark) -> None:
    pending.want(("scanned",), Work.SCAN, 0.0)
    for key, end in (("a", 10), ("b", 20), ("a", 30), ("c", 40)):
        changed(pending, watermark, key, 100 + end, end)
    found = pending.holding(20.0, 10)
    assert [(one.key, one.first, one.last, one.xid) for one in found] == [(("a",), 9, 29, 130), (("b",), 19, 19, 120)]
    assert [one.key for one in pending.holding(1000.0, 1)] == [("a",)]
    assert pending.holding(9.0, 10) == []


def test_what_came_in_flight_is_found_beside_what_is_in_flight(pending: Pending, watermark: Watermark) -> None:
    changed(pending, watermark, "a", 1, 10)
    pending.take(Work.LIVE, 1, 0.0)
    changed(pending, watermark, "a", 2, 20)
    assert [(one.first, one.xid) for one in pending.holding(20.0, 10)] == [(9, 1), (19, 2)]
    assert [(one.first, one.xid) for one in pending.holding(19.0, 10)] == [(9, 1)]


def test_a_spilled_key_that_waits_is_forgotten_and_the_watermark_passes_it(
    pending: Pending, watermark: Watermark
) -> None:
    for key in "abc":
        changed(pending, watermark, key, 7, 10)
    pending.give_back(pending.take(Work.LIVE, 1, 0.0), 0.0, delay_s=50.0)
    pending.want(("b",), Work.SCAN, 0.0)
    spills = spill(pending)
    assert watermark.flushed == 0, "found is not durable"
    pending.spilled(spills)
    assert (watermark.flushed, len(pending), pending.oldest, pending.wake(0.0)) == (10, 0, None, None)
    assert [pending.unfinished(work) + pending.waiting(work) for work in Work] == [0, 0, 0]
    assert pending.take(Work.LIVE, 10, 100.0) == []


def test_places_of_spilled_keys_are_not_kept(pending: Pending, watermark: Watermark) -> None:
    for _ in range(3):
        for key in range(100):
            changed(pending, watermark, str(key), 7, 10)
        pending.give_back(pending.take(Work.LIVE, 50, 0.0), 0.0, delay_s=5.0)
        pending.spilled(spill(pending))
    assert [len(queue) for queue in pending._queues] == [0, 0, 0]
    assert pending._delayed == []


def test_a_key_that_is_spilled_in_flight_is_settled_when_that_ends(pending: Pending, watermark: Watermark) -> None:
    changed(pending, watermark, "a", 1, 10)
    taken = pending.take(Work.LIVE, 1, 0.0)
    pending.spilled(spill(pending, seq=7))
    assert (watermark.flushed, len(pending)) == (10, 1)
    assert pending.holding(1000.0, 10) == []
    assert pending.finish(taken) == [(("a",), 7)]
    assert (len(pending), pending.unfinished(Work.LIVE)) == (0, 0)


def test_a_key_that_is_spilled_in_flight_and_given_back_keeps_its_row_and_its_xid(
    pending: Pending, watermark: Watermark
) -> None:
    changed(pending, watermark, "a", 1, 10)
    taken = pending.take(Work.LIVE, 1, 0.0)
    pending.spilled(spill(pending, seq=7))
    pending.give_back(taken, 0.0)
    changed(pending, watermark, "a", 2, 20)
    [again] = pending.take(Work.LIVE, 1, 0.0)
    assert (again.reason.xid, again.reason.seq, watermark.flushed) == (2, 7, 10)
    assert pending.finish([again]) == [(("a",), 7)]
    assert watermark.flushed == 20


def test_what_came_in_flight_is_spilled_for_itself_and_settled_by_its_own_judgement(
    pending: Pending, watermark: Watermark
) -> None:
    changed(pending, watermark, "a", 1, 10)
    taken = pending.take(Work.LIVE, 1, 0.0)
    changed(pending, watermark, "a", 2, 20)
    pending.spilled(spill(pending, seq=7))
    assert watermark.flushed == 20
    assert pending.finish(taken) == [(("a",), 7)], "the row has seq 8 by now"
    [again] = pending.take(Work.LIVE, 1, 0.0)
    assert (again.reason.xid, pending.finish([again])) == (2, [(("a",), 8)])


def test_a_key_that_changed_while_it_was_spilled_holds_the_watermark_still(
    pending: Pending, watermark: Watermark
) -> None:
    changed(pending, watermark, "a", 1, 10)
    spills = spill(pending)
    changed(pending, watermark, "a", 2, 20)
    pending.spilled(spills)
    assert (watermark.flushed, len(pending)) == (0, 1)
    pending.spilled(spill(pending))
    assert (watermark.flushed, len(pending)) == (20, 0)


@pytest.mark.parametrize("again", [False, True])
def test_a_key_that_was_judged_while_it_was_spilled_is_let_go_once(
    pending: Pending, watermark: Watermark, again: bool
) -> None:
    changed(pending, watermark, "a", 1, 10)
    spills = spill(pending)
    taken = pending.take(Work.LIVE, 1, 0.0)
    if again:
        changed(pending, watermark, "a", 2, 20)
    assert pending.finish(taken) == []
    pending.spilled(spills)
    assert (watermark.flushed, len(pending), watermark.outstanding) == (10, again, again)


@pytest.mark.parametrize("end", ["cleared", "lost"])
def test_a_key_of_an_earlier_stream_or_service_is_not_let_go_for_what_was_spilled_then(
    pending: Pending, watermark: Watermark, end: str
) -> None:
    changed(pending, watermark, "a", 1, 10)
    spills = spill(pending)
    if end == "lost":
        watermark = Watermark()
        pending.rebase(watermark)
    else:
        pending.clear()
    changed(pending, watermark, "a", 2, 20)
    before = watermark.flushed
    pending.spilled(spills)
    assert (watermark.flushed, len(pending), watermark.outstanding) == (before, 1, 1)


def test_a_restored_key_is_repair_work_under_the_xid_of_its_row(pending: Pending) -> None:
    pending.restore(("a",), 7, 42, None, 0.0)
    pending.restore(("b",), 8, None, None, 0.0)
    pending.restore(("a",), 7, 42, None, 1.0)
    taken = pending.take(Work.REPAIR, 10, 0.0)
    assert [(entry.key, entry.reason.xid) for entry in taken] == [(("a",), 42), (("b",), None)]
    pending.restore(("a",), 7, 42, None, 1.0)
    assert pending.finish(taken) == [(("a",), 7), (("b",), 8)]
    assert len(pending) == 0, "the same row does not make a key in flight dirty"


def test_a_row_that_is_restored_to_a_key_that_waits_is_settled_with_it(pending: Pending, watermark: Watermark) -> None:
    changed(pending, watermark, "live", 5, 10)
    pending.want(("scanned",), Work.SCAN, 0.0)
    for seq, key in enumerate(("live", "scanned"), 7):
        pending.restore((key,), seq, 4, None, 0.0)
    assert [pending.unfinished(work) for work in Work] == [1, 0, 1]
    [live], [scanned] = pending.take(Work.LIVE, 1, 0.0), pending.take(Work.SCAN, 1, 0.0)
    assert (live.reason.xid, scanned.reason.xid) == (5, 4), "the stream's is the later one"
    assert pending.finish([live, scanned]) == [(("live",), 7), (("scanned",), 8)]


def test_a_newer_row_that_is_restored_to_a_key_in_flight_has_it_judged_again(pending: Pending) -> None:
    pending.restore(("a",), 7, None, None, 0.0)
    taken = pending.take(Work.REPAIR, 1, 0.0)
    pending.restore(("a",), 8, 42, None, 0.0)
    assert pending.finish(taken) == [(("a",), 7)]
    [again] = pending.take(Work.REPAIR, 1, 0.0)
    assert (again.reason.xid, pending.finish([again])) == (42, [(("a",), 8)])


def test_a_row_that_is_restored_to_a_key_in_flight_does_not_make_its_xid_older(
    pending: Pending, watermark: Watermark
) -> None:
    changed(pending, watermark, "a", 3, 30)
    taken = pending.take(Work.LIVE, 1, 0.0)
    pending.restore(("a",), 7, 1, None, 0.0)
    pending.give_back(taken, 0.0)
    [again] = pending.take(Work.LIVE, 1, 0.0)
    assert (again.reason.xid, again.reason.seq) == (3, 7), "else a snapshot that does not see 3 could finish it"


def test_a_change_to_a_restored_key_lifts_it_and_spills_it_under_a_new_seq(
    pending: Pending, watermark: Watermark
) -> None:
    pending.restore(("a",), 7, None, None, 0.0)
    changed(pending, watermark, "a", 5, 10)
    assert [pending.unfinished(work) for work in Work] == [1, 0, 0]
    [(found, seq)] = spill(pending, seq=8)
    assert (found.first, found.xid) == (9, 5)
    pending.spilled([(found, seq)])
    assert (len(pending), watermark.flushed) == (0, 10)


def test_when_the_oldest_change_committed_is_known_until_the_key_is_done(
    pending: Pending, watermark: Watermark
) -> None:
    """How late a vector comes is told by it: through the backlog and back, above all where it was late."""
    changed(pending, watermark, "a", 5, 10, at=100.0)
    changed(pending, watermark, "a", 6, 20, at=200.0)
    [(found, seq)] = spill(pending)
    assert found.at == 100.0
    pending.spilled([(found, seq)])
    pending.restore(("a",), seq, 6, found.at, 0.0)
    changed(pending, watermark, "a", 7, 30, at=300.0)
    [taken] = pending.take(Work.LIVE, 1, 0.0)
    assert taken.committed_at == 100.0
    changed(pending, watermark, "a", 8, 40, at=400.0)
    assert taken.committed_at == 100.0
    pending.give_back([taken], 0.0)
    assert taken.committed_at == 100.0
    pending.finish(pending.take(Work.LIVE, 1, 0.0))
    changed(pending, watermark, "a", 9, 50, at=500.0)
    [again] = pending.take(Work.LIVE, 1, 0.0)
    assert again.committed_at == 500.0
    pending.restore(("a",), 11, None, 90.0, 0.0)
    assert pending.finish([again]) == []
    [last] = pending.take(Work.LIVE, 1, 0.0)
    pending.restore(("a",), 12, None, 80.0, 0.0)
    pending.give_back([last], 0.0)
    assert (last.committed_at, pending.finish([last])) == (80.0, [(("a",), 12)])


def test_the_time_of_a_key_counts_from_its_first_change_and_not_from_a_scan_before(
    pending: Pending, watermark: Watermark
) -> None:
    pending.want(("scanned",), Work.SCAN, 1.0)
    changed(pending, watermark, "other", 1, 10)
    changed(pending, watermark, "scanned", 2, 20)
    assert [found.key for found in pending.holding(15.0, 10)] == [("other",)]
    assert [found.key for found in pending.holding(20.0, 10)] == [("other",), ("scanned",)]
