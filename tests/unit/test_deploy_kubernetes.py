"""Kubernetes' objects, offline and strictly: as kubectl and helm render them, against Kubernetes' own schemas."""

from __future__ import annotations

import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cdc_embedder import __version__
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.openai_api import application
from cdc_embedder.querying import Queries
from cdc_embedder.settings import PREFIX, Settings
from cdc_embedder.web import Health
from tests.lacking import lacks

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "cdc-embedder"
OVERLAYS = ["kubernetes/base", "kubernetes/overlays/gpu"]
VALUES = {
    "default": [],
    "gpu": ["gpu.enabled=true", "gpu.count=2"],
    "everything": [
        "serviceMonitor.enabled=true",
        "models.offlineImage=registry.example.com/models:1",
        "models.existingClaim=models",
        "settings.WAL_LIMIT_THEN=renew",
        "nodeSelector.pool=batch",
        "tolerations[0].key=x",
        "tolerations[0].operator=Exists",
        "imagePullSecrets[0].name=pull",
        "podAnnotations.a=b",
        "extraEnv[0].name=OPENAI_API_KEY",
        "extraEnv[0].valueFrom.secretKeyRef.name=openai",
        "extraEnv[0].valueFrom.secretKeyRef.key=key",
    ],
    "little": ["replicaCount=1", "networkPolicy.enabled=false"],
}
OPERATORS = {"ServiceMonitor": "monitoring.coreos.com/v1"}

Object = dict[str, Any]


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with kubectl and helm, out of the Python package that carries them (`make` puts it into build/)."""
    found = sorted((ROOT / "build" / "kubectl").rglob("lambda-layer-kubectl-*.jsii.tgz"))
    if not found:
        lacks("kubectl and helm (make puts them into build/kubectl)")
    folder = tmp_path_factory.mktemp("tools")
    with tarfile.open(found[-1]) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(BytesIO(layer.read())) as archive:
            for name in ("kubectl", "helm"):
                (folder / name).write_bytes(archive.read(f"{name}/{name}"))
                (folder / name).chmod(0o755)
    return folder


def objects(text: str) -> list[Object]:
    return [each for each in yaml.safe_load_all(text) if each is not None]


def kustomized(tools: Path, folder: Path) -> list[Object]:
    done = subprocess.run([tools / "kubectl", "kustomize", folder], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    return objects(done.stdout)


def templated(tools: Path, *values: str, release: str = "cdc-embedder") -> list[Object]:
    command = [tools / "helm", "template", release, CHART, *(part for value in values for part in ("--set", value))]
    return objects(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def with_components(tools: Path, folder: Path) -> list[Object]:
    """The base with every component, as somebody's own kustomization has it."""
    folder.mkdir()
    named = {part.name: part for part in (DEPLOY / "kubernetes" / "components").iterdir()}
    (folder / "deploy").symlink_to(DEPLOY)
    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": ["deploy/kubernetes/base"],
                "components": [f"deploy/kubernetes/components/{name}" for name in sorted(named)],
            }
        )
    )
    done = subprocess.run(
        [tools / "kubectl", "kustomize", "--load-restrictor", "LoadRestrictionsNone", folder],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return objects(done.stdout)


@pytest.fixture(scope="session")
def rendered(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Object]]:
    """Every way of having them, by name."""
    ways = {name: kustomized(tools, DEPLOY / name) for name in OVERLAYS}
    ways["components"] = with_components(tools, tmp_path_factory.mktemp("own") / "kustomization")
    ways |= {f"helm {name}": templated(tools, *values, release="my") for name, values in VALUES.items()}
    ways["example secret"] = objects((DEPLOY / "kubernetes" / "secret.example.yaml").read_text())
    return ways


def kinds(found: list[Object]) -> list[str]:
    return sorted(each["kind"] for each in found)


def the(kind: str, found: list[Object]) -> Object:
    [each] = [each for each in found if each["kind"] == kind]
    return each


def pod_specs(ways: dict[str, list[Object]]) -> Iterator[tuple[str, Object]]:
    for way, found in ways.items():
        for each in found:
            if each["kind"] == "Deployment":
                yield way, each["spec"]["template"]["spec"]


def containers(spec: Object) -> list[Object]:
    return [*spec["containers"], *spec.get("initContainers", [])]


def test_every_object_is_one_that_kubernetes_knows_field_by_field(rendered: dict[str, list[Object]]) -> None:
    for way, found in rendered.items():
        for each in found:
            if OPERATORS.get(each["kind"]) == each["apiVersion"]:
                continue
            kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
            assert each["metadata"]["name"], way
    assert kinds(rendered["kubernetes/base"]) == ["Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service"]
    assert kinds(rendered["kubernetes/overlays/gpu"]) == ["Deployment", "NetworkPolicy", "Service"]
    assert "ServiceMonitor" in kinds(rendered["components"])
    assert kinds(rendered["helm little"]) == ["Deployment", "Service"]


def test_a_misspelt_field_would_be_seen(rendered: dict[str, list[Object]]) -> None:
    wrong = yaml.safe_load(yaml.safe_dump(the("Deployment", rendered["kubernetes/base"])))
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_selectors_find_the_pods_and_nothing_else(rendered: dict[str, list[Object]]) -> None:
    for way, found in rendered.items():
        if way == "example secret":
            continue
        deployment = the("Deployment", found)
        labels = deployment["spec"]["template"]["metadata"]["labels"].items()
        selectors = {"Deployment": deployment["spec"]["selector"]["matchLabels"],
                     "Service": the("Service", found)["spec"]["selector"]}  # fmt: skip
        for each in found:
            if each["kind"] == "PodDisruptionBudget":
                selectors["PodDisruptionBudget"] = each["spec"]["selector"]["matchLabels"]
            if each["kind"] == "NetworkPolicy":
                selectors["NetworkPolicy"] = each["spec"]["podSelector"]["matchLabels"]
            if each["kind"] == "ServiceMonitor":
                selectors["ServiceMonitor"] = each["spec"]["selector"]["matchLabels"]
                assert (
                    each["spec"]["selector"]["matchLabels"].items()
                    <= the("Service", found)["metadata"]["labels"].items()
                )
        for kind, selector in selectors.items():
            assert selector, (way, kind)
            assert selector.items() <= labels, (way, kind)


