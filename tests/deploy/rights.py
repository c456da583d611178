"""The written list: what each account may do in osctl's namespace. Everything else is Forbidden."""

from __future__ import annotations

Rights = dict[tuple[str, str], tuple[str, ...]]
"""(API group, resource) → verbs."""

READ, WATCH = ("get", "list"), ("get", "list", "watch")
OF_DRIVER: Rights = {
    ("kubeflow.org", "pytorchjobs"): (*WATCH, "create", "patch", "delete"),
    ("", "pods"): (*WATCH, "delete"),
    ("", "pods/log"): ("get",),
    ("", "events"): WATCH,
    ("", "resourcequotas"): READ,
    ("scheduling.x-k8s.io", "podgroups"): WATCH,
    ("kueue.x-k8s.io", "workloads"): READ,
    ("kueue.x-k8s.io", "localqueues"): READ,
}
OF_USER: Rights = {**OF_DRIVER, ("batch", "jobs"): (*WATCH, "create", "delete")}
OF_TRAINER: Rights = {}
