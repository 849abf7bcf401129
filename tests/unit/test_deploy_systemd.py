"""The units: nothing that systemd would pass over in silence, an exposure, and settings that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cdc_embedder.embedding.calibration import cache_file
from cdc_embedder.notifying import CHECK_SECONDS
from cdc_embedder.settings import PREFIX, Settings
from tests.lacking import tool

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
NAMES = ["cdc-embedder.service", "cdc-embedder@.service"]
EXECUTABLE = "/opt/cdc-embedder/bin/cdc-embedder"

RELIED_UPON = {
    "Type": ["notify"],
    "NotifyAccess": ["main"],
    "WatchdogSec": ["60"],
    "Restart": ["on-failure"],
    "StartLimitIntervalSec": ["10min"],
    "StartLimitBurst": ["10"],
    "DynamicUser": ["yes"],
    "LimitCORE": ["0"],
    "DevicePolicy": ["closed"],
    "DeviceAllow": [
        *(f"char-nvidia{kind} rw" for kind in ("", "-frontend", "-uvm", "-caps")),
        "char-drm rw",
        "/dev/kfd rw",
    ],
}
"""What neither `verify` nor `security` would miss: a unit without it is a correct one, and no less confined."""


@pytest.fixture(autouse=True, scope="module")
def analyze() -> str:
    return tool("systemd-analyze", "systemd")


def installed(folder: Path, name: str) -> Path:
    """A copy whose executable exists, with a name as it is started by."""
    text = (UNITS / name).read_text()
    assert text.count(EXECUTABLE) == 1
    unit = folder / name
    unit.write_text(text.replace(EXECUTABLE, shutil.which("true") or "/bin/true"))
    return unit.with_name(name.replace("@.", "@orders."))


def directives(name: str) -> dict[str, list[str]]:
    """Values by key, in their order."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def verify(unit: Path) -> str:
    """What systemd-analyze prints: it leaves with 0 whatever it finds."""
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_systemd_has_nothing_to_say_about_a_unit(name: str, tmp_path: Path) -> None:
    assert verify(installed(tmp_path, name)) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("WatchdogSec=60", "WatchdogSeconds=60"), ("[Service]", "[Servise]"), ("Type=notify", "Type=notiffy")],
)
def test_a_mistake_in_a_unit_would_be_seen(right: str, wrong: str, tmp_path: Path) -> None:
    unit = installed(tmp_path, NAMES[0])
    assert right in unit.read_text()
    unit.write_text(unit.read_text().replace(right, wrong))
    assert verify(unit) != ""


@pytest.mark.parametrize("name", NAMES)
def test_the_exposure_of_a_unit_is_two_at_the_most(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", installed(tmp_path, name)],
        capture_output=True,
        text=True,
    )
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    assert 0 < float(found[1]) <= 2.0
    assert f"gives them {found[1]}" in (UNITS / "README.md").read_text()


def test_the_units_differ_in_nothing_but_where_the_configuration_and_the_models_are() -> None:
    one, several = ((UNITS / name).read_text().splitlines() for name in NAMES)
    assert len(one) == len(several)
    differ = [(a.partition("=")[0], b.partition("=")[0]) for a, b in zip(one, several, strict=True) if a != b][1:]
    assert differ == [(key, key) for key in ("Description", "LoadCredential", *["Environment"] * 2, "CacheDirectory")]


@pytest.mark.parametrize("name", NAMES)
def test_each_setting_in_a_unit_exists_and_the_watchdog_outlasts_a_few_of_its_feedings(name: str) -> None:
    text = (UNITS / name).read_text()
    settings = {found.removeprefix(PREFIX) for found in re.findall(r"Environment=(CDC_EMBEDDER_\w+)=", text)}
    assert settings
    assert settings <= {"CONFIG", *(field.upper() for field in Settings.model_fields)}
    assert "Type=notify" in text
    found = re.search(r"^WatchdogSec=(\d+)$", text, re.MULTILINE)
    assert found is not None
    assert int(found[1]) >= 10 * CHECK_SECONDS


@pytest.mark.parametrize("name", NAMES)
def test_what_is_relied_upon_stands_in_a_unit(name: str) -> None:
    found = directives(name)
    assert {key: found.get(key) for key in RELIED_UPON} == RELIED_UPON


@pytest.mark.parametrize(("name", "instance"), [(NAMES[0], "cdc-embedder"), (NAMES[1], "%i")])
def test_a_unit_reads_the_credential_that_it_is_handed(name: str, instance: str) -> None:
    found = directives(name)
    assert found["LoadCredential"] == [f"cdc-embedder.toml:/etc/cdc-embedder/{instance}.toml"]
    assert f"{PREFIX}CONFIG=%d/cdc-embedder.toml" in found["Environment"]


@pytest.mark.parametrize("name", NAMES)
def test_models_and_what_is_measured_are_kept_in_the_cache_of_a_unit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = directives(name)
    [folder] = (Path("%C") / each for each in found["CacheDirectory"])
    variables = dict(each.split("=", 1) for each in found["Environment"])
    monkeypatch.setenv("XDG_CACHE_HOME", variables["XDG_CACHE_HOME"])
    kept = cache_file()
    assert kept is not None
    assert kept.is_relative_to(folder)
    assert Path(variables["HF_HOME"]).is_relative_to(folder)


def test_each_fragment_in_the_readme_fits_a_unit(tmp_path: Path) -> None:
    """As a drop-in, which is what `systemctl edit` makes of it."""
    fragments = re.findall(r"```ini\n(.*?)```", (UNITS / "README.md").read_text(), re.DOTALL)
    assert len(fragments) == 4
    for place, fragment in enumerate(fragments):
        folder = tmp_path / str(place)
        drop_ins = folder / f"{NAMES[0]}.d"
        drop_ins.mkdir(parents=True)
        (drop_ins / "override.conf").write_text(fragment)
        assert verify(installed(folder, NAMES[0])) == ""
        (drop_ins / "override.conf").write_text(fragment.replace("=", "s=", 1))
        assert verify(installed(folder, NAMES[0])) != ""
