"""Kubernetes' objects, offline and strictly: as kubectl and helm render them, against Kubernetes' own schemas."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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
from cdc_embedder.embedding.calibration import cache_file
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
        "serviceMonitor.labels.release=prometheus",
        "networkPolicy.extraEgress[0].ports[0].port=4318",
        "networkPolicy.extraEgress[0].ports[0].protocol=TCP",
        "extraVolumes[0].name=config",
        "extraVolumes[0].configMap.name=config",
        "extraVolumeMounts[0].name=config",
        "extraVolumeMounts[0].mountPath=/etc/cdc-embedder/config",
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
    "ipv6": ["listenAddress=[::]"],
}
OPERATORS = {"ServiceMonitor": "monitoring.coreos.com/v1"}
OF_THE_CHART = {"dsn", "replication_dsn", "http_token", "http", "log_format"}
"""Settings that it sets itself, from the Secret or from values of their own."""

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
    named = {part.name: part for part in (DEPLOY / "kubernetes" / "components").iterdir()}
    own = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["deploy/kubernetes/base"],
        "components": [f"deploy/kubernetes/components/{name}" for name in sorted(named)],
    }
    return over_ours(tools, folder, yaml.safe_dump(own))


def over_ours(tools: Path, folder: Path, kustomization: str) -> list[Object]:
    """Somebody's own kustomization, in whose folder there is `deploy`."""
    folder.mkdir()
    (folder / "deploy").symlink_to(DEPLOY)
    (folder / "kustomization.yaml").write_text(kustomization)
    done = subprocess.run(
        [tools / "kubectl", "kustomize", "--load-restrictor", "LoadRestrictionsNone", folder],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return objects(done.stdout)


@pytest.fixture(scope="session")
def rendered(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Object]]:
    """Every way of having them, by name."""
    ways = {name: kustomized(tools, DEPLOY / name) for name in OVERLAYS}
    own = tmp_path_factory.mktemp("own")
    ways["components"] = with_components(tools, own / "kustomization")
    ways["readme"] = over_ours(tools, own / "readme", kustomization_of_the_readme())
    ways |= {f"helm {name}": templated(tools, *values, release="my") for name, values in VALUES.items()}
    ways["example secret"] = objects((DEPLOY / "kubernetes" / "secret.example.yaml").read_text())
    return ways


def kustomization_of_the_readme() -> str:
    """With what it fetches from the project's address taken from here."""
    [text] = re.findall(r"```yaml\n(.*?)```", (DEPLOY / "kubernetes" / "README.md").read_text(), re.DOTALL)
    here, count = re.subn(
        rf"https://github\.com/cdc-embedder/cdc-embedder//(deploy/\S+)\?ref=v{re.escape(__version__)}(?=[\]\s])",
        r"\1",
        text,
    )
    assert count == 2
    assert "http" not in here
    return here


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
    assert seen == 11  # in two of them a container brings the models


