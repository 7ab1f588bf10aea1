"""Writes tests/golden/launch: what the scripts of launch/ print with --dry-run.

    python -m tests.make_golden_launch

After a change of launch/ run it, and read the difference before you commit it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.launch_fakes import ROOT, run_script

GOLDEN = Path(__file__).parent / "golden" / "launch"
_TRAIN = ("--config=configs/text.py:small,blind", "--workdir=/runs/the first")
_TPU = ("--name=mine", "--project=my-project", "--zone=us-central1-a")
_MADE = ("--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite")
_GIT = "--source=git+https://example.org/blindvalm_jax@v0.1.0"
_SET = ("--env=JAX_COORDINATOR_PORT=8476", "--env=NOTE=it's $HOME: $(PROCESS) 1", "--env=EMPTY=")
_IMAGE = ("--name=first", "--image=example.org/blindvalm:1")
_POD = (*_IMAGE, "--claim=runs")
_XPK = (*_IMAGE, "--project=my-project", "--zone=us-central1-a", "--cluster=my-cluster")
_SWEEP = ("sweep", "run", "--config=configs/sweeps/one.py", "--workdir=/runs/the sweep")
_STORED = (_TRAIN[0], "--workdir=gs://my-bucket/first")

CASES: dict[str, tuple[str, ...]] = {
    "tpu_vm_create": ("launch/tpu_vm.sh", "create", *_TPU, *_MADE),
    "tpu_vm_install": ("launch/tpu_vm.sh", "install", *_TPU, _GIT),
    "tpu_vm_run": ("launch/tpu_vm.sh", "run", *_TPU, "--", *_TRAIN),
    "tpu_vm_run_env": ("launch/tpu_vm.sh", "run", *_TPU, *_SET, "--", *_TRAIN),
    "tpu_vm_logs": ("launch/tpu_vm.sh", "logs", *_TPU),
    "tpu_vm_status": ("launch/tpu_vm.sh", "status", *_TPU),
    "tpu_vm_delete": ("launch/tpu_vm.sh", "delete", *_TPU),
    "tpu_vm_babysit": (
        *("launch/tpu_vm.sh", "babysit", *_TPU, *_MADE, _GIT, "--spot", "--queued"),
        *("--setup=mountpoint -q /runs || gcsfuse my-bucket /runs", "--", *_TRAIN),
    ),
    "gke_create_tpu": (
        *("launch/gke.sh", "create", *_POD, "--tpu=tpu-v5-lite-podslice", "--topology=4x4"),
        *("--hosts=4", "--slices=2", "--spot", "--", *_TRAIN),
    ),
    "gke_create_gpu": (
        *("launch/gke.sh", "create", *_POD, "--gpu=nvidia-h100-80gb", "--chips=8", "--hosts=2"),
        *("--namespace=training", "--", *_TRAIN),
    ),
    "gke_create_env": (
        *("launch/gke.sh", "create", *_POD, "--tpu=tpu-v5-lite-podslice", "--topology=2x2"),
        *(*_SET, "--", *_TRAIN),
    ),
    "gke_create_bucket": (
        *("launch/gke.sh", "create", *_POD, "--tpu=tpu-v5-lite-podslice", "--topology=2x2"),
        *("--gcsfuse", "--service-account=trainer", "--", *_TRAIN),
    ),
    "gke_create_address": (
        *("launch/gke.sh", "create", *_IMAGE, "--gpu=nvidia-h100-80gb", "--chips=8"),
        *("--service-account=trainer", "--", *_STORED),
    ),
    "gke_babysit": (
        *("launch/gke.sh", "babysit", *_IMAGE, "--gpu=nvidia-h100-80gb", "--chips=8"),
        *("--poll=30", "--", *_STORED),
    ),
    "gke_logs": ("launch/gke.sh", "logs", "--name=first"),
    "gke_status": ("launch/gke.sh", "status", "--name=first"),
    "gke_delete": ("launch/gke.sh", "delete", "--name=first"),
    "gke_xpk": (
        *("launch/gke.sh", "xpk", *_XPK, "--type=v5litepod-16", "--slices=2", "--storage=runs"),
        *(_SET[0], "--", *_TRAIN),
    ),
    "gke_xpk_address": ("launch/gke.sh", "xpk", *_XPK, "--type=v5litepod-16", "--", *_STORED),
    "sky_launch_tpu": (
        *("launch/sky.sh", "launch", "--name=first", "--tpu=tpu-v5litepod-16"),
        *("--bucket=gs://my-bucket", _SET[0], "--", *_TRAIN),
    ),
    "sky_launch_gpu": (
        *("launch/sky.sh", "launch", "--name=first", "--gpu=H100:8", "--nodes=2", "--infra=aws"),
        *("--extras=cuda,s3,wandb", "--secret=WANDB_API_KEY", "--", *_STORED),
    ),
    "sky_logs": ("launch/sky.sh", "logs", "--name=first"),
    "sky_status": ("launch/sky.sh", "status"),
    "sky_delete": ("launch/sky.sh", "delete", "--name=first"),
    "container_build": ("launch/container.sh", "build", "--extras=tpu,gs", "--image=my/image:1"),
    "container_run": (
        *("launch/container.sh", "run", "--runs=runs/of mine", "--data=/texts", _SET[0], "--"),
        *_TRAIN,
    ),
    "container_run_gpu": (
        *("launch/container.sh", "run", "--extras=cuda,gs,wandb", "--gpus", "--user=1001:1001"),
        *("--secret=WANDB_API_KEY", "--grace=60", "--", *_STORED),
    ),
    "slurm": ("launch/slurm.sbatch", *_TRAIN),
    "slurm_sweep": ("launch/slurm.sbatch", *_SWEEP),
    "gke_create_sweep": (
        *("launch/gke.sh", "create", *_POD, "--gpu=nvidia-h100-80gb", "--chips=8", "--", *_SWEEP),
    ),
    "local_sweep": (
        *("launch/local.py", "--processes=2", "--gpus=2", "--command=python -m it", "--", *_SWEEP),
    ),
    "local": (
        *("launch/local.py", "--processes=2", "--devices=4", "--port=12321"),
        *("--command=python -m blindvalm_jax.train", "--", *_TRAIN),
    ),
}
_ARRAY = {"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}
VARIABLES = {
    "slurm_sweep": _ARRAY,
    "slurm": {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "17"},
    "sky_launch_gpu": {"WANDB_API_KEY": "hidden"},
    "container_run_gpu": {"WANDB_API_KEY": "hidden"},
}


def dry_run(name: str) -> str:
    """What a case prints; the checkout's place is ROOT."""
    script, *words = CASES[name]
    words.insert(1 if script.endswith(".sh") else 0, "--dry-run")
    if script.endswith(".py"):
        command = [sys.executable, script, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    else:
        done = run_script(script, *words, **VARIABLES.get(name, {}))
    if done.returncode or done.stderr:
        raise RuntimeError(f"{name}: exit code {done.returncode}, {done.stderr}")
    return done.stdout.replace(str(ROOT), "ROOT")


def main() -> None:
    """Writes all of them."""
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*.txt"):
        path.unlink()
    for name in CASES:
        (GOLDEN / f"{name}.txt").write_text(dry_run(name))


if __name__ == "__main__":
    main()
