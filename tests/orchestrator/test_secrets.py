"""Forty secrets, planted wherever one can come in, come out nowhere: the part of the law that needs no cluster.

Real: the command line, the ledger in a folder, the agent with a trainer that says all it knows, MLflow's database, an S3 server's refusal.
A fake API server stands in for a cluster that quotes what it was sent. Real pods are in tests/cluster/test_secrets.py.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny_recipe
import yaml
from fake_api_server import Fault, serve
from planted import Planted

from orchestrator.cli import main
from orchestrator.errors import Unreachable
from orchestrator.redact import holds_credentials, masker, redacted, typed
from orchestrator.tracking.client import MlflowTracker

Run = Callable[..., str]
DIGEST = "sha256:" + "0" * 64
PROFILE: dict[str, Any] = {
    "name": "lab", "namespace": "lab", "image": f"trainer@{DIGEST}", "driver_image": f"osctl@{DIGEST}",
    "device": "h800", "cpu": "8", "memory": "64Gi", "shm": "1Gi", "s3_endpoint": "http://127.0.0.1:9", "s3_secret": "osctl-s3",
}  # fmt: skip


@pytest.fixture
def planted() -> Planted:
    return Planted()


@pytest.fixture
def osctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in a folder with a recipe; all it said, on stdout and stderr."""
    tiny_recipe.write(tmp_path, stages=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OSCTL_S3_PATIENCE_S", "0.2")

    def run(*words: str, expect: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["osctl", *words])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        assert code == expect, f"osctl {words[0]}: exit {code}, expected {expect}\n{said.out}{said.err}"
        assert "Traceback" not in said.err
        return said.out + said.err

    return run


def change(path: str, **values: Any) -> None:
    content = yaml.safe_load(Path(path).read_text())
    Path(path).write_text(yaml.safe_dump(content | values))


# --- What a person typed in the wrong place ---------------------------------------------------------------------------------------------


def test_credentials_in_what_is_written_down_are_refused_and_not_shown(osctl: Run, planted: Planted, monkeypatch: Any) -> None:
    """Nothing is written then: the ledger would have them for ever."""
    said = {
        "store": osctl("plan", "--store", f"s3://AKIA:{planted('store')}@bucket/x"),
        "store, slash": osctl("plan", "--store", f"s3://AKIA:ab/{planted('store, slash')}+/@bucket/x"),
        "other store": osctl("plan", "--store", f"gs://me:{planted('other store')}@bucket/x"),
        "tracking": osctl("launch", "--dry-run", "--tracking", f"http://me:{planted('tracking')}@mlflow:5000"),
        "database": osctl("launch", "--dry-run", "--tracking", f"postgresql://me:{planted('database')}@db/mlflow"),
        "data": osctl("plan", "--set", "stage1.data.source.kind=manifest",
                      "--set", f"stage1.data.source.path=s3://AKIA:{planted('data')}@bucket/clips.csv"),
        "list": osctl("list", "--store", f"s3://AKIA:{planted('list')}@bucket/x"),
        "list, other": osctl("list", "--store", f"gs://me:{planted('list, other')}@bucket/x"),
        "list, file": osctl("list", "--store", f"file://me:{planted('list, file')}@host/x"),
    }  # fmt: skip
    monkeypatch.setenv("OSCTL_TRACKING", f"http://me:{planted('OSCTL_TRACKING')}@mlflow:5000")
    said["OSCTL_TRACKING"] = osctl("plan")
    monkeypatch.delenv("OSCTL_TRACKING")
    change("osctl.yaml", trainer=["train", f"--hub-token={planted('trainer')}"])
    said["trainer"] = osctl("plan")
    monkeypatch.setenv("MY_SERVICE_PASSWORD", planted("trainer, by value"))
    change("osctl.yaml", trainer=["train", "--login", planted.values["trainer, by value"]])
    said["trainer, by value"] = osctl("plan")
    assert planted.found_in(said) == []
    assert all("holds credentials" in said[one] for one in ("store", "tracking", "data", "OSCTL_TRACKING", "trainer", "trainer, by value"))
    assert "osctl.yaml:" in said["trainer"], "it says where"
    assert not Path(".osctl").exists()


def test_a_value_that_looks_like_a_key_is_not_repeated_when_it_is_wrong(osctl: Run, planted: Planted) -> None:
    said = {
        "--set": osctl("plan", "--set", f"stage1.steps={planted('--set')}"),
        "--set, unknown": osctl("plan", "--set", f"hf_token={planted('--set, unknown')}"),
        "--set, no value": osctl("plan", "--set", planted("--set, no value")),
    }
    cases = {
        "unknown key": f"password: {planted('unknown key')}",
        "budget": f"budget_usd: {planted('budget')}",
        "as a key": f"{planted('as a key')}: 1",
        "alias": f"experiment: *{planted('alias')}",
        "tag": f"experiment: !{planted('tag')} x",
        "twice": f"{planted('twice')}: 1\n{planted.values['twice']}: 2",
        "name": f"backend: {planted('name')}",
    }
    for name, line in cases.items():
        Path(f"{name}.yaml").write_text(f"{line}\n" + Path("osctl.yaml").read_text())
        said[name] = osctl("plan", "-f", f"{name}.yaml")
    Path("colon.yaml").write_text(f"token {planted('no colon')}\n")
    said["no colon"] = osctl("plan", "-f", "colon.yaml")
    assert planted.found_in(said) == []
    assert "steps: expected a whole number, found" in said["--set"]


def test_a_profile_that_holds_a_secret_is_refused_and_it_is_not_shown(osctl: Run, planted: Planted) -> None:
    cases: dict[str, dict[str, Any]] = {
        "endpoint": {"s3_endpoint": f"http://me:{planted('endpoint')}@s3:9000"},
        "endpoint, no scheme": {"s3_endpoint": f"me:{planted('endpoint, no scheme')}@s3:9000"},
        "mlflow": {"tracking": f"http://me:{planted('mlflow')}@mlflow:5000"},
        "the secret itself": {"s3_secret": planted("the secret itself", "wJalr/")},
        "image": {"image": f"me:{planted('image')}@registry/osctl@{DIGEST}"},
        "image, allowed": {"image": f"me:{planted('image, allowed')}@registry/osctl", "allow_unpinned": ["x"]},
        "pull secret": {"image_pull_secrets": [planted("pull secret", "dckr_pat_")]},
        "unknown": {"aws_secret_access_key": planted("unknown")},
        "selector": {"node_selector": {"pool": f"{planted('selector')}=="}},
    }
    said = {}
    for name, changes in cases.items():
        Path("lab.yaml").write_text(yaml.safe_dump(PROFILE | changes))
        said[name] = osctl("render", "--cluster", "lab.yaml", "--store", "s3://bucket/x")
    assert planted.found_in(said) == []


# --- What servers and libraries say -----------------------------------------------------------------------------------------------------


class Parrot(BaseHTTPRequestHandler):
    """Refuses everything, and quotes what it was sent."""

    def do_GET(self) -> None:
        words = " ".join(self.headers.values()) + self.path
        body = f"<Error><Code>AccessDenied</Code><Message>{words}</Message><AWSAccessKeyId>{words}</AWSAccessKeyId></Error>".encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST = do_HEAD = do_PATCH = do_GET

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def parrot() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Parrot)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_store_that_quotes_keys_is_not_quoted(osctl: Run, planted: Planted, parrot: str, monkeypatch: Any) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": planted("key id"),
        "AWS_SECRET_ACCESS_KEY": planted("key", "a/b+"),
        "AWS_SESSION_TOKEN": planted("session"),
        "OSCTL_S3_ENDPOINT": f"http://me:{planted('endpoint')}@{parrot}",
    }.items():
        monkeypatch.setenv(name, value)
    said = {"status": osctl("status", "--store", "s3://bucket/x", expect=4), "list": osctl("list", "--store", "s3://bucket/x", expect=4)}
    assert "403" in said["status"]
    monkeypatch.setenv("AWS_SESSION_TOKEN", f"{planted('broken session')}\nx")
    said["line break"] = osctl("status", "--store", "s3://bucket/x", expect=5)
    monkeypatch.setenv("OSCTL_S3_ENDPOINT", planted("no endpoint"))
    said["no endpoint"] = osctl("status", "--store", "s3://bucket/x")
    monkeypatch.setenv("OSCTL_S3_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", f"http://me:{planted('proxy')}@127.0.0.1:9")
    said["proxy"] = osctl("status", "--store", "s3://bucket/x", expect=5)
    assert planted.found_in(said) == []


