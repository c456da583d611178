"""The command `python -m opensora.export CHECKPOINT_DIR OUT`: its arguments, output and exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opensora import last_resort
from opensora.errors import TrainerError
from opensora.export.components import TYPES
from opensora.export.folder import export
from opensora.printable import printable


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m opensora.export", description="Write a checkpoint as a folder that diffusers opens.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint directory, for example run/checkpoints/step-00000100")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="the moving average, or the last weights [ema]")
    parser.add_argument("--dtype", choices=tuple(TYPES), default="fp32", help="type of the transformer's weights [fp32]")
    return parser.parse_args(argv)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done · 1 it failed · 2 the command is wrong."""
    args = _arguments(argv)
    try:
        export(args.checkpoint, args.out, weights=args.weights, dtype=args.dtype, say=_say)
    except TrainerError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return 2 if error.kind == "config" else 1
    except OSError as error:
        sys.stderr.write(f"error: {args.out}: {error.strerror or error}; make room, or name a folder that can be made\n")
        return 1
    sys.stdout.write(f"{args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(last_resort.run("export", main))
