"""The image and the compose file: linted, and its steps taken as far as they can be without a container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from cdc_embedder import __version__
from cdc_embedder.embedding.calibration import cache_file
from cdc_embedder.settings import PREFIX, Settings
from tests.lacking import tool

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
COMPOSE = ROOT / "deploy" / "compose.yaml"


def python_tool(name: str) -> str:
    """A program that a Python package of the test environment brought."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else tool(name, f"Python's {name}")


def steps() -> dict[str, list[tuple[str, str]]]:
    """(instruction, arguments) by stage, with continued lines joined."""
    stages: dict[str, list[tuple[str, str]]] = {}
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE))
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            stage = stages.setdefault(arguments.split()[-1], [("FROM", arguments.split()[0])])
        elif stages:
            stage.append((instruction, " ".join(arguments.split())))
    return stages


def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    hadolint = python_tool("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.read_text().replace("AS runtime", "AS runtime\nRUN apt-get install curl"))
    assert "DL3" in subprocess.run([hadolint, wrong], capture_output=True, text=True).stdout


def test_the_targets_run_the_same_as_nobody_in_particular() -> None:
    stages = steps()
    assert list(stages)[-1] == "cpu", "what a build without --target gives"
    for target in ("cpu", "cuda"):
        assert stages[target][0] == ("FROM", "runtime")
        assert ("COPY", f"--from={target}-packages /opt/cdc-embedder /opt/cdc-embedder") in stages[target]
        assert {name for name, _ in stages[target]} <= {"FROM", "COPY", "ENV"}
    runtime = dict(stages["runtime"])
    assert runtime["USER"] == "10001:10001"
    assert runtime["ENTRYPOINT"] == '["cdc-embedder"]'
    assert runtime["CMD"].endswith('["run"]')
    assert "/healthz" in runtime["HEALTHCHECK"]
    variables = set(re.findall(rf"{PREFIX}(\w+)=", DOCKERFILE.read_text()))
    assert {"HTTP"} == variables <= {name.upper() for name in Settings.model_fields}


def test_what_is_copied_is_not_ignored_and_nothing_else_is_sent() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    copied = {
        source
        for stage in steps().values()
        for instruction, arguments in stage
        if instruction == "COPY" and not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    }
    assert copied == kept
    assert (ROOT / ".dockerignore").read_text().startswith("*\n")


def test_the_steps_of_the_image_give_a_service_that_runs(tmp_path: Path) -> None:
    """The stages `wheel`, `base` and `cpu-packages`, run by a shell as they stand, in folders in place of /src, /wheel
    and /opt. Only torch is not fetched again: its step is looked at, and the extra that needs it is left out."""
    stages = steps()
    source, opt, wheels, build = (tmp_path / name for name in ("src", "opt", "wheel", "build"))
    source.mkdir()
    opt.mkdir()
    copied = [arguments.split()[:-1] for name, arguments in stages["wheel"] if name == "COPY"]
    for name in (name for names in copied for name in names):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)

    def here(command: str) -> str:
        command = command.replace("/opt/cdc-embedder", str(opt / "cdc-embedder")).replace("/wheel", str(wheels))
        command = re.sub(r"(?<![\w.])/build\b", str(build), command)
        return command.replace("python -m venv", f"{sys.executable} -m venv")

    def run(command: str, folder: Path, **arguments: str) -> None:
        path = f"{opt / 'cdc-embedder' / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {"PATH": path} | arguments
        subprocess.run(["sh", "-ec", here(command)], cwd=folder, env=environment, check=True)

    for name, arguments in stages["wheel"]:
        if name == "RUN":
            run(arguments, source)
    assert len(list(wheels.glob("cdc_embedder-*.whl"))) == 1
    builder = "from importlib.metadata import version; print(version('hatchling'))"
    done = subprocess.run([build / "bin" / "python", "-c", builder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == pinned("hatchling")
    for name, arguments in stages["base"]:
        if name == "RUN":
            run(arguments, source)
    shutil.copy(ROOT / "constraints.txt", opt / "cdc-embedder" / "constraints.txt")
    torch, install = [arguments for name, arguments in stages["cpu-packages"] if name == "RUN"]
    run(
        torch.replace("pip install", "echo").replace('"${TORCH_INDEX}"', "x")
        + f' | grep -qx -- "--index-url x torch=={pinned("torch")}"',
        source,
    )
    run(install.replace("pip install", "pip install --quiet"), source, EXTRAS="otel")
    otel = "import importlib.util as util; print(util.find_spec('opentelemetry') is not None)"
    done = subprocess.run([opt / "cdc-embedder" / "bin" / "python", "-c", otel], capture_output=True, text=True)
    assert done.stdout.strip() == "True"
    program = opt / "cdc-embedder" / "bin" / "cdc-embedder"
    assert program.exists()
    done = subprocess.run([program, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_extras_of_an_image_exist_and_are_asked_for_in_each_target() -> None:
    [default] = re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    [other] = re.findall(r"^#.*--build-arg EXTRAS=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert (
        {"local", "otel"} == set(default.split(",")) < {"local", "otel", "ray"} == set(other.split(",")) <= set(known)
    )
    for target in ("cpu", "cuda"):
        packages = steps()[f"{target}-packages"]
        assert packages.index(("ARG", "EXTRAS")) < next(
            place for place, (_, arguments) in enumerate(packages) if '"${wheel}[${EXTRAS}]"' in arguments
        )


def test_the_authorities_of_the_system_are_there_or_the_image_is_not_built(tmp_path: Path) -> None:
    runtime = steps()["runtime"]
    [file] = (
        found[1]
        for name, arguments in runtime
        if name == "ENV" and (found := re.search(r"SSL_CERT_FILE=(\S+)", arguments))
    )
    assert file == "/etc/ssl/certs/ca-certificates.crt"
    [check] = (
        arguments.split("&&")[0] for name, arguments in runtime if name == "RUN" and "SSL_CERT_FILE" in arguments
    )
    there = tmp_path / "authorities"
    for text, status in (("", 1), ("-----BEGIN CERTIFICATE-----", 0)):
        there.write_text(text)
        done = subprocess.run(["sh", "-c", check], env={"PATH": os.environ["PATH"], "SSL_CERT_FILE": str(there)})
        assert done.returncode == status


def test_what_an_image_measures_is_kept_with_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = steps()["runtime"]
    variables = dict(each.split("=", 1) for name, arguments in runtime if name == "ENV" for each in arguments.split())
    monkeypatch.setenv("XDG_CACHE_HOME", variables["XDG_CACHE_HOME"])
    volume = Path(dict(runtime)["VOLUME"])
    assert Path(variables["HF_HOME"]) == volume
    kept = cache_file()
    assert kept is not None
    assert kept.is_relative_to(volume)


def test_the_compose_file_is_one_and_its_parts_fit() -> None:
    check = python_tool("check-jsonschema")
    done = subprocess.run([check, "--builtin-schema", "vendor.compose-spec", COMPOSE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert set(services) == {"db", "init", "cdc-embedder"}
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
    fields = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in ("init", "cdc-embedder"):
        given = {each for each in services[name]["environment"] if each != "<<"}
        assert given <= fields
        assert f":{__version__}-cpu" in services[name]["image"]
    assert services["init"]["build"]["target"] in steps()
    assert "wal_level=logical" in services["db"]["command"]
    [kept] = (found[1] for each in services["db"]["command"] if (found := re.search(r"keep_size=(\d+)GB$", each)))
    limit = int(services["cdc-embedder"]["environment"][PREFIX + "WAL_LIMIT_BYTES"])
    assert Settings.model_fields["wal_alarm_bytes"].default < limit < int(kept) << 30, (
        "warned, then given up, before the server takes it"
    )


@pytest.mark.parametrize(("right", "wrong"), [("image:", "imagge:"), ("condition: service_healthy", "condition: well")])
def test_a_mistake_in_the_compose_file_would_be_seen(right: str, wrong: str, tmp_path: Path) -> None:
    text = COMPOSE.read_text()
    assert right in text
    broken = tmp_path / "compose.yaml"
    broken.write_text(text.replace(right, wrong))
    check = python_tool("check-jsonschema")
    done = subprocess.run([check, "--builtin-schema", "vendor.compose-spec", broken], capture_output=True, text=True)
    assert done.returncode != 0
