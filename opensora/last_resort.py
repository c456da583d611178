"""The last line of defence of a command: what nobody expected ends as one line that says what and where, and not as a page of traceback.

Owns that line. Refuses to hide where it happened: it names the place, and with OSCTL_TRACEBACK=1 the whole way there is printed before it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from opensora.printable import one_line

VARIABLE = "OSCTL_TRACEBACK"
LONGEST = 500
FAULT = 6
"""Exit code of a fault that nobody foresaw, as `osctl` itself has it."""


def run(name: str, main: Callable[[], int]) -> int:
    """The exit code of `main`; 6 where it raises, 130 where it was interrupted. `name`: what the line calls the command."""
    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - the boundary
        with suppress(OSError, ValueError):  # a full disk or a closed stderr takes no line
            if os.environ.get(VARIABLE, "") not in ("", "0"):
                traceback.print_exception(error)
            sys.stderr.write(f"error: {name}: {said(error)}. This is a fault of osctl; {VARIABLE}=1 shows the whole way there\n")
        return FAULT


def said(error: BaseException) -> str:
    """What happened and where, in one line."""
    text = one_line(" ".join(str(error).split()), LONGEST)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{f': {text}' if text else ''}{where}"
