"""The parts that every pod of osctl has, made with the models of the official clients (`kubernetes`, `kubeflow-training`).

With `part` a field that Kubernetes does not have is an error here, and not a value that a server drops. The models are imported only when
an object is written, since their import takes longer than all other imports of a command.

Owns security, credentials by reference, environment and volumes of a pod. Refuses to hold a secret: credentials are only named.

Every pod obeys Pod Security "restricted". Every value that a person wrote reaches the container unchanged: kubelet's `$(VARIABLE)` is
escaped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from orchestrator.errors import Refused
from orchestrator.labels import Label
from orchestrator.recipe.cluster_profile import ClusterProfile

Manifest = dict[str, Any]
"""A Kubernetes object, as the API server takes it."""

USER = 1000
"""User and group id of every container of osctl."""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": False, "AWS_SECRET_ACCESS_KEY": False, "AWS_SESSION_TOKEN": True}
"""Keys of the profile's secret, and whether the secret may lack one."""


@functools.cache
def model(name: str) -> Any:
    """A model class of one of the clients. kubeflow-training is imported only for a PyTorchJob; a driver's Job does not need it."""
    if name.startswith("Kubeflow"):
        from kubeflow.training import models
    else:
        from kubernetes import client as models
    return getattr(models, name)


@functools.cache
def _configuration() -> Any:
    """One configuration for all models: a model without one makes its own, which takes thirty times as long as the model itself."""
    from kubernetes.client import Configuration

    return Configuration()


def part(kind: str, /, **fields: Any) -> Manifest:
    """A part of an object as the model `kind` describes it, with its fields in the order of the arguments. None leaves a field out.

    Raises:
        TypeError: the model has no field of this name.
        ValueError: a required field is missing, or has an impossible value.
    """
    described = model(kind)(**fields, local_vars_configuration=_configuration())
    return {described.attribute_map[name]: value for name, value in fields.items() if value is not None}


def pod(profile: ClusterProfile, account: str, *, token: bool, **fields: Any) -> Manifest:
    """A pod's spec.

    Args:
        account: name of its service account.
        token: whether the pod gets that account's token. Only a pod that sends requests to the API server needs it.
        fields: other fields of the spec, as V1PodSpec names them.
    """
    secrets = [part("V1LocalObjectReference", name=name) for name in dict.fromkeys(profile.image_pull_secrets)]
    return part(
        "V1PodSpec",
        service_account_name=account,
        automount_service_account_token=token,
        enable_service_links=False,  # otherwise every Service of the namespace becomes environment variables
        image_pull_secrets=secrets or None,
        security_context=part(
            "V1PodSecurityContext",
            run_as_non_root=True,
            run_as_user=USER,
            run_as_group=USER,
            fs_group=USER,
            fs_group_change_policy="OnRootMismatch",  # otherwise kubelet walks through a claim full of clips at each start
            seccomp_profile=part("V1SeccompProfile", type="RuntimeDefault"),
        ),
        **fields,
    )


def template(labels: Mapping[str, str], spec: Manifest) -> Manifest:
    """A pod's spec with the pod's labels."""
    # Istio's proxy would keep running after the trainer, so the pod would not end, and it would carry the ranks' traffic.
    metadata = part("V1ObjectMeta", labels={**labels, Label.ISTIO_INJECT: "false"})
    return part("V1PodTemplateSpec", metadata=metadata, spec=spec)


def confined() -> Manifest:
    """A container's security context."""
    return part(
        "V1SecurityContext",
        allow_privilege_escalation=False,
        read_only_root_filesystem=True,
        run_as_non_root=True,
        capabilities=part("V1Capabilities", drop=["ALL"]),
        seccomp_profile=part("V1SeccompProfile", type="RuntimeDefault"),
    )


def env(values: Mapping[str, str]) -> list[Manifest]:
    """A container's variables."""
    return [part("V1EnvVar", name=name, value=literal(value)) for name, value in values.items()]


def env_of_osctl(profile: ClusterProfile) -> dict[str, str]:
    """Variables of a container that runs `osctl` and may write only below /tmp."""
    return {**profile.store_env(), "HOME": "/tmp", "USER": "osctl", "OSCTL_HOME": "/tmp/osctl", "PYTHONUNBUFFERED": "1"}


def credentials(profile: ClusterProfile) -> list[Manifest]:
    """Variables that refer to the profile's secret. Empty if the service account is the identity."""
    if profile.s3_secret is None:
        return []
    references = {
        key: part("V1SecretKeySelector", name=profile.s3_secret, key=key, optional=optional or None)
        for key, optional in CREDENTIALS.items()
    }
    return [
        part("V1EnvVar", name=key, value_from=part("V1EnvVarSource", secret_key_ref=reference)) for key, reference in references.items()
    ]


def literal(text: str) -> str:
    """Escape a text so that kubelet gives it unchanged: it replaces `$(NAME)` in commands and values, and turns `$$` into `$`."""
    return text.replace("$", "$$")


def data_volumes(profile: ClusterProfile) -> list[Manifest]:
    """The profile's claims as volumes `data-0`, `data-1` and so on."""
    return [
        part(
            "V1Volume",
            name=f"data-{number}",
            persistent_volume_claim=part("V1PersistentVolumeClaimVolumeSource", claim_name=volume.claim, read_only=volume.read_only),
        )
        for number, volume in enumerate(profile.volumes)
    ]


def data_mounts(profile: ClusterProfile, *, read_only: bool = False) -> list[Manifest]:
    """The mounts of `data_volumes` in a container. `read_only` makes even those read-only that a trainer may write to."""
    return [
        part("V1VolumeMount", name=f"data-{number}", mount_path=volume.path, read_only=read_only or volume.read_only)
        for number, volume in enumerate(profile.volumes)
    ]


def tolerations(profile: ClusterProfile) -> list[Manifest]:
    """The profile's own tolerations."""
    return [part("V1Toleration", **toleration.model_dump()) for toleration in profile.tolerations]


def lost_node(profile: ClusterProfile) -> list[Manifest]:
    """Tolerations that say how long a pod stays bound to a lost node."""
    return [
        part(
            "V1Toleration",
            key=f"node.kubernetes.io/{state}",
            operator="Exists",
            effect="NoExecute",
            toleration_seconds=profile.lost_node_s,
        )
        for state in ("not-ready", "unreachable")
    ]


def check_store(store_url: str) -> None:
    """Raise Refused if the store's URL contains credentials."""
    netloc = urlsplit(store_url).netloc
    if "@" in netloc:
        shown = f"{store_url.partition('://')[0]}://…@{netloc.rpartition('@')[2]}"
        raise Refused(f"store {shown}: the URL holds credentials, and a manifest would show them. Put them into the profile's s3_secret")
