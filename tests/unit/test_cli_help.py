"""`--help` answers without the heavy libraries: told by what a fresh process has imported, not by a time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.main import get_group

from cdc_embedder import __version__
from cdc_embedder.cli import app
from cdc_embedder.settings import PREFIX

HEAVY = {"torch", "sentence_transformers", "transformers", "tokenizers", "huggingface_hub", "scipy", "sklearn"}
SERVER = {"uvicorn", "starlette", "h11"}

LIST_MODULES = "; import sys; print('\\n'.join(sys.modules))"

COMMANDS = sorted(get_group(app).commands)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter without settings of ours; wide, so that help is not wrapped."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environment |= {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def imported(stderr: str) -> set[str]:
    """The top-level packages in what `-X importtime` printed."""
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in stderr.splitlines() if "|" in line}


@pytest.mark.parametrize("arguments", [["--help"], ["status", "--help"], ["run", "--help"], ["--version"]])
def test_help_answers_without_heavy_libraries(arguments: list[str]) -> None:
    answered = run("-X", "importtime", "-m", "cdc_embedder", *arguments)
    assert answered.returncode == 0
    assert answered.stdout.strip()
    packages = imported(answered.stderr)
    assert "typer" in packages
    assert not packages & (HEAVY | SERVER | {"numpy", "psycopg"})


@pytest.mark.parametrize("module", ["cli", "status", "install", "uninstall", "service", "running", "settings"])
def test_no_module_around_the_model_brings_torch_with_it(module: str) -> None:
    answered = run("-c", f"import cdc_embedder.{module}" + LIST_MODULES)
    assert answered.returncode == 0, answered.stderr
    assert f"cdc_embedder.{module}" in answered.stdout.splitlines()
    assert not {name.partition(".")[0] for name in answered.stdout.splitlines()} & HEAVY


def test_status_without_a_server_fails_with_a_sentence_and_without_torch() -> None:
    answered = run("-X", "importtime", "-m", "cdc_embedder", "status", "--dsn", "host=/nowhere port=1")
    assert answered.returncode == 1
    sentences = [line for line in answered.stderr.splitlines() if not line.startswith("import time:")]
    assert sentences[0].startswith("cdc-embedder: ")
    assert "Traceback" not in answered.stderr
    assert not imported(answered.stderr) & (HEAVY | SERVER)


def test_every_command_is_listed_with_what_it_does() -> None:
    listed = run("-m", "cdc_embedder", "--help").stdout
    for command in COMMANDS:
        assert command in listed
    assert set(COMMANDS) >= {
        "init",
        "run",
        "add",
        "remove",
        "reconcile",
        "status",
        "embed",
        "search",
        "demo",
        "uninstall",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_says_what_it_is_for(command: str) -> None:
    top = get_group(app).commands[command]
    for one in (top, *getattr(top, "commands", {}).values()):
        assert one.help
        assert [parameter.name for parameter in one.params if not getattr(parameter, "help", None)] == []


def test_the_version_is_the_packages() -> None:
    assert run("-m", "cdc_embedder", "--version").stdout.strip() == __version__


def test_a_wrong_setting_is_a_sentence_and_status_one() -> None:
    answered = run("-m", "cdc_embedder", "run", "--slot", "Not-A-Slot")
    assert answered.returncode == 1
    assert answered.stderr.startswith("cdc-embedder: settings: slot: ")
    assert "Traceback" not in answered.stderr