def test_no_container_may_do_more_than_it_needs(rendered: dict[str, list[Object]]) -> None:
    seen = 0
    for way, spec in pod_specs(rendered):
        assert spec["automountServiceAccountToken"] is False, way
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(spec):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, way
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
            volumes = {volume["name"] for volume in spec["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            seen += 1
    assert seen == 9  # in two of them a container brings the models


def test_two_wait_for_each_other_and_one_on_a_gpu_is_replaced(rendered: dict[str, list[Object]]) -> None:
    for way in ("kubernetes/base", "helm default"):
        assert the("Deployment", rendered[way])["spec"]["replicas"] == 2
        assert the("PodDisruptionBudget", rendered[way])["spec"]["maxUnavailable"] == 1
    for way, count in (("kubernetes/overlays/gpu", "1"), ("helm gpu", "2")):
        spec = the("Deployment", rendered[way])["spec"]
        assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
        [container] = spec["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == count
        assert container["image"].endswith("-cuda")
        assert spec["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
        assert "PodDisruptionBudget" not in kinds(rendered[way])


def test_every_variable_is_a_setting_and_no_secret_stands_in_the_open(rendered: dict[str, list[Object]]) -> None:
    fields = {PREFIX + name.upper() for name in Settings.model_fields}
    for way, spec in pod_specs(rendered):
        [container] = spec["containers"]
        variables = {each["name"]: each for each in container["env"]}
        assert len(variables) == len(container["env"]), way
        assert {name for name in variables if name.startswith(PREFIX)} <= fields, way
        for name, key in (("DSN", "dsn"), ("HTTP_TOKEN", "http-token")):
            reference = variables[PREFIX + name]["valueFrom"]["secretKeyRef"]
            assert reference == {"name": "cdc-embedder", "key": key}
        assert variables["HF_HOME"]["value"] in [mount["mountPath"] for mount in container["volumeMounts"]]
    secret = rendered["example secret"][0]
    assert (secret["metadata"]["name"], set(secret["stringData"])) == ("cdc-embedder", {"dsn", "http-token"})
    everything = the("Deployment", rendered["helm everything"])["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "CDC_EMBEDDER_WAL_LIMIT_THEN", "value": "renew"} in everything


def test_what_is_probed_and_scraped_is_served(rendered: dict[str, list[Object]]) -> None:
    queries = Queries(Embedders())
    app = application(Health(), "slot", queries, lambda: b"", closed="", token=None, max_bytes=1 << 20)
    served = {route.path for route in app.routes}
    for _, spec in pod_specs(rendered):
        [container] = spec["containers"]
        [port] = container["ports"]
        address = next(each["value"] for each in container["env"] if each["name"] == PREFIX + "HTTP")
        assert Settings(http=address).http_address == ("0.0.0.0", port["containerPort"])
        for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
            assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
            assert path in served
    for way in ("components", "helm everything"):
        [endpoint] = the("ServiceMonitor", rendered[way])["spec"]["endpoints"]
        assert endpoint["path"] in served
        assert endpoint["authorization"]["credentials"] == {"name": "cdc-embedder", "key": "http-token"}
        assert endpoint["port"] == the("Service", rendered[way])["spec"]["ports"][0]["name"]


def test_the_chart_gives_what_the_base_gives(tools: Path, rendered: dict[str, list[Object]]) -> None:
    """But for the labels by which Helm knows its own, and the policy of pulling."""
    theirs = {each["kind"]: without_helm(each) for each in templated(tools)}
    ours = {each["kind"]: without_helm(each) for each in rendered["kubernetes/base"]}
    assert theirs == ours


def without_helm(found: Any) -> Any:
    own = {"app.kubernetes.io/instance", "app.kubernetes.io/version", "app.kubernetes.io/managed-by", "helm.sh/chart"}
    if isinstance(found, dict):
        return {key: without_helm(value) for key, value in found.items() if key not in {*own, "imagePullPolicy"}}
    return [without_helm(each) for each in found] if isinstance(found, list) else found


def test_helm_has_nothing_to_say_about_the_chart(tools: Path) -> None:
    done = subprocess.run([tools / "helm", "lint", "--strict", CHART], capture_output=True, text=True)
    assert done.returncode == 0
    assert "0 chart(s) failed" in done.stdout
    assert not re.search("ERROR|WARNING", done.stdout)


@pytest.mark.parametrize("value", ["replicaCount=many", "gpu.enable=true", "settings.dsn=x", "settings.DSN=x"])
def test_a_value_that_means_nothing_is_refused(tools: Path, value: str) -> None:
    command = [tools / "helm", "template", "x", CHART, "--set", value]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "schema" in done.stderr


def test_images_and_chart_are_of_this_version(rendered: dict[str, list[Object]]) -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    for way, spec in pod_specs(rendered):
        assert re.fullmatch(rf"ghcr\.io/cdc-embedder/cdc-embedder:{re.escape(__version__)}-(cpu|cuda)",
                            spec["containers"][0]["image"]), way  # fmt: skip
