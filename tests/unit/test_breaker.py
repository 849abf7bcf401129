"""Rule 7: trouble of the device or the network opens the circuit, and rows are not charged with it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdc_embedder.breaker import FIRST_SECONDS, LONGEST_SECONDS, Breaker


def test_a_new_breaker_is_closed() -> None:
    assert Breaker().state(0.0) == "closed"


def test_a_failure_opens_it_until_its_rest_is_over_and_then_one_may_try() -> None:
    breaker = Breaker()
    rest = breaker.failed(100.0)
    assert FIRST_SECONDS / 2 <= rest <= FIRST_SECONDS
    states = [breaker.state(100.0 + passed) for passed in (0.0, rest * 0.99, rest * 1.01, 1e6)]
    assert states == ["open", "open", "half-open", "half-open"]


def test_a_success_closes_it_and_the_next_failure_rests_as_the_first_did() -> None:
    breaker = Breaker()
    for _ in range(9):
        breaker.failed(0.0)
    breaker.succeeded()
    assert breaker.state(0.0) == "closed"
    assert breaker.failed(0.0) <= FIRST_SECONDS


@given(st.integers(1, 2000))
def test_each_rest_is_about_twice_the_one_before_and_never_longer_than_a_minute(failures: int) -> None:
    breaker = Breaker(failures=failures - 1)
    longest = min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(failures - 1, 100))
    assert longest / 2 <= breaker.failed(0.0) <= longest


def test_a_pause_that_the_other_side_asked_for_is_kept_to() -> None:
    breaker = Breaker()
    assert breaker.failed(10.0, rest=30.0) == 30.0
    assert [breaker.state(now) for now in (39.9, 40.0)] == ["open", "half-open"]


@given(st.integers(1, 50), st.sampled_from([0.0, 0.001, 1e9, float("inf")]))
def test_what_the_other_side_asked_for_is_no_pause_at_all_and_no_end(failures: int, asked: float) -> None:
    """`Retry-After: 0` would have it asked without a pause for ever, and `inf` never again."""
    breaker = Breaker(failures=failures - 1)
    assert FIRST_SECONDS / 2 <= breaker.failed(0.0, rest=asked) <= 3600.0
    assert breaker.state(3601.0) == "half-open"
