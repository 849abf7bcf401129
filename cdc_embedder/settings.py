"""How to run: flags beat the environment beats the TOML file beats the defaults.

What to embed is not here: that is data, in the table `cdc_embedder.embedding_column`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from cdc_embedder.errors import Misconfigured
from cdc_embedder.web import address

PREFIX = "CDC_EMBEDDER_"

_OF_KUBERNETES = re.compile(r"(SERVICE_(HOST|PORT)|PORT)(_\w+)?")
"""What Kubernetes tells of a Service that is called cdc-embedder."""


class Settings(BaseSettings):
    """Each field is `CDC_EMBEDDER_<NAME>` in the environment, `--<name>` as a flag and `<name>` in the TOML file.

    `http_token` is no flag: everybody on the machine may read the arguments of a process.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", env_ignore_empty=True)

    dsn: SecretStr = Field(
        SecretStr(""), description="libpq conninfo or URI; empty: libpq's own environment and service files."
    )
    replication_dsn: SecretStr | None = Field(
        None, description="Where the slot is read, if not where rows are read and written (default: the same)."
    )
    slot: str = Field(
        "cdc_embedder",
        pattern=r"^[a-z0-9_]{1,63}$",
        description="Name of the replication slot; publication, origins and advisory lock are named after it.",
    )
    output_plugin: Literal["auto", "wal2json", "pgoutput"] = Field(
        "auto", description="For a slot made anew; auto is wal2json where the server has and allows it, else pgoutput."
    )
    max_pending_keys: int = Field(
        200_000,
        ge=1_000,
        description="Changed keys held in memory (about 400 bytes each); more are spilled to the backlog tables.",
    )
    spill_after_s: float = Field(
        10.0, ge=0.0, description="A key that holds the slot for longer is spilled to its backlog table, seconds."
    )
    writers: int = Field(
        2,
        ge=1,
        le=16,
        description="Sessions that write vectors at once; each has a replication origin, up to PostgreSQL 17 one of"
        " max_replication_slots.",
    )
    scan_period_s: float = Field(
        86_400.0, ge=1.0, description="Every row is compared with its ledger at least so often, slowly, seconds."
    )
    wal_sender_timeout_s: float = Field(
        60.0, ge=1.0, description="Silence after which either side gives the replication connection up, seconds."
    )
    wal_warn_bytes: int = Field(
        1 << 30, ge=0, description="WAL held back by our slots that is worth a warning, bytes; 0 for none."
    )
    wal_alarm_bytes: int = Field(
        8 << 30, ge=0, description="WAL held back by our slots that is worth an error, bytes; 0 for none."
    )
    wal_limit_bytes: int | None = Field(
        None,
        ge=16 << 20,
        description="WAL held back at which the slot is given up: dropped, with a scan of every column requested"
        " (default: never).",
    )
    wal_limit_then: Literal["wait", "renew"] = Field(
        "wait",
        description="After that, wait until SELECT cdc_embedder.take_slot_again() says so, or make it anew at once.",
    )
    auto_migrate: bool = Field(
        True, description="Whether `run` brings an older schema up to date; else it leaves that to `init`."
    )
    http: str = Field(
        "127.0.0.1:8700",
        description="Where /healthz, /readyz, /metrics and /v1/embeddings are served: host:port, [::1]:port, or off.",
    )
    http_token: SecretStr | None = Field(
        None,
        min_length=16,
        description="Bearer token for metrics and embeddings; needed where the address is not a loopback one.",
    )
    http_max_bytes: int = Field(8 << 20, ge=1024, description="Largest request over HTTP, bytes.")
    sql_embed: bool = Field(
        False,
        description="Whether SQL may ask for vectors (cdc_embedder.embed); the texts then enter the WAL. The table"
        " cdc_embedder.sql_embed can turn it on too.",
    )
    traces: bool = Field(
        False, description="OpenTelemetry spans, one a batch (extra `otel`; OTEL_* variables say where they go)."
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people or for machines.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line logged.")
    device: str = Field(
        "auto",
        description="auto: every GPU, else the CPU; or torch devices with commas between them. A process serves each of"
        " several; a name twice (cuda:0,cuda:0) is two processes.",
    )
    allow_remote_code: bool = Field(
        False, description="Whether models whose row says trust_remote_code may run code from their repository."
    )
    api_key_envs: str = Field(
        "OPENAI_API_KEY", description="Comma-separated names of variables that a model's api_key_env may name."
    )
    base_urls: str | None = Field(
        None, description="Comma-separated prefixes that a model's base_url must start with (default: any)."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if (file := settings_cls.model_config.get("toml_file")) is not None:
            sources.append(TomlConfigSettingsSource(settings_cls, Path(str(file))))
        return tuple(sources)

    @field_validator("http")
    @classmethod
    def _understood(cls, text: str) -> str:
        address(text)
        return text

    @field_validator("http_token")
    @classmethod
    def _fits_a_header(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and not re.fullmatch(r"[!-~]+", token.get_secret_value()):
            raise ValueError("a token is of visible ASCII characters")
        return token

    @field_validator("device")
    @classmethod
    def _named(cls, text: str) -> str:
        names = [name.strip() for name in text.split(",")]
        if "" in names or ("auto" in names and len(names) > 1):
            raise ValueError("name devices as in cuda:0,cuda:1, or auto alone")
        return text

    @property
    def http_address(self) -> tuple[str, int] | None:
        return address(self.http)

    @property
    def http_is_explicit(self) -> bool:
        """Somebody asked for just this address, so that doing without it would be wrong."""
        return "http" in self.model_fields_set

    @property
    def allowed_api_key_envs(self) -> frozenset[str]:
        return frozenset(_split(self.api_key_envs))

    @property
    def allowed_base_urls(self) -> tuple[str, ...] | None:
        return None if self.base_urls is None else tuple(_split(self.base_urls))


def load(config: Path | None = None, **flags: Any) -> Settings:
    """Settings from flags (None: not given), environment and file. Raises Misconfigured with a line a mistake."""
    config = config or (Path(name) if (name := os.environ.get(PREFIX + "CONFIG")) else None)
    if config is not None and not config.is_file():
        raise Misconfigured(f"the configuration file {config} does not exist")

    class WithFile(Settings):
        model_config = SettingsConfigDict(toml_file=config)

    try:
        return WithFile(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in e['loc'])}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors(include_input=False)
        ]
        raise Misconfigured("settings: " + "; ".join(lines)) from None
    except (ValueError, OSError) as error:  # the file is not TOML, or not readable
        raise Misconfigured(f"the configuration file {config} cannot be read: {error}") from error


def misspelt(environment: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each variable that looks like a setting and is none. Never its value."""
    known = [PREFIX + name.upper() for name in Settings.model_fields] + [PREFIX + "CONFIG"]
    sentences = []
    for name in sorted(environment):
        if not name.startswith(PREFIX) or name in known or _OF_KUBERNETES.fullmatch(name.removeprefix(PREFIX)):
            continue
        near = difflib.get_close_matches(name, known, 1, 0.9)
        sentences.append(f"{name} is no setting, and changes nothing" + (f": is {near[0]} meant?" if near else ""))
    return sentences


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
