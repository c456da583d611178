"""What every process of `osctl` has around its command: streams that can be written, an end by signals, and one exit code a kind of end.

The last line of defence stands here. A fault that nobody foresaw is one line on stderr, exit code 6 and a file with the traceback; what a
person or a machine can cause (a full disk, a file that may not be read, a closed pipe) is no such fault, and says what it is.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

INTERNAL = 6
"""Exit code of a fault of osctl itself."""

CAUSED = frozenset({
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE,
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ETXTBSY, errno.EBUSY,
    errno.ENODEV, errno.ENOTEMPTY, errno.EXDEV, errno.ENOMEM,
})  # fmt: skip
"""Errors of the operating system that come from files and machines as they are, not from osctl."""
SHOWN = 120
"""Characters of a path in a message. Arbitrary."""

PLAIN = str.maketrans({
    "✔": "+", "✘": "x", "●": "*", "○": "o", "·": ".", "↳": ">", "…": "...", "–": "-", "—": "-", "−": "-", "×": "x", "→": "->",
    "━": "=", "╸": "=", "╺": "-", "─": "-", "│": "|", "█": "#", "’": "'", "“": '"', "”": '"', "≥": ">=", "≤": "<=",
})  # fmt: skip
"""Our own marks for a console without them. Other letters become escapes, so that nothing is lost."""


class ReaderLeft(Exception):
    """Nobody reads stdout any more (`osctl logs | head`)."""


class CannotPrint(Exception):
    """stdout cannot take the result."""


class Stdout(io.TextIOWrapper):
    """stdout whose faults are told from those of every other file and socket."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise _fault(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _fault(error) from error


def end_at_once() -> None:
    """Ctrl-C ends this process here and now, with a line, until its command begins (`run`): nothing is open yet that must be closed.

    An exception would be printed with its traceback, or be lost in an import that catches all. SIGINT stays ignored where it is.
    """
    if sys.stdout is sys.__stdout__ and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_at_once)


def _leave_at_once(_number: int, _frame: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted before it began; nothing was done\n")
    os._exit(130)


def run(app: Callable[..., Any]) -> NoReturn:
    """Run the command that was typed, and end with the code of how it went.

    Where somebody else has put up the streams (a test, a notebook), streams, signals and threads stay theirs.
    """
    if sys.stdout is sys.__stdout__:
        _read_utf8()
        _open_streams()
        _end_by_signals()
        threading.excepthook = _thread_ended
    code = _ended(app)
    try:
        sys.stdout.flush()
    except ReaderLeft:
        _silence(1)
    except (CannotPrint, OSError) as error:
        _silence(1)
        code = code or _said(str(error), 1)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    sys.exit(code)


def _ended(app: Callable[..., Any]) -> int:
    """Run it and return its exit code. What went wrong is printed."""
    import typer

    from orchestrator.errors import OsctlError

    try:
        if signal.getsignal(signal.SIGINT) is _leave_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _check_environment()
        result = app(standalone_mode=False)
        return result if isinstance(result, int) else 0
    except OsctlError as error:
        return _said(str(error), error.exit_code)
    except ReaderLeft:
        _silence(1)
        return 0
    except CannotPrint as error:
        _silence(1)
        return _said(str(error), 1)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else _said(str(error.code), 1)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except MemoryError:
        return _said("this machine has no memory left for osctl", 1)
    except Exception as error:  # noqa: BLE001 - the last line of defence
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # of the command line's parser: what was typed is wrong
            with contextlib.suppress(OSError):
                error.show()  # type: ignore[attr-defined] # typer has click inside, or beside it: either's exceptions
            return int(error.exit_code)
        if isinstance(error, OSError) and error.errno in CAUSED:
            return _said(told(error), 1)
        return _said(f"internal: {type(error).__name__}: {_one_line(str(error))}. {_kept(error)}", INTERNAL)


def told(error: OSError) -> str:
    """`PATH: Permission denied`."""
    places = [str(place) for place in (error.filename, error.filename2) if place is not None]
    shown = " -> ".join(place if len(place) <= SHOWN else f"{place[: SHOWN - 1]}…" for place in places)
    return _one_line(f"{shown}{': ' if shown else ''}{error.strerror}")


def _said(text: str, code: int) -> int:
    from orchestrator.cli import output

    output.error(text)
    return code


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)[:1000]


def _kept(error: BaseException) -> str:
    """Write the traceback beside the other logs, else into the folder of temporary files; a sentence that says where."""
    import tempfile
    import time
    import traceback

    from orchestrator.redact import redacted

    text = redacted("".join(traceback.format_exception(error)))
    name = f"internal-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (_log_folder, lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, RuntimeError):
            place = folder()
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return f"This is a fault of osctl; its traceback is in {place / name}"
    return "This is a fault of osctl; its traceback could be written nowhere"


def _log_folder() -> Path:
    from orchestrator.pipelines.host import Host

    return Host.here().home / "log"


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is None or ended.exc_type is SystemExit or isinstance(ended.exc_value, ReaderLeft | CannotPrint):
        return  # the main thread says it of the same stream
    name = ended.thread.name if ended.thread is not None else "a thread"
    _said(f"internal: {name}: {ended.exc_type.__name__}: {_one_line(str(ended.exc_value))}. {_kept(ended.exc_value)}", INTERNAL)


def _end_by_signals() -> None:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: what it opened is closed, the processes that it waits for end with it."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP, and means it
            signal.signal(number, leave)


def _check_environment() -> None:
    """Raises UsageError."""
    from orchestrator import environment
    from orchestrator.errors import UsageError

    environment.unset_empty(os.environ)
    for name, value in os.environ.items():
        if name.startswith("OSCTL_") and not _is_text(value):
            raise UsageError(f"{name}: is not UTF-8. Give it as UTF-8, or unset it")
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(f"the working folder: {error.strerror}; it was deleted, or may not be entered. Go to another one: cd") from None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_utf8() -> None:
    """Files, arguments and names are UTF-8, whatever the locale says; here, and in every child. The console keeps its own encoding."""
    if not sys.flags.utf8_mode and sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        os.environ.setdefault("PYTHONIOENCODING", getattr(sys.stdout, "encoding", None) or "ascii")
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    os.environ["PYTHONUTF8"] = "1"


def _open_streams() -> None:
    """Each of the three is open, and what a console cannot show is written otherwise."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed (`>&-`): the next file that is opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error("osctl", _degraded)
    _quietly(sys.stdout)
    out, err = _stream("stdout", 1), _stream("stderr", 2)
    sys.stdout = Stdout(out.detach(), encoding=out.encoding, errors="osctl", line_buffering=out.line_buffering)
    sys.stderr = io.TextIOWrapper(err.detach(), encoding=err.encoding, errors="osctl", line_buffering=True)
    os.environ.pop("PYTHONIOENCODING", None)  # of this console; children write files


def _stream(name: str, number: int) -> io.TextIOWrapper:
    stream = getattr(sys, name)
    if isinstance(stream, io.TextIOWrapper):
        return stream
    return io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding="utf-8")


def _quietly(stream: Any) -> None:
    with contextlib.suppress(OSError, AttributeError, ValueError):
        stream.flush()


def _degraded(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


def _fault(error: OSError) -> Exception:
    if error.errno in (errno.EPIPE, errno.ECONNRESET):
        return ReaderLeft()
    return CannotPrint(f"stdout: {error.strerror}; the result could not be printed")


def _silence(number: int) -> None:
    """Send what is still buffered for a stream that takes nothing to /dev/null, so that it does not fail once more at the end."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