def test_two_wait_for_each_other_and_one_on_a_gpu_is_replaced(rendered: dict[str, list[Object]]) -> None:
    for way in ("kubernetes/base", "helm default"):
        assert the("Deployment", rendered[way])["spec"]["replicas"] == 2
        budget = the("PodDisruptionBudget", rendered[way])["spec"]
        assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")
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
    assert (secret["metadata"]["name"], set(secret["stringData"])) == ("cdc-embedder", {"dsn", "http-token", "ca.crt"})
    everything = the("Deployment", rendered["helm everything"])["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "CDC_EMBEDDER_WAL_LIMIT_THEN", "value": "renew"} in everything["env"]
    assert {"name": "config", "mountPath": "/etc/cdc-embedder/config"} in everything["volumeMounts"]


def test_what_is_probed_and_scraped_is_served(rendered: dict[str, list[Object]]) -> None:
    queries = Queries(Embedders())
    app = application(Health(), "slot", queries, lambda: b"", closed="", token=None, max_bytes=1 << 20)
    served = {route.path for route in app.routes}
    for way, spec in pod_specs(rendered):
        [container] = spec["containers"]
        [port] = container["ports"]
        address = next(each["value"] for each in container["env"] if each["name"] == PREFIX + "HTTP")
        host = "::" if way == "helm ipv6" else "0.0.0.0"
        assert Settings(http=address).http_address == (host, port["containerPort"])
        for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
            assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
            assert path in served
    for way in ("components", "helm everything"):
        [endpoint] = the("ServiceMonitor", rendered[way])["spec"]["endpoints"]
        assert endpoint["path"] in served
        assert endpoint["authorization"]["credentials"] == {"name": "cdc-embedder", "key": "http-token"}
        assert endpoint["port"] == the("Service", rendered[way])["spec"]["ports"][0]["name"]
    assert the("ServiceMonitor", rendered["helm everything"])["metadata"]["labels"]["release"] == "prometheus"


@pytest.mark.parametrize(
    ("overlay", "values"), [("kubernetes/base", []), ("kubernetes/overlays/gpu", ["gpu.enabled=true"])]
)
def test_the_chart_gives_what_an_overlay_gives(
    overlay: str, values: list[str], tools: Path, rendered: dict[str, list[Object]]
) -> None:
    """But for the labels by which Helm knows its own, and the policy of pulling."""
    theirs = {each["kind"]: without_helm(each) for each in templated(tools, *values)}
    ours = {each["kind"]: without_helm(each) for each in rendered[overlay]}
    assert theirs == ours


@pytest.mark.parametrize("values", [[], ["gpu.enabled=true"]])
def test_resources_that_are_given_change_those_alone(values: list[str], tools: Path) -> None:
    def resources(*given: str) -> Object:
        spec = the("Deployment", templated(tools, *values, *given))["spec"]["template"]["spec"]
        return dict(spec["containers"][0]["resources"])

    before = resources()
    after = resources("resources.limits.memory=3Gi")
    assert after == {**before, "limits": {**before["limits"], "memory": "3Gi"}} != before


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


@pytest.mark.parametrize(
    "value",
    [
        "replicaCount=many",
        "gpu.enable=true",
        "settings.dsn=x",
        "settings.WAL_LIMIT=x",
        *(f"settings.{name.upper()}=x" for name in sorted(OF_THE_CHART)),
        *(f"extraEnv[0].name={PREFIX}{name.upper()}" for name in sorted(OF_THE_CHART)),
        "extraEnv[0].name=HF_HOME",
        "listenAddress=localhost",
    ],
)
def test_a_value_that_means_nothing_is_refused(tools: Path, value: str) -> None:
    command = [tools / "helm", "template", "x", CHART, "--set", value]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "schema" in done.stderr


def test_the_charts_settings_are_those_of_the_service_but_its_own() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    known = {name.upper() for name in Settings.model_fields.keys() - OF_THE_CHART}
    assert set(schema["settings"]["propertyNames"]["enum"]) == known
    refused = schema["extraEnv"]["items"]["properties"]["name"]["not"]["enum"]
    assert {name for name in refused if name.startswith(PREFIX)} == {PREFIX + name.upper() for name in OF_THE_CHART}


def test_the_authority_of_the_example_is_where_its_dsn_looks(rendered: dict[str, list[Object]]) -> None:
    [secret] = rendered["example secret"]
    dsn = dict(part.split("=", 1) for part in secret["stringData"]["dsn"].split())
    assert dsn["sslmode"] == "verify-full"
    for way, spec in pod_specs(rendered):
        [container] = spec["containers"]
        [volume] = [each for each in spec["volumes"] if each["name"] == "tls"]
        assert volume["secret"] == {
            "secretName": secret["metadata"]["name"],
            "optional": True,  # without it a pod waits for the key
            "items": [{"key": "ca.crt", "path": Path(dsn["sslrootcert"]).name}],
        }, way
        [mount] = [each for each in container["volumeMounts"] if each["name"] == "tls"]
        assert (mount["mountPath"], mount["readOnly"]) == (str(Path(dsn["sslrootcert"]).parent), True)
    assert f"sslrootcert={dsn['sslrootcert']}" in (DEPLOY / "kubernetes" / "README.md").read_text()


def test_what_is_measured_of_a_device_is_kept_with_the_models(
    rendered: dict[str, list[Object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for way, spec in pod_specs(rendered):
        [container] = spec["containers"]
        variables = {each["name"]: each.get("value") for each in container["env"]}
        monkeypatch.setenv("XDG_CACHE_HOME", variables["XDG_CACHE_HOME"])
        [models] = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "models"]
        assert variables["HF_HOME"] == models, way
        kept = cache_file()
        assert kept is not None
        assert kept.is_relative_to(models), way


@pytest.mark.parametrize("way", ["components", "helm everything"])
def test_the_models_of_an_image_are_copied_by_the_pods_user(
    way: str, rendered: dict[str, list[Object]], tmp_path: Path
) -> None:
    """Onto what an emptyDir with fsGroup is, a folder of root's; twice, as a pod's containers may start anew."""
    if os.geteuid() != 0:
        lacks("root, to copy models as the user of a pod")
    spec = the("Deployment", rendered[way])["spec"]["template"]["spec"]
    [container] = spec["initContainers"]
    snapshot = tmp_path / "models" / "hub" / "models--intfloat--e5-small-v2" / "snapshots" / "0123abcd"
    blob = snapshot.parents[1] / "blobs" / "feed"
    for file in (snapshot.parents[1] / "refs" / "main", blob):
        file.parent.mkdir(parents=True)
        file.write_text("0123abcd")
    blob.chmod(0o444)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(Path("../../blobs/feed"))
    [mount] = container["volumeMounts"]
    volume = tmp_path / mount["mountPath"].strip("/")
    volume.mkdir()
    user, group = spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"]
    os.chown(volume, 0, spec["securityContext"]["fsGroup"])
    volume.chmod(0o2777)
    # From within the folder, whose parents are closed to others.
    tmp_path.chmod(0o755)
    command = [part.removeprefix("/") for part in container["command"]]
    for _ in range(2):
        done = subprocess.run(
            command, cwd=tmp_path, user=user, group=group, extra_groups=[], umask=0o022, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
    find = (
        "from huggingface_hub import try_to_load_from_cache as find; print(find('intfloat/e5-small-v2', 'config.json'))"
    )
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(volume)}
    done = subprocess.run([sys.executable, "-c", find], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(volume / (snapshot / "config.json").relative_to(tmp_path / "models"))


def test_the_rules_for_what_else_is_reached_are_rules(rendered: dict[str, list[Object]]) -> None:
    """Those in the base's comments, without the comment signs; the one in the README; the chart's."""
    text = (DEPLOY / "kubernetes" / "base" / "networkpolicy.yaml").read_text()
    allowed, count = re.subn(r"^    # (?=- ports:|    )", "    ", text, flags=re.MULTILINE)
    assert count == 7
    policy = yaml.safe_load(allowed)
    kubernetes_validate.validate(policy, kubernetes_validate.latest_version(), strict=True)
    before = the("NetworkPolicy", rendered["kubernetes/base"])["spec"]["egress"]
    assert policy["spec"]["egress"][: len(before)] == before
    [more] = policy["spec"]["egress"][len(before) :]
    cluster = yaml.safe_load((DEPLOY / "kuberay" / "raycluster.yaml").read_text())
    [head] = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    client = next(port["containerPort"] for port in head["ports"] if port["name"] == "client")
    assert [port["port"] for port in more["ports"]] == [client, 4318, 8080]
    for way in ("readme", "helm everything"):
        assert the("NetworkPolicy", rendered[way])["spec"]["egress"] == [
            *before, {"ports": [{"protocol": "TCP", "port": 4318}]}
        ]  # fmt: skip


def test_the_kustomization_of_the_readme_is_one_for_who_asks_for_vectors(rendered: dict[str, list[Object]]) -> None:
    assert "ServiceMonitor" in kinds(rendered["readme"])
    assert the("Deployment", rendered["readme"])["spec"]["replicas"] == 1


def test_images_and_chart_are_of_this_version(rendered: dict[str, list[Object]]) -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    for way, spec in pod_specs(rendered):
        assert re.fullmatch(rf"ghcr\.io/cdc-embedder/cdc-embedder:{re.escape(__version__)}-(cpu|cuda)",
                            spec["containers"][0]["image"]), way  # fmt: skip
