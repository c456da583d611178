"""The trainer's errors, one small tree: `kind` is the `class` that `result.json` reports.

    TrainerError        code     the program is wrong
    ├── ConfigError     config   the stage cannot be run as written
    ├── ParentError     parent   the weights that the stage starts from do not fit it
    │   └── WeightsRefused
    ├── DataError       data     a clip's encoded form was whole and is no longer
    ├── NotFinite       nan      a loss or a gradient is not finite
    ├── LossSpike       spike    the loss left its range and stays there
    ├── OutOfMemory     oom      the device has no memory left
    └── DiskFull        disk     the run directory cannot be written

A message has three parts: subject, fact (with both values), next step.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Kind = Literal["config", "parent", "data", "nan", "spike", "oom", "disk", "code"]


class TrainerError(Exception):
    kind: ClassVar[Kind] = "code"


class ConfigError(TrainerError):
    kind = "config"


class ParentError(TrainerError):
    kind = "parent"


class WeightsRefused(ParentError):
    """Keys or shapes of a state dict are not those of the model."""


class DataError(TrainerError):
    kind = "data"


class NotFinite(TrainerError):
    kind = "nan"


class LossSpike(TrainerError):
    kind = "spike"


class OutOfMemory(TrainerError):
    kind = "oom"


class DiskFull(TrainerError):
    kind = "disk"
