"""Requests to one namespace of a Kubernetes API server, by the official client, as plain dicts.

Owns what an answer means: which are errors of the person, which of the moment, and how often a moment is waited for. Credentials,
certificates and the choice of a context are in `login`. Answers stay the JSON that they are: the client's typed models cost more time than
all else where thousands of objects are looked at.
Refuses to decide whose an object is: a caller looks before it changes anything, and names the uid it looked at.

A request may be sent twice: an answer that was lost says nothing about its effect. `create` then raises AlreadyExists, and the caller
compares; `delete` takes what is not there for gone.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import urllib3
from kubernetes.client.exceptions import ApiException
from kubernetes.watch.watch import iter_resp_lines
from urllib3.exceptions import HTTPError

from orchestrator.adapters.kube.login import Login, find
from orchestrator.errors import NotFound, Refused, Unreachable
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
LOG_BYTES = 65536
"""Of a container's output at a time, at most."""
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


class Busy(Unreachable):
    """The server says that it cannot answer now, and perhaps for how long."""

    def __init__(self, said: str, after_s: float):
        super().__init__(said)
        self.after_s = after_s


class OverQuota(Refused):
    """A ResourceQuota of the namespace is used up: what is asked for may be had later."""


@dataclass(frozen=True)
class Change:
    type: str
    """ADDED, MODIFIED, DELETED or BOOKMARK."""
    object: Any
    """As it came: an object, unless the server or somebody between is at fault."""


@dataclass
class Stream:
    """A watch. `close`, from any thread, ends it."""

    changes: Iterator[Change]
    _answer: urllib3.BaseHTTPResponse

    def __iter__(self) -> Iterator[Change]:
        return self.changes

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # it has ended by itself
            self._answer.shutdown()  # closing it would leave a thread that reads from it asleep

    def leave(self) -> None:
        """Of the thread that reads: it reads no more."""
        self._answer.close()


class Api:
    def __init__(self, login: Login, namespace: str, *, sleep: Callable[[float], None] = time.sleep):
        """Use `connect`."""
        self.namespace, self.server = namespace, login.server
        self._login, self._sleep = login, sleep

    @classmethod
    def connect(cls, context: str | None, namespace: str) -> Api:
        """For a context of the kubeconfig; none: its current one, or inside a pod the pod's own account.

        Asks nothing yet, and logs in with the first request. Raises UsageError where there is no usable kubeconfig.
        """
        return cls(find(context), namespace)

    def close(self) -> None:
        self._login.close()

    # --- Objects -------------------------------------------------------------------------------------------------------------------

    def get(self, kind: str, name: str) -> Object:
        """Raises NotFound, Refused, Unreachable."""
        return self._ask("GET", self._path(kind, name))

    def list(self, kind: str, selector: str = "") -> tuple[Sequence[Object], str]:
        """All of them as they come, odd ones too, and the version to watch from.

        Raises NotFound where the cluster does not know the kind, Refused, Unreachable.
        """
        items: list[Object] = []
        query: dict[str, str | int] = {"labelSelector": selector, "limit": PAGE}
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
        """Pieces of a container's output, as they come. Raises NotFound, Refused, Unreachable."""
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
        return bool((answer.get("status") or {}).get("allowed"))

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
        """An answer that is no error, its body still to be read. Credentials that the server does not know are had anew, once."""
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
                fault: Exception = self._fault(what, error)
            except (HTTPError, OSError) as error:
                fault = Unreachable(f"{self.server}: {what}: {_said(error)}")
            except ValueError:  # it quotes the header that it could not write: the token
                fault = Unreachable(
                    f"{self.server}: {what}: the request could not be written; is there a line break in the kubeconfig's token?"
                )
            raise fault from None  # the client's errors quote headers and whole answers
        raise AssertionError("unreachable")

    def _fault(self, what: str, error: ApiException) -> Exception:
        status, code = _status(error.body), error.status
        if not code:  # the client's way to tell of a certificate
            return Unreachable(f"{self.server}: {what}: {redacted(str(error.reason)).partition(chr(10))[2]}")
        words = status.get("message") or _text(error.body)[:300] or error.reason or code
        message = redacted(str(words).strip())
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
                return Busy(told, _retry_after(error.headers or {}))
            case 500 if "failed calling webhook" in message:
                return WebhookDown(message)
            case _ if code >= 500:
                return Busy(told, _retry_after(error.headers or {}))
            case _ if code < 400:
                return Refused(f"{told}; it points elsewhere, and nothing is sent there. Write the API server's own address")
            case 403 if "exceeded quota" in message:
                return OverQuota(message)
            case _:
                return Refused(message)


def _text(body: bytes | str | None) -> str:
    return body.decode(errors="replace") if isinstance(body, bytes) else body or ""


def _status(body: bytes | str | None) -> Object:
    try:
        told = json.loads(body or "")
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks for; 0 where it does not."""
    value = headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _said(error: BaseException) -> str:
    return redacted(f"{type(error).__name__}: {error}") if str(error) else type(error).__name__
