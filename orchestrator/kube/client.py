"""Requests to one namespace of a Kubernetes API server, by the official client, as plain dicts.

Owns how often a request with a passing fault is sent again; `faults` says which faults pass, and `login` has credentials, certificates and
the choice of a context. Answers stay JSON, because if a command reads thousands of objects, the client's typed models would take more time
than everything else.
Refuses to decide whose an object is: the caller reads it before it changes anything, and passes the uid that it has read.

A request may be sent twice, since a lost answer says nothing about its effect. `create` then raises AlreadyExists, and the caller compares;
`delete` counts an object that is not there as deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import urllib3
from kubernetes.client.exceptions import ApiException
from kubernetes.watch.watch import iter_resp_lines
from urllib3.exceptions import ConnectTimeoutError, HTTPError, ProtocolError, ReadTimeoutError

from orchestrator.effects import perform
from orchestrator.errors import NotFound, Refused, Unreachable
from orchestrator.kube.faults import Busy, Conflict, Expired, WebhookDown, fault_of
from orchestrator.kube.login import Login, find
from orchestrator.redact import redacted

Object = dict[str, Any]
"""A Kubernetes object as the API server returns it."""

PLACES: Mapping[str, str] = {
    "pytorchjobs": "/apis/kubeflow.org/v1",
    "trainjobs": "/apis/trainer.kubeflow.org/v1alpha1",
    "trainingruntimes": "/apis/trainer.kubeflow.org/v1alpha1",
    "jobsets": "/apis/jobset.x-k8s.io/v1alpha2",
    "rayjobs": "/apis/ray.io/v1",
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
    "localqueues": "/apis/kueue.x-k8s.io/*",
    "workloads": "/apis/kueue.x-k8s.io/*",
}
"""Kinds of objects in a namespace, by their name in a path, and the path of their API. `*` is the newest version that is served of
`VERSIONS`."""
CLUSTER_PLACES: Mapping[str, str] = {
    "nodes": "/api/v1",
    "namespaces": "/api/v1",
    "storageclasses": "/apis/storage.k8s.io/v1",
    "priorityclasses": "/apis/scheduling.k8s.io/v1",
    "customresourcedefinitions": "/apis/apiextensions.k8s.io/v1",
    "validatingwebhookconfigurations": "/apis/admissionregistration.k8s.io/v1",
    "clusterqueues": "/apis/kueue.x-k8s.io/*",
    "resourceflavors": "/apis/kueue.x-k8s.io/*",
}
"""The same for kinds of objects of the whole cluster; a driver needs none of them."""

VERSIONS = ("v1beta2", "v1beta1")
"""Versions of Kueue's APIs that are understood, the newest first. Kueue serves the first since 0.15."""

PAGE = 500
"""The most objects in one answer to a list."""
TRIES = 4
"""How often a request is sent if it meets a passing fault: a refused connection, 429, 500 and above."""
SYSTEM_SAID = re.compile(r"\[Errno -?\d+\] ([^'\")>\]]+)")
"""The operating system's words about a connection, inside urllib3's: `<urllib3.…HTTPSConnection object at 0x7f…>: …: [Errno 111] …`."""
PAUSE_S = 0.2
"""Pause before the second try. It is doubled before each further try, and shortened by up to a half at random, so that clients do not all
return at once."""
PATIENCE_S = 20.0
"""Time for all tries together. If the server asks for a longer pause with Retry-After, the fault is raised at once."""
CONNECT_S, READ_S = 5.0, 15.0
"""How long connecting may take, and how long the server may send nothing while an answer is read."""
LOG_BYTES = 65536
"""The most bytes in one piece of a container's output."""
WATCH_S = 30
"""The server ends a watch after this time, and a new one is begun. So a watch that died silently is noticed after about this time."""
SILENCE_S = WATCH_S + 10.0
"""A watch that sends nothing for this long, not even its end, is dead."""


@dataclass(frozen=True)
class Change:
    """One line of a watch."""

    type: str
    """ADDED, MODIFIED, DELETED or BOOKMARK."""
    object: Any
    """What was sent, unchecked. It is an object, unless the server or a proxy is at fault."""


