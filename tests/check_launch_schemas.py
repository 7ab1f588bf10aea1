"""Checks the YAML of launch/ by the schedulers' own schemas, in an environment of its own.

    pip install skypilot kubernetes-validate
    python -m tests.check_launch_schemas --jobset_crd=jobset.x-k8s.io_jobsets.yaml

The file is in JobSet's repository, in config/components/crd/bases, or what
`kubectl get crd jobsets.jobset.x-k8s.io --output=yaml` prints.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import sky
import yaml

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
_POD = ("--name=first", "--image=example.org/blindvalm:1", "--claim=runs")
_MACHINES = (
    ("--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--hosts=4", "--slices=2", "--spot"),
    ("--gpu=nvidia-h100-80gb", "--chips=8", "--hosts=2"),
)


def main() -> None:
    """Checks all; what is wrong is raised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobset_crd", type=Path, required=True, help="JobSet's own definition")
    (version, *_) = yaml.safe_load(parser.parse_args().jobset_crd.read_text())["spec"]["versions"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    for jobset in manifests():
        jsonschema.validate(jobset, schema)
        job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": job}
        under = kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
        print(f"JobSet of {version['name']}, Job of Kubernetes {under}: valid")
    given = [("BUCKET", "gs://MINE"), ("CONFIG", "configs/text.py"), ("RUN", "first")]
    for path in sorted(LAUNCH.glob("sky_*.yaml")):
        task = sky.Task.from_yaml_config(yaml.safe_load(path.read_text()), env_overrides=given)
        print(f"{path.name}, task {task.name} of SkyPilot {sky.__version__}: valid")


def manifests() -> Iterator[Any]:
    """What gke.sh creates, for TPUs and for GPUs."""
    for machines in _MACHINES:
        words = ["bash", str(LAUNCH / "gke.sh"), "manifest", *_POD, *machines, "--", "--config=a"]
        yield yaml.safe_load(subprocess.run(words, capture_output=True, check=True).stdout)


def strict(schema: Any) -> Any:
    """The schema with fields refused that it does not name, as a cluster does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(part) for name, part in schema.items()}
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    if found.get("type") == "object" and "properties" in found:
        found.setdefault("additionalProperties", False)
    return found


if __name__ == "__main__":
    main()
