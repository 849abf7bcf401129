"""The demo's texts: real, the same each time, from all over the library, and read without running anything."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cdc_embedder.corpus import Docstring, standard_library


@pytest.fixture(scope="module")
def texts() -> list[Docstring]:
    return standard_library(2000)


def test_there_are_as_many_as_asked_for_under_different_names_in_order(texts: list[Docstring]) -> None:
    names = [docstring.name for docstring in texts]
    assert len(names) == 2000
    assert names == sorted(set(names))


def test_they_are_docstrings_that_anybody_can_look_up(texts: list[Docstring]) -> None:
    found = {docstring.name: docstring for docstring in texts}
    assert found["tarfile"] == Docstring("tarfile", "tarfile", "Read from and write to tar format archives.")
    members = [docstring for docstring in texts if docstring.name != docstring.module]
    assert all(docstring.name.startswith(docstring.module + ".") for docstring in members)
    assert all(len(docstring.text) >= 30 and docstring.text == docstring.text.strip() for docstring in texts)


def test_they_come_from_all_over_the_library(texts: list[Docstring]) -> None:
    modules = {docstring.module.split(".")[0] for docstring in texts}
    assert len(modules) > 100
    assert {"csv", "email", "http", "json", "os", "tarfile", "unittest"} <= modules
    assert modules.isdisjoint({"test", "idlelib", "lib2to3", "site-packages", "encodings"})


def test_private_names_are_left_out(texts: list[Docstring]) -> None:
    assert not [
        docstring.name for docstring in texts if any(part.startswith("_") for part in docstring.name.split("."))
    ]


def test_few_are_modules_before_anything_else() -> None:
    few = standard_library(50)
    assert len(few) == 50
    assert all(docstring.name == docstring.module for docstring in few)
    assert standard_library(0) == []


def test_another_process_finds_the_same_and_imports_nothing_of_it(texts: list[Docstring]) -> None:
    program = (
        "import sys; from cdc_embedder.corpus import standard_library;"
        "found = standard_library(2000);"
        "assert 'antigravity' not in sys.modules and 'tkinter' not in sys.modules;"
        "print(*(docstring.name for docstring in found), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [docstring.name for docstring in texts]
