"""Where imported weights and encoders lie on this machine.

A stage names them as its author wrote them: a path, an address, a name in a store, an id of the hub. Whoever copies them here (the agent
or `osctl`) writes a JSON file, `{"schema": 1, "places": {"<name in the stage>": "<file or folder>"}}`, and names that file in the variable
OSCTL_PLACES. A name that is not in the file is itself the path. Free of torch. Refuses to open what lies there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from opensora.errors import ConfigError

VARIABLE = "OSCTL_PLACES"


def local(name: str, env: Mapping[str, str] = os.environ) -> str:
    """Where the import with this name in the stage lies. Raises ConfigError if the file of places cannot be read."""
    return places(env).get(name, name)


def places(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Where each import lies, by its name in the stage. Raises ConfigError."""
    file = env.get(VARIABLE)
    if not file:
        return {}
    try:
        found = json.loads(Path(file).read_bytes())["places"]
        return {str(name): str(place) for name, place in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{VARIABLE} {file}: cannot be read ({error!r}). Remove the file, or unset {VARIABLE}") from error
