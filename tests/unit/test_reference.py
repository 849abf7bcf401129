"""docs/reference.md and the program say the same: every command, option and setting, in both directions.

What stands between two markers is rendered from the program. Where it differs, the test prints what to paste.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from pydantic_core import PydanticUndefined
from typer.main import get_group

from cdc_embedder.cli import app
from cdc_embedder.settings import PREFIX, Settings
from tests.commands import cli

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"

UNITS = {"_s": "seconds", "_bytes": "bytes", "_keys": "keys"}
"""How a setting's name ends, and in what it counts."""

NO_FLAG = {"http_token"}


def between(name: str) -> str:
    """What the page has between its markers of that name."""
    found = re.search(rf"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", PAGE.read_text(), re.DOTALL)
    assert found, f"docs/reference.md has no markers for {name}"
    return found[1]


def must_hold(name: str, rendered: str) -> None:
    if between(name) != rendered:
        print(f"Paste this between the markers for {name} in docs/reference.md:\n{rendered}")
    assert between(name) == rendered


def commands() -> dict[str, Any]:
    """Every command by its full name, in the order of `--help`."""
    found: dict[str, Any] = {}
    for name, command in get_group(app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {sub}": one for sub, one in inner.items()} if inner else {name: command}
    return found


def render_commands() -> str:
    return "".join(render_command(name, command) for name, command in commands().items())


def render_command(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    usage = " ".join([f"cdc-embedder {name}", *(usage_of(argument) for argument in arguments)])
    lines = [f"### `{usage}`\n\n{command.help}\n\n"]
    rows = [f"| {left} | {shown(parameter)} | {escaped(parameter.help)} |\n"
            for parameter in command.params if (left := names_of(parameter)) != "`--help`"]  # fmt: skip
    if rows:
        lines.append("| | default | |\n| --- | --- | --- |\n" + "".join(rows) + "\n")
    return "".join(lines)


def usage_of(argument: Any) -> str:
    many = "…" if argument.nargs == -1 else ""
    name = f"{argument.name.upper().removesuffix('S') if many else argument.name.upper()}{many}"
    return name if argument.required else f"[{name}]"


def names_of(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    return ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])


def shown(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False or parameter.default == ():
        return ""
    return f"`{parameter.default}`"


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def render_settings() -> str:
    rows = ["| setting | default | unit | environment | flag of `run` | |\n", "| --- | --- | --- | --- | --- | --- |\n"]
    for name, field in Settings.model_fields.items():
        rows.append(
            f"| `{name}` | {default_of(field)} | {unit_of(name)} | `{PREFIX}{name.upper()}` | {flag_of(name)}"
            f" | {escaped(str(field.description))} |\n"
        )
    return "".join(rows)


def default_of(field: Any) -> str:
    value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
    assert value is not PydanticUndefined
    if isinstance(value, bool):
        return "`on`" if value else "`off`"
    return "" if value in (None, "") else f"`{value}`"


def unit_of(name: str) -> str:
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), "")


def flag_of(name: str) -> str:
    parameter = next((one for one in commands()["run"].params if one.name == name), None)
    return "none" if parameter is None else names_of(parameter)


def test_every_command_is_in_the_reference_with_every_option() -> None:
    must_hold("commands", render_commands())


def test_every_setting_is_in_the_reference_with_unit_default_variable_and_flag() -> None:
    must_hold("settings", render_settings())


def test_every_setting_but_a_secret_is_a_flag_of_run_and_every_flag_a_setting() -> None:
    flags = {parameter.name for parameter in commands()["run"].params} - {"config"}
    assert flags == set(Settings.model_fields) - NO_FLAG


def test_a_number_says_in_what_it_counts() -> None:
    counts = {name for name, field in Settings.model_fields.items() if field.annotation in (int, float, int | None)}
    assert {name for name in counts if not unit_of(name)} == {"writers"}


def test_the_reason_of_every_default_is_told_and_of_none_that_is_not_there() -> None:
    section = PAGE.read_text().partition("## Why these defaults")[2].partition("\n## ")[0]
    told = [name for line in re.findall(r"^\* (.*?): ", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)]
    assert sorted(told) == sorted(Settings.model_fields)


@pytest.mark.parametrize("arguments", [["status", "--nothing"], ["unknown"], ["search"]])
def test_the_exit_status_of_a_usage_error_is_as_the_page_says(arguments: list[str]) -> None:
    assert re.search(r"\| 2 \| .*usage", PAGE.read_text())
    assert cli(*arguments).returncode == 2


def test_the_exit_status_of_what_an_operator_interrupts_is_as_the_page_says() -> None:
    program = (
        "import os, signal, sys; from cdc_embedder import cli; import cdc_embedder.failures as f\n"
        "f.find = lambda *a: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.argv = ['cdc-embedder', 'failed']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr == ""
    assert "| 130 | " in PAGE.read_text()


@pytest.mark.parametrize("page", ["reference.md", "operations.md"])
def test_every_command_and_option_that_the_docs_name_exists(page: str) -> None:
    known = commands()
    for line in re.findall(r"(?:`|\$ )cdc-embedder ([a-z][^`\n]*)", (PAGE.parent / page).read_text()):
        words = line.partition("#")[0].partition("|")[0].split()
        name = next((name for name in (" ".join(words[:2]), words[0]) if name in known), None)
        assert name is not None, line
        options = {
            option for parameter in known[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        given = {word.partition("=")[0].rstrip(".,;:)]") for word in words if word.startswith("--")}
        assert given <= options, (line, given - options)


@pytest.mark.parametrize("page", ["reference.md", "operations.md"])
def test_every_variable_that_the_docs_name_is_a_setting(page: str) -> None:
    named = set(re.findall(rf"{PREFIX}([A-Z_]+)", (PAGE.parent / page).read_text()))
    assert named <= {name.upper() for name in Settings.model_fields} | {"CONFIG"}
