"""Checks the YAML of launch/ by the schedulers' own schemas, in an environment of its own.

    pip install skypilot kubernetes-validate
    python -m tests.check_launch_schemas --jobset_crd=jobset.x-k8s.io_jobsets.yaml

The file is in JobSet's repository, in config/components/crd/bases, or what
`kubectl get crd jobsets.jobset.x-k8s.io --output=yaml` prints.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.launch_fakes import Answer, Fakes

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
_POD = ("--name=first", "--image=example.org/blindvalm:1")
_TPU = ("--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--hosts=4", "--slices=2", "--spot")
_GPU = ("--gpu=nvidia-h100-80gb", "--chips=8", "--hosts=2")
_SET = ("--env=JAX_COORDINATOR_PORT=8476", "--env=NOTE=it's $HOME: $(PROCESS) 1", "--env=EMPTY=")
_JOBSETS = {
    "a claim": ("--claim=runs", "--", "--workdir=/runs/first"),
    "variables": ("--claim=runs", *_SET, "--", "--workdir=/runs/first"),
    "a mounted bucket": (
        *("--claim=runs", "--gcsfuse", "--service-account=trainer"),
        *("--", "--workdir=/runs/first"),
    ),
    "an address": ("--service-account=trainer", *_SET, "--", "--workdir=gs://BUCKET/first"),
}
_SKY = {
    "tpu": ("--tpu=tpu-v5litepod-16", "--infra=gcp"),
    "gpu": ("--gpu=H100:8", "--nodes=2", "--extras=cuda,s3,wandb", "--env=NOTE=it's $HOME"),
}
_PLACES = (
    ("--bucket=gs://BUCKET", "--", "--workdir=/runs/first"),
    ("--secret=HOME", "--", "--workdir=gs://BUCKET/first"),
)
# Stands for sky: reads the words and the task as it does, and goes no further.
_READ = """
import sys, click, sky, yaml
from sky.client.cli import command
found, words, context = command.cli, sys.argv[1:], click.Context(command.cli)
while isinstance(found, click.Group):
    _, found, words = found.resolve_command(context, words)
given = found.make_context(found.name, words).params
told = f"sky {sys.argv[1]} {found.name} of SkyPilot {sky.__version__}: valid"
if given.get("entrypoint"):
    (path,) = given["entrypoint"]
    with open(path) as file:
        task = sky.Task.from_yaml_config(yaml.safe_load(file), env_overrides=given["env"])
    told += f", so is task {task.name}, mounts {sorted(task.storage_mounts)}"
print(told)
"""


def main() -> None:
    """Checks all; what is wrong is raised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobset_crd", type=Path, required=True, help="JobSet's own definition")
    (version, *_) = yaml.safe_load(parser.parse_args().jobset_crd.read_text())["spec"]["versions"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    for what, jobset in manifests():
        jsonschema.validate(jobset, schema)
        job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": job}
        under = kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
        print(f"{what}: JobSet of {version['name']}, Job of Kubernetes {under}: valid")
    for words in sky_commands():
        with tempfile.TemporaryDirectory() as directory:
            fakes = Fakes(Path(directory) / "bin")
            read = shlex.join([sys.executable, "-c", _READ])
            fakes.add("sky", {"": [Answer(script=f'{read} "$@"')]})
            done = fakes.run(LAUNCH / "sky.sh", *words)
        if done.returncode:
            raise RuntimeError(f"{words}: {done.stdout}{done.stderr}")
        print(done.stdout.splitlines()[-1])


def manifests() -> Iterator[tuple[str, Any]]:
    """What gke.sh creates, for TPUs and for GPUs."""
    for kind, machines in {"TPU": _TPU, "GPU": _GPU}.items():
        for what, words in _JOBSETS.items():
            command = ["bash", str(LAUNCH / "gke.sh"), "manifest", *_POD, *machines, *words]
            done = subprocess.run(command, capture_output=True, check=True)
            yield f"{kind}, {what}", yaml.safe_load(done.stdout)


def sky_commands() -> Iterator[tuple[str, ...]]:
    """Commands of sky.sh, those that launch with a mount and for an address."""
    for machines, place in itertools.product(_SKY.values(), _PLACES):
        yield ("launch", "--name=first", *machines, *place)
    for command in ("logs", "status", "delete"):
        yield (command, "--name=first")


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
