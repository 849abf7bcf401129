"""What is counted, against the same counted plainly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdc_embedder.embedding.base import Spent
from cdc_embedder.metering import Histogram, Meters, ModelMeter


@given(st.lists(st.lists(st.floats(0, 4000), max_size=5), max_size=20))
def test_a_histogram_counts_what_is_at_or_below_each_bound(batches: list[list[float]]) -> None:
    histogram = Histogram((0.5, 1, 30, 1800))
    for batch in batches:
        histogram.observe(*batch)
    values = [value for batch in batches for value in batch]
    expected = [(bound, sum(value <= bound for value in values)) for bound in (0.5, 1, 30, 1800, float("inf"))]
    assert histogram.cumulative() == expected
    assert abs(histogram.sum - sum(values)) < 1e-6


def test_a_device_that_cannot_tell_is_busy_with_any_call_and_counted_once() -> None:
    meter = ModelMeter()
    for began, ended in ((0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (10.0, 11.0)):
        meter.called(1, 5, Spent(), began, ended)
    assert meter.busy_s == 4.0
    assert (meter.calls, meter.tokens) == (4, 20)
    meter.called(1, 5, Spent(device_s=0.25), 11.0, 12.0)
    assert meter.busy_s == 4.25


def test_what_calls_cost_adds_up_where_it_is_known() -> None:
    assert Spent(1, 0.5, None) + Spent(2, 0.25, None) == Spent(3, 0.75, None)
    assert Spent(1, 0.5, None) + Spent(2, 0.25, 1.0) == Spent(3, 0.75, 1.0)
    assert Spent(1, 0.5, 2.0) + Spent(2, 0.25, 1.0) == Spent(3, 0.75, 3.0)


def test_the_time_of_a_call_is_either_tokenizing_or_embedding() -> None:
    meters = Meters()
    meters.called("m", 3, 30, Spent(tokenizing_s=0.5), 10.0, 12.0)
    meters.called("m", 3, 30, Spent(tokenizing_s=0.5), 20.0, 20.25)  # a worker's clock may say more than ours
    assert meters.stages == {"tokenizing": 1.0, "embedding": 1.5}
    assert meters.model("m").rows.cumulative()[1:3] == [(2, 0), (4, 2)]
