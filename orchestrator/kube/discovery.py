"""Which kinds of jobs a cluster serves, and which of them a new attempt gets.

Owns both, and what to install where the answer is none. Refuses to remember: what a cluster serves may change while a driver runs (`watch`
asks again).
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.errors import NotFound, Refused
from orchestrator.kube.client import Api
from orchestrator.kube.operator import BY_NAME, OPERATORS, Operator
from orchestrator.recipe.cluster_profile import ClusterProfile


def is_served(api: Api, operator: Operator) -> bool:
    """Whether the cluster has the operator's kind of job. Raises Unreachable.

    A list would not tell: for a kind that the cluster does not know it is answered with `forbidden` to an account without that right.
    """
    try:
        resources = api.ask(operator.api).get("resources") or ()
    except NotFound:
        return False
    except Refused:  # an account may be kept from discovery; then the list tells what is the matter
        return True
    return any(one.get("name") == operator.plural for one in resources)


def served(api: Api) -> list[Operator]:
    """All kinds that the cluster serves. Raises Unreachable."""
    return [one for one in OPERATORS if is_served(api, one)]


def chosen(profile: ClusterProfile, served: Sequence[Operator], server: str) -> Operator:
    """The kind of job that a new attempt gets. `server` is the API server's URL, for people.

    Raises:
        Refused: the cluster does not serve the kind that the profile wants, or none at all.
    """
    if not served:
        raise Refused(f"{server}: knows {none_of(OPERATORS)}; {' or '.join(one.install for one in OPERATORS)}; then run osctl doctor")
    if profile.operator == "auto":
        return served[0]
    wanted = BY_NAME[profile.operator]
    if wanted not in served:
        there = " and ".join(one.plural for one in served)
        raise Refused(
            f"{server}: the profile says operator: {wanted.name}, and the cluster has only {there}; {wanted.install}, or say auto"
        )
    return wanted


def none_of(operators: Sequence[Operator]) -> str:
    """`neither pytorchjobs nor trainjobs`, or `no pytorchjobs` where there is one."""
    names = [one.plural for one in operators]
    return f"no {names[0]}" if len(names) == 1 else f"neither {' nor '.join(names)}"
