"""Jobs of ours in a cluster that drive something: which of those found there belong to one pipeline or one data set.

Owns the check of who a Job belongs to, and the refusal of one that nobody can read. Refuses to list and to make Jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from orchestrator.errors import Refused

Found = TypeVar("Found")


def owned(
    jobs: Sequence[Mapping[str, Any]], store_url: str, prefix: str, read: Callable[[Mapping[str, Any]], Found], where: str
) -> list[Found]:
    """Those of this store whose run key begins with `prefix`, as `read` makes them.

    Args:
        where: for people, of a Job that cannot be read: whose it is, and how to look at it, around the fact `{fact}`.

    Raises:
        Refused: a Job with our labels is not as osctl writes one.
    """
    from orchestrator.kube import names

    found = []
    for job in jobs:
        try:
            owner = names.owner(job)
            if owner is not None and owner[0] == store_url and owner[1].startswith(prefix):
                found.append(read(job))
        except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
            raise Refused(where.replace("{fact}", f"is not as osctl writes one ({type(error).__name__})")) from error
    return found