@dataclass
class Stream:
    """An open watch. `close`, which any thread may call, ends it."""

    changes: Iterator[Change]
    _answer: urllib3.BaseHTTPResponse

    def __iter__(self) -> Iterator[Change]:
        return self.changes

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # raised if it has ended by itself
            self._answer.shutdown()  # a plain close would not wake a thread that reads from it

    def leave(self) -> None:
        """Release the connection. The reading thread calls this."""
        self._answer.close()


class Api:
    """One namespace of one cluster. Safe for several threads."""

    def __init__(self, login: Login, namespace: str, *, sleep: Callable[[float], None] = time.sleep):
        """Use `connect` instead."""
        self.namespace, self.server = namespace, login.server
        self._login, self._sleep = login, sleep
        self._versions: dict[str, str] = {}

    @classmethod
    def connect(cls, context: str | None, namespace: str, env: Mapping[str, str] = os.environ) -> Api:
        """The API of a context of the kubeconfig. None means the current context, or inside a pod the pod's own account.

        Sends nothing yet, and logs in with the first request. `env` says where the kubeconfig is (KUBECONFIG); the plugin of a login gets
        this process's environment. Raises UsageError if there is no usable kubeconfig.
        """
        return cls(find(context, env), namespace)

    def close(self) -> None:
        self._login.close()

    # --- Objects -------------------------------------------------------------------------------------------------------------------

    def get(self, kind: str, name: str) -> Object:
        """The object of this name. Raises NotFound, Refused, Unreachable."""
        return self._ask("GET", self._path(kind, name))

    def list(self, kind: str, selector: str = "", fields: str = "") -> tuple[Sequence[Object], str]:
        """All objects of a kind that a label selector and a field selector select, unchecked, and the version to watch from.

        Raises NotFound if the cluster does not know the kind, Refused, Unreachable.
        """
        items: list[Object] = []
        query: dict[str, str | int] = {"labelSelector": selector, "limit": PAGE}
        if fields:
            query["fieldSelector"] = fields
        while True:
            answer = self._ask("GET", self._path(kind), query)
            about, found = answer.get("metadata"), answer.get("items") or []
            if not isinstance(about, dict) or not about.get("resourceVersion") or not isinstance(found, list):
                raise Unreachable(f"{self.server}: list of {kind}: the answer is not a list of a Kubernetes API server")
            items += found
            if not (more := about.get("continue")):
                return items, str(about["resourceVersion"])
            query["continue"] = more

    def create(self, kind: str, body: Object, *, dry_run: bool = False) -> Object:
        """Create an object. Returns it as the server created it. Raises AlreadyExists, Refused with the server's message, Unreachable."""
        try:
            if dry_run:
                return self._ask("POST", self._path(kind), {"dryRun": "All"}, body)
            name = body["metadata"].get("name", "")
            return perform("cluster.create", f"{kind}/{name}", lambda: self._ask("POST", self._path(kind), {}, body))
        except NotFound as error:
            raise Refused(f"{self.server}: cannot create {kind}: {error}; `osctl doctor` names what is not installed") from error

    def patch(self, kind: str, name: str, body: Object, *, uid: str) -> Object:
        """Merge `body` into the object of this uid. Raises NotFound, Conflict, Refused, Unreachable."""
        metadata = {**body.get("metadata", {}), "uid": uid}
        try:
            sent = {**body, "metadata": metadata}
            return perform("cluster.patch", f"{kind}/{name}", lambda: self._ask("PATCH", self._path(kind, name), {}, sent))
        except Refused as error:
            if "metadata.uid" in str(error):  # for a kind that a CRD defines, another uid is invalid (422) and not a conflict
                raise Conflict(str(error)) from error
            raise

    def delete(self, kind: str, name: str, *, uid: str, grace_s: int | None = None, wait_for_dependents: bool = False) -> None:
        """Delete the object of this uid, with those that it owns. Does nothing if it is gone already.

        With `wait_for_dependents` it is there until they are gone.

        Raises Conflict, Refused, Unreachable.
        """
        policy = "Foreground" if wait_for_dependents else "Background"
        options: Object = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": uid}, "propagationPolicy": policy}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        try:
            perform("cluster.delete", f"{kind}/{name}", lambda: self._ask("DELETE", self._path(kind, name), {}, options))
        except NotFound:
            return

    # --- Watches and logs ----------------------------------------------------------------------------------------------------------

    def watch(self, kind: str, selector: str, version: str, *, silence_s: float = SILENCE_S) -> Stream:
        """Changes since a version, until the server ends the watch (after `WATCH_S`).

        Raises, on opening and while it is read: Expired, Unreachable (also if it sends nothing for `silence_s`), Refused, NotFound.
        """
        query: dict[str, str | int] = {
            "watch": "1",
            "labelSelector": selector,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": WATCH_S,
        }
        what = f"watch {kind}"
        answer = self._send(what, "GET", self._path(kind), query, read_s=silence_s)
        return Stream(self._changes(what, answer), answer)

    def _changes(self, what: str, answer: urllib3.BaseHTTPResponse) -> Iterator[Change]:
        try:
            for line in iter_resp_lines(answer):
                if line:
                    yield self._change(what, json.loads(line))
        except (HTTPError, OSError) as error:
            raise Unreachable(f"{self.server}: {what}: {_said(error)}") from error
        except json.JSONDecodeError as error:
            raise Unreachable(f"{self.server}: {what}: a line that is not JSON") from error
        finally:
            answer.close()

    def _change(self, what: str, told: Object) -> Change:
        if not isinstance(told, dict) or not isinstance(told.get("type"), str):
            raise Unreachable(f"{self.server}: {what}: a line that is not a change")
        status = told.get("object")
        if told["type"] == "ERROR":
            said = status if isinstance(status, dict) else {}
            if said.get("code") == 410:
                raise Expired(str(said.get("message", "")))
            raise Unreachable(f"{self.server}: {what}: {redacted(str(said.get('message', status)))}")
        return Change(told["type"], status)

    def pod_log(
        self, name: str, *, container: str | None = None, follow: bool = False, tail: int | None = None, previous: bool = False
    ) -> Iterator[bytes]:
        """A container's output, piece by piece.

        Args:
            container: name of the container. None means the only one.
            follow: go on until the container ends.
            tail: only this many of the last lines. None means all.
            previous: read the output from before the container was restarted.

        Raises NotFound, Refused, Unreachable.
        """
        query: dict[str, str | int] = {"follow": "true"} if follow else {}
        query |= {"container": container} if container else {}
        query |= {"tailLines": tail} if tail is not None else {}
        query |= {"previous": "true"} if previous else {}
        answer = self._send(f"log of pod {name}", "GET", f"{self._path('pods', name)}/log", query, read_s=None if follow else READ_S)
        try:
            yield from answer.stream(LOG_BYTES)
        except (HTTPError, OSError) as error:
            raise Unreachable(f"{self.server}: log of pod {name}: {_said(error)}") from error
        finally:
            answer.close()

    # --- The cluster itself --------------------------------------------------------------------------------------------------------

    def can_i(self, verb: str, group: str, resource: str, *, cluster_wide: bool = False) -> bool:
        """Whether this account may do `verb` to `resource` in the namespace, or cluster-wide. `resource` may be a subresource: `pods/log`.

        Raises Unreachable.
        """
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
        return bool((answer.get("status") or {}).get("allowed"))

    def ask(self, path: str) -> Object:
        """Read any document of the API server, e.g. `/version` or `/apis/kubeflow.org/v1`. Raises NotFound, Refused, Unreachable."""
        return self._ask("GET", path)

    def pending_workloads(self, queue: str) -> Sequence[Object]:
        """What waits in a LocalQueue of Kueue, the next one first, as Kueue's visibility API lists it.

        Raises NotFound if that API is not served or knows no such queue, Refused, Unreachable.
        """
        where = f"{self._newest('/apis/visibility.kueue.x-k8s.io/*')}/namespaces/{quote(self.namespace, safe='')}/localqueues"
        items = self._ask("GET", f"{where}/{quote(queue, safe='')}/pendingworkloads").get("items") or []
        return items if isinstance(items, list) else []

    def _newest(self, place: str) -> str:
        """The path of an API whose version is chosen by what is served. Raises NotFound, Refused, Unreachable."""
        group, star, _ = place.partition("/*")
        if not star:
            return place
        if group not in self._versions:
            served = {one.get("version") for one in self._ask("GET", group).get("versions") or ()}
            found = next((version for version in VERSIONS if version in served), None)
            if found is None:
                raise NotFound(f"{group} is served in none of the versions {', '.join(VERSIONS)}")
            self._versions[group] = found
        return f"{group}/{self._versions[group]}"

    # --- Requests ------------------------------------------------------------------------------------------------------------------

    def _path(self, kind: str, name: str | None = None) -> str:
        if kind in CLUSTER_PLACES:
            path = f"{self._newest(CLUSTER_PLACES[kind])}/{kind}"
        else:
            path = f"{self._newest(PLACES[kind])}/namespaces/{quote(self.namespace, safe='')}/{kind}"
        return path if name is None else f"{path}/{quote(name, safe='')}"

    def _ask(self, method: str, path: str, query: Mapping[str, str | int] | None = None, body: Object | None = None) -> Object:
        what = f"{method} {path}"
        began = time.monotonic()
        for number in range(1, TRIES + 1):
            pause = PAUSE_S * 2 ** (number - 1) * random.uniform(0.5, 1.0)
            try:
                return self._read(what, self._send(what, method, path, query or {}, body))
            except WebhookDown:
                raise
            except Unreachable as error:
                pause = max(pause, error.after_s if isinstance(error, Busy) else 0.0)
                if number == TRIES or time.monotonic() - began + pause > PATIENCE_S:
                    raise
            self._sleep(pause)
        raise AssertionError("unreachable")

    def _read(self, what: str, answer: urllib3.BaseHTTPResponse) -> Object:
        try:
            told = json.loads(answer.data)
        except (HTTPError, OSError) as error:
            raise Unreachable(f"{self.server}: {what}: {_said(error)}") from error
        except ValueError:
            told = None
        finally:
            answer.close()
        if not isinstance(told, dict):
            raise Unreachable(f"{self.server}: {what}: the answer is not an object of a Kubernetes API server; is this its address?")
        return told

    def _send(
        self,
        what: str,
        method: str,
        path: str,
        query: Mapping[str, str | int],
        body: Object | None = None,
        *,
        read_s: float | None = READ_S,
    ) -> urllib3.BaseHTTPResponse:
        """Send one request. Returns an answer that is not an error, with its body unread. If the server answers 401, log in anew once."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        for last in (False, True):
            client, authorization = self._login.authorized()
            try:
                answer: urllib3.BaseHTTPResponse = client.call_api(
                    path,
                    method,
                    query_params=list(query.items()),
                    header_params={"Accept": "application/json", "Content-Type": kind, **authorization},
                    body=body,
                    _preload_content=False,
                    _return_http_data_only=True,
                    _request_timeout=(CONNECT_S, read_s),
                )
                return answer
            except ApiException as error:
                if error.status == 401 and not last:
                    self._login.renew(client)
                    continue
                fault: Exception = fault_of(self.server, what, error)
            except (HTTPError, OSError) as error:
                fault = Unreachable(f"{self.server}: {what}: {_said(error)}")
            except ValueError:  # the error quotes the header that could not be written: the token
                fault = Unreachable(
                    f"{self.server}: {what}: the request could not be written; is there a line break in the kubeconfig's token?"
                )
            raise fault from None  # the client's errors quote headers and whole answers
        raise AssertionError("unreachable")


def _said(error: BaseException) -> str:
    """What went wrong with a connection, for people: the system's own words, where a library has wrapped them."""
    if plain := SYSTEM_SAID.search(str(error)):
        return redacted(plain[1]).lower()
    if isinstance(error, ConnectTimeoutError | ReadTimeoutError):
        return "no answer in time"
    if isinstance(error, ProtocolError):
        return "the connection broke"
    return redacted(f"{type(error).__name__}: {error}") if str(error) else type(error).__name__
