"""`helm test`: what a driver needs is there, seen from a pod like the driver's. Arguments: the store's URL, then MLflow's, if there is one.

Refuses to write anything but the store's own probe object, and to read a secret.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

from orchestrator.errors import OsctlError
from orchestrator.stores import open_store


def mlflow(url: str, host: str | None = None) -> int:
    """HTTP status of a question to MLflow's API. /health would not do: it answers to every host name."""
    headers = {"Content-Type": "application/json", **({"Host": host} if host else {})}
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/experiments/search", data=b'{"max_results": 1}', headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def main(store: str, tracking: str = "") -> None:
    open_store(store).probe()
    sys.stdout.write(f"store {store}: there, and it holds its conditional writes\n")
    if tracking:
        if (status := mlflow(tracking)) != 200:
            raise SystemExit(f"MLflow {tracking}: answers {status}, not 200")
        if (status := mlflow(tracking, host="rebound.example.com")) != 403:
            raise SystemExit(f"MLflow {tracking}: answers {status} to a foreign host name, not 403")
        sys.stdout.write(f"MLflow {tracking}: answers, and not to foreign host names\n")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (OsctlError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
