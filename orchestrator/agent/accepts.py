"""`python -m orchestrator.agent.accepts NEEDS`: whether the agent and the trainer of this image have what a launch needs.

Exit code 0: they have. 64: they have not, and one line says what is missing. `orchestrator.recipe.image_needs` has the question.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from orchestrator.recipe.image_needs import unmet

ACCEPTED, NOT_ACCEPTED = 0, 64


def main(argv: Sequence[str] | None = None) -> int:
    (needs,) = sys.argv[1:] if argv is None else argv
    why = unmet(needs)
    if why:
        sys.stderr.write(f"error: {why}\n")
    return NOT_ACCEPTED if why else ACCEPTED


if __name__ == "__main__":
    raise SystemExit(main())
