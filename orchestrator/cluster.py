"""A cluster profile: the facts of one site that no recipe should hold. Image, nodes, network, storage, queue, price.

Owns the schema of `configs/clusters/*.yaml` and the finding of a profile. Refuses secrets (credentials are named, never held), and what
an API server would refuse: a profile that loads makes manifests that are accepted, as far as a file can tell.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from datetime import date
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from opensora.config import Frozen
from orchestrator.document import shown

_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_DOMAIN = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"


def _like(pattern: str, words: str) -> Callable[[str], str]:
    """A validator that says in words what it expects: a pattern tells a person nothing."""
    expression = re.compile(pattern)

    def check(value: str) -> str:
        if not expression.fullmatch(value):
            raise ValueError(f"expected {words}, found {shown(value)}")
        return value

    return check


DnsLabel = Annotated[str, AfterValidator(_like(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "lower-case letters, digits and '-', at most 63"))]
"""Name of a namespace, service account, queue or claim."""
_label_key = _like(f"({_DOMAIN}/)?{_NAME}", "a label's key such as nvidia.com/gpu.product")
LabelKey = Annotated[str, AfterValidator(_label_key)]
"""Of a node's label or taint."""
LabelValue = Annotated[str, AfterValidator(_like(f"({_NAME})?", "a label's value: letters, digits, '-', '_' and '.', at most 63"))]
"""Of a node's label or taint; its host name is one."""
ExtendedResource = Annotated[str, AfterValidator(_like(f"{_DOMAIN}/{_NAME}", "a resource as nodes call it, such as nvidia.com/gpu"))]
"""As `kubectl describe node` shows it under Allocatable."""
Cores = Annotated[str, AfterValidator(_like(r"[0-9]+m|[0-9]+(\.[0-9]{1,3})?", "cores such as '16' or '500m'"))]
"""Processor cores, in quotes: "16", "0.5", "500m"."""
Memory = Annotated[str, AfterValidator(_like(r"[0-9]+(\.[0-9]+)?([kMGT]|[KMGT]i)", "bytes with a unit such as 64Gi"))]
"""500Mi, 1600Gi."""
Image = Annotated[str, AfterValidator(_like(r"[A-Za-z0-9][^\s@]*(@\w+:[0-9a-f]+)?", "an image's name, with @ before a digest alone"))]
"""As `docker pull` takes it."""
PINNED = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")


class Toleration(Frozen):
    """As in a pod's specification."""

    key: LabelKey
    """Taint that is tolerated."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Exists: any value."""
    value: LabelValue | None = None
    """With Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """none: every effect."""

    @model_validator(mode="after")
    def _value_belongs_to_equal(self) -> Self:
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError(f"operator {self.operator} with value {self.value}; Equal needs a value, Exists none")
        return self


class Volume(Frozen):
    """A claim that every trainer's pod mounts, for data."""

    claim: DnsLabel
    """PersistentVolumeClaim in the namespace."""
    path: Annotated[str, AfterValidator(_like(r"/[^:]+", "an absolute path without ':'"))]
    """Where it is mounted."""
    read_only: bool = True
    """Trainers do not write data."""


class Price(Frozen):
    """What a device of this site costs, in place of the price list."""

    usd_per_hour: Annotated[Decimal, Field(ge=0)]
    """Held, busy or idle. In quotes."""
    source: str
    """Who says so."""
    date: date
    """When they said so, YYYY-MM-DD."""


