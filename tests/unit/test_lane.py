"""How big a step is, and what a column's state is called: the words that `status` shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_embedder.catalog import EmbeddingColumn, Target
from cdc_embedder.embedding.base import ModelSpec
from cdc_embedder.embedding.fake import FakeEmbedder
from cdc_embedder.lane import Lane, ScanProgress, Size
from cdc_embedder.pending import Pending, Work
from cdc_embedder.routing import Route
from cdc_embedder.watermark import Watermark

MODEL = ModelSpec("tiny", 4, backend="fake")

COLUMN = EmbeddingColumn(
    id=1,
    table_oid=100,
    schema="public",
    table="document",
    stored_name=("public", "document"),
    relations=frozenset({("public", "document")}),
    key=(),
    sources=("body",),
    separator="\n\n",
    template=None,
    target=Target("embedding", "vector", "vector(4)", 5),
    model=MODEL,
    generation=1,
    enabled=True,
    on_existing="ask",
    priority=0,
    partitioned=False,
    unlogged=False,
    published=True,
    keys_only=False,
    fires_triggers=False,
    fires_always=False,
    refuses_updates=False,
    moved=False,
    storage=1,
    fault=None,
)


def new_lane(column: EmbeddingColumn = COLUMN) -> Lane:
    pending = Pending(Watermark())
    return Lane(column, pending, Route(100, column.relations, ("id",), pending))


@pytest.fixture
def lane() -> Lane:
    """A served column whose first scan counted."""
    made = new_lane()
    made.served, made.covered, made.scan.counted = True, True, True
    return made


def test_a_column_is_backfilling_until_its_first_scan_counted(lane: Lane) -> None:
    lane.scan.counted = False
    assert lane.state == ("backfilling", "")
    lane.scan.counted = True
    assert lane.state == ("live", "")


def test_a_routine_scan_is_nothing_that_a_column_waits_for(lane: Lane) -> None:
    lane.scan = ScanProgress(running=True, routine=True, counted=True)
    assert lane.state == ("live", "")
    lane.scan.wanted = True
    assert lane.state == ("backfilling", "")


def test_a_doubt_voids_what_every_scan_has_counted_so_far(lane: Lane) -> None:
    lane.barrier = 7
    lane.cast_doubt()
    found = lane.barrier, lane.doubts, lane.scan.wanted, lane.scan.counted
    assert repr(found) == "(None, 1, True, False)"


def test_what_is_outstanding_is_in_memory_or_in_the_backlog(lane: Lane) -> None:
    assert lane.outstanding == 0
    lane.pending.want(("scanned",), Work.SCAN, 0.0)
    lane.backlog = 3
    assert lane.outstanding == 4
    lane.pending.restore(("1",), 1, None, None, 0.0)
    assert lane.outstanding == 4, "a key that was taken up again counts once"
    lane.backlog = 0
    assert lane.outstanding == 2


def test_a_lane_that_forgets_looks_at_its_backlog_from_the_start_again(lane: Lane) -> None:
    lane.pending.restore(("1",), 1, None, None, 0.0)
    lane.backlog, lane.drained, lane.settled = 3, 1, [(("2",), 2)]
    lane.forget()
    assert (len(lane.pending), lane.backlog, lane.drained, lane.settled) == (0, 3, 0, [])


@pytest.mark.parametrize("scan", [ScanProgress(wanted=True, counted=True), ScanProgress(running=True, counted=True)])
def test_a_column_is_backfilling_while_another_scan_is_wanted_or_runs(lane: Lane, scan: ScanProgress) -> None:
    lane.scan = scan
    assert lane.state == ("backfilling", "")


@pytest.mark.parametrize(
    ("happen", "state"),
    [
        (lambda lane: setattr(lane, "fault", "broken"), ("error", "broken")),
        (lambda lane: setattr(lane, "paused", "holds vectors"), ("paused", "holds vectors")),
        (lambda lane: setattr(lane, "column", replace(COLUMN, enabled=False)), ("paused", "paused")),
        (lambda lane: setattr(lane, "uncovered", "not published"), ("error", "not published")),
        (lambda lane: setattr(lane, "trouble", "embedder away"), ("live", "embedder away")),
        (lambda lane: setattr(lane, "waiting_for", "old transactions"), ("live", "old transactions")),
    ],
)
def test_each_trouble_has_its_state_and_its_reason(
    lane: Lane, happen: Callable[[Lane], None], state: tuple[str, str]
) -> None:
    happen(lane)
    assert lane.state == state


def test_a_fault_outranks_a_pause_and_a_pause_outranks_a_backfill(lane: Lane) -> None:
    lane.scan.running = True
    lane.column = replace(COLUMN, enabled=False)
    assert lane.state[0] == "paused"
    lane.fault = "broken"
    assert lane.state == ("error", "broken")


def test_reasons_are_told_together(lane: Lane) -> None:
    lane.scan.running = True
    lane.uncovered, lane.trouble, lane.waiting_for = "a", "b", "c"
    assert lane.state == ("backfilling", "a; b; c")


def test_a_column_that_no_stream_can_cover_is_live_after_a_scan() -> None:
    unlogged = new_lane(replace(COLUMN, unlogged=True))
    unlogged.covered, unlogged.uncovered = False, "unlogged: scans only"
    assert unlogged.state == ("live", "unlogged: scans only")


def test_a_logged_column_without_a_stream_is_an_error_even_though_scans_feed_it() -> None:
    unpublished = new_lane()
    unpublished.covered, unpublished.uncovered = False, "run: ALTER PUBLICATION"
    assert unpublished.state == ("error", "run: ALTER PUBLICATION")


def test_a_lane_is_ready_when_it_is_served_has_a_model_and_rests_no_more(lane: Lane) -> None:
    assert not lane.ready(0.0)
    lane.embedder = FakeEmbedder(MODEL)
    assert lane.ready(0.0)
    lane.breaker.failed(0.0, rest=5.0)
    assert [lane.ready(now) for now in (4.9, 5.0)] == [False, True]
    lane.served = False
    assert not lane.ready(6.0)


def test_a_scan_is_drained_when_the_last_key_that_it_found_was_judged(lane: Lane) -> None:
    assert lane.scan_drained()
    lane.pending.want(("1",), Work.SCAN, 0.0)
    taken = lane.pending.take(Work.SCAN, 1, 0.0)
    assert not lane.scan_drained()
    lane.pending.give_back(taken, 0.0, 5.0)
    assert not lane.scan_drained()
    lane.pending.finish(lane.pending.take(Work.SCAN, 1, 5.0))
    assert lane.scan_drained()


SIZES = st.builds(
    Size, rows=st.integers(16, 64), lowest=st.integers(1, 16), highest=st.integers(64, 1024), seconds=st.just(0.25)
)


@settings(deadline=None)
@given(SIZES, st.lists(st.tuples(st.integers(0, 2000), st.one_of(st.floats(0, 0.2), st.floats(0, 100))), max_size=30))
def test_a_size_stays_within_its_bounds_and_grows_only_by_full_quick_steps(
    size: Size, steps: list[tuple[int, float]]
) -> None:
    for rows, elapsed in steps:
        before = size.rows
        size.took(rows, elapsed)
        assert size.lowest <= size.rows <= size.highest
        if rows < before or elapsed >= size.seconds / 2:
            assert size.rows <= before
        else:
            assert size.rows == min(2 * before, size.highest)


@pytest.mark.parametrize(
    ("rows", "elapsed", "after"),
    [(100, 1.0, 25), (100, 0.26, 96), (50, 0.5, 25), (100, 0.2, 100), (100, 0.1, 200), (99, 0.1, 100), (1, 9.0, 1)],
)
def test_a_size_follows_what_a_step_took(rows: int, elapsed: float, after: int) -> None:
    size = Size(100, 1, 1000, 0.25)
    size.took(rows, elapsed)
    assert size.rows == after


def test_a_size_ends_at_its_bounds() -> None:
    size = Size(100, 16, 150, 0.25)
    size.took(150, 0.0)
    assert size.rows == 150
    size.took(150, 60.0)
    assert size.rows == 16


def test_whatever_a_row_takes_the_size_settles_so_that_a_step_takes_its_time() -> None:
    for row_seconds in (0.0002, 0.001, 0.03, 0.2):
        size = Size(16, 1, 1024, 0.25)
        for _ in range(40):
            size.took(size.rows, size.rows * row_seconds)
        assert size.rows * row_seconds <= 0.25
        assert size.rows == 1024 or size.rows * row_seconds >= 0.1


def test_a_part_of_a_step_makes_it_grow_as_a_full_one_does_and_no_less_rows_do() -> None:
    size = Size(16, 1, 1024, 0.25, calls=True)
    assert size.part(0.2) == 3
    for _ in range(6):
        size.took(size.part(0.2), 0.002, 0.2)
    assert size.rows == 1024
    small = Size(16, 1, 1024, 0.25, calls=True)
    small.took(2, 0.002, 0.2)
    assert (small.rows, Size(1, 1, 1024, 0.25).part(0.2)) == (16, 1)
