"""Alerts and dashboard are held to what the running service really says of itself, by promtool and by their words."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests import servers
from tests.documents import make_documents, make_model
from tests.servers import Bench, bench_with
from tests.service import Service, running, status, until, wait_caught_up

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
RULES = FOLDER / "alerts.yaml"

ALERTS = {
    "CdcEmbedderDown", "CdcEmbedderNotReady", "CdcEmbedderNoLeader", "CdcEmbedderReconnecting",
    "CdcEmbedderSlotRetainsWal", "CdcEmbedderSlotAtRisk", "CdcEmbedderSlotLost", "CdcEmbedderSlotGivenUp",
    "CdcEmbedderStalled", "CdcEmbedderFreshness", "CdcEmbedderFailingRows", "CdcEmbedderColumnError",
    "CdcEmbedderModelDown", "CdcEmbedderBacklogGrows",
}  # fmt: skip

FAMILIES: dict[str, tuple[str, ...]] = {
    "build_info": ("version", "slot", "plugin"),
    "leader": (),
    "ready": (),
    "lag_seconds": (),
    "slot_lag_bytes": ("slot",),
    "slot_retained_bytes": ("slot",),
    "slot_safe_wal_bytes": ("slot",),
    "slot_wal_status": ("slot", "status"),
    "wal_budget_bytes": ("level",),
    "slot_given_up": (),
    "column_state": ("column", "state"),
    "column_info": ("column", "model", "engine"),
    "pending_keys": ("column", "work"),
    "backlog_keys": ("column",),
    "oldest_pending_seconds": ("column",),
    "failed_rows": ("column",),
    "circuit_breaker_open": ("column",),
    "scan_running": ("column",),
    "reconnects": (),
    "received_changes": (),
    "own_changes": (),
    "rows": ("column", "result"),
    "guard_misses": ("column",),
    "spilled_keys": ("column",),
    "model_calls": ("model",),
    "tokens": ("model",),
    "padding_tokens": ("model",),
    "stage_seconds": ("stage",),
    "device_busy_seconds": ("model",),
    "model_errors": ("model",),
    "queries": ("via", "result"),
    "commit_to_vector_seconds": ("column",),
    "batch_rows": ("model",),
    "batch_tokens": ("model",),
    "query_seconds": ("via",),
}
"""What there is, and its labels: whoever renames one breaks somebody's dashboard."""

OF_SCRAPING = {"job", "instance", "namespace", "database"}
"""Labels that Prometheus gives to a target."""

OF_PROMETHEUS = {"up": set[str](), "ALERTS": {"alertname", "alertstate"}}

UNUSED: dict[str, str] = {}
"""Metrics that neither an alert nor the dashboard uses, and why they are there all the same."""

KEYWORDS = {"and", "or", "unless", "on", "ignoring", "by", "without", "group_left", "group_right", "bool", "offset"}
TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[A-Za-z_:][\w:]*|\d[\w.]*|=~|!~|!=|==|>=|<=|\$\w+|[^\s\w]')


@dataclass(frozen=True)
class Selector:
    """A metric that an expression asks for, with its matchers (label, operator, value)."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]


def parse(expression: str) -> tuple[list[Selector], set[str]]:
    """The selectors of a PromQL expression, and the labels that it groups or joins by."""
    tokens = TOKENS.findall(re.sub(r"\[[^\]]*\]", "", expression))
    selectors, labels, at = [], set(), 0
    while at < len(tokens):
        token, following = tokens[at], tokens[at + 1] if at + 1 < len(tokens) else ""
        at += 1
        if token in ("by", "without", "on", "ignoring", "group_left", "group_right") and following == "(":
            end = tokens.index(")", at)
            labels |= {name for name in tokens[at + 1 : end] if name != ","}
            at = end + 1
        elif (
            re.fullmatch(r"[A-Za-z_:][\w:]*", token)
            and token not in KEYWORDS
            and following not in ("(", "by", "without")
        ):
            matchers = []
            if following == "{":
                end = tokens.index("}", at)
                inside = tokens[at + 1 : end]
                matchers = [(inside[n], inside[n + 1], json.loads(inside[n + 2])) for n in range(0, len(inside), 4)]
                at = end + 1
            selectors.append(Selector(token, tuple(matchers)))
    return selectors, labels


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))
    return loaded


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def promtool(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Prometheus' own tool, where this machine has it."""
    tool = shutil.which("promtool")
    if tool is None:
        if os.environ.get("CI") == "true":
            pytest.fail("this machine lacks promtool (package prometheus)")
        pytest.skip("this machine lacks promtool (package prometheus)")
    return subprocess.run([tool, *arguments], input=stdin, capture_output=True, text=True, check=False)


def succeeds(*arguments: str, stdin: str = "") -> None:
    done = promtool(*arguments, stdin=stdin)
    assert done.returncode == 0, done.stdout + done.stderr


# What the service says


