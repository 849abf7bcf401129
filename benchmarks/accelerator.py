"""A simulated accelerator: `fake` with a delay for each text, slept with the interpreter's lock released.

It offers so many rows a second and needs no core, as a GPU does. What is achieved of it says whether everything else
keeps up: where the share falls below 0.95 the path is the limit, not the device.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks import stage
from benchmarks.path import watched
from benchmarks.results import Result
from tests.servers import Bench
from tests.service import Service

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"offered": [2_000, 5_000, 10_000, 20_000], "seconds": 5.0, "repetitions": 3},
    "quick": {"offered": [2_000, 10_000, 20_000], "seconds": 1.5, "repetitions": 1},
    "tiny": {"offered": [2_000], "seconds": 0.5, "repetitions": 1, "idle_s": 0.0},
}

GOAL = 0.95


def run(settings: dict[str, Any]) -> Result:
    result = Result("accelerator", "A simulated accelerator: achieved of what it offers", settings)
    with stage.database() as bench, stage.serving(bench) as service:
        service.wait_for_log("streaming from the slot")
        turns = iter(range(1000))
        for offered in settings["offered"]:
            stage.make_model(bench, f"fake_{offered}", delay_per_text_s=1 / offered)
        result.measure(
            {
                f"{offered} rows/s": partial(_backfill, bench, service, turns, offered, settings["seconds"])
                for offered in settings["offered"]
            },
            settings["repetitions"],
        )
    for offered in settings["offered"]:
        shares = [m.values["achieved_to_offered"] for m in result.measurements if m.variant == f"{offered} rows/s"]
        if sorted(shares)[len(shares) // 2] < GOAL:
            result.notes.append(f"it breaks at {offered} rows/s: less than {GOAL} of it is achieved")
            break
    else:
        result.notes.append(f"it does not break up to {settings['offered'][-1]} rows/s")
    result.notes.append("a backfill, 384 dimensions, 300 bytes a text; the fake's own hash takes part of our core")
    return result


def _backfill(bench: Bench, service: Service, turns: Any, offered: int, seconds: float) -> dict[str, float]:
    table, rows = f"accelerated_{next(turns)}", int(offered * seconds)
    stage.make_table(bench, table, rows)
    bench.admin.execute(f"VACUUM ANALYZE {table}")
    stage.settle(bench)
    column = stage.configure(bench, table, f"fake_{offered}")
    found = watched(bench, service, column, rows)
    stage.drop(bench, table)
    return {"achieved_to_offered": found["rows_per_s"] / offered} | found
