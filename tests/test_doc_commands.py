"""Every block of commands in README and docs is run by a test, or says why not."""

from __future__ import annotations

import pytest
from doc_commands import REPOSITORY, blocks, pages

TOLD = [page for page in pages() if not page.startswith(("CHANGELOG.md", "docs/log.md", "docs/adr/"))]


@pytest.mark.parametrize("page", TOLD)
def test_a_block_of_commands_names_who_runs_it_or_why_nobody_does(page: str) -> None:
    for block in blocks(page):
        assert block.commands, f"{page}:{block.line} is a block of commands without one: a line begins with `$ `"
        assert block.run_by or block.reason, f"{page}:{block.line}: say who runs it (<!-- run: FILE -->), or why nobody does"
        if block.run_by:
            runner = REPOSITORY / block.run_by
            assert runner.is_file(), f"{page}:{block.line} is run by {block.run_by}, which is not there"
            assert runner.name == "run" or page.rpartition("/")[2] in runner.read_text(), f"{block.run_by} does not read {page}"


def test_pages_with_commands_are_found() -> None:
    assert {"README.md", "docs/cluster.md", "docs/own-clips.md"} <= {page for page in TOLD for _ in blocks(page)}
