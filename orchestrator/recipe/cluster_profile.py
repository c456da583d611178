"""A cluster profile: the facts of one site that no recipe should hold. Image, nodes, network, storage, queue, price, pools.

Owns the schema of `configs/clusters/*.yaml`, the finding of a profile, and what it says of one of its pools. Refuses secrets (credentials
are named, never held), and what an API server would refuse: a profile that loads makes manifests that are accepted, as far as a file can
tell.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from opensora.config import Frozen, Unit, without_added
from orchestrator.recipe.yaml_file import shown

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


def _one_line(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError(f"expected one line of text, found {shown(value)}")
    return value


Line = Annotated[str, AfterValidator(_one_line)]
"""What people are shown as it is, so that nothing in it may move a terminal's cursor."""
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

    usd_per_hour: Annotated[Decimal, Field(ge=0), Unit("US dollars an hour")]
    """Held, busy or idle. In quotes."""
    source: str
    """Who says so."""
    date: date
    """When they said so, YYYY-MM-DD."""


def _labels(value: dict[str, str]) -> dict[str, str]:
    for key in value:
        _label_key(key)
    return value


NodeSelector = Annotated[dict[str, LabelValue], AfterValidator(_labels)]
"""Labels of nodes, by key."""


class Pool(Frozen):
    """Nodes of the site that are had in one way: reserved, on demand, spot. What it does not say, the profile says."""

    name: DnsLabel
    """How a stage's `pools` calls it, e.g. reserved."""
    region: Line | None = None
    """Where its nodes are, for people. It places nothing: node_selector does."""
    kueue_queue: DnsLabel | None = None
    """LocalQueue, with kueue; none: the profile's."""
    kueue_priority: DnsLabel | None = None
    """WorkloadPriorityClass, with kueue; none: the profile's."""
    priority_class: DnsLabel | None = None
    """priorityClassName; none: the profile's."""
    node_selector: NodeSelector = Field(default_factory=dict)
    """Labels of its nodes, beside the profile's."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of its nodes, beside the profile's."""
    device: Line | None = None
    """Name of its device in the price list, where it is not the profile's."""
    price: Price | None = None
    """What its device costs; none: the profile's price, or for a device of its own the price list's."""
    wait_minutes: Annotated[PositiveFloat, Unit("minutes")] = 30
    """An attempt that has waited for nodes of this pool for so long is made in the next one. In the last one it waits without end."""


