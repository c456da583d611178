"""Where imported weights and encoders lie on this machine.

A stage names them as a person did: a path, an address, a name in a store, an id of the hub. Who brings them here (the agent, `osctl`)
writes a file of JSON, `{"schema": 1, "places": {"<name in the stage>": "<file or folder>"}}`, and names it in the variable OSCTL_PLACES.
What is not in it lies where its name says. Free of torch. Refuses to look at what lies there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from opensora.errors import ConfigError

VARIABLE = "OSCTL_PLACES"


def local(name: str) -> str:
    """The place of what a stage names so. Raises ConfigError, for a file of places that cannot be read."""
    return places().get(name, name)


def places() -> dict[str, str]:
    """Raises ConfigError."""
    file = os.environ.get(VARIABLE)
    if not file:
        return {}
    try:
        found = json.loads(Path(file).read_bytes())["places"]
        return {str(name): str(place) for name, place in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{VARIABLE} {file}: cannot be read ({error!r}). Remove the file, or unset {VARIABLE}") from error
