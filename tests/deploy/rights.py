"""The written list: what each account may do in osctl's namespace. Everything else is Forbidden."""

from __future__ import annotations

Rights = dict[tuple[str, str], tuple[str, ...]]
"""(API group, resource) → verbs."""

READ, WATCH = ("get", "list"), ("get", "list", "watch")
OWN = (*WATCH, "create", "patch", "delete")
MADE = (*READ, "create", "delete")
OF_DRIVER: Rights = {
    ("batch", "jobs"): MADE,
    ("ray.io", "rayjobs"): MADE,
    ("kubeflow.org", "pytorchjobs"): OWN,
    ("trainer.kubeflow.org", "trainjobs"): OWN,
    ("trainer.kubeflow.org", "trainingruntimes"): OWN,
    ("jobset.x-k8s.io", "jobsets"): (*WATCH, "delete"),
    ("", "pods"): (*WATCH, "delete"),
    ("", "pods/log"): ("get",),
    ("", "events"): WATCH,
    ("", "resourcequotas"): READ,
    ("scheduling.x-k8s.io", "podgroups"): OWN,
    ("kueue.x-k8s.io", "workloads"): WATCH,
    ("kueue.x-k8s.io", "localqueues"): WATCH,
    ("visibility.kueue.x-k8s.io", "localqueues/pendingworkloads"): ("get",),
}
ASKED = (*WATCH, "create", "delete")
OF_USER: Rights = {**OF_DRIVER, ("batch", "jobs"): ASKED, ("ray.io", "rayjobs"): ASKED}
OF_TRAINER: Rights = {}
