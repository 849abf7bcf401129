"""Rule 2: 32-bit xids against 64-bit snapshots, by arithmetic on the whole numbers. The last test is the wrap."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_embedder.visibility import Snapshot, widen

EPOCH, HALF = 2**32, 2**31
QUICK = settings(deadline=None, max_examples=400)

XIDS = st.one_of(st.integers(3, 2**63), st.integers(0, 4).map(lambda epoch: max(3, epoch * EPOCH)))
DISTANCES = st.one_of(st.integers(-HALF + 1, HALF - 1), st.integers(-5, 5))


@QUICK
@given(near=XIDS, distance=DISTANCES)
def test_an_xid_within_two_billion_of_the_snapshot_gets_its_epoch_back(near: int, distance: int) -> None:
    wide = max(0, near + distance)
    assert widen(wide % EPOCH, near) == wide


@QUICK
@given(near=XIDS, xid=st.integers(0, EPOCH - 1))
def test_the_widened_xid_is_the_nearest_that_is_not_negative(near: int, xid: int) -> None:
    wide = widen(xid, near)
    candidates = [epoch * EPOCH + xid for epoch in range(max(0, near // EPOCH - 1), near // EPOCH + 2)]
    assert wide in candidates
    assert abs(wide - near) == min(abs(candidate - near) for candidate in candidates)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Any snapshot whose transactions in progress lie between its bounds, and so that xmin itself is one of them."""
    xmin = draw(XIDS)
    more = draw(st.sets(st.integers(0, 30), max_size=8))
    xmax = xmin + draw(st.integers(max(more, default=0) + 1, 40))
    return Snapshot(xmin, xmax, frozenset({xmin} | {xmin + step for step in more}))


@QUICK
@given(snapshots(), st.one_of(st.integers(-10, 60), DISTANCES))
def test_a_snapshot_sees_what_had_ended_before_it_was_taken(snapshot: Snapshot, distance: int) -> None:
    wide = snapshot.xmin + distance
    if wide < 0 or abs(wide - snapshot.xmax) >= HALF:
        return
    ended = wide < snapshot.xmax and wide not in snapshot.in_progress
    assert snapshot.sees(wide % EPOCH) is ended


@QUICK
@given(snapshots())
def test_what_the_server_prints_is_read_back(snapshot: Snapshot) -> None:
    running = ",".join(str(xid) for xid in sorted(snapshot.in_progress))
    assert Snapshot.parse(f"{snapshot.xmin}:{snapshot.xmax}:{running}") == snapshot


def test_a_snapshot_with_nothing_in_progress_is_read() -> None:
    assert Snapshot.parse("750:750:") == Snapshot(750, 750, frozenset())


@pytest.mark.parametrize("text", ["", "1", "1:2", "1:2:3:4", "a:2:", "1:2:x", "1::"])
def test_anything_else_is_not_a_snapshot(text: str) -> None:
    with pytest.raises(ValueError, match=r"unpack|invalid literal"):
        Snapshot.parse(text)


def test_a_transaction_that_commits_later_than_a_higher_xid_is_told_apart() -> None:
    snapshot = Snapshot.parse("860:862:860")
    assert (snapshot.sees(860), snapshot.sees(861), snapshot.sees(862)) == (False, True, False)


@pytest.mark.parametrize(
    ("xid", "seen"),
    [(EPOCH - 1, True), (EPOCH - 2, False), (3, True), (4, False), (5, False), (HALF + 6, True), (HALF + 4, False)],
)
def test_across_the_wrap_an_old_high_xid_is_past_and_a_low_one_may_be_ahead(xid: int, seen: bool) -> None:
    snapshot = Snapshot.parse(f"{EPOCH - 2}:{EPOCH + 5}:{EPOCH - 2},{EPOCH + 4}")
    assert snapshot.sees(xid) is seen