@dataclass(frozen=True)
class Said:
    """The metrics of one that works and has seen everything, and of two when all is well: it works, the other waits."""

    text: str
    works: str
    waits: str

    @property
    def samples(self) -> list[Sample]:
        return samples(self.text)


def samples(text: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def url(service: Service) -> str:
    service.wait_for_log("health is served at")
    found = re.search(r"health is served at (http://\S+)/healthz", service.log)
    assert found is not None
    return found[1]


def scrape(service: Service) -> str:
    answer = httpx.get(url(service) + "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return answer.text


@pytest.fixture(scope="module")
def said() -> Iterator[Said]:
    """On a server with a limit on WAL, so that nothing is absent."""
    with bench_with(servers.bindir_18(), "pgoutput", {"max_slot_wal_keep_size": "10GB"}) as bench:
        make_model(bench, reject="poison")
        make_documents(bench, 50)
        both = {"CDC_EMBEDDER_HTTP": "127.0.0.1:0", "CDC_EMBEDDER_WAL_LIMIT_BYTES": str(20 << 30)}
        with running(bench, CDC_EMBEDDER_SQL_EMBED="on", **both) as service:
            service.wait_for_log("SQL is answered")
            with running(bench, **both) as other:
                other.wait_for_log("waiting: another instance")
                bench.admin.execute("UPDATE documents SET body = 'new ' || body")
                wait_caught_up(bench)
                until(lambda: 'status="reserved"} 1.0' in scrape(service), "the slot was not looked at")
                works, waits = scrape(service), scrape(other)
            use_everything(bench, service)
            yield Said(scrape(service), works, waits)


def use_everything(bench: Bench, service: Service) -> None:
    bench.admin.execute("UPDATE documents SET body = 'poison' WHERE id = 1")
    until(lambda: status(bench)[0]["failed"] == 1, "never failed", lambda: service.log)
    bench.admin.execute("SET cdc_embedder.embed_timeout = '60s'")
    bench.admin.execute("SELECT cdc_embedder.embed('fake', 'a question')")
    asked = urllib.request.Request(
        url(service) + "/v1/embeddings",
        json.dumps({"model": "fake", "input": "a question"}).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(asked).close()
    until(lambda: "cdc_embedder_query_seconds_bucket" in scrape(service), "no query was counted")


def test_every_metric_is_there_with_its_labels_and_no_other(said: Said) -> None:
    found: dict[str, set[tuple[str, ...]]] = {}
    for family in text_string_to_metric_families(said.text):
        found[family.name] = {tuple(sorted(set(sample.labels) - {"le"})) for sample in family.samples}
    assert found == {f"cdc_embedder_{name}": {tuple(sorted(labels))} for name, labels in FAMILIES.items()}


def test_promtool_has_nothing_to_say_about_the_metrics(said: Said) -> None:
    for text in (said.text, said.works, said.waits):
        succeeds("check", "metrics", stdin=text)


def test_who_waits_says_nothing_of_slot_and_columns(said: Said) -> None:
    by_name = {sample.name: sample.value for sample in samples(said.waits)}
    assert (by_name["cdc_embedder_leader"], by_name["cdc_embedder_ready"]) == (0, 1)
    assert not {
        name for name in by_name if "column" in name or "retained" in name or "lag" in name or "pending" in name
    }


def test_two_instances_that_are_well_fire_no_alert(said: Said, tmp_path: Path) -> None:
    """What both really said, for five hours."""
    series = [
        {"series": series_of(sample, instance), "values": f"{sample.value}x300"}
        for instance, text in (("a", said.works), ("b", said.waits))
        for sample in [Sample("up", {}, 1.0), *samples(text)]
    ]
    assert len(series) > 100
    quiet = [
        {"expr": 'ALERTS{alertstate=~"firing|pending"}', "eval_time": when, "exp_samples": []}
        for when in ("1m", "1h", "5h")
    ]
    tests = [{"interval": "1m", "input_series": series, "promql_expr_test": quiet}]
    shutil.copy(RULES, tmp_path)
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["alerts.yaml"], "tests": tests}))
    succeeds("test", "rules", str(tmp_path / "test.yaml"))


def series_of(sample: Sample, instance: str) -> str:
    labels = {**sample.labels, "job": "cdc-embedder", "instance": instance}
    return sample.name + "{" + ",".join(f"{name}={json.dumps(value)}" for name, value in labels.items()) + "}"


# What is made of it


@pytest.mark.parametrize("expression", [rule["expr"] for rule in rules()] + dashboard_expressions())
def test_an_expression_asks_only_for_what_the_service_says(said: Said, expression: str) -> None:
    selectors, labels = parse(expression)
    assert selectors
    there = {sample.name for sample in said.samples}
    offered = set(OF_SCRAPING)
    for selector in selectors:
        if selector.name in OF_PROMETHEUS:
            offered |= OF_PROMETHEUS[selector.name]
            assert {label for label, *_ in selector.matchers} <= OF_SCRAPING | OF_PROMETHEUS[selector.name]
            continue
        assert selector.name in there, selector.name
        of_name = [sample for sample in said.samples if sample.name == selector.name]
        offered |= {label for sample in of_name for label in sample.labels}
        for label, operator, value in selector.matchers:
            if label in OF_SCRAPING or value.startswith("$"):
                assert label in OF_SCRAPING or label in of_name[0].labels, (selector.name, label)
                continue
            assert operator in ("=", "=~")
            pattern = re.escape(value) if operator == "=" else value
            for wanted in pattern.split("|"):
                assert any(re.fullmatch(wanted, sample.labels[label]) for sample in of_name), (
                    selector.name,
                    label,
                    wanted,
                )
    assert labels <= offered, labels - offered


