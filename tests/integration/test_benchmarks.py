"""Benchmarks at their smallest: that they run, and that what they give can be written, read and put into the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import accelerator, embed, gpu, table
from benchmarks.results import read, write


@pytest.mark.usefixtures("pg18")
def test_the_simulated_accelerator_runs_at_its_smallest(tmp_path: Path) -> None:
    result = accelerator.run(accelerator.SETTINGS["tiny"])
    (measured,) = result.measurements
    assert measured.variant == "2000 rows/s"
    assert measured.values["rows_per_s"] > 0
    assert {"client_us", "server_us", "achieved_to_offered"} <= measured.values.keys()
    write(result, tmp_path, [])
    shown = table.table(read(tmp_path))
    assert "| achieved of a simulated accelerator of 2,000 rows/s | not measured" not in shown
    assert "| achieved of a simulated accelerator of 2,000 rows/s |" in shown


@pytest.mark.usefixtures("pg18")
def test_calls_of_embed_are_measured_at_their_smallest(tmp_path: Path) -> None:
    result = embed.run(embed.SETTINGS["tiny"])
    assert [measured.variant for measured in result.measurements] == ["18 pgoutput, fake", "fake alone"]
    for measured in result.measurements:
        assert 0 < measured.values["p50_ms"] <= measured.values["p95_ms"] <= measured.values["p99_ms"]
    write(result, tmp_path, [])
    shown = table.table(read(tmp_path))
    assert "| a call of embed in SQL, fake, 18 pgoutput: p50 / p95 / p99 | not measured" not in shown
    assert "| a call of embed in SQL, fake, 15 wal2json: p50 / p95 / p99 | not measured" in shown


def test_the_gpu_suite_runs_on_a_cpu_at_its_smallest() -> None:
    assert gpu.lacking("cpu") is None
    result = gpu.run(gpu.SETTINGS["tiny"] | {"device": "cpu"})
    variants = {measurement.variant for measurement in result.measurements}
    for shape in ("tiny", "tiny, gated"):
        assert {
            f"{shape}, mixed, packed",
            f"{shape}, mixed, padded",
            f"{shape}, mixed, encode, batches of 8",
        } <= variants
        assert {f"{shape}, latency of 1, packed", f"{shape}, latency of 2, padded"} <= variants
        assert result.derived[f"{shape}, mixed: packed / best encode"]["median"] > 0
    assert all(m.values["mfu"] > 0 for m in result.measurements if "mfu" in m.values)
