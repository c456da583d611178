"""Secrets that are planted wherever one can come in, and a search that finds them, whole or in part, wherever they come out.

Each is random and of its own, so that a find says which way it took. What is searched is text as a person or a program would read it;
base64 is looked for as well, since Kubernetes and HTTP write secrets so.
"""

from __future__ import annotations

import base64
import secrets
import string
from collections.abc import Mapping
from urllib.parse import quote

PART = 12
"""Characters of a secret that are a leak already."""
LETTERS = string.ascii_letters + string.digits


class Planted:
    """`planted("where")` makes a secret; `found_in(texts)` says which came out where."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def __call__(self, where: str, beginning: str = "", ending: str = "") -> str:
        """A new one. `beginning` and `ending` make it look like what stands there; they are no part of what is searched for."""
        assert where not in self.values, f"{where} has a secret already"
        self.values[where] = "".join(secrets.choice(LETTERS) for _ in range(28))
        return f"{beginning}{self.values[where]}{ending}"

    def add(self, where: str, value: str) -> None:
        """One that is there already, such as a server's own key."""
        self.values[where] = value

    def found_in(self, texts: Mapping[str, str | bytes]) -> list[str]:
        """`secret in place`, for each that is there."""
        found = []
        for place, text in texts.items():
            data = text if isinstance(text, bytes) else text.encode()
            found += [f"{where} in {place}" for where, value in self.values.items() if any(form in data for form in _forms(value))]
        return found


def _forms(value: str) -> set[bytes]:
    parts = {value, value[:PART], value[-PART:], quote(value, safe="")}
    # Of base64, the middle: how its ends look depends on what stands beside the secret.
    encoded = {base64.b64encode(b"x" * shift + value.encode())[4:-4].decode() for shift in range(3)}
    return {part.encode() for part in parts | encoded}
