"""An agent's sums beside its journal: whoever begins at them comes to what the pieces say."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from live_attempts import Attempts, stage_config

from orchestrator.accounting.history import History
from orchestrator.accounting.node_fold import TOTALS_EVERY
from orchestrator.ledger.store import Ledger


@pytest.mark.long
@pytest.mark.timeout(120)
def test_sums_of_a_real_agent_are_those_of_its_pieces(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    intent = attempts.intend("--step-ms", "15", config=stage_config(steps=300, every_steps=100), flush_s=0.02)
    attempts.live(intent)
    (totals,) = attempts.ledger.newest_totals("stage1", intent.inputs_digest, 1, 1)
    assert totals.seq % TOTALS_EVERY == TOTALS_EVERY - 1 and totals.pieces == totals.seq + 1 <= len(attempts.journal(intent))
    looks = [History(Ledger(attempts.store, "demo"), verify=verify) for verify in (False, True)]
    quick, whole = (look.attempts("stage1", intent.inputs_digest, time.time())[0] for look in looks)
    assert quick.time == whole.time and quick.recent == whole.recent and quick.step == 300
