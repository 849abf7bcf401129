"""What the benchmarks compute, and one of them run at its smallest; the README's table is what the results give."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table
from benchmarks.latency import commit
from benchmarks.measuring import Measurement, in_turn, interval, percentile, ratios, spread, summary
from benchmarks.price import latencies
from benchmarks.results import FOLDER, Result, read, write
from benchmarks.shapes import LENGTHS, SHAPES, mixed, operations

README = Path(__file__).parents[2] / "README.md"


def test_the_median_and_extremes_are_those_of_the_values_in_any_order() -> None:
    found = spread([3.0, 1.0, 2.0, 10.0])
    assert (found.median, found.minimum, found.maximum, found.repetitions) == (2.5, 1.0, 10.0, 4)
    with pytest.raises(ValueError, match="nothing"):
        spread([])


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.95, 95), (0.99, 99), (1.0, 100), (0.0, 1)])
def test_a_percentile_is_a_value_that_was_measured(share: float, value: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == value
    assert percentile([3, 1, 2], 0.5) == 2
    assert math.isnan(percentile([], share))


def test_variants_are_measured_in_turn_and_none_always_goes_first() -> None:
    order: list[str] = []

    def measured(name: str) -> dict[str, float]:
        order.append(name)
        return {"value": len(order)}

    measurements = in_turn({name: lambda name=name: measured(name) for name in "ABC"}, 2)  # type: ignore[misc]
    assert order == list("ABCCBA")
    assert [m.repetition for m in measurements] == [0, 0, 0, 1, 1, 1]
    assert summary(measurements)["A"]["value"] == {"median": 3.5, "minimum": 1, "maximum": 6, "repetitions": 2}


def test_a_ratio_compares_only_what_was_measured_in_the_same_turn() -> None:
    measurements = [
        Measurement("ours", 0, 1.0, {"rate": 10.0}),
        Measurement("bare", 0, 1.0, {"rate": 20.0}),
        Measurement("bare", 1, 1.0, {"rate": 1000.0}),
        Measurement("ours", 2, 1.0, {"rate": 30.0, "other": 5.0}),
        Measurement("bare", 2, 1.0, {"rate": 40.0}),
    ]
    assert ratios(measurements, "rate", "ours", "bare") == [0.5, 0.75]
    assert ratios(measurements, "other", "ours", "bare") == []


def test_an_interval_holds_its_mean_and_is_students() -> None:
    found = interval([0.5, 2.0])
    # two values at a distance of log 4: mean 1, margin 12.706 * log(4) / sqrt(2) / sqrt(2)
    assert found.mean == pytest.approx(1.0)
    assert found.high == pytest.approx(math.exp(12.706 * math.log(4) / 2))
    assert found.low == pytest.approx(1 / found.high)
    assert interval([0.9]) == interval([0.9, 0.9, 0.9])


def test_a_results_file_holds_every_repetition_and_what_was_run(tmp_path: Path) -> None:
    result = Result("price", "A title", {"rows": 3})
    for turn, (bare, ours) in enumerate([(100.0, 97.0), (50.0, 50.0)]):
        result.add("bare", turn, 0.9, {"tps": bare})
        result.add("ours", turn, 0.8, {"tps": ours, "lost": math.nan})
    result.ratio("ours / bare", "tps", "ours", "bare", ">= 0.97")
    result.ratio("peer / bare", "tps", "peer", "bare")
    path = write(result, tmp_path, ["price", "--quick"])
    document = read(tmp_path)["price"]
    assert document == json.loads(path.read_text())
    assert document["command"] == "python -m benchmarks price --quick"
    assert document["derived"]["ours / bare"]["values"] == [0.97, 1.0]
    assert "peer / bare" not in document["derived"]
    assert [m["values"]["tps"] for m in document["measurements"]] == [100, 97, 50, 50]
    assert document["measurements"][1]["values"]["lost"] is None
    assert {"date", "commit", "cpu", "cores", "packages", "python"} <= document["environment"].keys()


def test_pgbenchs_latency_is_without_the_time_that_a_transaction_began_late() -> None:
    assert latencies(["0 1 1500 0 1700000000 1 500", "1 1 3000 0 1700000000 2 0"]) == {
        "mean_ms": 2.0,
        "p50_ms": 1.0,
        "p99_ms": 3.0,
        "lag_ms": 0.0,
    }
    assert latencies(["0 1 1500 0 1700000000 1"])["mean_ms"] == 1.5


@pytest.mark.parametrize("origin", ["", "; origin: node 1, lsn 0/0, at 2026-11-23 04:00:00.000000 UTC"])
def test_a_commits_time_is_its_own_and_not_its_origins(origin: str) -> None:
    line = (
        "rmgr: Transaction len (rec/tot):     46/    46, tx:        745, lsn: 0/01A2B3C8, prev 0/01A2B388, "
        f"desc: COMMIT 2026-11-23 04:50:16.123456 UTC{origin}"
    )
    assert commit(line) == (745, pytest.approx(1795409416.123456, abs=1e-6))


# docs/s x GFLOP of a text, from the roofline of each model: 2 x layers x (4 h^2 + k h f) and attention's 4 n h a token
@pytest.mark.parametrize(
    ("name", "dense", "attention", "gflop"),
    [
        ("all-MiniLM-L6-v2", 21.2e6, 9_216, (0.342, 1.40, 2.87, 6.04, 13.3)),
        ("e5-small-v2", 42.5e6, 18_432, (0.684, 2.79, 5.74, 12.1, 26.6)),
        ("mxbai-embed-large-v1", 604e6, 98_304, (9.69, 39.1, 78.9, 161, 335)),
        ("gte-large-en-v1.5", 805e6, 98_304, (12.9, 51.9, 105, 213, 438)),
    ],
)
def test_the_operations_of_every_shape_are_those_of_its_roofline(
    name: str, dense: float, attention: int, gflop: tuple[float, ...]
) -> None:
    shape = SHAPES[name]
    assert shape.dense == pytest.approx(dense, rel=2e-3)
    assert shape.operations(1) - shape.dense == attention
    for length, expected in zip(LENGTHS, gflop, strict=True):
        assert shape.operations(length) == pytest.approx(expected * 1e9, rel=5e-3)
    assert operations(shape, [16, 64]) == shape.operations(16) + shape.operations(64)


def test_the_mixture_of_lengths_is_the_same_every_time_and_within_its_bounds() -> None:
    lengths = mixed(1000, 512)
    assert lengths == mixed(1000, 512)
    assert min(lengths) >= 4
    assert max(lengths) == 512
    assert 50 < percentile(lengths, 0.5) < 80


def test_the_table_says_what_was_not_measured_and_what_was() -> None:
    document: dict[str, Any] = {
        "environment": {"cpu": "a CPU", "cores": 2, "commit": "abc", "date": "2026-01-02T03:04:05", "packages": {}},
        "summary": {"18 pgoutput, inserts": {"rows_per_s": {"median": 20123.4}}},
        "derived": {},
    }
    of_a_gpu = {"e5-small-v2, 128, packed": {"mfu": {"median": 0.414}}}
    lines = table.table({"path": document, "gpu": document | {"summary": of_a_gpu}}).splitlines()
    assert "| e5-small-v2 shape, 128 tokens: share of the matmul peak | 41 % | ≥ 35 % | `gpu` |" in lines
    assert "| path without a model, 18 pgoutput, inserts | 20,123 rows/s | ≥ 20,000 | `path` |" in lines
    assert "| path without a model, 15 wal2json, inserts | not measured |  | `path` |" in lines
    assert lines[-1] == "path, gpu: a CPU, 2 cores, commit abc, 2026-01-02."


def test_the_table_stands_between_the_markers_and_nothing_else_changes(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.MARKER}\nold\n{table.END}\nafter\n")
    made = table.update(tmp_path / "none", readme)
    assert table.held(readme.read_text()) == made
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter\n")


def test_the_readmes_table_is_what_the_results_give() -> None:
    found = table.held(README.read_text())
    assert found is not None, "the README has lost its markers"
    assert found == table.table(read(FOLDER)), "python -m benchmarks table"
