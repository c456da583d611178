"""What is fetched is whole and is one state of its file, whatever a server does; what cannot be had leaves with a reason."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opensora.dataset.prepare_config import Download
from opensora.dataset.rows import Fetched, Quarantine, Source
from opensora.errors import DiskFull
from opensora.prepare.addresses import member_address, without_credentials
from opensora.prepare.download import fetch, file_name
from opensora.prepare.parts import Again, Kept, State

FILM = bytes(range(256)) * 4096  # 1 MiB
SETTINGS = Download(robots=False, timeout_s=5)


class Host:
    """A loopback server whose faults are written down: one function an answer, the last one for all that follow."""

    def __init__(self) -> None:
        self.answers: list[Callable[[Any, Host], None]] = [whole()]
        self.asked: list[dict[str, str]] = []
        self.robots: tuple[int, bytes] | None = None
        self.url = ""
        self.under_way = self.most = 0
        self.lock = threading.Lock()


def send(to: Any, status: int, body: bytes, *, declared: int | None = None, **headers: str) -> None:
    to.send_response(status)
    for name, value in headers.items():
        to.send_header(name.replace("_", "-"), value)
    to.send_header("Content-Length", str(len(body) if declared is None else declared))
    to.end_headers()
    to.wfile.write(body)
    if declared is not None and declared > len(body):
        to.wfile.flush()
        to.connection.shutdown(socket.SHUT_RDWR)


def whole(content: bytes = FILM, etag: str = '"1"', **headers: str) -> Callable[[Any, Host], None]:
    """As a server that knows ranges."""

    def answer(to: Any, host: Host) -> None:
        told = {"ETag": etag} | headers if etag else headers
        asked = to.headers.get("Range")
        if asked and to.headers.get("If-Range") == etag:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            if start >= len(content):
                send(to, 416, b"", Content_Range=f"bytes */{len(content)}")
            else:
                send(to, 206, content[start:], Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}", **told)
        else:
            send(to, 200, content, **told)

    return answer


def cut(after: int, content: bytes = FILM, etag: str = '"1"', **headers: str) -> Callable[[Any, Host], None]:
    """Ends early, though more was promised."""

    def answer(to: Any, host: Host) -> None:
        asked = to.headers.get("Range")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked and etag and to.headers.get("If-Range") == etag else 0
        told = {"ETag": etag} | headers if etag else headers
        if start:
            told |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        send(to, 206 if start else 200, content[start : start + after], declared=len(content) - start, **told)

    return answer


def says(status: int, **headers: str) -> Callable[[Any, Host], None]:
    return lambda to, host: send(to, status, b"no", **headers)


@contextmanager
def hosting() -> Iterator[Host]:
    host = Host()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/robots.txt":
                status, text = host.robots or (404, b"")
                send(self, status, text)
                return
            with host.lock:
                host.asked.append({"path": self.path, **dict(self.headers.items())})
                answer = host.answers.pop(0) if len(host.answers) > 1 else host.answers[0]
                host.under_way += 1
                host.most = max(host.most, host.under_way)
            try:
                answer(self, host)
            except OSError:
                pass  # the client left
            finally:
                with host.lock:
                    host.under_way -= 1

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    host.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield host
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.fixture
def host() -> Iterator[Host]:
    with hosting() as one:
        yield one


class Pauses:
    """Sleeps that are written down and not slept."""

    def __init__(self) -> None:
        self.pieces: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.pieces.append(seconds)
        time.sleep(0.001)

    @property
    def seconds(self) -> float:
        return sum(self.pieces)


def got(uri: str, folder: Path, settings: Download = SETTINGS, *, pauses: Callable[[float], None] | None = None, **options: Any) -> Fetched:
    return fetch(Source(uri, "film"), folder, settings, halt=options.pop("halt", lambda: False), sleep=pauses or Pauses(), **options)


def leaves(uri: str, folder: Path, settings: Download = SETTINGS, **options: Any) -> Quarantine:
    with pytest.raises(Quarantine) as caught:
        got(uri, folder, settings, **options)
    return caught.value


def content(found: Fetched) -> bytes:
    data = Path(found.path).read_bytes()
    assert (found.sha256, found.size) == (hashlib.sha256(data).hexdigest(), len(data))
    return data


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


# Faults


def test_a_file_comes_whole_under_digits_of_its_address_and_is_not_asked_for_twice(host: Host, tmp_path: Path) -> None:
    uri = f"{host.url}/x/..%2f..%2fetc/a%20b.MP4?size=1"
    found = got(uri, tmp_path)
    assert content(found) == FILM and Path(found.path) == tmp_path / file_name(uri) and found.path.endswith(".mp4")
    assert got(uri, tmp_path) == found and len(host.asked) == 1
    assert left_over(tmp_path) == [file_name(uri)]


def test_what_may_pass_is_tried_again_with_growing_pauses(host: Host, tmp_path: Path) -> None:
    host.answers = [says(503), says(500), says(408), whole()]
    pauses = Pauses()
    assert content(got(f"{host.url}/a.mp4", tmp_path, pauses=pauses)) == FILM
    assert len(host.asked) == 4 and 0.5 * (1 + 2 + 4) <= pauses.seconds <= 1.5 * (1 + 2 + 4)


def test_a_host_is_given_the_time_that_it_asks_for_unless_that_is_too_long(host: Host, tmp_path: Path) -> None:
    host.answers = [says(429, Retry_After="37"), whole()]
    pauses = Pauses()
    got(f"{host.url}/a.mp4", tmp_path, pauses=pauses)
    assert pauses.seconds == 37
    host.answers = [says(503, Retry_After="86400")]
    gone = leaves(f"{host.url}/b.mp4", tmp_path)
    assert (gone.reason, len(host.asked)) == ("host asks to wait", 3) and "86,400 s" in gone.detail


@pytest.mark.parametrize(
    ("answer", "reason", "asked"),
    [
        (says(404), "no such file", 1),
        (says(410), "no such file", 1),
        (says(403), "host refuses", 1),
        (says(401), "host wants a login", 1),
        (says(400), "HTTP 400", 1),
        (says(503), "host answers 5xx", 3),
        (cut(10), "cut off", 3),
        (whole(b"<html>", Content_Type="text/html; charset=utf-8"), "page instead of a file", 1),
        (whole(b"x", Content_Encoding="gzip"), "host compresses it", 1),
        (says(302, Location="file:///etc/passwd"), "redirect that is not followed", 1),
        (says(302, Location="ftp://127.0.0.1/a"), "redirect that is not followed", 1),
        (says(302, Location="http://user:secretword@127.0.0.1/a"), "redirect that is not followed", 1),
        (says(302, Location="/again.mp4"), "too many redirects", 10),
    ],
    ids=lambda value: "",
)
def test_what_cannot_be_had_leaves_with_its_reason(host: Host, tmp_path: Path, answer: Any, reason: str, asked: int) -> None:
    host.answers = [answer]
    gone = leaves(f"{host.url}/a.mp4", tmp_path, Download(robots=False, tries=3, timeout_s=5))
    assert (gone.reason, len(host.asked)) == (reason, asked)
    assert "secretword" not in f"{gone}" and not (tmp_path / file_name(f"{host.url}/a.mp4")).exists()


def test_a_file_that_is_cut_off_goes_on_where_it_was(host: Host, tmp_path: Path) -> None:
    host.answers = [cut(300_000), cut(400_000), whole()]
    assert content(got(f"{host.url}/a.mp4", tmp_path)) == FILM
    starts = [int(one.get("Range", "bytes=0-")[6:-1]) for one in host.asked]
    assert starts == sorted(starts) and 0 < starts[1] <= 300_000 and starts[1] < starts[2] <= 700_000
    assert all(one.get("If-Range") == '"1"' for one in host.asked[1:])


def test_another_run_goes_on_too(host: Host, tmp_path: Path) -> None:
    host.answers = [cut(500_000)]
    leaves(f"{host.url}/a.mp4", tmp_path, Download(robots=False, tries=1))
    host.answers = [whole()]
    assert content(got(f"{host.url}/a.mp4", tmp_path)) == FILM
    assert int(host.asked[-1]["Range"][6:-1]) > 0


OTHER = FILM[::-1]


def wrong_rest(etag: str) -> Callable[[Any, Host], None]:
    """The rest of another file, from its byte 9 on, whatever was asked for."""
    return lambda to, host: send(to, 206, OTHER[9:], ETag=etag, Content_Range=f"bytes 9-{len(OTHER) - 1}/{len(OTHER)}")


@pytest.mark.parametrize(
    "then",
    [
        pytest.param([whole(OTHER, '"2"')], id="changed, and the server says so"),
        pytest.param([wrong_rest('"2"'), whole(OTHER, '"2"')], id="changed, and the server ignores If-Range"),
        pytest.param([wrong_rest('"1"'), whole(OTHER, '"2"')], id="another range than asked for"),
        pytest.param([lambda to, host: send(to, 200, OTHER)], id="a server without ranges"),
        pytest.param([says(416), whole(OTHER, '"2"')], id="shorter than before"),
    ],
)  # fmt: skip
def test_a_file_that_may_be_another_one_begins_anew(host: Host, tmp_path: Path, then: Any) -> None:
    host.answers = [cut(500_000), *then]
    assert content(got(f"{host.url}/a.mp4", tmp_path)) == OTHER


def test_a_server_that_names_no_state_is_never_asked_for_a_rest(host: Host, tmp_path: Path) -> None:
    host.answers = [cut(500_000, etag=""), cut(1000, etag="", ETag='W/"1"'), whole(etag="")]
    assert content(got(f"{host.url}/a.mp4", tmp_path)) == FILM
    assert not any("Range" in one for one in host.asked)
    host.answers = [cut(500_000, etag="", Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT"), whole()]
    got(f"{host.url}/b.mp4", tmp_path)
    assert host.asked[-1]["If-Range"] == "Mon, 01 Jan 2024 00:00:00 GMT"


def test_a_file_that_is_too_large_is_refused_before_it_is_sent_or_as_soon_as_it_is_known(host: Host, tmp_path: Path) -> None:
    host.answers = [lambda to, _: send(to, 200, b"", declared=10 << 40)]
    gone = leaves(f"{host.url}/a.mp4", tmp_path, max_bytes=1000)
    assert (gone.reason, len(host.asked)) == (
        "larger than limits.max_bytes",
        1,
    ) and "10,995,116,277,760 bytes, 1,000 are allowed" in gone.detail

    def endless(to: Any, _: Host) -> None:
        to.send_response(200)
        to.end_headers()
        while True:
            to.wfile.write(bytes(1 << 16))

    host.answers = [endless]
    assert leaves(f"{host.url}/b.mp4", tmp_path, max_bytes=1 << 20).reason == "larger than limits.max_bytes"
    assert left_over(tmp_path) == []


def test_a_silent_host_is_given_up_and_a_run_that_is_to_stop_does_not_wait_for_one(host: Host, tmp_path: Path) -> None:
    done = threading.Event()
    host.answers = [lambda to, _: done.wait(20)]
    assert leaves(f"{host.url}/a.mp4", tmp_path, Download(robots=False, tries=2, timeout_s=0.2)).reason == "host does not answer"
    asked: list[bool] = []
    stops = leaves(f"{host.url}/b.mp4", tmp_path, Download(robots=False, timeout_s=3600), halt=lambda: asked.append(True) or len(asked) > 3)
    assert stops.reason == "stopped"
    done.set()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}/a.mp4"
        assert leaves(nobody, tmp_path, Download(robots=False, tries=2)).reason == "host cannot be reached"


def test_a_stopped_fetch_keeps_what_it_has(host: Host, tmp_path: Path) -> None:
    asked: list[bool] = []
    host.answers = [whole(FILM * 8)]
    assert leaves(f"{host.url}/a.mp4", tmp_path, halt=lambda: asked.append(True) or len(asked) > 4).reason == "stopped"
    assert content(got(f"{host.url}/a.mp4", tmp_path)) == FILM * 8
    assert int(host.asked[-1]["Range"][6:-1]) > 0


def test_redirects_within_http_are_followed(host: Host, tmp_path: Path) -> None:
    host.answers = [says(302, Location="/there.mp4"), says(307, Location=f"{host.url}/here.mp4"), whole()]
    assert content(got(f"{host.url}/a.mp4", tmp_path)) == FILM
    assert [one["path"] for one in host.asked] == ["/a.mp4", "/there.mp4", "/here.mp4"]


def test_credentials_in_an_address_are_never_used_or_shown(host: Host, tmp_path: Path) -> None:
    for secret in (
        "http://me:verysecret@127.0.0.1/a.mp4",
        "https://h/a.mp4?X-Amz-Signature=verysecret&x=1",
        "https://h/a?x=1&token=verysecret",
    ):
        shown = without_credentials(secret)
        gone = leaves(shown, tmp_path)
        assert gone.reason == "address holds credentials" and "verysecret" not in shown + str(gone)
    assert without_credentials("https://h/a@b.mp4?size=1#x") == "https://h/a@b.mp4?size=1#x" and host.asked == []


# Manners


def test_no_more_connections_to_a_host_than_allowed_over_all_who_fetch(host: Host, tmp_path: Path) -> None:
    gate = threading.Barrier(3, timeout=20)

    def slow(to: Any, _: Host) -> None:
        gate.wait()  # three are here at once, or nobody goes on
        time.sleep(0.2)  # a fourth one would come meanwhile
        send(to, 200, b"film")

    host.answers = [slow]
    settings = Download(robots=False, per_host=3)
    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda number: got(f"{host.url}/{number}.mp4", tmp_path, settings, pauses=time.sleep), range(9)))
    assert host.most == 3 and all(content(one) == b"film" for one in found)


def test_a_part_that_is_shorter_or_longer_than_its_file_never_gets_its_name(tmp_path: Path) -> None:
    for bytes_, reason in ((b"12345", "cut off"), (b"12345678901", "longer than its server says")):
        with Kept(tmp_path / "a.mp4", "s3://b/a.mp4", 100, lambda: False) as part:
            part.begin(State(etag='"1"', size=10))
            part.add(bytes_)
            with pytest.raises(Again) as failed:
                part.finish()
        assert failed.value.reason == reason and not (tmp_path / "a.mp4").exists()


def test_two_that_want_one_file_fetch_it_once(host: Host, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: got(f"{host.url}/a.mp4", tmp_path, pauses=time.sleep), range(4)))
    assert len(host.asked) == 1 and len({one.path for one in found}) == 1 and left_over(tmp_path) == [file_name(f"{host.url}/a.mp4")]


def test_robots_are_obeyed_asked_for_once_and_can_be_turned_off(host: Host, tmp_path: Path) -> None:
    asks = Download(timeout_s=5)
    host.robots = (200, b"User-agent: *\nDisallow: /private/\n")
    gone = leaves(f"{host.url}/private/a.mp4", tmp_path, asks)
    assert gone.reason == "robots.txt does not allow it" and host.asked == []
    assert content(got(f"{host.url}/public/a.mp4", tmp_path, asks)) == FILM
    host.robots = (500, b"")  # kept of before
    assert content(got(f"{host.url}/public/b.mp4", tmp_path, asks)) == FILM
    assert content(got(f"{host.url}/private/a.mp4", tmp_path)) == FILM
    assert leaves(f"{host.url}/c.mp4", tmp_path / "other", Download(tries=2)).reason == "robots.txt cannot be read"


# Other places


def test_local_files_are_hashed_where_they_lie(tmp_path: Path) -> None:
    film = tmp_path / "ein Fílm 映画.mp4"
    film.write_bytes(FILM)
    for uri in (str(film), film.as_uri()):
        found = got(uri, tmp_path / "fetched")
        assert found.path == str(film) and content(found) == FILM
    assert not (tmp_path / "fetched").exists()


def test_what_is_no_local_file_says_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "round.mp4").symlink_to("round.mp4")
    (tmp_path / "nowhere.mp4").symlink_to("none")
    (tmp_path / "large.mp4").write_bytes(bytes(11))
    (tmp_path / "folder.mp4").mkdir()
    found = {
        name: leaves(str(tmp_path / name), tmp_path, max_bytes=10)
        for name in ("pipe.mp4", "round.mp4", "nowhere.mp4", "none.mp4", "large.mp4", "folder.mp4")
    }
    assert {name: one.reason for name, one in found.items()} == {
        "pipe.mp4": "no regular file", "round.mp4": "a link into itself", "nowhere.mp4": "no such file", "none.mp4": "no such file",
        "large.mp4": "larger than limits.max_bytes", "folder.mp4": "no regular file",
    }  # fmt: skip
    assert "a pipe" in found["pipe.mp4"].detail
    assert leaves(f"/{'x' * 300}", tmp_path).reason == "cannot be read" and leaves("/x\0y", tmp_path).reason == "cannot be read"


def test_a_member_of_a_tar_is_fetched_by_itself(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        for name, data in (("x/a.mp4", FILM), ("b::c%.mp4", b"film b")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    assert content(got(f"tar://x/a.mp4::file://{tmp_path}/s.tar", tmp_path / "to")) == FILM
    assert content(got(member_address("b::c%.mp4", f"file://{tmp_path}/s.tar"), tmp_path / "to")) == b"film b"
    assert leaves(f"tar://none.mp4::file://{tmp_path}/s.tar", tmp_path / "to").reason == "no such file"
    (tmp_path / "t.tar").write_bytes(b"no tar" * 200)
    assert leaves(f"tar://a.mp4::file://{tmp_path}/t.tar", tmp_path / "to").reason == "cannot be read"
    assert leaves(f"tar://a.mp4::file://{tmp_path}/none.tar", tmp_path / "to").reason == "no such file"


def test_a_full_disk_is_said_and_ends_no_other_way(host: Host, tmp_path: Path) -> None:
    folder = Path("/dev/full")
    if not folder.exists():
        pytest.skip("no /dev/full here")
    (tmp_path / f"{file_name(host.url + '/a.mp4')}.part").symlink_to(folder)
    with pytest.raises(DiskFull, match=r"No space left on device, .* bytes are free\. Make room, and run again"):
        got(f"{host.url}/a.mp4", tmp_path)


@pytest.mark.s3
def test_objects_are_fetched_go_on_and_begin_anew_when_they_changed(tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    place = s3.root / s3.bucket / "download/ä b.mp4"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(FILM * 4)
    uri = s3.url("download/ä b.mp4")
    asked: list[bool] = []
    assert leaves(uri, tmp_path, halt=lambda: asked.append(True) or len(asked) > 3).reason == "stopped"
    part = tmp_path / f"{file_name(uri)}.part"
    assert 0 < part.stat().st_size < 4 * len(FILM)
    assert content(got(uri, tmp_path)) == FILM * 4
    (tmp_path / file_name(uri)).unlink()
    asked.clear()
    leaves(uri, tmp_path, halt=lambda: asked.append(True) or len(asked) > 3)
    assert part.stat().st_size > 0 and part.with_suffix(".json").exists()
    place.write_bytes(OTHER * 3)
    assert content(got(uri, tmp_path)) == OTHER * 3
    assert leaves(s3.url("download/none.mp4"), tmp_path).reason == "no such file"
