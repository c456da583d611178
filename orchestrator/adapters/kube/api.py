"""Requests to one namespace of a Kubernetes API server, as plain dicts.

Owns what an answer means: which are errors of the person, which of the moment, and how often a moment is waited for. Credentials,
certificates and the choice of a context are lightkube's; its typed models are not used, since importing them costs half a second.
Refuses to decide whose an object is: a caller looks before it changes anything, and names the uid it looked at.

A request may be sent twice: an answer that was lost says nothing about its effect. `create` then raises AlreadyExists, and the caller
compares; `delete` takes what is not there for gone.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import yaml
from lightkube.config.client_adapter import Client, ConnectionParams
from lightkube.config.kubeconfig import DEFAULT_KUBECONFIG, SERVICE_ACCOUNT, KubeConfig, SingleConfig
from lightkube.core.exceptions import ConfigError

from orchestrator.errors import NotFound, Refused, Unreachable, UsageError
from orchestrator.redact import redacted

Object = dict[str, Any]
"""A Kubernetes object as the API server tells it."""

PLACES: Mapping[str, str] = {
    "pytorchjobs": "/apis/kubeflow.org/v1",
    "podgroups": "/apis/scheduling.x-k8s.io/v1alpha1",
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
    "events": "/api/v1",
    "configmaps": "/api/v1",
    "services": "/api/v1",
    "serviceaccounts": "/api/v1",
    "resourcequotas": "/api/v1",
    "persistentvolumeclaims": "/api/v1",
    "networkpolicies": "/apis/networking.k8s.io/v1",
    "roles": "/apis/rbac.authorization.k8s.io/v1",
    "rolebindings": "/apis/rbac.authorization.k8s.io/v1",
    "localqueues": "/apis/kueue.x-k8s.io/v1beta1",
}
"""Kinds of objects in a namespace, by their name in a path."""
CLUSTER_PLACES: Mapping[str, str] = {
    "nodes": "/api/v1",
    "namespaces": "/api/v1",
    "storageclasses": "/apis/storage.k8s.io/v1",
    "priorityclasses": "/apis/scheduling.k8s.io/v1",
    "customresourcedefinitions": "/apis/apiextensions.k8s.io/v1",
    "validatingwebhookconfigurations": "/apis/admissionregistration.k8s.io/v1",
}
"""Kinds of objects of the whole cluster; a driver needs none of them."""

PAGE = 500
"""Objects a request of a list."""
TRIES = 4
"""Of a request that met a passing fault: a connection refused, 429, 500 and above."""
PAUSE_S = 0.2
"""Before the second try; doubled before each further one, and half as long at random so that clients do not return together."""
PATIENCE_S = 20.0
"""For all tries together. A server that asks for more with Retry-After is told to the caller instead."""
CONNECT_S, READ_S = 5.0, 15.0
WATCH_S = 30
"""A watch is ended by the server after this, and begun anew: one that has died without a word is then found out about as fast."""
SILENCE_S = WATCH_S + 10.0
"""A watch that says nothing for so long, not even its end, is dead."""


class AlreadyExists(Exception):
    """An object of this name is there, perhaps from our own request whose answer was lost."""


class Conflict(Exception):
    """The object is another than the caller looked at: its uid or its version differs."""


class Expired(Exception):
    """A watch from this version is no longer possible (410): list again."""


class WebhookDown(Unreachable):
    """The API server is there, but a webhook that it must ask is not: an operator that is down. Passing, but only if somebody mends it."""


class OverQuota(Refused):
    """A ResourceQuota of the namespace is used up: what is asked for may be had later."""


@dataclass(frozen=True)
class Change:
    type: str
    """ADDED, MODIFIED, DELETED or BOOKMARK."""
    object: Object


@dataclass
class Stream:
    """A watch. `close`, from any thread, ends it."""

    changes: Iterator[Change]
    _sockets: list[socket.socket] = field(default_factory=list)

    def __iter__(self) -> Iterator[Change]:
        return self.changes

    def close(self) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # closing it would leave a thread that reads from it asleep


class Api:
    def __init__(self, client: httpx2.Client, namespace: str, server: str, *, sleep: Callable[[float], None] = time.sleep):
        """`server`: its URL, for people. Use `connect`."""
        self.namespace, self.server = namespace, server
        self._client, self._sleep = client, sleep

    @classmethod
    def connect(cls, context: str | None, namespace: str) -> Api:
        """A client for a context of the kubeconfig; none: its current one, or inside a pod the pod's own account.

        Asks nothing yet. Raises UsageError where there is no usable kubeconfig.
        """
        config = _config(context)
        try:
            timeout = httpx2.Timeout(READ_S, connect=CONNECT_S)
            client = Client(config, ConnectionParams(timeout=timeout))
        except (ConfigError, OSError, AssertionError, ValueError) as error:
            said = redacted(f"kubeconfig {config.fname or 'of this pod'}: context {config.context_name}: {error}")
            raise UsageError(said) from error
        except httpx2.InvalidURL as error:  # it quotes a part of what it could not read, which may be one of a password
            raise UsageError("kubeconfig's server, or a proxy variable such as HTTPS_PROXY, is not a URL; escape what is in it") from error
        return cls(client, namespace, redacted(config.cluster.server))

    def close(self) -> None:
        self._client.close()

    # --- Objects -------------------------------------------------------------------------------------------------------------------

    def get(self, kind: str, name: str) -> Object:
        """Raises NotFound, Refused, Unreachable."""
        return self._ask("GET", self._path(kind, name))

    def list(self, kind: str, selector: str = "") -> tuple[Sequence[Object], str]:
        """All of them, and the version to watch from. Raises NotFound where the cluster does not know the kind, Refused, Unreachable."""
        items: list[Object] = []
        query: dict[str, str | int] = {"labelSelector": selector, "limit": PAGE}
        while True:
            answer = self._ask("GET", self._path(kind), query)
            items += answer["items"]
            if not (more := answer["metadata"].get("continue")):
                return items, answer["metadata"]["resourceVersion"]
            query["continue"] = more

    def create(self, kind: str, body: Object, *, dry_run: bool = False) -> Object:
        """What the server made of it. Raises AlreadyExists, Refused with the server's words, Unreachable."""
        try:
            return self._ask("POST", self._path(kind), {"dryRun": "All"} if dry_run else {}, body)
        except NotFound as error:
            raise Refused(f"{self.server}: cannot create {kind}: {error}; `osctl doctor` names what is not installed") from error

    def patch(self, kind: str, name: str, body: Object, *, uid: str) -> Object:
        """Merge into the object of this uid. Raises NotFound, Conflict, Refused, Unreachable."""
        metadata = {**body.get("metadata", {}), "uid": uid}
        try:
            return self._ask("PATCH", self._path(kind, name), {}, {**body, "metadata": metadata})
        except Refused as error:
            if "metadata.uid" in str(error):  # of a kind that a CRD defines, another uid is invalid (422) instead of a conflict
                raise Conflict(str(error)) from error
            raise

    def delete(self, kind: str, name: str, *, uid: str, grace_s: int | None = None) -> None:
        """Delete the object of this uid; what hangs on it follows. One that is not there is gone. Raises Conflict, Refused, Unreachable."""
        options: Object = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        try:
            self._ask("DELETE", self._path(kind, name), {}, options)
        except NotFound:
            return

    # --- Watches and logs ----------------------------------------------------------------------------------------------------------

    def watch(self, kind: str, selector: str, version: str, *, silence_s: float = SILENCE_S) -> Stream:
        """Changes since a version, until the server ends the watch (after `WATCH_S`).

        Raises, on opening and while it is read: Expired, Unreachable (also where it says nothing for `silence_s`), Refused, NotFound.
        """
        sockets: list[socket.socket] = []
        opened = self._watch(kind, selector, version, silence_s, sockets)
        next(opened)  # the answer's head: from here on the picture is fresh
        return Stream((change for change in opened if change is not None), sockets)

    def _watch(self, kind: str, selector: str, version: str, silence_s: float, sockets: Sequence[socket.socket]) -> Iterator[Change | None]:
        query: dict[str, str | int] = {
            "watch": "1",
            "labelSelector": selector,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": WATCH_S,
        }
        what = f"watch {kind}"
        timeout = httpx2.Timeout(silence_s, connect=CONNECT_S)
        try:
            with self._client.stream("GET", self._path(kind), params=query, timeout=timeout) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise self._fault(what, answer)
                network = answer.extensions.get("network_stream")
                if network is not None:
                    sockets.append(network.get_extra_info("socket"))  # type: ignore[attr-defined]
                yield None
                for line in answer.iter_lines():
                    if line:
                        yield self._change(what, json.loads(line))
        except httpx2.HTTPError as error:
            raise Unreachable(f"{self.server}: {what}: {_said(error)}") from error
        except json.JSONDecodeError as error:
            raise Unreachable(f"{self.server}: {what}: cut off within a line") from error

    def _change(self, what: str, told: Object) -> Change:
        if told["type"] == "ERROR":
            status = told["object"]
            if status.get("code") == 410:
                raise Expired(str(status.get("message", "")))
            raise Unreachable(f"{self.server}: {what}: {status.get('message', status)}")
        return Change(told["type"], told["object"])

    def pod_log(
        self, name: str, *, container: str | None = None, follow: bool = False, tail: int | None = None, previous: bool = False
    ) -> Iterator[bytes]:
        """Pieces of a container's output, as they come. Raises NotFound, Refused, Unreachable."""
        query: dict[str, str | int] = {"follow": "true"} if follow else {}
        query |= {"container": container} if container else {}
        query |= {"tailLines": tail} if tail is not None else {}
        query |= {"previous": "true"} if previous else {}
        timeout = httpx2.Timeout(None if follow else READ_S, connect=CONNECT_S)
        try:
            with self._client.stream("GET", f"{self._path('pods', name)}/log", params=query, timeout=timeout) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise self._fault(f"log of pod {name}", answer)
                yield from answer.iter_bytes()
        except httpx2.HTTPError as error:
            raise Unreachable(f"{self.server}: log of pod {name}: {_said(error)}") from error

    # --- The cluster itself --------------------------------------------------------------------------------------------------------

    def can_i(self, verb: str, group: str, resource: str, *, cluster_wide: bool = False) -> bool:
        """Whether this person or account may do so in the namespace. `resource` may name a part: `pods/log`. Raises Unreachable."""
        resource, _, part = resource.partition("/")
        asked = {"verb": verb, "group": group, "resource": resource, "subresource": part}
        if not cluster_wide:
            asked["namespace"] = self.namespace
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": asked},
        }
        answer = self._ask("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", {}, review)
        return bool(answer["status"]["allowed"])

    def ask(self, path: str) -> Object:
        """Any other document of the API server, e.g. `/version`, `/apis/kubeflow.org/v1`. Raises NotFound, Refused, Unreachable."""
        return self._ask("GET", path)

    # --- Requests ------------------------------------------------------------------------------------------------------------------

    def _path(self, kind: str, name: str | None = None) -> str:
        if kind in CLUSTER_PLACES:
            path = f"{CLUSTER_PLACES[kind]}/{kind}"
        else:
            path = f"{PLACES[kind]}/namespaces/{quote(self.namespace, safe='')}/{kind}"
        return path if name is None else f"{path}/{quote(name, safe='')}"

    def _ask(self, method: str, path: str, query: Mapping[str, str | int] | None = None, body: Object | None = None) -> Object:
        what = f"{method} {path}"
        content = None if body is None else json.dumps(body).encode()
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Accept": "application/json", **({"Content-Type": kind} if body is not None else {})}
        began = time.monotonic()
        for number in range(1, TRIES + 1):
            pause = PAUSE_S * 2 ** (number - 1) * random.uniform(0.5, 1.0)
            try:
                answer = self._client.request(method, path, params=dict(query or {}), content=content, headers=headers)
            except (ConfigError, OSError, KeyError, ValueError) as error:  # the last two: a plugin's answer without a token
                raise Refused(
                    f"{self.server}: cannot log in: {redacted(str(error))}; look at the user of this context in the kubeconfig"
                ) from error
            except httpx2.HTTPError as error:
                fault: Exception = Unreachable(f"{self.server}: {what}: {_said(error)}")
                fault.__cause__ = error
            else:
                if answer.is_success:
                    told: Object = answer.json()
                    return told
                fault = self._fault(what, answer)
                if not isinstance(fault, Unreachable) or isinstance(fault, WebhookDown):
                    raise fault
                pause = max(pause, _retry_after(answer))
            if number == TRIES or time.monotonic() - began + pause > PATIENCE_S:
                raise fault
            self._sleep(pause)
        raise AssertionError("unreachable")

    def _fault(self, what: str, answer: httpx2.Response) -> Exception:
        status = _status(answer)
        message = redacted(str(status.get("message") or answer.text[:300] or answer.reason_phrase).strip())
        code = answer.status_code
        told = f"{self.server}: {what}: {message}"
        match code:
            case 404:
                return NotFound(message)
            case 409:
                return AlreadyExists(message) if status.get("reason") == "AlreadyExists" else Conflict(message)
            case 410:
                return Expired(message)
            case 401:
                return Refused(f"{told}; log in again, or name another context in the cluster profile")
            case 429:
                return Unreachable(told)
            case 500 if "failed calling webhook" in message:
                return WebhookDown(message)
            case _ if code >= 500:
                return Unreachable(told)
            case 403 if "exceeded quota" in message:
                return OverQuota(message)
            case _:
                return Refused(message)


