"""Pinned connection strings, as libpq reads them back. Nothing is connected to."""

from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from cdc_embedder.conninfo import pinned
from cdc_embedder.errors import Misconfigured


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGOPTIONS", "PGSERVICE", "PGSERVICEFILE", "PGCONNECT_TIMEOUT", "PGHOST"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services").write_text("[mine]\nhost=from.service\nconnect_timeout=3\noptions=-c work_mem=5MB\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))


@pytest.mark.parametrize("dsn", ["", "host=h dbname=d", "postgresql://u@h/d", "service=mine"])
def test_settings_and_name_are_added_to_any_form(dsn: str) -> None:
    given = conninfo_to_dict(pinned(dsn, "writer 1", {"TimeZone": "UTC"}, client_encoding="UTF8"))
    assert given["application_name"] == "cdc-embedder writer 1"
    assert str(given["options"]).endswith("-c TimeZone=UTC")
    assert given["client_encoding"] == "UTF8"
    assert {name: given.get(name) for name in conninfo_to_dict(dsn)} == conninfo_to_dict(dsn)


def test_blanks_and_backslashes_in_a_setting_are_escaped() -> None:
    given = conninfo_to_dict(pinned("", "x", {"DateStyle": "ISO, YMD", "search_path": '"a\\b"'}))
    assert given["options"] == '-c DateStyle=ISO,\\ YMD -c search_path="a\\\\b"'


def test_options_of_the_dsn_stay_and_ours_come_last() -> None:
    given = conninfo_to_dict(pinned("options='-c work_mem=7MB'", "x", {"TimeZone": "UTC"}))
    assert given["options"] == "-c work_mem=7MB -c TimeZone=UTC"


def test_options_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=6MB")
    assert conninfo_to_dict(pinned("", "x", {"a": "1"}))["options"] == "-c work_mem=6MB -c a=1"
    assert conninfo_to_dict(pinned("options=-cb=2", "x", {"a": "1"}))["options"] == "-cb=2 -c a=1"


@pytest.mark.usefixtures("service")
def test_options_of_a_service_stay_and_its_host_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    given = conninfo_to_dict(pinned("service=mine", "x", {"a": "1"}))
    assert given["options"] == "-c work_mem=5MB -c a=1"
    assert "host" not in given
    monkeypatch.setenv("PGSERVICE", "mine")
    assert conninfo_to_dict(pinned("", "x", {"a": "1"}))["options"] == "-c work_mem=5MB -c a=1"


@pytest.mark.usefixtures("service")
def test_what_the_user_chose_about_dead_peers_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert conninfo_to_dict(pinned("", "x", {}))["connect_timeout"] == "10"
    assert conninfo_to_dict(pinned("connect_timeout=4", "x", {}))["connect_timeout"] == "4"
    assert "connect_timeout" not in conninfo_to_dict(pinned("service=mine", "x", {}))
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "5")
    assert "connect_timeout" not in conninfo_to_dict(pinned("", "x", {}))


def test_a_dsn_that_cannot_be_read_is_not_shown() -> None:
    with pytest.raises(Misconfigured) as raised:
        pinned("host=h password=hunter2 with blanks", "x", {})
    assert "hunter2" not in raised.value.sentence
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__
