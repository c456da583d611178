"""Random but valid specs: what a person may write into pipeline and cluster files, hostile words included. For the laws of manifests.

Also how a test looks into the job that is made of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from hypothesis import strategies as st

from opensora.config import StageConfig
from orchestrator.kube import manifest
from orchestrator.ledger.keys import run_key
from orchestrator.ledger.records import Intent
from orchestrator.recipe import files, resolve
from orchestrator.recipe.cluster_profile import ClusterProfile, Toleration, Volume
from orchestrator.recipe.pipeline import Pipeline

HOSTILE = [
    "NO", "off", "null", "~", "1e3", "0x1F", "0o17", "1_000", "12:30:45", "2026-11-23", ".inf", "<<", "=", "- a", "a: b", "a #b", "{{x}}",
    "{{ .Values.secret }}", "$(HOME)", "$$(HOME)", "$", "$$", "a$", "${HOME}", "`id`", "'", '"', "\\", "%41", "!!python/object:os.system",
    "&a", "*a", "|", ">", "---", "...", " ", " a ", "é", "模型", "🙂", "\u2028", "\x85", "\ufeff", "a\nb", "\t",
]  # fmt: skip
"""What readers of YAML, kubelet, Go templates and shells take for something else than text."""


@cache
def stage_config() -> StageConfig:
    return resolve.load(files.find("demo")).stages[0].config


@dataclass(frozen=True)
class Spec:
    """One attempt somewhere."""

    intent: Intent
    profile: ClusterProfile
    store_url: str
    exclude_nodes: tuple[str, ...] = ()

    def on(self, profile: ClusterProfile) -> Spec:
        return replace(self, profile=profile)


def intent(
    pipeline: str, stage: str, inputs_digest: str, attempt: int, nodes: int, devices: int, *, config: StageConfig | None = None
) -> Intent:
    return Intent(
        run_key=run_key(pipeline, stage, inputs_digest, attempt),
        pipeline=pipeline,
        stage=stage,
        inputs_digest=inputs_digest,
        attempt=attempt,
        epoch=3,
        created=1.0,
        config=config or stage_config(),
        config_digest="",
        nodes=nodes,
        devices_per_node=devices,
        device="h800",
        trainer=(),
        hang_timeout_s=300,
        flush_s=5,
        parent=None,
        resume=None,
        code="",
    )


names = st.one_of(
    st.sampled_from(["no", "y", "on", "null", "true", "e3", "a..b", "a-.-b", "open-sora-1.0", "x" * 40]),
    st.from_regex(r"[a-z]([a-z0-9.-]{0,38}[a-z0-9])?", fullmatch=True),
)
dns = st.sampled_from(["0", "1e3", "no", "null", "a", "osctl", "a--b", "0x1f", "x" * 63])
words = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20))
labels = st.sampled_from(["NO", "1e3", "null", "0x1F", "2026-11-23", "NVIDIA-H800", "a.b_c-d", "0", "X" * 63])
keys = st.builds(str.__add__, st.sampled_from(["", "nvidia.com/", "a.b-c/"]), labels)
stores = st.builds(lambda scheme, path: f"{scheme}{path}", st.sampled_from(["s3://bucket/", "/mnt/", "file:///x/"]), words)
images = st.sampled_from(["registry.example.com/a@sha256:" + "0" * 64, "localhost:5000/a/b:dev@sha256:" + "1e3f" * 16])
memory = st.sampled_from(["1Gi", "1600Gi", "1.5Ti", "7000M"])
tolerations = st.one_of(
    st.builds(Toleration, key=keys, effect=st.sampled_from([None, "NoSchedule", "NoExecute"])),
    st.builds(Toleration, key=keys, operator=st.just("Equal"), value=labels),
)
site_words = st.one_of(st.none(), words)
address_words = words.map(lambda word: word.replace("@", "-"))  # with an `@` it would be refused as credentials


@st.composite
def profiles(draw: st.DrawFn) -> ClusterProfile:
    queue = draw(st.sampled_from(["gang", "kueue"]))
    gpu = draw(st.booleans())
    return ClusterProfile(
        name="random",
        namespace=draw(dns),
        image=draw(images),
        driver_image=draw(images),
        image_pull_secrets=tuple(draw(st.lists(dns, max_size=2))),
        service_account=draw(dns),
        driver_service_account=draw(dns),
        device="h800",
        gpu_resource=draw(st.sampled_from(["nvidia.com/gpu", "amd.com/gpu"])) if gpu else None,
        rdma_resource=draw(st.sampled_from([None, "rdma/hca_shared_devices_a", "nvidia.com/hostdev"])),
        rdma_per_node=draw(st.integers(1, 8)),
        cpu=draw(st.sampled_from(["120", "500m", "0.5", "1", "2.125"])),
        memory=draw(memory),
        shm=draw(st.sampled_from(["64Mi", "256Mi", "0.5Gi"])),
        scratch=draw(memory),
        latents_gb=draw(st.none() | st.floats(0.01, 1)),
        node_selector=draw(st.dictionaries(keys, labels, max_size=3)),
        tolerations=tuple(draw(st.lists(tolerations, max_size=2))),
        exclude_nodes=tuple(draw(st.lists(labels, max_size=3))),
        nccl_socket_ifname=draw(site_words),
        nccl_ib_hca=draw(site_words),
        nccl_ib_gid_index=draw(st.none() | st.integers(0, 7)),
        save_s=draw(st.floats(0.1, 7200)),
        lost_node_s=draw(st.integers(60, 120)),
        priority_class=draw(st.none() | dns),
        scheduler=draw(st.none() | dns),
        queue=queue,
        kueue_queue=draw(dns) if queue == "kueue" else None,
        kueue_priority=draw(st.none() | dns) if queue == "kueue" else None,
        s3_endpoint=draw(st.none() | address_words.map(lambda word: f"http://s3.local/{word}")),
        s3_region=draw(words),
        s3_secret=draw(st.none() | dns),
        volumes=tuple(
            Volume(claim=claim, path=f"/data/{number}{draw(words).replace(':', '').replace('/', '')}x", read_only=draw(st.booleans()))
            for number, claim in enumerate(draw(st.lists(dns, max_size=2)))
        ),
        keep_s=draw(st.integers(1, 10**7)),
    )


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    return Spec(
        intent=intent(
            draw(names),
            draw(names),
            draw(st.from_regex(r"[0-9a-f]{12}", fullmatch=True)),
            draw(st.integers(1, 10**5)),
            draw(st.integers(1, 9)),
            draw(st.integers(1, 8)),
        ),
        profile=draw(profiles()),
        store_url=draw(stores),
        exclude_nodes=tuple(draw(st.lists(labels, max_size=2))),
    )


@cache
def open_sora() -> Pipeline:
    return resolve.load(files.find("open-sora-1.0"))


def h800() -> ClusterProfile:
    """The profile of the published run."""
    cluster = open_sora().cluster
    assert cluster is not None
    return cluster


def rendered(spec: Spec) -> dict[str, Any]:
    return manifest.pytorch_job(spec.intent, spec.profile, spec.store_url, exclude_nodes=spec.exclude_nodes)


def job_of(profile: ClusterProfile, *, nodes: int = 8, devices: int = 8, attempt: int = 1, **kwargs: Any) -> dict[str, Any]:
    return manifest.pytorch_job(intent("p", "s", "0" * 12, attempt, nodes, devices), profile, "s3://b/p", **kwargs)


def worker(job: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    return pod


def container(job: dict[str, Any]) -> dict[str, Any]:
    (only,) = worker(job)["containers"]
    return dict(only)


def environment(job: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(job)["env"] if "value" in entry}


def expanded(text: str, variables: dict[str, str]) -> str:
    """What kubelet makes of a text: `$(NAME)` is replaced, an unknown one stays, `$$` becomes `$`."""
    return re.sub(
        r"\$(\$|\(([^)]*)\))",
        lambda found: "$" if found[1] == "$" else variables.get(found[2], found[0]),
        text,
    )


def _context(pod: dict[str, Any]) -> dict[str, Any]:
    context: dict[str, Any] = pod["spec"]["containers"][0]["securityContext"]
    return context


def _pod_context(pod: dict[str, Any]) -> dict[str, Any]:
    context: dict[str, Any] = pod["spec"]["securityContext"]
    return context


def _without_seccomp(pod: dict[str, Any]) -> None:
    del _context(pod)["seccompProfile"]
    del _pod_context(pod)["seccompProfile"]


def _without_non_root(pod: dict[str, Any]) -> None:
    del _context(pod)["runAsNonRoot"]
    del _pod_context(pod)["runAsNonRoot"]


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "host network": lambda pod: pod["spec"].update(hostNetwork=True),
    "host processes": lambda pod: pod["spec"].update(hostPID=True),
    "host IPC": lambda pod: pod["spec"].update(hostIPC=True),
    "privileged": lambda pod: _context(pod).update(privileged=True, allowPrivilegeEscalation=True),
    "escalation": lambda pod: _context(pod).pop("allowPrivilegeEscalation"),
    "keeps capabilities": lambda pod: _context(pod).update(capabilities={"drop": ["NET_RAW"]}),
    "adds a capability": lambda pod: _context(pod)["capabilities"].update(add=["IPC_LOCK"]),
    "host path": lambda pod: pod["spec"]["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    "host port": lambda pod: pod["spec"]["containers"][0]["ports"][0].update(hostPort=23456),
    "hook of another host": lambda pod: pod["spec"]["containers"][0].update(
        lifecycle={"preStop": {"httpGet": {"host": "169.254.169.254", "port": 80}}}
    ),
    "root by number": lambda pod: _context(pod).update(runAsUser=0),
    "root allowed": _without_non_root,
    "root demanded": lambda pod: _context(pod).update(runAsNonRoot=False),
    "no seccomp": _without_seccomp,
    "seccomp unconfined": lambda pod: _context(pod).update(seccompProfile={"type": "Unconfined"}),
    "apparmor unconfined": lambda pod: _context(pod).update(appArmorProfile={"type": "Unconfined"}),
    "selinux type": lambda pod: _context(pod).update(seLinuxOptions={"type": "spc_t"}),
    "selinux user": lambda pod: _pod_context(pod).update(seLinuxOptions={"user": "root"}),
    "unmasked proc": lambda pod: (_context(pod).update(procMount="Unmasked"), pod["spec"].update(hostUsers=False)),
    "sysctl": lambda pod: _pod_context(pod).update(sysctls=[{"name": "kernel.msgmax", "value": "1"}]),
}
"""One violation of each rule of Pod Security "restricted"."""
