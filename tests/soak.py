"""`python -m tests.soak --minutes N [--seed S]`: the model-based test for as long as wanted, on each plugin by turns.

The steps follow from the seed, their timing does not. A violation ends the run with exit status 1; it is told with its
steps, the end of the service's log, and the seed of its round. What this machine lacks is named.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hypothesis import settings

from cdc_embedder.errors import Misconfigured
from tests import servers
from tests.faults.machine import SPILL_AFTER_S, UNBOUNDED, Worlds, run
from tests.faults.model import Violation, World

KINDS = tuple(SPILL_AFTER_S)

ROUND = settings(UNBOUNDED, max_examples=10, stateful_step_count=40)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="The model-based test, for long.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, help="of the first round; each next one adds 1 (default: by chance)")
    parser.add_argument("--only", choices=KINDS, help="server and plugin (default: all, by turns)")
    arguments = parser.parse_args()
    first = random.SystemRandom().randrange(10**9) if arguments.seed is None else arguments.seed
    end = time.monotonic() + 60 * arguments.minutes
    print(f"seed {first}, {arguments.minutes:g} minutes", flush=True)
    operations: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    violations = examples = 0
    with ExitStack() as stack:
        all_worlds = [
            (kind, worlds)
            for kind in ([arguments.only] if arguments.only else KINDS)
            if (worlds := stack.enter_context(_worlds(kind))) is not None
        ]
        if not all_worlds:
            return 1
        for number, (kind, worlds) in enumerate(itertools.cycle(all_worlds), first):
            if violations or time.monotonic() >= end:
                break
            began = time.monotonic()
            try:
                run(worlds, ROUND, number, end)
            except Violation as violation:
                violations += 1
                print(f"VIOLATION on {kind}, seed {number}: {violation}", flush=True)
            world = worlds.world
            operations += world.operations
            faults += world.faults
            examples += worlds.examples
            print(
                f"seed {number} on {kind}: {worlds.examples} examples, {world.operations.total()} operations,"
                f" {world.faults.total()} faults, {time.monotonic() - began:.0f} s",
                flush=True,
            )
            worlds.count_anew()
    print(f"examples    {examples}")
    print(f"operations  {operations.total()}: {_listed(operations)}")
    print(f"faults      {faults.total()}: {_listed(faults)}")
    print(f"violations  {violations}")
    print(f"seed        {first}")
    return 1 if violations else 0


@contextmanager
def _worlds(kind: str) -> Iterator[Worlds | None]:
    major, plugin = kind.split("-")
    try:
        bindir = {"15": servers.bindir_15, "18": servers.bindir_18}[major]()
        if plugin == "wal2json" and not servers.WAL2JSON_15.exists():
            raise Misconfigured("wal2json (package postgresql-15-wal2json)")
    except Misconfigured as missing:
        print(f"not run: this machine lacks {missing}")
        yield None
        return
    with servers.bench_with(bindir, plugin, {}) as bench, tempfile.TemporaryDirectory() as folder:
        worlds = Worlds(World(bench, Path(folder), SPILL_AFTER_S[kind]))
        try:
            yield worlds
        finally:
            worlds.close()


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())


if __name__ == "__main__":
    sys.exit(main())
