"""Laws of the cores that an actor of Ray asks for. That nothing else works is tested on a cluster."""

from __future__ import annotations

import pytest

from opensora.dataset.ray_cores import FEED, of_actor
from opensora.errors import ConfigError


@pytest.mark.parametrize(("wanted", "nodes"), [(1, [1]), (1, [16, 16]), (2, [2]), (0.5, [1]), (2, [4, 8]), (0.1, [1])])
def test_actors_that_would_fill_every_node_leave_room_for_what_hands_rows_out(wanted: float, nodes: list[float]) -> None:
    asked = of_actor(wanted, nodes)
    actors = round(max(nodes) / wanted)
    assert asked < wanted and actors * asked + FEED <= max(nodes), "as many actors as before"


@pytest.mark.parametrize(("wanted", "nodes"), [(1, []), (2, [3]), (1, [1, 1.5]), (1, [0, 2.5])])
def test_where_a_node_has_room_an_actor_asks_for_what_it_was_to_have(wanted: float, nodes: list[float]) -> None:
    assert of_actor(wanted, nodes) == wanted


def test_an_actor_that_fits_on_no_node_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"ray.num_cpus 2: the largest node of Ray offers 1 cores.*1 or less"):
        of_actor(2, [0, 1, 1])
