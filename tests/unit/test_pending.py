"""Rule 3 by example: one entry a key, newest wins, and what it holds. The whole is in `test_pending_model`."""

from __future__ import annotations

import pytest

from cdc_embedder.lsn import LSN
from cdc_embedder.pending import Pending, Work
from cdc_embedder.watermark import Watermark


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
