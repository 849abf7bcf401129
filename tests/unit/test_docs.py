"""Documentation that names a test must name one that there is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_documentation_names_exists() -> None:
    there = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    named = {name for file in (ROOT / "docs").glob("*.md") for name in re.findall(r"`(test_\w+)`", file.read_text())}
    assert len(named) > 50
    assert named - there == set()


def test_the_sql_files_can_be_installed_in_a_database_of_any_encoding() -> None:
    for file in (ROOT / "sql").rglob("*.sql"):
        assert file.read_text().isascii(), file
