"""What makes a finished preparation anew: whatever of the sources may have changed is in its mark."""

from __future__ import annotations

from pathlib import Path

from opensora.dataset.left_out import LeftOut
from opensora.dataset.prepare_config import PrepareConfig
from orchestrator.prepare.finished import mark
from orchestrator.prepare.run_directory import RunDirectory


def test_the_text_beside_a_single_file_counts_as_it_does_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"film a")
    config = PrepareConfig.model_validate({"name": "x", "sources": [{"path": str(tmp_path / "a.mp4")}]})

    def now() -> str:
        return mark(config, {}, RunDirectory(tmp_path / "run"), LeftOut())

    without = now()
    (tmp_path / "a.txt").write_text("a red ball")
    with_text = now()
    (tmp_path / "a.txt").write_text("a green ball")
    assert len({without, with_text, now()}) == 3
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").write_text("of another")
    assert now() == without
