"""Decode a video or picture file to the frames that a player would show.

Owns which of a file's streams is the film, and which frames are shown and when. `screen` turns a frame, stretches it and fits it to a size.
Refuses to know which files there are (`folder`) and which bucket a clip goes to (`buckets`).

- The stream: cover pictures, thumbnails and tiles of a larger picture are not films. If there are several films, the first one that is
  marked as default is used.
- Frames: those that an edit list leaves out are not shown. They are taken by counting (`interval`: 0, k, 2k …), or by time (`fps`: frame i
  is the one on the screen i/fps after the first, by the frames' own times, so that a varying rate does no harm).
- The screen: display matrices and EXIF orientations turn and mirror by quarter turns. Pixels of films that are not square are stretched;
  those of pictures are not, because a picture's pixel density is for printers. Of an interlaced frame one field is used.
- Colours: as tagged. Untagged video of more than 576 rows or 1,279 columns counts as BT.709, as in players. `colour` converts HDR and wide
  gamuts. Transparent pixels are laid on `BACKGROUND`.

Only the file itself is opened. Playlists and descriptions of streams (SDP, HLS, DASH, lists of ffconcat) would make FFmpeg open other files
or the network; they are refused before that, whatever their file name.

Any failure of one file is raised as `Unusable`, whatever a library raised. Two failures cannot be caught: a file may crash FFmpeg itself,
and the kernel may kill a process that takes too much memory. `MOST_PIXELS` is there to avoid the second.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from opensora.data.buckets import Size, too_short
from opensora.data.screen import MOST_PIXELS, Unusable, fitted, screen_of, too_large

SLACK = Fraction(1, 10)
"""Share of a frame's duration. A frame that begins this little after an instant counts as shown at that instant, because times in files are
rounded, and 29.97 frames a second is treated as 30."""
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that read alpha of these codecs; FFmpeg's own decoders of them do not."""


_NAMES_OTHERS = frozenset({
    "applehttp", "avisynth", "bluray", "concat", "dash", "hls", "imf", "lavfi", "libopenmpt", "rtp", "rtsp", "sap", "sdp", "tty",
    "vapoursynth", "vobsub", "webm_dash_manifest",
})  # fmt: skip
"""Formats of FFmpeg that open other files or the network, run scripts, or accept any text as a film."""
FORMATS = ",".join(sorted(name for name in av.formats_available if not _NAMES_OTHERS & set(name.split(","))))
"""Formats that FFmpeg may recognise in a file. It probes the content, whatever the file's name."""
_LISTS = ((b"ffconcat version", "concat"), (b"#EXTM3U", "hls"), (b"v=0", "sdp"), (b"<MPD", "dash"), (b"RTSPtext", "rtsp"))
"""First bytes of files that name other files, and their format."""


@dataclass
class Notes:
    """Facts about a clip, beside its pixels, that were found while it was decoded."""

    span: Fraction = Fraction(0)
    """Seconds from its first frame to its last."""
    interlaced: bool = False


def probe(file: Any, most: int, fps: Fraction | None = None) -> Size:
    """Frames, rows and columns of a video (an open binary file or a path), as on the screen. Its first frame is decoded. If its container
    does not count frames, they are decoded and counted, at most `most`.

    Args:
        fps: count the frames of a clip at this rate. None means count the file's own frames.

    Raises:
        Unusable: the file is not a video.
    """
    with _one_file() as seen, opened(file) as (container, stream):
        frames = _shown(container, stream, seen)
        first = next(frames, None)
        if first is None:
            raise Unusable("no frames")
        screen = screen_of(file, stream, first[1], is_picture=is_picture(container))
        counted = _counted(container, stream, fps)
        if counted is None:
            selected = _selected(itertools.chain([first], frames), stream, 1, fps)
            counted = max(1, sum(1 for _ in itertools.islice(selected, most)))
        return Size(counted, *screen.shown(first[1].height, first[1].width))


def decode_frames(file: Any, frames: int, interval: int) -> NDArray[np.uint8]:
    """Frames 0, interval, 2·interval … of a video (an open binary file or a path), uint8 (frames, H, W, 3).

    Raises:
        Unusable: the file is not a video, breaks off, or is too short.
    """
    return np.stack(list(decode(file, frames, interval)))


