"""The README's table, made from the results files: a line a claim, with its goal and the command that measures it.

What was not measured says so. `update` puts it between the markers; a test holds the README to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import read

MARKER = "<!-- benchmarks -->"
END = "<!-- /benchmarks -->"
NOT_MEASURED = "not measured"

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """`value` reads it from the results of `benchmark`; a KeyError means that this was not measured."""

    benchmark: str
    what: str
    goal: str
    value: Callable[[Document], str]


def ratio(label: str) -> Callable[[Document], str]:
    def value(document: Document) -> str:
        found = document["derived"][label]
        return f"{found['median']:.2f} ({found['minimum']:.2f}–{found['maximum']:.2f})"

    return value


def interval(label: str) -> Callable[[Document], str]:
    def value(document: Document) -> str:
        found = document["derived"][label]["interval_95"]
        return f"{found['mean']:.2f} (95 %: {found['low']:.2f}–{found['high']:.2f})"

    return value


def median(variant: str, *measures: str, unit: str, digits: int = 0, scale: float = 1.0) -> Callable[[Document], str]:
    def value(document: Document) -> str:
        found = [document["summary"][variant][measure]["median"] * scale for measure in measures]
        return f"{' / '.join(f'{number:,.{digits}f}' for number in found)} {unit}".strip()

    return value


LINES = (
    Line("pipeline", "backfill ÷ best plain `encode`, MiniLM on a CPU, mixed lengths", "≥ 1.3",
         ratio("backfill / best encode")),
    Line("pipeline", "backfill ÷ our engine alone", "≥ 0.95", ratio("backfill / our engine alone")),
    *(Line("accelerator", f"achieved of a simulated accelerator of {rate:,} rows/s", "≥ 0.95" if rate <= 10_000 else "",
           median(f"{rate} rows/s", "achieved_to_offered", unit="", digits=2))
      for rate in (2_000, 5_000, 10_000, 20_000)),
    *(Line("path", f"path without a model, {variant}", goal, median(variant, "rows_per_s", unit="rows/s"))
      for variant, goal in (("18 pgoutput, inserts", "≥ 20,000"), ("18 pgoutput, backfill", "≥ 20,000"),
                            ("15 wal2json, inserts", ""), ("15 wal2json, backfill", ""))),
    Line("path", "CPU of our process / of the server, 18 pgoutput, inserts", "",
         median("18 pgoutput, inserts", "client_us", "server_us", unit="µs a row")),
    *(Line("latency", f"commit to vector, {variant}: p50 / p95 / p99", goal,
           median(variant, "p50_ms", "p95_ms", "p99_ms", unit="ms", digits=1))
      for variant, goal in (*((f"fake, {rate}/s, idle", "p50 ≤ 3, p99 ≤ 20 ms") for rate in (10, 100, 500)),
                            *((f"fake, {rate}/s, backfill", "≤ double") for rate in (10, 100, 500)),
                            *((f"all-MiniLM-L6-v2, {rate}/s, idle", "") for rate in (10, 100, 500)),
                            *((f"all-MiniLM-L6-v2, {rate}/s, backfill", "") for rate in (10, 100, 500)))),
    *(Line("embed", f"a call of embed in SQL, {model}, {server}: p50 / p95 / p99", "",
           median(f"{server}, {model}", "p50_ms", "p95_ms", "p99_ms", unit="ms", digits=1))
      for model in ("fake", "all-MiniLM-L6-v2") for server in ("18 pgoutput", "15 wal2json")),
    Line("embed", "all-MiniLM-L6-v2 alone, one text: p50 / p95 / p99", "",
         median("all-MiniLM-L6-v2 alone", "p50_ms", "p95_ms", "p99_ms", unit="ms", digits=1)),
    *(Line("price", f"{kind}s, {name}: {what} ÷ bare", goal if name == "ours" else "",
           interval(f"{kind}, {name}: {measure} / bare"))
      for kind in ("insert", "update") for name in ("ours", "trigger + queue", "pgai's trigger", "call in trigger")
      for measure, what, goal in (("throughput", "throughput at half load", "≥ 0.97"),
                                  ("mean latency", "mean latency", "≤ 1.03"))),
    *(Line("writeback", f"write-back, {variant}", "", median(variant, "rows_per_s", unit="rows/s"))
      for variant in ("ours, guarded", "unnest, numpy", "executemany", "COPY, staged", "ours, guarded, HNSW")),
    Line("writeback", "log a row: first vector / another", "",
         median("ours, guarded", "wal_bytes_per_row", "again_wal_bytes_per_row", unit="bytes")),
    Line("writeback", "heap after five re-embeddings, vacuumed: fillfactor 100", "",
         median("ours, guarded", "heap_growth", unit="times", digits=2)),
    Line("writeback", "heap after five re-embeddings, vacuumed: fillfactor 50", "",
         median("ours, guarded, fillfactor 50", "heap_growth", unit="times", digits=2)),
    *(Line("gpu", f"{shape} shape, {length} tokens: share of the matmul peak", goal,
           median(f"{shape}, {length}, packed", "mfu", unit="%", digits=0, scale=100))
      for shape, length, goal in (("e5-small-v2", 128, "≥ 35 %"), ("e5-small-v2", 512, "≥ 35 %"),
                                  ("mxbai-embed-large-v1", 128, "≥ 55 %"), ("gte-large-en-v1.5", 128, "≥ 55 %"))),
    Line("gpu", "e5-small-v2 shape, mixed lengths: packed ÷ best `encode`", "≥ 5",
         ratio("e5-small-v2, mixed: packed / best encode")),
)  # fmt: skip


def table(documents: Mapping[str, Document]) -> str:
    """The table and, below it, the machines."""
    rows = ["| what | measured | goal | `python -m benchmarks …` |", "| --- | --- | --- | --- |"]
    for line in LINES:
        rows.append(
            f"| {line.what} | {_value(line, documents.get(line.benchmark))} | {line.goal} | `{line.benchmark}` |"
        )
    machines: dict[str, list[str]] = {}
    for name, document in documents.items():
        machines.setdefault(_machine(document["environment"]), []).append(name)
    below = [f"{', '.join(names)}: {machine}." for machine, names in machines.items()]
    return "\n".join([*rows, *([""] if below else []), *below])


def update(folder: Path, readme: Path) -> str:
    """Write the table between the README's markers, and return it. Without markers nothing is written."""
    made = table(read(folder))
    text = readme.read_text()
    if MARKER in text and END in text:
        head, rest = text.split(MARKER, 1)
        readme.write_text(f"{head}{MARKER}\n{made}\n{END}{rest.split(END, 1)[1]}")
    return made


def held(readme: str) -> str | None:
    """What stands between the markers; None where there are none."""
    if MARKER not in readme or END not in readme:
        return None
    return readme.split(MARKER, 1)[1].split(END, 1)[0].strip("\n")


def _value(line: Line, document: Document | None) -> str:
    if document is None:
        return NOT_MEASURED
    try:
        return line.value(document)
    except (KeyError, TypeError):
        return NOT_MEASURED


def _machine(environment: Mapping[str, Any]) -> str:
    packages = environment.get("packages", {})
    parts = [environment.get("gpu", ""), f"{environment['cpu']}, {environment['cores']} cores",
             f"torch {packages['torch']}" if "torch" in packages else "",
             f"commit {environment['commit']}" if environment.get("commit") else "",
             environment["date"][:10]]  # fmt: skip
    return ", ".join(part for part in parts if part)
