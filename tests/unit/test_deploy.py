"""What `deploy/` ships can be read by what it is for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from cdc_embedder import __version__
from cdc_embedder.embedding.ray_pool import OPTIONS

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"


def test_the_ray_cluster_has_gpus_to_give_and_the_models_row_points_to_its_head() -> None:
    cluster = yaml.safe_load((KUBERAY / "raycluster.yaml").read_text())
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    [head] = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    [group] = cluster["spec"]["workerGroupSpecs"]
    [worker] = group["template"]["spec"]["containers"]
    row = re.search(r"options = '(.*)'", (KUBERAY / "model.sql").read_text())
    assert row is not None
    options = json.loads(row[1])
    assert set(options) <= set(OPTIONS)
    assert options["address"] == (
        f"ray://{cluster['metadata']['name']}-head-svc:"
        f"{next(port['containerPort'] for port in head['ports'] if port['name'] == 'client')}"
    )
    assert options["num_gpus"] <= int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert options["num_cpus"] <= int(worker["resources"]["requests"]["cpu"])
    assert options["actors"] <= group["replicas"]


def test_the_ray_cluster_is_of_the_versions_of_the_service() -> None:
    """Ray and Python as in the service's image, or its client is refused; what the actors load, too."""
    text = (KUBERAY / "raycluster.yaml").read_text()
    cluster = yaml.safe_load(text)
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    python = re.search(r"^ARG PYTHON=python:3\.(\d+)-", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    assert pinned is not None
    assert python is not None
    assert cluster["spec"]["rayVersion"] == pinned[1]
    assert f"FROM rayproject/ray:{pinned[1]}-py3{python[1]}-gpu\n" in text
    assert re.findall(r"cdc-embedder(?:\[local\]==|:|-ray:)(\d+\.\d+\.\d+)", text) == [__version__] * 4
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    images = {each["image"] for group in groups for each in group["template"]["spec"]["containers"]}
    assert images == {f"registry.example.com/cdc-embedder-ray:{__version__}"}
