"""Random operations and faults on real servers and the real process: nothing lost, nothing wrong. See `model`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from cdc_embedder.embedded import Server
from tests.faults.machine import SPILL_AFTER_S, UNBOUNDED, Worlds, run
from tests.faults.model import World
from tests.servers import bench_with

BOUNDED = settings(UNBOUNDED, max_examples=7, stateful_step_count=25)

SEEDS = {"15-wal2json": 87, "18-pgoutput": 54}
"""Fixed, so that each run is the same, and chosen so that together they draw every operation and fault."""


@pytest.mark.parametrize("kind", SEEDS)
def test_whatever_happens_every_row_gets_the_vector_of_its_text(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    major, plugin = kind.split("-")
    shared: Server = request.getfixturevalue(f"pg{major}")
    with bench_with(shared.bindir, plugin, {}) as bench:
        worlds = Worlds(World(bench, tmp_path, SPILL_AFTER_S[kind]))

        try:
            run(worlds, BOUNDED, SEEDS[kind])
        finally:
            worlds.close()