def test_every_metric_is_used_or_has_a_reason_not_to_be(said: Said) -> None:
    expressions = [rule["expr"] for rule in rules()] + dashboard_expressions()
    used = {selector.name for expression in expressions for selector in parse(expression)[0]}
    unused = {
        family.name
        for family in text_string_to_metric_families(said.text)
        if not {sample.name for sample in family.samples} & used
    }
    assert unused == set(UNUSED)


def test_the_parser_of_these_tests_sees_what_there_is() -> None:
    """A parser that overlooks something would let everything pass."""
    selectors, labels = parse(
        'max by (job, slot) (a_b * on (x) group_left (y) c{d="e",f=~"g|h"})'
        " / sum(rate(i:j[5m])) without (k) > 1e3 or absent(l)"
    )
    assert [selector.name for selector in selectors] == ["a_b", "c", "i:j", "l"]
    assert selectors[1].matchers == (("d", "=", "e"), ("f", "=~", "g|h"))
    assert labels == {"job", "slot", "x", "y", "k"}


# Alerts


def test_promtool_accepts_the_rules_and_their_tests_pass() -> None:
    succeeds("check", "rules", str(RULES))
    succeeds("check", "config", str(FOLDER / "prometheus.yaml"))
    succeeds("test", "rules", str(FOLDER / "alerts_test.yaml"))


def test_every_alert_says_how_bad_it_is_for_whom_and_what_to_do() -> None:
    assert {rule["alert"] for rule in rules()} == ALERTS
    assert len(rules()) == len(ALERTS)
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / "operations.md").read_text("utf-8"), re.MULTILINE)
    anchors = {heading.strip("` ").lower() for heading in headings}
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        anchor = rule["alert"].lower()
        assert rule["annotations"]["runbook_url"].endswith(f"docs/operations.md#{anchor}")
        assert anchor in anchors, "a runbook that is not there"


def test_every_alert_has_a_scenario_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    scenarios = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text("utf-8"))["tests"]
    fires, quiet = set(), set()
    for scenario in scenarios:
        seen = {
            label
            for check in scenario["promql_expr_test"]
            for sample in check["exp_samples"]
            for label in re.findall(r'alertname="(\w+)"', sample["labels"])
        }
        fires |= seen
        if not seen:
            quiet |= set(re.findall(r"^(\w+) does not fire", scenario["name"]))
    assert fires == ALERTS
    assert quiet == ALERTS


def test_what_an_alert_tells_is_among_its_labels() -> None:
    for rule in rules():
        selectors, grouped = parse(rule["expr"])
        known = set(OF_SCRAPING)
        for selector in selectors:
            base = re.sub(r"^cdc_embedder_|_(total|bucket|count)$", "", selector.name)
            known |= set(FAMILIES.get(base, ()))
        told = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert told <= (grouped if " by " in rule["expr"] else known), rule["alert"]


# The dashboard


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    board = dashboard()
    assert board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    assert [panel["title"] for panel in board["panels"] if panel["type"] == "row"] == [
        "Freshness and lag", "Slot", "Throughput", "Stages and device", "Failures", "Queries"]  # fmt: skip
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in panels():
        assert panel["title"]
        assert panel["targets"]
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables.keys(), used
            _, grouped = parse(target["expr"])
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= grouped
    taken = [
        (place["x"] + x, place["y"] + y)
        for place in (panel["gridPos"] for panel in board["panels"])
        for x in range(place["w"])
        for y in range(place["h"])
    ]
    assert len(taken) == len(set(taken)), "panels lie upon one another"
    assert max(x for x, _ in taken) < 24


def test_every_expression_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    recorded = [
        {"record": f"panel_{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(dashboard_expressions())
    ]
    path = tmp_path / "dashboard.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    succeeds("check", "rules", str(path))


def test_the_variables_of_the_dashboard_ask_for_labels_that_are_there(said: Said) -> None:
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variable["definition"])
            assert found is not None
            labels = {label for sample in said.samples if sample.name == found[1] for label in sample.labels}
            assert labels
            assert found[2] in labels | OF_SCRAPING


def test_promtool_is_told_of_what_it_tests() -> None:
    """The folder holds nothing that no test looks at."""
    assert {path.name for path in FOLDER.iterdir()} == {
        "README.md", "alerts.yaml", "alerts_test.yaml", "dashboard.json", "prometheus.yaml"}  # fmt: skip