class PreparePods(Frozen):
    """Pods that prepare raw videos. What it does not say, the profile says of a trainer's pod."""

    cpu: Cores | None = None
    """Of a pod that decodes; request and limit. none: the profile's."""
    memory: Memory | None = None
    """Of a pod that decodes, /dev/shm included; request and limit. none: the profile's."""
    scratch: Memory | None = None
    """Of /tmp there, where downloads and results lie on their way; request and limit of ephemeral storage. none: the profile's."""
    node_selector: NodeSelector | None = None
    """Labels of the nodes that decode, in place of the profile's; none: the profile's."""
    tolerations: tuple[Toleration, ...] | None = None
    """Taints of those nodes, in place of the profile's; none: the profile's."""
    price: Price | None = None
    """What a core of them costs; none: the price list's cpu-core."""
    ray_pods: Annotated[PositiveInt, Unit("pods")] = 4
    """Pods that decode, with engine ray."""
    gpus: Annotated[NonNegativeInt, Unit("GPUs")] = 0
    """For models that caption, score or encode; with engine ray as many pods more, with one each. `--gpus` says otherwise for one run."""
    ray_image: Image | None = None
    """Image with Ray (Dockerfile's target `ray`), pinned; none: the trainer's."""
    head_cpu: Cores = "1"
    """Of the head of Ray, which decodes nothing."""
    head_memory: Memory = "8Gi"
    """Of the head of Ray."""
    caption_secret: DnsLabel | None = None
    """Secret with OSCTL_CAPTION_KEY, for a captioning server that wants one; none: it wants none."""


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
    rdma_per_node: Annotated[PositiveInt, Unit("resources a node")] = 1
    """How many of it a pod takes."""
    cpu: Cores
    """Of a pod, close to the node's allocatable; request and limit."""
    memory: Memory
    """Of a pod, close to the node's allocatable, /dev/shm included; request and limit."""
    shm: Memory = "64Gi"
    """Size of /dev/shm."""
    scratch: Memory = "500Gi"
    """Size of the run directory and /tmp together: checkpoints, latents, caches; request and limit of ephemeral storage."""
    latents_gb: Annotated[PositiveFloat | None, Unit("GB of 10^9 bytes")] = None
    """OSCTL_LATENTS_GB: room in scratch for latents that are streamed from the store; none: 16 GB, or less on a node with a small disk."""
    node_selector: NodeSelector = Field(default_factory=dict)
    """Labels of the nodes, e.g. nvidia.com/gpu.product."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of those nodes."""
    exclude_nodes: tuple[LabelValue, ...] = ()
    """Host names that nothing is placed on."""
    nccl_socket_ifname: str | None = None
    """NCCL_SOCKET_IFNAME, e.g. =eth0."""
    nccl_ib_hca: str | None = None
    """NCCL_IB_HCA: the compute adapters alone."""
    nccl_ib_gid_index: Annotated[NonNegativeInt | None, Unit("index")] = None
    """NCCL_IB_GID_INDEX, for RoCE."""
    save_s: Annotated[PositiveFloat, Unit("seconds")] = 120
    """Longest measured time of a save with its upload. The grace period is twice that and a minute."""
    lost_node_s: Annotated[int, Field(ge=60, le=120), Unit("seconds")] = 90
    """Seconds that a pod stays bound to a node that is not ready or unreachable; the default of 300 costs 64 GPUs 5.3 hours each time."""
    priority_class: DnsLabel | None = None
    """priorityClassName."""
    scheduler: DnsLabel | None = None
    """schedulerName; none: the cluster's default, which must know PodGroups."""
    operator: Literal["auto", "pytorchjob", "trainjob"] = "auto"
    """Kind of job of an attempt. auto: what the cluster has, and where it has both, a PyTorchJob."""
    queue: Literal["gang", "kueue"] = "gang"
    """gang: all nodes at once by the scheduler; kueue: by label and suspension."""
    kueue_queue: DnsLabel | None = None
    """LocalQueue, with kueue."""
    kueue_priority: DnsLabel | None = None
    """WorkloadPriorityClass, with kueue: who goes first and who is preempted; none: priority_class's, else 0."""
    driver_queue: DnsLabel | None = None
    """LocalQueue of the Jobs that run osctl itself, for clusters where Kueue holds every Job back; none: they start at once."""
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
    start_deadline_s: Annotated[PositiveFloat, Unit("seconds")] = 1800
    """An attempt that a fault (image, quota, silent operator) keeps from a start for so long has failed. A wait for devices has no end."""
    keep_s: Annotated[PositiveInt, Unit("seconds")] = 86_400
    """How long a finished job stays for people to look at."""
    pools: tuple[Pool, ...] = ()
    """Ways to have nodes, in order of preference; a stage may name another order. None: all nodes are alike."""
    prepare: PreparePods = PreparePods()
    """Pods of `osctl prepare run --cluster`."""

    @field_validator("pools")
    @classmethod
    def _names_differ(cls, pools: tuple[Pool, ...]) -> tuple[Pool, ...]:
        names = [pool.name for pool in pools]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{shown(twice)} names {names.count(twice)} pools, and attempts are billed by that name; rename one")
        return pools

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what a later release added, a revision is what an older release wrote, and reads."""
        return without_added(self, write(self), ("latents_gb", "pools", "kueue_priority", "operator", "driver_queue", "prepare"))

    @model_validator(mode="after")
    def _queues_are_named(self) -> Self:
        priorities = [self.kueue_priority, *(pool.kueue_priority for pool in self.pools)]
        if self.queue != "kueue" and (first := next((one for one in priorities if one is not None), None)):
            raise ValueError(f"queue {self.queue} with kueue_priority {first}; it orders a queue of Kueue, so it needs one")
        if self.queue == "gang":
            named = [("kueue_queue", self.kueue_queue), *((f"kueue_queue of pool {pool.name}", pool.kueue_queue) for pool in self.pools)]
            for what, queue in named:
                if queue is not None:
                    raise ValueError(f"queue gang with {what} {queue}; only Kueue has queues: write queue: kueue, or leave it out")
        elif self.kueue_queue is None:
            bare = [pool.name for pool in self.pools if pool.kueue_queue is None]
            if bare or not self.pools:
                whose = f", nor has the pool {', '.join(bare)}" if bare else ""
                raise ValueError(f"queue kueue with kueue_queue None{whose}; Kueue needs the name of its LocalQueue")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for image in filter(None, (self.image, self.driver_image, self.prepare.ray_image)):
            if not PINNED.fullmatch(image) and image not in self.allow_unpinned:
                raise ValueError(f"image {shown(image)} is not pinned; write name@sha256:<64 digits>, or name it under allow_unpinned")
        for name in ("cpu", "memory", "shm", "scratch"):
            if not amount(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; a pod with none of it cannot run")
        if amount(self.shm) >= amount(self.memory):
            raise ValueError(f"shm {self.shm} is not below memory {self.memory}, and counts as memory; lower shm")
        if self.latents_gb is not None and Decimal(str(self.latents_gb)) * 10**9 >= amount(self.scratch):
            raise ValueError(f"latents_gb {self.latents_gb:g} (GB) is not below scratch {self.scratch}, in which it lies; lower latents_gb")
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

    def order(self, wanted: Sequence[str] = ()) -> tuple[str, ...]:
        """Names of the pools in which a stage's attempts are made, the preferred one first. Empty: this profile has no pools.

        Args:
            wanted: the stage's own order; empty: the profile's.
        """
        return tuple(wanted) or tuple(pool.name for pool in self.pools)

    def pool(self, name: str) -> Pool:
        """Raises KeyError."""
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise KeyError(name)

    def in_pool(self, name: str | None) -> ClusterProfile:
        """The profile of an attempt that is made in a pool: who renders, submits or prices it needs to know nothing of pools.

        Args:
            name: the pool's. None: no pool, the profile itself without its pools.

        Raises KeyError.
        """
        if name is None:
            return self.model_copy(update={"pools": ()})
        pool = self.pool(name)
        own_device = pool.device is not None and pool.device != self.device
        update = {
            "pools": (),
            "node_selector": {**self.node_selector, **pool.node_selector},
            "tolerations": (*self.tolerations, *(one for one in pool.tolerations if one not in self.tolerations)),
            "kueue_queue": pool.kueue_queue or self.kueue_queue,
            "kueue_priority": pool.kueue_priority or self.kueue_priority,
            "priority_class": pool.priority_class or self.priority_class,
            "device": pool.device or self.device,
            "price": pool.price or (None if own_device else self.price),
        }
        return self.model_copy(update=update)

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
