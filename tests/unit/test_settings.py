"""Settings: a flag beats the environment beats the file beats the default. Mistakes are sentences, no secret prints."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from typer.main import get_group

from cdc_embedder.cli import app
from cdc_embedder.errors import Misconfigured
from cdc_embedder.settings import PREFIX, Settings, load, misspelt

PASSWORD = "correct-horse"
DSN = f"postgresql://service:{PASSWORD}@h/d"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "service.toml"
    path.write_text('slot = "from_file"\ndevice = "cuda:1"\nmax_pending_keys = 5000\n')
    return path


def test_without_anything_the_defaults_hold() -> None:
    settings = load()
    assert (settings.dsn.get_secret_value(), settings.replication_dsn) == ("", None)
    assert (settings.slot, settings.output_plugin, settings.device) == ("cdc_embedder", "auto", "auto")
    assert (settings.log_format, settings.log_level, settings.allow_remote_code) == ("text", "info", False)


def test_the_file_beats_the_defaults(file: Path) -> None:
    settings = load(file)
    assert (settings.slot, settings.device, settings.max_pending_keys) == ("from_file", "cuda:1", 5000)
    assert settings.log_level == "info"


def test_the_environment_beats_the_file_and_a_flag_beats_both(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_EMBEDDER_SLOT", "from_environment")
    monkeypatch.setenv("CDC_EMBEDDER_DEVICE", "cpu")
    settings = load(file, slot="from_flag", device=None)
    assert (settings.slot, settings.device, settings.max_pending_keys) == ("from_flag", "cpu", 5000)


def test_a_flag_beats_the_file_alone(file: Path) -> None:
    assert load(file, slot="from_flag").slot == "from_flag"


def test_an_empty_variable_is_none(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_EMBEDDER_SLOT", "")
    assert load(file).slot == "from_file"


def test_the_environment_names_the_file_and_a_flag_names_another(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDC_EMBEDDER_CONFIG", str(file))
    assert load().slot == "from_file"
    other = tmp_path / "other.toml"
    other.write_text('slot = "other"\n')
    assert (load(other).slot, load(other).device) == ("other", "auto")


def test_one_load_leaves_nothing_for_the_next(file: Path) -> None:
    load(file)
    assert load().slot == "cdc_embedder"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"slot": "Bad-Name"}, "slot"),
        ({"slot": ""}, "slot"),
        ({"slot": "a" * 64}, "slot"),
        ({"output_plugin": "test_decoding"}, "output_plugin"),
        ({"max_pending_keys": 10}, "max_pending_keys"),
        ({"wal_sender_timeout_s": 0.0}, "wal_sender_timeout_s"),
        ({"log_format": "xml"}, "log_format"),
        ({"log_level": "loud"}, "log_level"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_a_mistake_is_named_in_a_sentence(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(Misconfigured, match=f"settings: {named}: "):
        load(**flags)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(Misconfigured, match=r"slot: .*; log_level: "):
        load(slot="!", log_level="loud")


def test_a_key_of_the_file_that_is_no_setting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "service.toml"
    path.write_text('slots = "misspelt"\n')
    with pytest.raises(Misconfigured, match="slots"):
        load(path)


def test_a_variable_that_is_no_setting_is_told_by_its_name_alone() -> None:
    """It is not refused: Kubernetes makes such variables for a Service of our name."""
    given = {
        "CDC_EMBEDDER_DSN": "", "CDC_EMBEDDER_CONFIG": "", "CDC_EMBEDDER_WAL_LIMT_BYTES": PASSWORD, "OTHER": "",
        "CDC_EMBEDDER_QQ": "", "CDC_EMBEDDER_SERVICE_HOST": "", "CDC_EMBEDDER_SERVICE_PORT_HTTP": "",
        "CDC_EMBEDDER_PORT": "", "CDC_EMBEDDER_PORT_8700_TCP_ADDR": "",
    }  # fmt: skip
    assert misspelt(given) == [
        "CDC_EMBEDDER_QQ is no setting, and changes nothing",
        "CDC_EMBEDDER_WAL_LIMT_BYTES is no setting, and changes nothing: is CDC_EMBEDDER_WAL_LIMIT_BYTES meant?",
    ]


@pytest.mark.parametrize("content", [b"slot = ", b"dsn = " + DSN.encode(), b'slot = "\xff"'])
def test_a_file_that_is_not_toml_is_named_and_not_shown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "service.toml"
    path.write_bytes(content)
    with pytest.raises(Misconfigured, match=r"service\.toml cannot be read") as refused:
        load(path)
    assert PASSWORD not in refused.value.sentence


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(Misconfigured, match="does not exist"):
        load(tmp_path / name)


@pytest.mark.parametrize("field", ["dsn", "replication_dsn"])
def test_a_password_never_prints(field: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = load(None, **{field: DSN})
    with caplog.at_level(logging.INFO):
        logging.getLogger("cdc_embedder").info("settings %s %r %s", settings, settings, settings.model_dump())
    for shown in (str(settings), repr(settings), settings.model_dump_json(), f"{settings.model_dump()}", caplog.text):
        assert PASSWORD not in shown
    secret: SecretStr = getattr(settings, field)
    assert secret.get_secret_value() == DSN


@pytest.mark.parametrize("bad", [{"slot": DSN}, {"output_plugin": DSN}, {"max_pending_keys": DSN}, {"log_level": DSN}])
def test_a_password_in_the_wrong_place_does_not_print_either(bad: dict[str, Any]) -> None:
    with pytest.raises(Misconfigured) as refused:
        load(dsn=DSN, **bad)
    assert PASSWORD not in refused.value.sentence
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


@pytest.mark.parametrize(
    ("field", "given"), [("dsn", 5), ("dsn", ["a", DSN]), ("replication_dsn", {"password": PASSWORD})]
)
def test_a_dsn_of_the_wrong_type_is_refused_without_being_shown(field: str, given: Any) -> None:
    with pytest.raises(Misconfigured, match=f"settings: {field}") as refused:
        load(**{field: given})
    assert PASSWORD not in refused.value.sentence


def test_lists_are_split_at_commas() -> None:
    settings = load(api_key_envs=" A_KEY, B_KEY ,", base_urls="https://a/, https://b/")
    assert settings.allowed_api_key_envs == {"A_KEY", "B_KEY"}
    assert settings.allowed_base_urls == ("https://a/", "https://b/")


def test_no_list_of_urls_allows_any_and_an_empty_one_none() -> None:
    assert load().allowed_base_urls is None
    assert load(base_urls="").allowed_base_urls == ()


def test_only_the_default_address_of_health_may_be_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = load()
    assert (default.http_address, default.http_is_explicit) == (("127.0.0.1", 8700), False)
    assert load(http="127.0.0.1:8700").http_is_explicit
    path = tmp_path / "http.toml"
    path.write_text('http = "[::1]:8700"\n')
    assert (load(path).http_address, load(path).http_is_explicit) == (("::1", 8700), True)
    monkeypatch.setenv("CDC_EMBEDDER_HTTP", "off")
    assert (load().http_address, load().http_is_explicit) == (None, True)


def test_an_address_of_health_that_is_none_is_a_sentence() -> None:
    with pytest.raises(Misconfigured, match=r"^settings: http: it is host:port, as in 127\.0\.0\.1:8700, or off$"):
        load(http="8700")


NO_FLAGS = {"http_token"}
"""The arguments of a process are no secret."""


def test_a_token_is_long_fits_a_header_and_never_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().http_token is None
    monkeypatch.setenv("CDC_EMBEDDER_HTTP_TOKEN", "t" * 16)
    given = load().http_token
    assert given is not None
    assert given.get_secret_value() == "t" * 16
    for bad in ("secret-2-short!", "secret with space", "secret-ünd-lang-genug", "secret-\n-on-two-lines"):
        monkeypatch.setenv("CDC_EMBEDDER_HTTP_TOKEN", bad)
        with pytest.raises(Misconfigured, match="settings: http_token: ") as refused:
            load()
        assert "secret" not in refused.value.sentence


@pytest.mark.parametrize("name", sorted(Settings.model_fields.keys() - NO_FLAGS))
def test_every_setting_is_a_flag_of_run_and_says_what_it_is_for(name: str) -> None:
    flags = {option for parameter in get_group(app).commands["run"].params for option in parameter.opts}
    assert "--" + name.replace("_", "-") in flags
    assert Settings.model_fields[name].description


def test_the_token_is_no_flag() -> None:
    assert not [name for name in get_group(app).commands["run"].params if name.name in NO_FLAGS]
    assert all(Settings.model_fields[name].description for name in NO_FLAGS)
