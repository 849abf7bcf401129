"""One picture a results file: the medians of its first measures by variant, with their extremes. Needs matplotlib."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

MEASURES: dict[str, tuple[str, ...]] = {
    "pipeline": ("rows_per_s",),
    "accelerator": ("achieved_to_offered",),
    "path": ("rows_per_s", "client_us", "server_us"),
    "latency": ("p50_ms", "p99_ms"),
    "embed": ("p50_ms", "p99_ms"),
    "price": ("p50_ms", "p99_ms", "tps"),
    "writeback": ("rows_per_s", "wal_bytes_per_row"),
    "gpu": ("docs_per_s", "mfu"),
}
"""What is drawn of each benchmark, a panel each."""

_WIDE = 12.0


def plot(results: Path) -> Path | None:
    """Draw `results` as an SVG beside it; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    document = json.loads(results.read_text())
    measures = [m for m in MEASURES.get(document["name"], ()) if bars(document, m)]
    if not measures:
        return None
    tallest = max(len(bars(document, measure)) for measure in measures)
    figure = Figure(figsize=(_WIDE, 1.2 + 0.3 * tallest), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        drawn = bars(document, measure)[::-1]
        medians = [spread["median"] for _, spread in drawn]
        below = [spread["median"] - spread["minimum"] for _, spread in drawn]
        above = [spread["maximum"] - spread["median"] for _, spread in drawn]
        axes.barh([name for name, _ in drawn], medians, xerr=[below, above], color="#4477aa", ecolor="#222222")
        axes.set_title(measure)
        axes.tick_params(labelsize=8)
    environment = document["environment"]
    figure.suptitle(
        f"{document['title']}: {environment['cpu']}, {environment['cores']} cores, {environment['date'][:10]}"
    )
    path = results.with_suffix(".svg")
    figure.savefig(path, metadata={"Date": None})
    return path


def bars(document: dict[str, Any], measure: str) -> list[tuple[str, dict[str, Any]]]:
    """Variants that have `measure`, in the order in which they were measured."""
    return [
        (variant, measures[measure])
        for variant, measures in document["summary"].items()
        if measure in measures and measures[measure]["median"] is not None
    ]
