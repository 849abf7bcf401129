"""Repetitions in turn, and what they come to: a median with its extremes, a ratio with its interval. No I/O.

Machines drift: variants are measured in turn (A B C, A B C …), and only what was measured in the same turn is compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Values = Mapping[str, float]

_STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom; 1.96 from there on is near enough."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One repetition of one variant. `idle`: the share of the machine that was idle just before."""

    variant: str
    repetition: int
    idle: float
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Spread:
    """What several repetitions gave."""

    median: float
    minimum: float
    maximum: float
    repetitions: int


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean ratio and its 95 % confidence interval; of a single value there is none, and the bounds are the value."""

    mean: float
    low: float
    high: float


def in_turn(
    variants: Mapping[str, Callable[[], Values]],
    repetitions: int,
    *,
    idle: Callable[[], float] = lambda: math.nan,
    report: Callable[[Measurement], None] = lambda _: None,
) -> list[Measurement]:
    """Run every variant once a turn; the order turns around with each turn, so that none always goes first."""
    measurements = []
    for repetition in range(repetitions):
        names = list(variants) if repetition % 2 == 0 else list(variants)[::-1]
        for name in names:
            before = idle()
            values = {key: float(value) for key, value in variants[name]().items()}
            measurements.append(Measurement(name, repetition, before, values))
            report(measurements[-1])
    return measurements


def spread(values: Iterable[float]) -> Spread:
    """Median and extremes. Raises ValueError where there is nothing."""
    known = sorted(values)
    if not known:
        raise ValueError("nothing was measured")
    return Spread(statistics.median(known), known[0], known[-1], len(known))


def summary(measurements: Sequence[Measurement]) -> dict[str, dict[str, dict[str, Any]]]:
    """Variant → measure → spread, in the order of their first appearance."""
    gathered: dict[str, dict[str, list[float]]] = {}
    for measurement in measurements:
        of_variant = gathered.setdefault(measurement.variant, {})
        for key, value in measurement.values.items():
            of_variant.setdefault(key, []).append(value)
    return {
        variant: {key: asdict(spread(values)) for key, values in of_variant.items()}
        for variant, of_variant in gathered.items()
    }


def ratios(measurements: Sequence[Measurement], measure: str, of: str, to: str) -> list[float]:
    """`measure` of variant `of` ÷ that of `to`, one a turn in which both were measured."""
    by_turn = {(m.variant, m.repetition): m.values[measure] for m in measurements if measure in m.values}
    turns = sorted({turn for variant, turn in by_turn if variant == of and (to, turn) in by_turn})
    return [by_turn[of, turn] / by_turn[to, turn] for turn in turns]


def interval(values: Sequence[float]) -> Interval:
    """The mean of ratios, taken over their logarithms, with Student's interval. Raises ValueError without values."""
    if not values:
        raise ValueError("nothing was measured")
    logs = [math.log(max(value, 1e-9)) for value in values]
    middle, count = statistics.fmean(logs), len(logs)
    if count < 2:
        return Interval(values[0], values[0], values[0])
    margin = _STUDENT_95.get(count - 1, 1.96) * statistics.stdev(logs) / math.sqrt(count)
    return Interval(math.exp(middle), math.exp(middle - margin), math.exp(middle + margin))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of all are not above; NaN where there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
