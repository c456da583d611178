"""What is printed and written down without the credentials in it.

Owns what counts as a credential: the values of this process's environment that are named like one, what stands before the `@` of a URL,
what is assigned to a name like `password=`, and the shapes of well-known keys. Refuses to promise more: a password that stands in no
variable, under no such name and in no URL is a word like any other.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import unquote

HIDDEN = "…"
SHORTEST = 8
"""Characters. A shorter value would be found in words that are none; nobody's key is that short."""
SURE = 16
"""From here on a value that is found somewhere did not get there by chance (`minioadmin` is the name of many a bucket)."""

_NAMES = re.compile(
    r"(?:SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY)(?!\w*_(?:FILE|PATH|DIR|URL|URI|NAME|TYPE)$)",
    re.IGNORECASE,
)
"""Of variables, unless they say where a secret lies."""
_USER = re.compile(r"(?<=://)(?:[^\s/'\"@]*@)+|(?<=://)[^\s/'\"@:]*:(?!\d+(?:[/?#]|$))[^\s'\"@]*@")
"""What stands before the host of a URL. Keys of S3 hold slashes, which belong into no URL and are put there all the same."""
_ASSIGNED = re.compile(
    r"(?i)\b([\w.-]*(?:secret|token|passw(?:or)?d|passphrase|credentials?|api[_-]?key|access[_-]?key(?:[_-]id)?|secret[_-]?key|signature))"
    rf"(=['\"]?)([^\s'\",;&]{{{SHORTEST},}})"
)
_SHAPES = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bhf_[A-Za-z0-9]{20,}"
    r"|\bgh[a-z]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]+)?"
    rf"|(?<=Bearer )[^\s'\"]{{{SHORTEST},}}|(?<=Basic )[A-Za-z0-9+/=]{{{SHORTEST},}}"
)
_LOGIN = re.compile(r"(?<![^\s'\"=])[^\s/:@'\"]+:(?!//)[^\s@'\"]+@(?!sha256:)")
"""user:password@ where the scheme before it was forgotten."""
_WORD = re.compile(r"[A-Za-z0-9+/_=-]{20,}")


def secrets_of(env: Mapping[str, str]) -> tuple[str, ...]:
    """Values that are credentials, longest first: of variables named like one, and passwords in URLs such as HTTPS_PROXY."""
    found: set[str] = set()
    for name, value in env.items():
        if _NAMES.search(name):
            found.add(value.strip())
        for user in _USER.findall(value):
            password = user[:-1].partition(":")[2]
            found |= {password, unquote(password), *re.split(r"[/?#@]", password)}  # a parser that stumbles quotes a part
    return tuple(sorted((one for one in found if len(one) >= SHORTEST), key=lambda one: (-len(one), one)))


def redacted(text: str, env: Mapping[str, str] = os.environ) -> str:
    """A text of ours, or about what a person or a server said."""
    return _without(_known(secrets_of(env)), text)


def typed(text: str, env: Mapping[str, str] = os.environ) -> str:
    """What a person typed, for a message about it: without what only looks random, too, since it may be a key in the wrong place."""
    text = _LOGIN.sub(f"{HIDDEN}@", redacted(text, env))
    return _WORD.sub(lambda match: HIDDEN if _looks_random(match[0]) else match[0], text)


def holds_credentials(text: str, env: Mapping[str, str]) -> bool:
    """Whether something that is about to be written down must be refused. Says no where chance could say yes."""
    return _without(_known([one for one in secrets_of(env) if len(one) >= SURE]), text) != text


def masker(env: Mapping[str, str]) -> Callable[[bytes], bytes]:
    """Hides values of the environment in output that is somebody else's, whose words are otherwise left as they are."""
    known = _known(secrets_of(env))
    if known is None:
        return lambda data: data
    pattern = re.compile(known.pattern.encode())
    return lambda data: pattern.sub(HIDDEN.encode(), data)


def _known(values: Iterable[str]) -> re.Pattern[str] | None:
    words = [re.escape(value) for value in values]
    return re.compile("|".join(words)) if words else None


def _without(known: re.Pattern[str] | None, text: str) -> str:
    text = known.sub(HIDDEN, text) if known is not None else text
    text = _USER.sub(f"{HIDDEN}@", text)
    text = _ASSIGNED.sub(rf"\1\2{HIDDEN}", text)
    return _SHAPES.sub(HIDDEN, text)


def _looks_random(word: str) -> bool:
    """Words and names change between small letters, capitals and digits now and then; keys do so all the time."""
    kinds = [(letter.isdigit(), letter.isupper()) for letter in word if letter.isalnum()]
    return sum(one != other for one, other in itertools.pairwise(kinds)) >= 0.3 * len(kinds)
