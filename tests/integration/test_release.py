"""What is released: wheel and sdist, built, installed where nothing else of ours is, and at work there."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from cdc_embedder import __version__
from tests.documents import make_documents, make_model
from tests.servers import Bench
from tests.service import assert_every_vector_is_of_its_text, wait_caught_up

ROOT = Path(__file__).parents[2]
SQL = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "sql").rglob("*.sql"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder, "-t", "wheel", "-t", "sdist"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def clean(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a new environment that has the wheel and what it asks for, and no torch."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    [wheel] = built.glob("*.whl")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", wheel], check=True, cwd=folder)
    return folder / "bin"


def test_wheel_and_sdist_hold_every_sql_file_and_name_the_version(built: Path) -> None:
    [wheel], [sdist] = built.glob("*.whl"), built.glob("*.tar.gz")
    assert f"-{__version__}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {f"cdc_embedder/{name}" for name in SQL} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "deploy"))]
    assert "cdc_embedder/py.typed" in names
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {*SQL, "README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"} <= packed
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "deploy").rglob("*") if path.is_file()} <= packed


def test_a_wheel_built_from_the_sdist_is_the_same(built: Path, tmp_path: Path) -> None:
    [wheel], [sdist] = built.glob("*.whl"), built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.iterdir()
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", tmp_path / "again", "-t", "wheel"],
                   cwd=unpacked, check=True, capture_output=True)  # fmt: skip
    [again] = (tmp_path / "again").glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert {each.filename: each.CRC for each in one.infolist()} == {
            each.filename: each.CRC for each in other.infolist()
        }


def test_what_was_installed_works_where_there_is_no_checkout(clean: Path, bench18: Bench, tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("CDC_EMBEDDER_", "PG", "PYTHON"))
    } | {"CDC_EMBEDDER_DSN": bench18.dsn_service, "CDC_EMBEDDER_SLOT": bench18.slot, "CDC_EMBEDDER_HTTP": "off"}

    def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [clean / "cdc-embedder", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)

    assert cli("--version").stdout.strip() == __version__
    assert "torch" not in subprocess.run([clean / "python", "-m", "pip", "list"], capture_output=True, text=True).stdout
    bench18.admin.execute("DROP SCHEMA cdc_embedder CASCADE")
    bench18.admin.execute(f'GRANT CREATE ON DATABASE "{bench18.database}" TO cdc_service')
    assert "applied migration 001_tables" in cli("init").stdout
    make_model(bench18)
    make_documents(bench18, 5)
    service = subprocess.Popen([clean / "cdc-embedder", "run"], cwd=tmp_path, env=environment)
    try:
        wait_caught_up(bench18)
        assert assert_every_vector_is_of_its_text(bench18) == 5
        assert '"state": "live"' in cli("status", "--json").stdout
    finally:
        service.terminate()
        assert service.wait() == 0