def test_an_mlflow_that_quotes_credentials_is_not_quoted(planted: Planted, parrot: str, monkeypatch: Any) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, planted(name))
    said = {}
    with pytest.raises(Unreachable) as quoted:
        MlflowTracker(f"http://{parrot}").runs("tiny", {})
    said["login"] = str(quoted.value)
    assert "403" in said["login"] or "AccessDenied" in said["login"]
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name)
    for case, ending in (("token", ""), ("token with a line break", "\nx")):
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", planted(case, ending=ending))
        with pytest.raises(Unreachable) as quoted:
            MlflowTracker(f"http://{parrot}").runs("tiny", {})
        said[case] = str(quoted.value)
    assert planted.found_in(said) == []


def test_credentials_for_a_sync_are_refused_before_a_process_is_called_by_them(osctl: Run, planted: Planted) -> None:
    trainer = [sys.executable, "-c", "raise SystemExit(1)"]
    change("osctl.yaml", trainer=trainer, stages=[{**yaml.safe_load(Path("osctl.yaml").read_text())["stages"][0], "max_attempts": 1}])
    osctl("launch", "-q", expect=3)
    said = {"sync": osctl("sync", "--tracking", f"http://me:{planted('tracking')}@127.0.0.1:9")}
    assert planted.found_in(said) == []
    assert "holds credentials" in said["sync"]


