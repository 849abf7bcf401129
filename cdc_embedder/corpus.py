"""Real texts that every machine has: the docstrings of Python's standard library, for the demo and for tests.

Read as syntax, never imported, so nothing runs and nothing depends on what the platform can load. The same Python gives
the same texts in the same order. Not a benchmark's corpus: another Python has other texts.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_LEFT_OUT = frozenset({"encodings", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"})
"""Folders of tests, of tables without words, of other people's code, and of programs."""

_SHORTEST = 30
"""Characters below which a docstring says nothing that can be searched for."""

_Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Docstring:
    """`name` is what one would import and write: `csv`, `csv.DictReader`, `pathlib.Path.glob`."""

    module: str
    name: str
    text: str


def standard_library(limit: int) -> list[Docstring]:
    """At most `limit` docstrings, by name: those of modules first of all, the others spread evenly over the library."""
    found = _everything()
    modules = [docstring for docstring in found if docstring.name == docstring.module]
    members = [docstring for docstring in found if docstring.name != docstring.module]
    chosen = _spread(modules, limit)
    return sorted(chosen + _spread(members, limit - len(chosen)), key=lambda docstring: docstring.name)


@cache
def _everything() -> list[Docstring]:
    """Every docstring; where a name is defined more than once, the first."""
    found: dict[str, Docstring] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT.isdisjoint(parts) and not any(_is_private(part) for part in parts if part != "__init__"):
            for docstring in _docstrings(path, ".".join(part for part in parts if part != "__init__")):
                found.setdefault(docstring.name, docstring)
    return list(found.values())


def _docstrings(path: Path, module: str) -> Iterator[Docstring]:
    try:
        with warnings.catch_warnings(action="ignore"):  # what the library's own source is warned about
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and broken files that some distributions put there
        return
    if (text := _text(tree)) is not None:
        yield Docstring(module, module, text)
    yield from _members(tree, module, module)


def _members(owner: ast.Module | _Documented, module: str, prefix: str) -> Iterator[Docstring]:
    """Public classes, functions and methods of `owner`, at any depth of classes; not what is inside functions."""
    for node in owner.body:
        if isinstance(node, _Documented) and not _is_private(node.name):
            name = f"{prefix}.{node.name}"
            if (text := _text(node)) is not None:
                yield Docstring(module, name, text)
            if isinstance(node, ast.ClassDef):
                yield from _members(node, module, name)


def _text(node: ast.Module | _Documented) -> str | None:
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").replace("\0", "").strip()
    return text if len(text) >= _SHORTEST else None


def _is_private(name: str) -> bool:
    return name.startswith("_")


def _spread(items: list[Docstring], limit: int) -> list[Docstring]:
    """`limit` of `items` at even distances; all where there are no more."""
    if len(items) <= limit:
        return items
    return [items[i * len(items) // limit] for i in range(max(limit, 0))]
