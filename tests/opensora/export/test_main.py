"""The command `python -m opensora.export`."""

from __future__ import annotations

from pathlib import Path

import pytest

from opensora.export.__main__ import main


def test_the_command_says_what_it_wrote_on_stderr_and_where_on_stdout(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(video), str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out'}\n" and "transformer: 54 tensors (ema)" in said.err
    assert main([str(video), str(tmp_path / "out")]) == 2
    (video / "ema.safetensors").unlink()
    assert main([str(video), str(tmp_path / "other")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
