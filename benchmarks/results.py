"""A results file: what was run, where, with which settings, every repetition, and what they come to."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, idle_share
from benchmarks.measuring import Measurement, Values, in_turn, interval, ratios, spread, summary

FOLDER = Path(__file__).parent / "results"


@dataclass
class Result:
    """What a benchmark gives. `derived` are ratios between variants, each a list of one number a turn."""

    name: str
    title: str
    settings: Mapping[str, Any]
    measurements: list[Measurement] = field(default_factory=list)
    derived: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=environment)

    def measure(self, variants: Mapping[str, Any], repetitions: int) -> None:
        """Run `variants` in turn and keep every repetition."""
        idle = partial(idle_share, self.settings.get("idle_s", 0.5))
        self.measurements += in_turn(variants, repetitions, idle=idle, report=self.say)

    def add(self, variant: str, repetition: int, idle: float, values: Values) -> None:
        """Keep one repetition that the benchmark ran by itself."""
        self.measurements.append(Measurement(variant, repetition, idle, dict(values)))
        self.say(self.measurements[-1])

    def ratio(self, label: str, measure: str, of: str, to: str, goal: str = "") -> None:
        """Keep `of` ÷ `to` in `measure`, turn by turn; nothing where they were never measured together."""
        found = ratios(self.measurements, measure, of, to)
        if found:
            self.derived[label] = {
                "values": found,
                **asdict(spread(found)),
                "interval_95": asdict(interval(found)),
                "goal": goal,
                "is": f"{measure} of {of} / {measure} of {to}",
            }

    def say(self, measurement: Measurement) -> None:
        """A line for whoever waits."""
        values = "  ".join(f"{key}={value:,.4g}" for key, value in measurement.values.items())
        print(f"  {measurement.repetition}  {measurement.variant:34s} {values}", flush=True)

    def document(self, command: str) -> dict[str, Any]:
        """As it is written to the file; what is not a number becomes null."""
        document: dict[str, Any] = _plain(
            {
                "name": self.name,
                "title": self.title,
                "command": command,
                "environment": self.environment,
                "settings": dict(self.settings),
                "summary": summary(self.measurements),
                "derived": self.derived,
                "notes": self.notes,
                "measurements": [asdict(measurement) for measurement in self.measurements],
            }
        )
        return document


def write(result: Result, folder: Path, arguments: Sequence[str] | None = None) -> Path:
    """Write `result` as `<name>.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if arguments is None else arguments
    path = folder / f"{result.name}.json"
    document = result.document(" ".join(["python", "-m", "benchmarks", *given]))
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return path


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Every results file of `folder` by its benchmark's name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return None if not math.isfinite(value) else float(f"{value:.6g}")
    return value
