"""What `deploy/` ships can be read by what it is for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from cdc_embedder.embedding.ray_pool import OPTIONS

KUBERAY = Path(__file__).parents[2] / "deploy" / "kuberay"


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