def decode(
    file: Any,
    frames: int,
    interval: int = 1,
    *,
    fps: Fraction | None = None,
    size: tuple[int, int] | None = None,
    notes: Notes | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """The frames of a clip one by one, uint8 (H, W, 3), since a long film at its own size may not fit in memory.

    Args:
        interval: take every `interval`-th frame, if `fps` is None.
        fps: take frames by time at this rate. None means frames are counted.
        size: rows and columns that each frame is fitted to. None means its own size on the screen.
        notes: facts that were found on the way are written here.

    Raises:
        Unusable: the file is not a video, breaks off, or is too short.
    """
    notes, kept, screen = notes or Notes(), 0, None
    before: tuple[Any, NDArray[np.uint8]] | None = None
    with _one_file() as seen, opened(file) as (container, stream):
        for at, frame in itertools.islice(_selected(_shown(container, stream, seen), stream, interval, fps), frames):
            screen = screen or screen_of(file, stream, frame, is_picture=is_picture(container))
            if before is None or before[0] is not frame:
                wanted = size or screen.shown(frame.height, frame.width)
                before = frame, fitted(frame, screen, *wanted)
            notes.span, notes.interlaced = at, notes.interlaced or frame.interlaced_frame
            yield before[1]
            kept += 1
        if kept < frames:
            raise Unusable(too_short(seen.frames if fps is None else kept, frames, interval, fps))


# --- Files and streams ------------------------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """How many frames of a file were decoded."""

    frames: int = 0


@contextmanager
def _one_file() -> Iterator[_Seen]:
    """Turn every failure into `Unusable` with the reason why this file gives no clip: libraries raise many kinds of errors."""
    seen = _Seen()
    try:
        yield seen
    except Unusable:
        raise
    except Exception as error:
        after = f" after {seen.frames} frames" if seen.frames else ""
        why = error.strerror if isinstance(error, av.FFmpegError) and error.strerror else f"{type(error).__name__}: {error}"
        raise Unusable(f"cannot be decoded{after}: {why}") from error


@contextmanager
def opened(file: Any) -> Iterator[tuple[Any, Any]]:
    """PyAV's container, and the stream that is the film.

    Raises:
        Unusable: the file is not a video, names other files, or has frames of more than `MOST_PIXELS`. FFmpeg's errors are raised as PyAV
            does.
    """
    if getattr(file, "size", None) == 0:  # PyAV would seek before its beginning, and raise an error that looks like one of disk or network
        raise Unusable("the file is empty")
    if isinstance(file, str | Path):
        with Path(file).open("rb") as binary, opened(binary) as found:
            yield found
        return
    _refuse_lists(file)
    # A title that is not in UTF-8 must not make a clip unusable: it is not read here.
    allowed = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    with av.open(file, metadata_errors="replace", container_options=allowed, io_open=_itself_alone(file)) as container:
        stream = _film(container.streams.video)
        if stream.height * stream.width > MOST_PIXELS:
            raise too_large(stream.height, stream.width)
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        yield container, stream


def _refuse_lists(file: Any) -> None:
    """Raise Unusable if a file names other files. FFmpeg itself refuses other kinds of such files (`FORMATS`), with a poorer message."""
    place = file.tell()
    begins = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(place)
    for mark, kind in _LISTS:
        if begins.startswith(mark) or (mark.startswith(b"<") and begins.startswith(b"<") and mark in begins):
            raise Unusable(f"a list of other files ({kind}), not a video. Give the video itself")


def _itself_alone(file: Any) -> Callable[[str, int, Any], Any]:
    """The function that PyAV calls when a format opens another file. Some formats of pictures open the same file again; any other file is
    refused."""

    def opened_besides(url: str, flags: int, options: Any) -> Any:
        if url != str(getattr(file, "name", "")):
            raise Unusable("names other files, and is not a video by itself. Give the video itself")
        place = file.tell()
        file.seek(0)
        content = io.BytesIO(file.read())  # PyAV closes it
        file.seek(place)
        return content

    return opened_besides


def _film(streams: Any) -> Any:
    """The stream that a player shows."""
    if not streams:
        raise Unusable("no video stream")
    flags = av.stream.Disposition
    stills = flags.attached_pic | flags.timed_thumbnails | flags.dependent
    films = [stream for stream in streams if not stream.disposition & stills]
    default = next((stream for stream in films if stream.disposition & flags.default), None)
    if default is None and any(stream.disposition & flags.dependent for stream in streams):  # the stream that is left is its thumbnail
        raise Unusable("a picture made of tiles (HEIF), which osctl does not read. Save it as JPEG")
    if not films:
        raise Unusable("no video stream, only a cover picture")
    return default or films[0]


# --- Frames and times -------------------------------------------------------------------------------------------------------------------


def _shown(container: Any, stream: Any, seen: _Seen) -> Iterator[tuple[Fraction, Any]]:
    """The frames that are shown, and when each begins, in seconds after the first one. The times are strictly increasing."""
    start = last = None
    period = period_of(stream)
    for frame in _decoded(container, stream):
        if is_left_out(container, stream, frame):
            continue
        base = frame.time_base or stream.time_base
        own = None if frame.pts is None or not base else frame.pts * Fraction(base)
        if start is None or last is None:
            start, last = own or Fraction(0), Fraction(0)
        else:
            last = own - start if own is not None and own - start > last else last + period
        seen.frames += 1
        yield last, frame
        if is_picture(container):  # a frame after it may be a map of depth or of light
            return


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    decoder = alpha_decoder(stream)
    if decoder is None:
        yield from container.decode(stream)
        return
    for packet in container.demux(stream):
        yield from decoder.decode(packet if packet.size else None)


def alpha_decoder(stream: Any) -> Any:
    """PyAV's codec context for a stream whose alpha FFmpeg's own decoder leaves out. None means the stream's own decoder is enough."""
    if stream.metadata.get("alpha_mode") != "1" or stream.codec_context.name not in _WITH_ALPHA:
        return None
    return av.CodecContext.create(_WITH_ALPHA[stream.codec_context.name], "r")


def is_left_out(container: Any, stream: Any, frame: Any) -> bool:
    """Whether a frame ends before the film begins. FFmpeg drops frames that an edit list leaves out, but not those at negative times."""
    if frame.pts is None or not _is_mov(container):
        return False
    return bool(frame.pts < 0 and frame.pts + (frame.duration or 0) <= 0)


def _is_mov(container: Any) -> bool:
    return "mov" in container.format.name.split(",")


def is_picture(container: Any) -> bool:
    return bool(container.format.name.endswith("_pipe"))


def period_of(stream: Any) -> Fraction:
    """Seconds that a frame is assumed to last if the file does not say when the next one begins."""
    rate = stream.guessed_rate or stream.average_rate
    return 1 / Fraction(rate) if rate else Fraction(1, 25)


def _selected(frames: Iterator[tuple[Fraction, Any]], stream: Any, interval: int, fps: Fraction | None) -> Iterator[tuple[Fraction, Any]]:
    """The frames that a clip takes, with their times, to the end of the file."""
    if fps is None:
        yield from itertools.islice(frames, 0, None, interval)
        return
    period = period_of(stream)
    rounded = min(Fraction(stream.time_base or 0), period / 4)
    slack = max(SLACK * min(1 / fps, period), rounded)
    count, shown, began, gap = 0, None, Fraction(0), period
    for at, frame in frames:
        while shown is not None and count / fps + slack < at:
            yield count / fps, shown
            count += 1
        gap, began, shown = (at - began) or gap, at, frame
    if shown is None:
        return
    lasts = shown.duration * Fraction(shown.time_base) if shown.duration and shown.time_base else gap
    while count / fps < began + lasts:
        yield count / fps, shown
        count += 1


def _counted(container: Any, stream: Any, fps: Fraction | None) -> int | None:
    """Number of frames that clips can be made of, as the container says, without decoding. None means it does not say."""
    frames = stream.frames
    if frames <= 0:
        return None
    if not _is_mov(container):
        return frames if fps is None else _instants(frames * period_of(stream), fps)
    # There is one entry for each frame, in the order of decoding. Those that an edit list leaves out are marked.
    entries = [(entry.timestamp, entry.is_discard) for entry in stream.index_entries]
    shown = sum(not left_out for _, left_out in entries)
    if fps is None or not shown:
        return shown or None
    lasts = [after - before for (before, _), (after, _) in itertools.pairwise(entries)]
    lasts.append(lasts[-1] if lasts else period_of(stream) / stream.time_base)
    return _instants(sum(time for time, (_, left_out) in zip(lasts, entries, strict=True) if not left_out) * stream.time_base, fps)


def _instants(lasts: Fraction, fps: Fraction) -> int:
    """How many of the instants 0, 1/fps, 2/fps … are before the end."""
    return max(1, -int(-lasts * fps // 1))
