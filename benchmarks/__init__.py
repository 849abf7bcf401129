"""What the package costs and what it gains, measured side by side in one run. Not part of the package.

`python -m benchmarks --help` lists them; `docs/benchmarks.md` says how each one measures.
"""
