"""Proof that the tests can fail: each mistake of `mutants` is made in a copy, and the test that must tell does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.mutants import MUTANTS, Edit, Mutant

ROOT = Path(__file__).parents[2]

COPIED = ("cdc_embedder", "sql", "tests", "pyproject.toml")

GUARD = """
from pathlib import Path

import cdc_embedder

assert Path(cdc_embedder.__file__).is_relative_to(Path(__file__).parent), "these are not the mutant's tests"
"""


def copy(to: Path) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, to / name)
    (to / "conftest.py").write_text(GUARD)


def make(edit: Edit, root: Path) -> None:
    file = root / "cdc_embedder" / edit.file
    before = file.read_text()
    assert before.count(edit.old) == 1, f"{edit.file} has changed: {edit.old!r} is there {before.count(edit.old)} times"
    after = before.replace(edit.old, edit.new)
    compile(after, edit.file, "exec")
    file.write_text(after)


def run(root: Path, test: str) -> subprocess.CompletedProcess[str]:
    """The test in the copy; what it starts imports from there too."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", test, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"],
        cwd=root,
        env=environment | {"PYTHONPATH": str(root), "TESTS_PATIENCE_S": "60"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=290,
    )


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_a_mutant_is_caught(mutant: Mutant, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not mutant.caught_by.startswith("tests/unit/"):
        request.getfixturevalue("pg15" if "[15-" in mutant.caught_by else "pg18")  # skips where there is none
    tmp_path.chmod(0o755)
    copy(tmp_path)
    for edit in mutant.edits:
        make(edit, tmp_path)
    result = run(tmp_path, mutant.caught_by)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    [summary] = re.findall(r"^(?:=+ )?(\d+ \w+.* in [\d.]+s.*)$", result.stdout, re.MULTILINE)
    assert re.fullmatch(r"1 failed in .*", summary), result.stdout
    assert any(said in result.stdout for said in mutant.says), result.stdout


def test_mutants_have_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
