"""The command line as a process of its own, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.service import PATIENCE_S


def cli(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m cdc_embedder arguments…` with these settings and no others; no traceback may ever be seen."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CDC_EMBEDDER_", "PG"))}
    done = subprocess.run(
        [sys.executable, "-m", "cdc_embedder", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env=inherited | {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "160"} | environment,
        timeout=PATIENCE_S,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def asked(bench: Any, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command on the bench's database, as the superuser unless the environment says otherwise."""
    return cli(*arguments, **({"CDC_EMBEDDER_DSN": bench.dsn_admin, "CDC_EMBEDDER_SLOT": bench.slot} | environment))


def succeeds(bench: Any, *arguments: str, **environment: str) -> str:
    """What a command that must succeed prints."""
    done = asked(bench, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(bench: Any, *arguments: str, **environment: str) -> str:
    """The one sentence of a command that must fail: on standard error, with exit status 1."""
    done = asked(bench, *arguments, **environment)
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("cdc-embedder: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def answers(bench: Any, *arguments: str, **environment: str) -> Any:
    """What a command prints as JSON."""
    return json.loads(succeeds(bench, *arguments, "--json", **environment))
