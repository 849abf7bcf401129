"""Rule 1: what may be confirmed, against the definition worked out afresh after every step."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_embedder.lsn import LSN, ZERO
from cdc_embedder.watermark import Position, Watermark


@dataclass(eq=False)
class Transaction:
    """The model: how many pieces of work are left, and where it ends."""

    position: Position
    left: int = 0
    end: LSN | None = None


def by_definition(transactions: list[Transaction], idles: list[LSN]) -> LSN:
    """The last end before the first unfinished transaction, or a later keepalive heard when all was done."""
    passed = [ZERO]
    for transaction in transactions:
        if transaction.left or transaction.end is None:
            break
        passed.append(transaction.end)
    return max(passed + idles)


STEPS = st.lists(
    st.tuples(st.sampled_from(["begin", "hold", "release", "commit", "idle"]), st.integers(0, 20)), max_size=80
)


@settings(deadline=None, max_examples=300)
@given(STEPS)
def test_the_flush_lsn_is_the_end_of_the_last_commit_with_nothing_unfinished_before_it(
    steps: list[tuple[str, int]],
) -> None:
    watermark, transactions, idles = Watermark(), list[Transaction](), list[LSN]()
    wal, before = 0, ZERO
    for step, number in steps:
        still = [one for one in transactions if one.end is None]
        wal += number
        if step == "begin":
            transactions.append(Transaction(watermark.begin()))
        elif step == "hold" and still:
            still[-1].left += 1
            watermark.hold(still[-1].position)
        elif step == "release" and (held := [one for one in transactions if one.left]):
            chosen = held[number % len(held)]
            chosen.left -= 1
            watermark.release(chosen.position)
        elif step == "commit" and still:
            still[0].end = LSN(wal)
            watermark.commit(still[0].position, LSN(wal))
        elif step == "idle":
            watermark.idle(LSN(wal))
            if all(one.end is not None and not one.left for one in transactions):
                idles.append(LSN(wal))
        assert watermark.flushed == by_definition(transactions, idles)
        assert watermark.flushed >= before
        assert type(watermark.flushed) is LSN
        before = watermark.flushed


def test_nothing_is_confirmed_at_the_start() -> None:
    assert Watermark().flushed == ZERO


def test_a_transaction_that_is_still_being_read_is_not_passed() -> None:
    watermark = Watermark()
    first = watermark.begin()
    watermark.idle(LSN(100))
    watermark.hold(first)
    watermark.release(first)
    assert (watermark.flushed, watermark.outstanding) == (ZERO, 1)
    watermark.commit(first, LSN(50))
    assert (watermark.flushed, watermark.outstanding) == (50, 0)


def test_an_older_commit_with_work_holds_back_newer_ones_that_are_done() -> None:
    watermark = Watermark()
    first, second = watermark.begin(), watermark.begin()
    watermark.hold(first)
    watermark.commit(first, LSN(10))
    watermark.commit(second, LSN(20))
    assert watermark.flushed == ZERO
    watermark.release(first)
    assert watermark.flushed == 20


def test_a_commit_below_what_a_keepalive_said_does_not_move_it_back() -> None:
    watermark = Watermark()
    watermark.idle(LSN(100))
    watermark.commit(watermark.begin(), LSN(90))
    assert watermark.flushed == 100


def test_an_older_keepalive_does_not_move_it_back() -> None:
    watermark = Watermark()
    watermark.idle(LSN(100))
    watermark.idle(LSN(90))
    assert watermark.flushed == 100


def test_releasing_more_than_was_held_is_a_defect_that_shows() -> None:
    watermark = Watermark()
    with pytest.raises(AssertionError, match="released more often than held"):
        watermark.release(watermark.begin())


def test_where_a_commit_record_begins_is_noted_and_never_confirmed() -> None:
    watermark = Watermark()
    position = watermark.begin(LSN(40))
    watermark.hold(position)
    watermark.commit(position, LSN(50))
    assert (position.commit, watermark.begin().commit, watermark.flushed) == (40, ZERO, ZERO)
    watermark.release(position)
    assert watermark.flushed == 50
