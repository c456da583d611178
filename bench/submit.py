"""What `osctl launch --backend kubernetes` costs, in CPU-seconds of the whole process, beside `kubectl create -f` of the Job that it makes.

Each round is the first launch of a pipeline: store probed, data and imports found in it, plan and budget computed, revision written, Job
created; then the driver is removed again. The recipe is `open-sora-1.0` with data that pods alone see and imports that were brought in;
both are registered before anything is measured, as small files in their place: a launch reads manifests, not contents.
The first round does not count: it compiles modules, and asks the trainer's image in a real pod whether it knows imports. No driver runs,
since its image is none.
Rounds of all are interleaved; the minimum counts. Limit 1.0 CPU-s, goal 0.5. Needs the cluster of tests/cluster/up.

    .venv/bin/python bench/submit.py [rounds]
"""

from __future__ import annotations

import os
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROUNDS = 10
CLIPS = 20_000
"""Rows of each CSV; the published one of the last stages has so many."""
OSCTL = str(Path(sys.executable).parent / "osctl")
CACHE = Path(os.environ.get("OSCTL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "osctl") / "cluster"
KUBECTL = str(CACHE / "bin/kubectl")
IMAGE = str(Path(__file__).parents[1] / "tests/cluster/image")


def cpu_seconds(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """(CPU, wall) of a process and its children."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    wall = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def recipe(folder: Path, store: str, env: dict[str, str]) -> Path:
    """`open-sora-1.0` as a person makes it theirs: what it names is registered in the store under its name."""
    osctl(["init", str(folder), "--from", "open-sora-1.0"], env)
    contents = folder.with_name("contents")
    for role in ("weights", "autoencoder", "text"):
        (contents / role).mkdir(parents=True)
        (contents / role / "config.json").write_text("{}")
        (contents / role / "model.safetensors").write_bytes(role.encode())
        osctl(["weights", "add", f"published-{role}", str(contents / role), "--as", role, "--store", store], env)
    for file in folder.glob("stage*.yaml"):
        stage = yaml.safe_load(file.read_text())
        stage["autoencoder"]["path"], stage["text"]["path"] = "published-autoencoder", "published-text"
        if "weights" in stage:
            stage["weights"] = "published-weights"
        clips = contents / Path(stage["data"]["source"]["path"]).name
        stage["data"]["source"]["path"] = str(clips)
        if not clips.exists():
            clips.write_text("path,text\n" + "".join(f"{number}.mp4,a clip\n" for number in range(CLIPS)))
            osctl(["data", "register", clips.stem, str(clips), "--by-name", "--store", store], env)
        file.write_text(yaml.safe_dump(stage))
    for clips in contents.glob("*.csv"):
        clips.unlink()  # pods see it, this machine does not
    return folder


def osctl(words: list[str], env: dict[str, str]) -> None:
    done = subprocess.run([OSCTL, *words], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"osctl {' '.join(words)}: {done.stderr}")


def main() -> None:
    settings = dict(line.split("=", 1) for line in (CACHE / "conf/s3.env").read_text().splitlines())
    # As on anybody's machine: modules are compiled once. Without it each process would compile what nobody has compiled before.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"} | settings
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    namespace = f"bench-{secrets.token_hex(4)}"
    env |= {"KUBECONFIG": str(CACHE / "conf/admin.kubeconfig"), "PYTHONPATH": str(Path(__file__).parents[1])}
    kubectl = [KUBECTL, "-n", namespace]
    subprocess.run([KUBECTL, "create", "namespace", namespace], env=env, check=True, capture_output=True)
    images = subprocess.run([IMAGE], env=env, check=True, capture_output=True, text=True).stdout.splitlines()
    image = next(line.split()[1] for line in images if line.startswith("trainer "))
    try:
        subprocess.run([*kubectl, "create", "serviceaccount", "osctl-driver"], env=env, check=True, capture_output=True)
        with tempfile.TemporaryDirectory() as folder:
            env |= {"PYTHONPYCACHEPREFIX": f"{folder}/compiled"}
            profile = yaml.safe_load((Path(__file__).parents[1] / "configs/clusters/h800-64.yaml").read_text())
            profile |= {"namespace": namespace, "s3_endpoint": settings["OSCTL_S3_ENDPOINT"], "tracking": "none"}
            profile |= {"image": image, "tolerations": []}  # the check runs on the node that is real
            path = Path(folder, "cluster.yaml")
            path.write_text(yaml.safe_dump(profile))
            job = Path(folder, "job.yaml")
            spent: dict[str, list[tuple[float, float]]] = {}
            store = f"s3://osctl/{namespace}"
            own = recipe(Path(folder, "recipe"), store, env)
            where = ["-f", str(own), "--cluster", str(path), "--store"]
            for number in range(rounds + 1):
                render = [OSCTL, "render", "stage1", "--driver", "-o", "yaml", *where, f"{store}-{number}"]
                rendered = subprocess.run(render, env=env, check=True, capture_output=True, text=True)
                job.write_text(rendered.stdout.split("---\n")[-1])
                costs = {"kubectl create -f": cpu_seconds([*kubectl, "create", "-f", str(job)], env)}
                subprocess.run([*kubectl, "delete", "-f", str(job), "--wait=true"], env=env, check=True, capture_output=True)
                costs["osctl launch"] = cpu_seconds([OSCTL, "launch", *where, store, "--set", f"name=round-{number}"], env)
                driver = ["jobs", "-l", "osctl/role=driver,osctl/pipeline"]  # the check of the image stays
                subprocess.run([*kubectl, "delete", *driver, "--wait=true"], env=env, check=True, capture_output=True)
                if number:
                    for name, cost in costs.items():
                        spent.setdefault(name, []).append(cost)
            peer = min(spent["kubectl create -f"])[0]
            for name, rows in spent.items():
                cpu, wall = (sorted(column) for column in zip(*rows, strict=True))
                print(f"{name:32s} {cpu[0]:.3f} CPU-s (median {cpu[len(cpu) // 2]:.3f})  {wall[0]:.3f} s  {cpu[0] / peer:.1f}x kubectl")
    finally:
        subprocess.run([KUBECTL, "delete", "namespace", namespace, "--wait=false"], env=env, check=True, capture_output=True)


if __name__ == "__main__":
    main()