def test_doctor_and_mlflow_behind_a_proxy_that_is_no_url_do_not_quote_it(osctl: Run, planted: Planted, monkeypatch: Any) -> None:
    for variable in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(variable, f"http://me:{planted(variable)}/ab@127.0.0.1:9")
    said = {
        "mlflow": osctl("mlflow", "--tracking", "http://mlflow.example:5000", expect=5),
    }
    monkeypatch.setenv("OSCTL_TRACKING", "http://mlflow.example:5000")
    monkeypatch.setattr(urllib.request, "_opener", None)  # else it keeps the proxies of whatever this process asked first
    said["doctor, tracking"] = osctl("doctor", "-o", "json", expect=4)
    assert "mlflow.example" in said["doctor, tracking"]
    assert planted.found_in(said) == []


def kubeconfig(server: str, **user: Any) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "me"}}],
            "clusters": [{"name": "lab", "cluster": {"server": server}}], "users": [{"name": "me", "user": user}],
        }
    )  # fmt: skip


def test_a_kubeconfig_that_does_not_work_keeps_its_secrets(osctl: Run, planted: Planted, tmp_path: Path, monkeypatch: Any) -> None:
    Path("lab.yaml").write_text(yaml.safe_dump(PROFILE))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    plugin = {"apiVersion": "client.authentication.k8s.io/v1beta1", "command": "sh"}
    with serve() as fake:
        host = fake.url.removeprefix("http://")
        quoting = f'Unauthorized: "Authorization: Bearer {planted("quoted token", "eyJhbGciOi.eyJhdWQi.")}"'
        for _ in range(20):
            fake.faults.append(Fault("GET", status=401, message=quoting))
        cases = {
            "quoted": kubeconfig(fake.url, token=planted.values["quoted token"]),
            "token": kubeconfig(fake.url, token=planted("token", ending="\nx")),
            "password": kubeconfig(f"http://me:{planted('server')}@{host}", username="me", password=planted("password")),
            "plugin": kubeconfig(fake.url, exec={**plugin, "args": ["-c", f"echo 'Bearer {planted('plugin')}' >&2; exit 1"]}),
            "plugin's answer": kubeconfig(fake.url, exec={**plugin, "args": ["-c", f"echo {planted('plugin, answer')}"]}),
            "key": kubeconfig(fake.url.replace("http", "https"), **{"client-certificate-data": "x", "client-key-data": planted("key")}),
            "broken": f"users: [{{name: me, user: {{token: {planted('broken')}",
        }
        said = {}
        for name, content in cases.items():
            Path("kubeconfig").write_text(content)
            monkeypatch.setattr("orchestrator.kube.client.TRIES", 1)
            code = 2 if name in ("broken", "key") else 5 if name == "token" else 4
            said[name] = osctl("launch", "--cluster", "lab.yaml", "--store", "s3://bucket/x", expect=code)
    Path("kubeconfig").write_text(kubeconfig("http://127.0.0.1:9", token="x"))
    for variable in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(variable, f"http://me:{planted(variable)}/ab@127.0.0.1:9")
        said[variable] = osctl("launch", "--cluster", "lab.yaml", "--store", "s3://bucket/x")
    assert planted.found_in(said) == []
    assert "line break" in said["token"]