def _config(context: str | None) -> SingleConfig:
    """As kubectl chooses: KUBECONFIG, else inside a pod its account, else ~/.kube/config. Raises UsageError."""
    named = os.environ.get("KUBECONFIG")
    if not named and context is None and (Path(SERVICE_ACCOUNT) / "token").is_file():
        found = KubeConfig.from_service_account().get()
        assert found is not None
        return found
    files = [name for name in (named or DEFAULT_KUBECONFIG).split(os.pathsep) if name]
    reasons: list[str] = []
    for name in files:
        try:
            found = KubeConfig.from_file(name).get(context)
        except (ConfigError, OSError) as error:
            reasons.append(str(error))
        except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:  # lightkube checks nothing, msgspec some
            reasons.append(f"{name}: {error!r} is missing or not as kubectl writes it")
        else:
            assert found is not None
            return found
    raise UsageError(f"no cluster to talk to: {'; '.join(reasons)}. Set KUBECONFIG, or name a context in the cluster profile")


def _status(answer: httpx2.Response) -> Object:
    try:
        told = answer.json()
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _retry_after(answer: httpx2.Response) -> float:
    """Seconds that the server asks for; 0 where it does not."""
    value = answer.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _said(error: httpx2.HTTPError) -> str:
    if isinstance(error, httpx2.LocalProtocolError):  # it quotes the header that it could not write: the token
        return "the request could not be written; is there a line break in the kubeconfig's token?"
    return redacted(f"{type(error).__name__}: {error}") if str(error) else type(error).__name__
