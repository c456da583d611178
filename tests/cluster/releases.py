"""What tests of a release on the cluster ask of it."""

from __future__ import annotations

from conftest import Cluster


def logged_artifact(cluster: Cluster, namespace: str) -> str:
    """Key, below the artifact root, of what a client of this MLflow has sent it: the client has no key of the object store."""
    script = f"""
import os
for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_"))]:
    del os.environ[name]
import mlflow
mlflow.set_tracking_uri("http://osctl-mlflow.{namespace}.svc:5000")
mlflow.set_experiment("deploy")
with mlflow.start_run() as run:
    mlflow.log_text("kept in the object store\\n", "note.txt")
print("ARTIFACT", run.info.artifact_uri.removeprefix("mlflow-artifacts:/") + "/note.txt")
"""
    said = cluster.kubectl("-n", namespace, "exec", "deployment/osctl-mlflow", "--", "python", "-c", script)
    return next(line.split()[1] for line in said.splitlines() if line.startswith("ARTIFACT"))
