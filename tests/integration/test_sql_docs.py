"""docs/sql.md against the catalog: every function, table, column and SQLSTATE is in it, and no function besides."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import psycopg
import pytest

from cdc_embedder.install import install
from tests.servers import SERVICE_ROLE, Bench

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "sql.md").read_text()
SIGNATURE = re.compile(r"`((?:cdc_embedder|pgml)\.\w+\([^`]*\) → [^`]+)`")

FUNCTIONS = """
SELECT format('%s.%s(%s) → %s', n.nspname, p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid))
  FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
 WHERE n.nspname = %s AND p.proname !~ '^_'
"""
COLUMNS = """
SELECT c.relname::text, array_agg(a.attname::text) FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
 WHERE c.relnamespace = 'cdc_embedder'::regnamespace AND c.relkind IN ('r', 'v') AND a.attnum > 0 AND NOT a.attisdropped
 GROUP BY 1
"""


def signatures(bench: Bench, schema: str) -> set[str]:
    """Without the casts of defaults; T is a vector's element where a function is there for both."""
    statement = FUNCTIONS.replace("%s.%s(%s) → %s", "%%s.%%s(%%s) → %%s")
    found = [
        re.sub(r"::[a-z][a-z ]*(\[\])?", "", row[0]) for row in bench.admin.execute(statement, (schema,)).fetchall()
    ]
    general = {one: re.sub(r"\b(real|double precision)\b", "T", one) for one in found}
    times = Counter(general.values())
    return {general[one] if times[general[one]] == 2 else one for one in found}


def documented(schema: str) -> set[str]:
    return {found for found in SIGNATURE.findall(DOCS) if found.startswith(schema + ".")}


@pytest.fixture
def everything(bench18: Bench) -> Bench:
    install(bench18.dsn_admin, bench18.slot, owner=SERVICE_ROLE, pgml=True)
    return bench18


def test_every_function_is_documented_as_it_is(everything: Bench) -> None:
    there = signatures(everything, "cdc_embedder")
    assert len(there) > 30
    assert documented("cdc_embedder") == there


def test_pgml_has_what_is_documented_or_has_the_same_name_here(everything: Bench) -> None:
    there, ours = signatures(everything, "pgml"), documented("cdc_embedder")
    assert documented("pgml") - there == set()
    assert {
        found for found in there - documented("pgml") if found.replace("pgml.", "cdc_embedder.", 1) not in ours
    } == set()


def test_every_table_and_column_is_documented(everything: Bench) -> None:
    sections = dict(re.findall(r"^### `cdc_embedder\.(\w+)`\n(.*?)(?=^##|\Z)", DOCS, re.MULTILINE | re.DOTALL))
    there = dict(everything.admin.execute(COLUMNS).fetchall())
    assert set(sections) == set(there)
    missing = {
        (table, column)
        for table, columns in there.items()
        for column in columns
        if f"`{column}`" not in sections[table]
    }
    assert missing == set()


def test_every_sqlstate_that_our_sql_raises_is_documented() -> None:
    files = [*(ROOT / "sql").rglob("*.sql")]
    raised = {name for file in files for name in re.findall(r"ERRCODE = '(\w+)'", file.read_text())}
    assert len(raised) > 10
    states = {}
    for name in raised:
        found = getattr(psycopg.errors, "".join(part.capitalize() for part in name.split("_")), None)
        states[name] = name if found is None else found.sqlstate
    assert {name for name, state in states.items() if f"`{state}`" not in DOCS} == set()
