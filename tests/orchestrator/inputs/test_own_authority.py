"""Clips in a bucket whose server has a certificate authority of its own are read with what reaches the store, here and by a trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensora.config import FolderSource
from orchestrator import modules
from orchestrator.errors import Unreachable
from orchestrator.inputs.data_files import DataFiles
from orchestrator.stores.s3 import S3Store

CHILD = "import fsspec, sys; files, path = fsspec.core.url_to_fs(sys.argv[1]); print(files.cat_file(path).decode())"
"""Reads as a trainer does: what it needs to know stands in its environment."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    options = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", "req", *options, *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


@pytest.mark.s3
def test_readers_of_clips_trust_whom_the_store_trusts(
    start_s3: Callable[..., Any], authority: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = authority
    server = start_s3(cert=cert, key=key)
    env = {**server.env, "OSCTL_S3_CA": str(cert), "OSCTL_S3_PATH_STYLE": "1"}
    S3Store(server.url("clips"), env=env).create("captions.csv", b"path,text\na.mp4,a film\n")
    for name, value in (server.env | {"AWS_MAX_ATTEMPTS": "1"}).items():  # by itself botocore asks a stranger for 20 s
        monkeypatch.setenv(name, value)
    source = FolderSource(kind="folder", path=server.url("clips"))
    assert [row.text for row in DataFiles(tmp_path / "home", env).captioned(source).rows] == ["a film"]
    with pytest.raises(Unreachable):
        DataFiles(tmp_path / "home", server.env).captioned(FolderSource(kind="folder", path=server.url("clips/other")))
    variables = modules.reading_clips({**os.environ, **env})
    command = [sys.executable, "-c", CHILD, f"{server.url('clips')}/captions.csv"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert "a film" in done.stdout, done.stderr[-500:]
    unknown = {name: value for name, value in variables.items() if name != "AWS_CA_BUNDLE"}
    assert subprocess.run(command, env=unknown, capture_output=True, text=True, check=False).returncode != 0


def test_how_buckets_are_addressed_reaches_fsspec_unless_a_person_says_otherwise() -> None:
    assert '"addressing_style": "path"' in modules.reading_clips({"OSCTL_S3_PATH_STYLE": "1"})["FSSPEC_S3"]
    assert '"addressing_style": "virtual"' in modules.reading_clips({"OSCTL_S3_PATH_STYLE": "0"})["FSSPEC_S3"]
    assert modules.reading_clips({"OSCTL_S3_PATH_STYLE": "0", "FSSPEC_S3": "{}"})["FSSPEC_S3"] == "{}"
    assert "FSSPEC_S3" not in modules.reading_clips({}) and "AWS_CA_BUNDLE" not in modules.reading_clips({})
