"""A cluster profile: the facts of one site that no recipe should hold. Image, nodes, network, storage, queue, price.

Owns the schema of `configs/clusters/*.yaml` and the finding of a profile. Refuses secrets: credentials are named, never held.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from opensora.config import Frozen

DnsLabel = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
"""Name of a namespace, service account, queue or claim."""
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
"""A Kubernetes quantity in quotes: "16", "500m", "1600Gi"."""
PINNED = re.compile(r"^[^@\s]+@sha256:[0-9a-f]{64}$")


class Toleration(Frozen):
    """As in a pod's specification."""

    key: str
    """Taint that is tolerated."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Exists: any value."""
    value: str | None = None
    """With Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """none: every effect."""


class Volume(Frozen):
    """A claim that every trainer's pod mounts, for data."""

    claim: DnsLabel
    """PersistentVolumeClaim in the namespace."""
    path: Annotated[str, Field(pattern=r"^/[^:]*$")]
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
    image: str
    """Trainer's image, pinned: name@sha256:digest."""
    driver_image: str
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
    gpu_resource: str | None = "nvidia.com/gpu"
    """Extended resource that a device is; none: a CPU cluster."""
    rdma_resource: str | None = None
    """Extended resource of the network adapters, as the nodes call it, e.g. rdma/hca_shared_devices_a."""
    rdma_per_node: PositiveInt = 1
    """How many of it a pod takes."""
    cpu: Quantity
    """Of a pod, close to the node's allocatable; request and limit."""
    memory: Quantity
    """Of a pod, close to the node's allocatable, /dev/shm included; request and limit."""
    shm: Quantity = "64Gi"
    """Size of /dev/shm."""
    scratch: Quantity = "500Gi"
    """Size of the run directory: checkpoints, latents."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes, e.g. nvidia.com/gpu.product."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of those nodes."""
    exclude_nodes: tuple[str, ...] = ()
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
    scheduler: str | None = None
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for image in (self.image, self.driver_image):
            if not PINNED.match(image) and image not in self.allow_unpinned:
                raise ValueError(f"image {image!r} is not pinned; write name@sha256:<64 digits>, or name it under allow_unpinned")
        if (self.queue == "kueue") != (self.kueue_queue is not None):
            raise ValueError(
                f"queue {self.queue} with kueue_queue {self.kueue_queue}; Kueue needs the name of its LocalQueue, the gang none"
            )
        return self

    @property
    def grace_s(self) -> int:
        """terminationGracePeriodSeconds: twice the longest save, and a minute for everything else."""
        return round(2 * self.save_s) + 60

    def store_env(self) -> dict[str, str]:
        """What a process needs to find the object store; credentials are not among it."""
        endpoint = {"OSCTL_S3_ENDPOINT": self.s3_endpoint} if self.s3_endpoint else {}
        return {**endpoint, "AWS_REGION": self.s3_region}


def shipped_clusters(folder: Path) -> Mapping[str, Path]:
    """Profiles that come with this package, by name. `folder`: that of the shipped pipelines."""
    return {path.stem: path for path in sorted((folder / "clusters").glob("*.yaml"))}