# --- What an attempt leaves behind ------------------------------------------------------------------------------------------------------

TELLTALE = """
import json, os, sys, time
run = sys.argv[1]
everything = ";".join(os.environ.values())
for name, value in os.environ.items():
    print(name, value)
    sys.stdout.write(value[:9]); sys.stdout.flush(); time.sleep(0.01); sys.stdout.write(value[9:])
    sys.stdout.flush()
for step in range(1, 3):
    line = {"step": step, "time": time.time(), "loss": 1.0, "data_wait_s": 0, "step_s": 0, "checkpoint_s": 0, "note": everything}
    with open(f"{run}/metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + chr(10))
print("x" * 300_000)
print(f"KeyError: {os.environ['AWS_SECRET_ACCESS_KEY']}", flush=True)
time.sleep(1)
died = os.path.join(os.path.dirname(os.path.abspath(__file__)), "died")
if os.path.exists(died):
    with open(f"{run}/result.json", "w") as file:
        json.dump({"schema": 1, "status": "failed", "class": "code", "step": 2, "reason": everything[-1500:]}, file)
open(died, "w").close()
sys.exit(1)
"""
"""A trainer that tells all it knows: on stdout, in pieces too, in its metrics, and of its end: in its last line the first time, as the
reason the second."""


@pytest.mark.long
def test_what_a_trainer_says_is_kept_without_the_credentials_of_its_environment(planted: Planted, tmp_path: Path) -> None:
    """In the ledger, in MLflow, in logs and in what commands print. Only the run directory, on this disk, has the output as it was."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY",
             "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "GITHUB_TOKEN", "AZURE_CLIENT_SECRET", "DOCKER_PASSWORD",
             "PGPASSWORD", "MY_SECRET", "SERVICE_CREDENTIAL")  # fmt: skip
    env = {name: planted(name) for name in names}
    env |= {name: f"http://me:{planted(name)}@127.0.0.1:9" for name in ("HTTPS_PROXY", "ALL_PROXY", "DATABASE_URL")}
    (tmp_path / "telltale.py").write_text(TELLTALE)
    trainer = [sys.executable, str(tmp_path / "telltale.py"), "{run_dir}"]
    folder = tiny_recipe.write(tmp_path / "pipeline", stages=1, devices=1, trainer=trainer, tracking="sqlite")
    change(str(folder / "osctl.yaml"), stages=[{**yaml.safe_load((folder / "osctl.yaml").read_text())["stages"][0], "max_attempts": 2}])
    osctl = tiny_recipe.Osctl(folder, env)
    launch = osctl("launch", expect=3)
    said = {"launch": launch.stdout + launch.stderr}
    for words in ("logs", "events", "status -o json", "status", "compare -o json", "cost", "list", "lineage", "sync", "plan"):
        done = osctl(*words.split(), expect=4 if words == "lineage" else 0)
        said[words] = done.stdout + done.stderr
    assert "HF_TOKEN …" in said["logs"], "its output is there, but for them"
    ended = [attempt["reason"] for attempt in json.loads(osctl("status", "-o", "json").stdout)["stages"][0]["attempts"]]
    assert len(ended) == 2 and "KeyError: " in ended[0] and "KeyError" not in ended[1], "what it printed last, then what it said"
    assert "telltale" in " ".join(json.loads((folder / ".osctl/store/tiny/revisions/000001.json").read_text())["pipeline"]["trainer"])
    texts: dict[str, str | bytes] = dict(said)
    own = ("trainer.log", "metrics.jsonl", "result.json")
    for path in (folder / ".osctl").rglob("*"):
        if path.is_file() and path.name not in own:
            texts[str(path.relative_to(folder))] = path.read_bytes()
    assert any("/log/" in name for name in texts) and ".osctl/mlflow.db" in texts
    assert planted.found_in(texts) == []
    with sqlite3.connect(f"file:{folder / '.osctl/mlflow.db'}?mode=ro", uri=True) as database:
        runs = database.execute("select count(*) from runs").fetchone()[0]
    database.close()
    assert runs, "MLflow was told of it"
    kept = {str(path): path.read_bytes() for path in (folder / ".osctl").rglob("trainer.log")}
    assert len(kept) == 2, "both attempts"
    assert len(planted.found_in(kept)) == 2 * len(planted.values), "the search finds them all where they are: on this machine's disk"


# --- The parts --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "store s3://bucket/tiny/stage1@0a1b2c3d4e5f/a1 at http://127.0.0.1:9000: cannot read a",
        "text.caption_tokens: must be at least 1, found 0",
        "stages.stage1.resources.nodes: expected a whole number, found 'two'",
        f"image registry.example.com:5000/osctl:1@{DIGEST}",
        "--set stage2.data.source.path=/data/clips-2024-03/train-part-001",
        "OpenSoraPretrainedAutoencoder, stage1/optimizer/lr_schedule",
        "see http://localhost:5000/#/experiments/1/runs?workflowType=machine_learning",
    ],
)
def test_ordinary_words_stay_as_they_are(text: str) -> None:
    assert typed(text, {"USER": "osctl", "MY_TOKEN": "short"}) == text
    assert not holds_credentials(text, {})


def test_where_a_secret_lies_is_no_secret() -> None:
    env = {"AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/secrets/token", "TOKENIZERS_PARALLELISM": "false"}
    assert redacted("reads /var/run/secrets/token: false", env) == "reads /var/run/secrets/token: false"


def test_a_bucket_that_is_called_like_a_short_key_can_be_used() -> None:
    env = {"AWS_ACCESS_KEY_ID": "minioadmin", "AWS_SECRET_ACCESS_KEY": "minioadmin"}
    assert not holds_credentials("s3://minioadmin/runs", env)


def test_output_is_left_alone_where_there_is_nothing_to_hide() -> None:
    assert masker({"PATH": "/usr/bin"})(b"password=hunter2hunter2 \xff") == b"password=hunter2hunter2 \xff"
    assert masker({"A_TOKEN": "hunter2hunter2"})(b"\xff hunter2hunter2 password") == b"\xff \xe2\x80\xa6 password"


def test_a_leak_is_found_whole_in_part_and_encoded(planted: Planted) -> None:
    secret = planted("here")
    encoded = subprocess.run(["base64", "-w0"], input=f"user:{secret}", capture_output=True, text=True, check=True).stdout
    texts = {"whole": f"x{secret}y", "half": secret[:14], "base64": encoded, "nothing": os.environ.get("PATH", "")}
    assert planted.found_in(texts) == ["here in whole", "here in half", "here in base64"]