class ClusterProfile(Frozen):
    """`configs/clusters/NAME.yaml`."""

    name: DnsLabel
    """How `--cluster` calls it."""
    context: str | None = None
    """Context of the kubeconfig; none: its current one, or inside a pod the pod's service account."""
    namespace: DnsLabel = "osctl"
    """Everything lies here; made by k8s/."""
    image: Image
    """Trainer's image, pinned: name@sha256:digest."""
    driver_image: Image
    """Image of driver and CLI (Dockerfile's target `slim`), pinned."""
    allow_unpinned: tuple[str, ...] = ()
    """Images that may be named by a tag."""
    image_pull_secrets: tuple[DnsLabel, ...] = ()
    """Secrets of a private registry, by name."""
    service_account: DnsLabel = "osctl-trainer"
    """Of the trainer's pods; it needs no right and its token is not mounted."""
    driver_service_account: DnsLabel = "osctl-driver"
    """Of the driver."""
    device: str
    """Name in the price list that `device: auto` means here, e.g. h800."""
    price: Price | None = None
    """What that device costs here; none: the price list's."""
    gpu_resource: ExtendedResource | None = "nvidia.com/gpu"
    """Extended resource that a device is; none: a CPU cluster."""
    rdma_resource: ExtendedResource | None = None
    """Extended resource of the network adapters, as the nodes call it, e.g. rdma/hca_shared_devices_a."""
    rdma_per_node: PositiveInt = 1
    """How many of it a pod takes."""
    cpu: Cores
    """Of a pod, close to the node's allocatable; request and limit."""
    memory: Memory
    """Of a pod, close to the node's allocatable, /dev/shm included; request and limit."""
    shm: Memory = "64Gi"
    """Size of /dev/shm."""
    scratch: Memory = "500Gi"
    """Size of the run directory and /tmp together: checkpoints, latents, caches; request and limit of ephemeral storage."""
    node_selector: dict[str, LabelValue] = Field(default_factory=dict)
    """Labels of the nodes, e.g. nvidia.com/gpu.product."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of those nodes."""
    exclude_nodes: tuple[LabelValue, ...] = ()
    """Host names that nothing is placed on."""
    nccl_socket_ifname: str | None = None
    """NCCL_SOCKET_IFNAME, e.g. =eth0."""
    nccl_ib_hca: str | None = None
    """NCCL_IB_HCA: the compute adapters alone."""
    nccl_ib_gid_index: NonNegativeInt | None = None
    """NCCL_IB_GID_INDEX, for RoCE."""
    save_s: PositiveFloat = 120
    """Longest measured time of a save with its upload. The grace period is twice that and a minute."""
    lost_node_s: Annotated[int, Field(ge=60, le=120)] = 90
    """Seconds that a pod stays bound to a node that is not ready or unreachable; the default of 300 costs 64 GPUs 5.3 hours each time."""
    priority_class: DnsLabel | None = None
    """priorityClassName."""
    scheduler: DnsLabel | None = None
    """schedulerName; none: the cluster's default, which must know PodGroups."""
    queue: Literal["gang", "kueue"] = "gang"
    """gang: all nodes at once by the scheduler; kueue: by label and suspension."""
    kueue_queue: DnsLabel | None = None
    """LocalQueue, with kueue."""
    s3_endpoint: str | None = None
    """URL of the object store; none: AWS."""
    s3_region: str = "us-east-1"
    """AWS_REGION."""
    s3_secret: DnsLabel | None = None
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; none: workload identity of the service accounts."""
    tracking: str | None = None
    """MLflow's URI, for pipelines that name none."""
    volumes: tuple[Volume, ...] = ()
    """Data."""
    start_deadline_s: PositiveFloat = 1800
    """An attempt that a fault (image, quota, silent operator) keeps from a start for so long has failed. A wait for devices has no end."""
    keep_s: PositiveInt = 86_400
    """How long a finished job stays for people to look at."""

    @field_validator("node_selector")
    @classmethod
    def _keys_are_labels(cls, value: dict[str, str]) -> dict[str, str]:
        for key in value:
            _label_key(key)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for image in (self.image, self.driver_image):
            if not PINNED.fullmatch(image) and image not in self.allow_unpinned:
                raise ValueError(f"image {shown(image)} is not pinned; write name@sha256:<64 digits>, or name it under allow_unpinned")
        if (self.queue == "kueue") != (self.kueue_queue is not None):
            raise ValueError(
                f"queue {self.queue} with kueue_queue {self.kueue_queue}; Kueue needs the name of its LocalQueue, the gang none"
            )
        for name in ("cpu", "memory", "shm", "scratch"):
            if not amount(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; a pod with none of it cannot run")
        if amount(self.shm) >= amount(self.memory):
            raise ValueError(f"shm {self.shm} is not below memory {self.memory}, and counts as memory; lower shm")
        taken = [PurePosixPath(path) for path in ("/run/osctl", "/tmp", "/dev/shm")]
        for volume in self.volumes:
            path = PurePosixPath(posixpath.normpath(volume.path))
            if clash := next((other for other in taken if path.is_relative_to(other) or other.is_relative_to(path)), None):
                raise ValueError(f"volumes: {volume.path} and {clash} lie in each other; mount it elsewhere")
            taken.append(path)
        if self.s3_endpoint is not None and not self.s3_endpoint.startswith(("http://", "https://")):
            raise ValueError("s3_endpoint is no URL; write http://host:port or https://host")
        for name in ("s3_endpoint", "tracking"):
            if "@" in (getattr(self, name) or ""):
                raise ValueError(f"{name} holds credentials, and everything in a profile is written down; put them into a Secret")
        return self

    @property
    def grace_s(self) -> int:
        """terminationGracePeriodSeconds: twice the longest save, and a minute for everything else."""
        return round(2 * self.save_s) + 60

    def store_env(self) -> dict[str, str]:
        """What a process needs to find the object store; credentials are not among it."""
        endpoint = {"OSCTL_S3_ENDPOINT": self.s3_endpoint} if self.s3_endpoint else {}
        return {**endpoint, "AWS_REGION": self.s3_region}


_UNITS = {"": Decimal(1), "m": Decimal("0.001")}
_UNITS |= {unit: Decimal(1000**power) for power, unit in enumerate(("k", "M", "G", "T"), 1)}
_UNITS |= {unit: Decimal(1024**power) for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti"), 1)}


def amount(quantity: str) -> Decimal:
    """Cores, or bytes."""
    number = quantity.rstrip("mkKMGTi")
    return Decimal(number) * _UNITS[quantity[len(number) :]]


def shipped_clusters(folder: Path) -> Mapping[str, Path]:
    """Profiles that come with this package, by name. `folder`: that of the shipped pipelines."""
    return {path.stem: path for path in sorted((folder / "clusters").glob("*.yaml"))}
