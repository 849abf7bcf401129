"""Whose turn it is: strict classes with a floor, priorities inside a class, fairness between equals."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_embedder.pending import Work
from cdc_embedder.scheduling import FLOOR, Candidate, Scheduler

CANDIDATES = st.lists(
    st.builds(Candidate, st.sampled_from("abc"), st.sampled_from(Work), st.integers(-1, 1)),
    max_size=6,
    unique_by=lambda candidate: (candidate.column, candidate.work),
)


def spend(scheduler: Scheduler, candidates: list[Candidate], turns: int, cost: float = 1.0) -> Counter[Candidate]:
    """How much each candidate got of `turns` turns in which all of them always have work."""
    spent: Counter[Candidate] = Counter()
    for _ in range(turns):
        chosen = scheduler.choose(candidates)
        assert chosen is not None
        scheduler.account(chosen, cost)
        spent[chosen] += 1
    return spent


def test_nobody_is_chosen_where_nobody_has_work() -> None:
    assert Scheduler().choose([]) is None


@pytest.mark.parametrize("work", Work)
def test_at_the_start_the_most_urgent_class_goes_first(work: Work) -> None:
    candidates = [Candidate("a", each, 0) for each in Work if each >= work]
    assert Scheduler().choose(reversed(candidates)) == Candidate("a", work, 0)


def test_lower_classes_get_their_floor_and_live_work_gets_the_rest() -> None:
    candidates = [Candidate("a", work, 0) for work in Work]
    spent = spend(Scheduler(), candidates, 2000)
    shares = [spent[candidate] / 2000 for candidate in candidates]
    assert shares[Work.LIVE] >= 1 - 2 * FLOOR - 0.03
    assert all(FLOOR - 0.005 <= share <= FLOOR + 0.015 for share in shares[1:])


def test_a_flood_of_live_work_does_not_starve_the_repair() -> None:
    scheduler = Scheduler()
    live, repair = Candidate("a", Work.LIVE, 0), Candidate("b", Work.REPAIR, 0)
    spend(scheduler, [live], 1000)
    assert scheduler.choose([live, repair]) == repair


def test_a_floor_is_a_share_of_what_was_used_not_of_the_turns() -> None:
    scheduler, used = Scheduler(), dict.fromkeys(Work, 0.0)
    candidates = [Candidate("a", Work.LIVE, 0), Candidate("a", Work.SCAN, 0)]
    for _ in range(3000):
        chosen = scheduler.choose(candidates)
        assert chosen is not None
        cost = 1.0 if chosen.work is Work.LIVE else 10.0
        scheduler.account(chosen, cost)
        used[chosen.work] += cost
    assert FLOOR / 2 <= used[Work.SCAN] / sum(used.values()) <= 3 * FLOOR


def test_the_higher_priority_goes_first_inside_a_class() -> None:
    high, low = Candidate("a", Work.SCAN, 1), Candidate("b", Work.SCAN, 0)
    assert spend(Scheduler(), [low, high], 100) == {high: 100}


def test_priority_does_not_reach_across_classes() -> None:
    live, scan = Candidate("a", Work.LIVE, -5), Candidate("b", Work.SCAN, 5)
    assert Scheduler().choose([scan, live]) == live


def test_equals_share_by_time_used() -> None:
    candidates = [Candidate(name, Work.LIVE, 0) for name in "abcd"]
    assert set(spend(Scheduler(), candidates, 400).values()) == {100}


def test_an_expensive_column_gets_fewer_turns_than_a_cheap_one() -> None:
    scheduler, used = Scheduler(), dict.fromkeys(("cheap", "dear"), 0.0)
    candidates = [Candidate("cheap", Work.LIVE, 0), Candidate("dear", Work.LIVE, 0)]
    for _ in range(1000):
        chosen = scheduler.choose(candidates)
        assert chosen is not None
        cost = 1.0 if chosen.column == "cheap" else 4.0
        scheduler.account(chosen, cost)
        used[str(chosen.column)] += cost
    assert 0.8 < used["cheap"] / used["dear"] < 1.25


def test_a_column_that_comes_back_after_long_is_not_paid_for_its_absence() -> None:
    """What was used long ago is forgotten, so a newcomer does not push the others out for as long as they ran."""
    scheduler = Scheduler()
    old, new = Candidate("old", Work.LIVE, 0), Candidate("new", Work.LIVE, 0)
    spend(scheduler, [old], 10_000)
    assert spend(scheduler, [old, new], 200)[old] > 0


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(CANDIDATES, st.floats(0, 100)), max_size=60))
def test_whoever_is_chosen_has_work_and_the_highest_priority_of_its_class(
    turns: list[tuple[list[Candidate], float]],
) -> None:
    scheduler = Scheduler()
    for candidates, cost in turns:
        chosen = scheduler.choose(candidates)
        if chosen is None:
            assert not candidates
            continue
        assert chosen in candidates
        assert chosen.priority == max(one.priority for one in candidates if one.work is chosen.work)
        scheduler.account(chosen, cost)
