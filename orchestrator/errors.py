"""The control plane's errors, one small tree named by what the caller should do.

    OsctlError                 exit 1   an expected failure
    ├── UsageError             exit 2   change the command or the file
    ├── RunFailed              exit 3   the run itself failed; look at its logs
    ├── Refused                exit 4   a contract, a budget or a lease says no; nothing was done
    │   ├── CorruptCheckpoint  exit 4   a committed checkpoint is not what was committed
    │   └── TooLarge           exit 4   an object that ought to be a small record is not
    └── Unreachable            exit 5   a store or cluster did not answer; nothing was done

    StoreConflict              not an end: another writer was first (`create`) or faster (`replace`)
    NotFound                   not an end: the store has no such object

A message has three parts: subject, fact (with both values), next step. `main()` prints it as one line and never a traceback.
"""

from __future__ import annotations


class OsctlError(Exception):
    exit_code = 1


class UsageError(OsctlError):
    exit_code = 2


class RunFailed(OsctlError):
    exit_code = 3


class Refused(OsctlError):
    exit_code = 4


class CorruptCheckpoint(Refused):
    pass


class TooLarge(Refused):
    pass


class Unreachable(OsctlError):
    exit_code = 5


class StoreConflict(Exception):
    """The condition of a write did not hold: the object exists with other content, or changed since it was read."""


class NotFound(Exception):
    """No object under this key."""
