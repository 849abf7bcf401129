"""`python -m benchmarks NAME… [--quick]`: run benchmarks, write their results and plots, and the README's table."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from benchmarks import gpu, table
from benchmarks.plot import plot
from benchmarks.results import FOLDER, write

ON_A_CPU = ("pipeline", "accelerator", "path", "latency", "embed", "price", "writeback")


def main() -> int:
    arguments = _arguments()
    if arguments.names == ["table"]:
        print(table.update(arguments.out or FOLDER, Path(__file__).parents[1] / "README.md"))
        return 0
    size = "tiny" if arguments.tiny else "quick" if arguments.quick else "standard"
    out = arguments.out or (FOLDER if size == "standard" else Path("build") / "benchmarks")
    for name in ON_A_CPU if arguments.names == ["all"] else arguments.names:
        began = time.monotonic()
        print(f"{name} ({size})", flush=True)
        module = importlib.import_module(f"benchmarks.{name}")
        if name == "gpu":
            if (lacking := gpu.lacking(arguments.device)) is not None:
                print(lacking)
                continue
            result = gpu.run(module.SETTINGS[size] | {"device": arguments.device})
        else:
            result = module.run(module.SETTINGS[size])
        path = write(result, out)
        drawn = plot(path)
        for label, ratio in result.derived.items():
            goal = f" (goal {ratio['goal']})" if ratio["goal"] else ""
            print(f"  {label}: {ratio['median']:.3f}{goal}")
        print(f"  {time.monotonic() - began:.0f} s; {path}{f', {drawn}' if drawn else ''}", flush=True)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="+", choices=[*ON_A_CPU, "gpu", "all", "table"], metavar="NAME",
                        help=f"{', '.join(ON_A_CPU)}, gpu; all (but gpu); table: write the README's")  # fmt: skip
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="at most 45 seconds each: to see that it works")
    sizes.add_argument("--tiny", action="store_true", help="the least that runs at all")
    parser.add_argument("--device", default="cuda", help="of the benchmark gpu (default: cuda)")
    parser.add_argument(
        "--out", type=Path, help="where results go (default: benchmarks/results, of smaller runs build)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
