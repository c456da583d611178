"""Laws of an attempt's life, on the real agent process with a stand-in trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from live_attempts import Attempts, Watcher, assert_books_balance, stage_config, until

from opensora.dataset.usage import Usage, grouped
from opensora.training.run_directory import RunDirectory as TrainerRunDirectory
from orchestrator.agent import guard
from orchestrator.agent.attempt import Attempt, Patience
from orchestrator.agent.ending import Ending
from orchestrator.agent.events import TOGETHER_S, Events
from orchestrator.agent.ranks_watch import who_stands
from orchestrator.agent.run_directory import Heartbeat, RunDirectory
from orchestrator.agent.trainer_process import TrainerProcess, command, environment
from orchestrator.errors import Refused, Unreachable
from orchestrator.ledger.records import ExitClass, Intent, Outcome, ResumeRef
from orchestrator.ledger.store import Ledger
from orchestrator.local.attempt_lock import AgentRecord, read_trouble, take_lock
from orchestrator.local.clock import AttemptClock
from orchestrator.stores.folder import FolderStore


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path)


def agent_argv(attempts: Attempts, intent: Intent, *more: str) -> list[str]:
    run_dir = str(attempts.run_dir(intent))
    return [
        sys.executable,
        "-m",
        "orchestrator.agent",
        "--store",
        attempts.store.url,
        "--intent",
        attempts.key(intent),
        "--run-dir",
        run_dir,
        *more,
    ]


# --- Ends ----------------------------------------------------------------------------------------------------------------


def test_a_completed_attempt_is_published_reported_and_accounted_for(attempts: Attempts) -> None:
    intent = attempts.intend("--step-ms", "10", "--init-ms", "300", "--evaluate-ms", "300", config=stage_config(evaluate=True), devices=2)
    attempts.submit(intent)
    watcher = Watcher(attempts.agent(intent))
    life, report = attempts.end(intent), attempts.report(intent)
    assert report is not None
    assert (life.exit_code, report.class_, report.step) == (0, "completed", 20)
    assert set(report.evaluation) == {"digit_accuracy", "direction_accuracy"}
    assert attempts.published(intent)[-1] == 20
    assert attempts.ledger.checkpoints("stage1", intent.inputs_digest)[-1][1].complete
    assert [key.rpartition("/")[2] for key in attempts.ledger.samples("stage1", intent.inputs_digest, 1)] == ["samples.json"]

    pieces = attempts.journal(intent)
    assert_books_balance(pieces, life, watcher, devices=2)
    assert [line["step"] for piece in pieces for line in piece.metrics] == list(range(1, 21))
    assert {5, 10, 15, 20} <= {piece.last_step for piece in pieces}
    spent = {category: sum(piece.spent.get(category, 0) for piece in pieces) for category in ("init", "step", "evaluate")}
    assert spent["init"] > 0.3 and spent["step"] > 0.2 and spent["evaluate"] > 0.3
    assert not attempts.left_behind(intent)


@pytest.mark.long
def test_what_a_trainer_says_of_its_data_is_in_the_ledger_while_it_trains(attempts: Attempts, tmp_path: Path) -> None:
    says = tmp_path / "says"
    says.mkdir()
    left_out = {f"gone{number}\x1b[31m\udcff.mp4": "No such file" for number in range(18)}
    usage = Usage(20, 2, grouped(left_out, 18), cut=1, tokens=6, remarks=("rates differ",))
    TrainerRunDirectory(says, rank=0).tell_usage(usage, left_out)
    intent = attempts.intend("--step-ms", "100", "--says", str(says))
    attempts.submit(intent)
    said = until(lambda: attempts.ledger.clips("stage1", intent.inputs_digest, 1), "word of the data")
    assert attempts.report(intent) is None
    assert list(said.sentences()) == usage.sentences()
    assert said.listing is not None and len(attempts.store.read(said.listing).data.splitlines()) == 19
    attempts.end(intent)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"clips": "many"}', '{"clips": -1, "used": 2, "reasons": []}', '"\\ud800"'])
def test_a_trainer_that_says_something_else_of_its_data_is_none_that_says_nothing(attempts: Attempts, tmp_path: Path, content: str) -> None:
    (tmp_path / "says").mkdir()
    (tmp_path / "says" / "clips.json").write_text(content)
    intent = attempts.intend("--says", str(tmp_path / "says"))
    _, report = attempts.live(intent)
    assert report.class_ == "completed" and attempts.ledger.clips("stage1", intent.inputs_digest, 1) is None


def test_a_sample_that_the_store_will_not_take_is_a_warning_of_the_report(attempts: Attempts, tmp_path: Path) -> None:
    (tmp_path / "says" / "samples").mkdir(parents=True)
    for name in ("good.png", "a\x07bell.mp4", *(f"{'x' * 210}{number}.mp4" for number in range(5))):
        (tmp_path / "says" / "samples" / name).write_bytes(b"a picture")
    intent = attempts.intend("--says", str(tmp_path / "says"))
    _, report = attempts.live(intent)
    assert report.class_ == "completed"
    assert [key.rpartition("/")[2] for key in attempts.ledger.samples("stage1", intent.inputs_digest, 1)] == ["good.png"]
    assert len(report.warnings) == 4 and "a\\x07bell.mp4 is not in the store" in report.warnings[0]
    assert report.warnings[-1].startswith("3 more samples are not in the store")


@pytest.mark.long
def test_a_drained_attempt_leaves_with_143_and_its_successor_ends_with_the_same_weights(attempts: Attempts) -> None:
    unbroken = attempts.intend(stage="unbroken")
    attempts.live(unbroken)

    first = attempts.intend("--step-ms", "100")
    attempts.submit(first)
    attempts.reaches(first, 5)
    attempts.backend.drain(first.run_key)
    life, report = attempts.end(first), attempts.report(first)
    assert report is not None
    assert (life.exit_code, report.class_) == (143, "drained")
    assert report.step is not None and 5 < report.step < 20
    assert attempts.published(first)[-1] == report.step

    second = attempts.intend(attempt=2, resume=attempts.newest(first))
    _, report = attempts.live(second)
    assert report.class_ == "completed"
    steps = [line["step"] for piece in attempts.journal(second) for line in piece.metrics]
    assert steps == list(range(attempts.published(first)[-1] + 1, 21))
    assert attempts.published(second)[-1] == 20
    assert attempts.weights(second) == attempts.weights(unbroken)


@pytest.mark.long
@pytest.mark.parametrize(
    ("failure", "class_", "code", "reason"),
    [
        ("data@7", "data", 72, "data as asked, before step 7"),
        ("nan@7", "nan", 66, "nan as asked, before step 7"),
        ("spike@7", "spike", 73, "spike as asked, before step 7"),
        ("oom@7", "oom", 67, "oom as asked, before step 7"),
        ("disk@7", "disk", 70, "disk as asked, before step 7"),
        ("config@1", "config", 64, "config as asked, before step 1"),
        ("exit@7", "code", 1, "rank 1 ended with exit code 3 after step"),
        ("segv@7", "signal", 139, "rank 1 was ended by SIGSEGV after step"),
        ("kill@7", "signal", 137, "rank 1 was ended by SIGKILL after step"),
        ("hang@7", "hang", 68, "ranks 0, 1 stand at step 6 in phase train"),
    ],
)
def test_each_failure_has_its_class_its_code_and_a_reason(
    attempts: Attempts, failure: str, class_: ExitClass, code: int, reason: str
) -> None:
    intent = attempts.intend(
        "--fail", failure, "--fail-rank", "1", config=stage_config(steps=8), devices=2, hang_timeout_s=3.0 if class_ == "hang" else 30.0
    )
    life, report = attempts.live(intent)
    assert (report.class_, life.exit_code, report.rank) == (class_, code, None if class_ == "hang" else 1)
    assert reason in report.reason
    assert not attempts.left_behind(intent)
    if class_ == "hang":
        assert sum(piece.spent.get("hang", 0) for piece in attempts.journal(intent)) >= 3.0
    result = RunDirectory(attempts.run_dir(intent)).result()
    assert result is not None and result["class"] == class_


def test_a_trainer_that_cannot_be_started_is_named(attempts: Attempts) -> None:
    life, report = attempts.live(attempts.intend(trainer=("/no/such/trainer",)))
    assert (life.exit_code, report.class_) == (1, "code")
    assert "/no/such/trainer: No such file or directory" in report.reason


def test_a_rank_killed_while_it_saves_leaves_the_last_whole_checkpoint(attempts: Attempts) -> None:
    intent = attempts.intend("--fail", "half@10")
    _, report = attempts.live(intent)
    assert report.class_ == "signal"
    assert attempts.published(intent) == [5]


@pytest.mark.long
def test_a_trainer_that_stays_after_its_last_word_is_ended_and_its_word_counts(attempts: Attempts) -> None:
    intent = attempts.intend("--fail", "linger@99")
    life, report = attempts.live(intent)
    assert (life.exit_code, report.class_, report.step) == (0, "completed", 20)
    assert not attempts.left_behind(intent)


@pytest.mark.long
def test_a_second_request_to_leave_ends_a_trainer_that_does_not_drain(attempts: Attempts) -> None:
    intent = attempts.intend("--step-ms", "100", "--fail", "drainless@99")
    attempts.submit(intent)
    attempts.reaches(intent, 5)
    agent = attempts.agent(intent).pid
    os.kill(agent, signal.SIGTERM)
    until((attempts.run_dir(intent) / "drain").exists, "a drain flag")
    time.sleep(TOGETHER_S)
    os.kill(agent, signal.SIGTERM)
    life, report = attempts.end(intent), attempts.report(intent)
    assert report is not None
    assert (life.exit_code, report.class_) == (137, "signal")
    assert not attempts.left_behind(intent)


@pytest.mark.long
def test_requests_of_one_moment_are_one_and_so_is_the_launchers_however_late(attempts: Attempts) -> None:
    """A node that shuts down asks launcher and agent at once, and the launcher asks the agent."""
    intent = attempts.intend("--step-ms", "100")
    attempts.submit(intent)
    attempts.reaches(intent, 5)
    agent, trainer = attempts.agent(intent).pid, attempts.trainers(intent)[0]
    os.kill(trainer, signal.SIGSTOP)  # its ranks go on; that it saves late gives the late request its time
    for rank in attempts.trainers(intent)[1:]:
        os.kill(rank, signal.SIGSTOP)
    for _ in range(3):
        os.kill(agent, signal.SIGTERM)
        time.sleep(0.05)
    time.sleep(TOGETHER_S)
    attempts.backend.drain(intent.run_key)
    time.sleep(0.2)
    for pid in attempts.trainers(intent):
        os.kill(pid, signal.SIGCONT)
    life, report = attempts.end(intent), attempts.report(intent)
    assert report is not None and (life.exit_code, report.class_) == (143, "drained"), report
    assert attempts.published(intent)[-1] == report.step


# --- What an attempt starts from -----------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_stage_starts_from_its_parents_weights(attempts: Attempts) -> None:
    parents = [attempts.intend(stage=f"parent{seed}", config=stage_config(steps=5, seed=seed)) for seed in (1, 2)]
    ends = set()
    for number, parent in enumerate(parents):
        attempts.live(parent)
        child = attempts.intend(stage=f"child{number}", parent=attempts.commit(parent))
        _, report = attempts.live(child)
        assert report.class_ == "completed"
        assert attempts.ledger.checkpoints(child.stage, child.inputs_digest)[-1][1].parent_manifest is not None
        ends.add(attempts.weights(child))
    assert len(ends) == 2


@pytest.mark.long
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_parent_is_refused_and_the_file_named(attempts: Attempts, damage: str) -> None:
    parent = attempts.intend(config=stage_config(steps=5))
    attempts.live(parent)
    reference = attempts.commit(parent)
    file = attempts.root / "store" / reference.key.replace("MANIFEST.json", "ema.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flipped" else data[:-1])
    child = attempts.intend(stage="stage2", parent=reference)
    life, report = attempts.live(child)
    assert (life.exit_code, report.class_) == (65, "parent")
    assert "ema.safetensors" in report.reason
    assert attempts.published(child) == []
    assert not (attempts.run_dir(child) / "trainer.log").exists()


@pytest.mark.long
def test_a_damaged_checkpoint_to_go_on_from_is_said_in_the_ledger_and_another_attempt_goes_on(attempts: Attempts) -> None:
    first = attempts.intend("--fail", "exit@12")
    attempts.live(first)
    older, newest = attempts.ledger.checkpoints("stage1", first.inputs_digest)
    file = attempts.root / "store" / newest[0].replace("MANIFEST.json", "ema.safetensors")
    data = bytearray(file.read_bytes())
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    second = attempts.intend(attempt=2, resume=attempts.newest(first))
    life, report = attempts.live(second)
    assert (life.exit_code, report.class_) == (65, "parent") and "step 10" in report.reason and "ema.safetensors" in report.reason
    word = attempts.ledger.damaged("stage1", first.inputs_digest, 2)
    assert word is not None and (word.key, word.step, word.by) == (newest[0], 10, "agent")
    third = attempts.intend(attempt=3, resume=ResumeRef(key=older[0], manifest_digest=older[1].digest(), step=5))
    _, report = attempts.live(third)
    assert report.class_ == "completed"


def test_a_checkpoint_that_the_trainer_refuses_is_said_too(attempts: Attempts) -> None:
    first = attempts.intend("--fail", "exit@12")
    attempts.live(first)
    second = attempts.intend("--fail", "parent@11", attempt=2, resume=attempts.newest(first))
    _, report = attempts.live(second)
    word = attempts.ledger.damaged("stage1", first.inputs_digest, 2)
    assert report.class_ == "parent" and word is not None and (word.step, word.by) == (10, "trainer")


# --- The right to start --------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_second_agent_of_the_same_attempt_touches_nothing_and_leaves(attempts: Attempts) -> None:
    intent = attempts.intend("--step-ms", "1000")
    attempts.submit(intent)
    attempts.agent(intent)
    second = subprocess.run(agent_argv(attempts, intent), capture_output=True, text=True, timeout=60)
    assert second.returncode == 69 and "another agent lives this attempt" in second.stderr
    attempts.backend.drain(intent.run_key)
    attempts.end(intent)
    before = attempts.journal(intent)
    third = subprocess.run(agent_argv(attempts, intent), capture_output=True, text=True, timeout=60)
    assert third.returncode == 69 and "has been lived before" in third.stderr
    report = attempts.report(intent)
    assert attempts.journal(intent) == before and report is not None and report.class_ == "drained"


def test_an_intent_older_than_the_lease_is_not_lived(attempts: Attempts) -> None:
    intent = attempts.intend(epoch=1)
    for _ in range(2):
        handle = attempts.ledger.acquire(time.time())
        handle.release()
    assert handle.epoch > intent.epoch
    attempts.submit(intent)
    life = attempts.end(intent)
    assert life.exit_code == 69
    assert attempts.journal(intent) == [] and attempts.report(intent) is None and AgentRecord.read(attempts.run_dir(intent)) is None
    assert "the newer driver decides" in (attempts.run_dir(intent) / "agent.log").read_text()


def test_in_a_pod_an_intent_older_than_the_lease_is_lived_unless_its_driver_has_closed_it(attempts: Attempts) -> None:
    closed, adopted = attempts.intend(epoch=1), attempts.intend(epoch=1, attempt=2)
    for _ in range(2):
        attempts.ledger.acquire(time.time()).release()
    outcome = {"class": "lost", "exit_code": None, "reason": "given up", "step": None, "bound": None, "ended": 1.0, "devices": 1}
    attempts.ledger.write_outcome(closed, Outcome.model_validate(outcome | {"unaccounted_s": 0, "epoch": 2}))
    late = subprocess.run(agent_argv(attempts, closed), capture_output=True, text=True, timeout=60)
    assert late.returncode == 69 and "has closed it" in late.stderr and attempts.journal(closed) == []
    assert subprocess.run(agent_argv(attempts, adopted), capture_output=True, timeout=60).returncode == 0
    report = attempts.report(adopted)
    assert report is not None and report.class_ == "completed"


def test_an_agent_whose_launcher_is_dead_touches_nothing(attempts: Attempts) -> None:
    intent = attempts.intend()
    dead = subprocess.Popen(["true"])
    dead.wait()
    for launcher in (dead.pid, 1):
        late = subprocess.run(agent_argv(attempts, intent, "--launcher-pid", str(launcher)), capture_output=True, text=True, timeout=60)
        assert late.returncode == 69 and "the launcher died" in late.stderr
    assert AgentRecord.read(attempts.run_dir(intent)) is None and attempts.journal(intent) == []


# --- A store that is away ------------------------------------------------------------------------------------------------


class AwayStore(FolderStore):
    away = False

    def create(self, key: str, data: bytes) -> str:
        if self.away:
            raise Unreachable("store: connection refused")
        return super().create(key, data)

    def upload(self, key: str, path: Path) -> None:
        if self.away:
            raise Unreachable("store: connection refused")
        super().upload(key, path)


@pytest.fixture
def undisturbed() -> Iterator[None]:
    """An attempt lived in this very process changes what belongs to the process; put it back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)
    guard.prctl(guard.PR_SET_CHILD_SUBREAPER, 0)


def live_here(attempts: Attempts, intent: Intent, store: AwayStore, patience_s: float, unsaved_s: float = 1800) -> Ending:
    run_dir = attempts.run_dir(intent)
    run_dir.mkdir(parents=True)
    lock = take_lock(run_dir)
    assert lock is not None
    clock = AttemptClock.here()
    events, trainer = Events(None), TrainerProcess(run_dir, lock, clock)
    ledger, patience = Ledger(store, "demo"), Patience(store_s=patience_s, peer_s=30, unsaved_s=unsaved_s)
    attempt = Attempt(ledger, intent, RunDirectory(run_dir), trainer, events, node=0, bound=time.time(), patience=patience)
    try:
        return attempt.live()
    finally:
        store.away = False  # lets the upload queues end
        trainer.close()
        os.close(lock)


@pytest.mark.usefixtures("undisturbed")
def test_training_goes_on_while_the_store_is_away_and_nothing_is_missing_when_it_is_back(attempts: Attempts) -> None:
    intent, store = attempts.intend(flush_s=0.05), AwayStore(attempts.root / "store")
    store.away = True

    def come_back() -> None:
        until(lambda: RunDirectory(attempts.run_dir(intent)).result(), "the end of the training")
        store.away = False

    helper = threading.Thread(target=come_back)
    helper.start()
    ending = live_here(attempts, intent, store, patience_s=60)
    helper.join()
    assert (ending.class_, ending.exit_code) == ("completed", 0)
    assert attempts.published(intent)[-1] == 20
    pieces = attempts.journal(intent)
    assert [line["step"] for piece in pieces for line in piece.metrics] == list(range(1, 21))
    assert all(left.end == right.start for left, right in pairwise(pieces))


@pytest.mark.usefixtures("undisturbed")
def test_what_could_not_be_published_is_not_called_completed(attempts: Attempts) -> None:
    intent, store = attempts.intend(), AwayStore(attempts.root / "store")
    store.away = True
    ending = live_here(attempts, intent, store, patience_s=0.5)
    assert (ending.class_, ending.exit_code) == ("store", 69)
    assert "step 20" in ending.reason and "connection refused" in ending.reason


@pytest.mark.usefixtures("undisturbed")
def test_a_checkpoint_that_the_store_refuses_is_not_called_completed(attempts: Attempts) -> None:
    intent = attempts.intend(config=stage_config(steps=5))
    key = f"{attempts.ledger.keys.checkpoint('stage1', intent.inputs_digest, 5, 1)}/model.safetensors"
    attempts.store.create(key, b"another writer's")
    ending = live_here(attempts, intent, AwayStore(attempts.root / "store"), patience_s=60)
    assert (ending.class_, ending.exit_code) == ("store", 69)
    assert "model.safetensors" in ending.reason


@pytest.mark.usefixtures("undisturbed")
def test_a_half_written_manifest_of_one_step_does_not_keep_later_steps_from_being_published(attempts: Attempts) -> None:
    """As a try leaves it that died in a store without atomic writes."""
    intent = attempts.intend(config=stage_config(steps=20))
    key = f"{attempts.ledger.keys.checkpoint('stage1', intent.inputs_digest, 10, 1)}/MANIFEST.json"
    attempts.store.create(key, b'{"schema": 1, "run')
    ending = live_here(attempts, intent, AwayStore(attempts.root / "store"), patience_s=60)
    assert (ending.class_, ending.exit_code) == ("completed", 0)
    assert 10 not in attempts.published(intent) and attempts.published(intent)[-1] == 20


class RefusingStore(AwayStore):
    """Takes every small object and no weights, once it refuses."""

    refuses: Exception | None = None

    def upload(self, key: str, path: Path) -> None:
        if self.refuses is not None and "optimizer" in key:
            raise self.refuses
        super().upload(key, path)


@pytest.mark.long
@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("refusal", [Refused("store: access denied"), Unreachable("store: connection refused")])
def test_an_attempt_that_cannot_publish_says_so_at_once_and_ends_saved_after_its_patience(attempts: Attempts, refusal: Exception) -> None:
    intent = attempts.intend("--step-ms", "20", config=stage_config(steps=1000), flush_s=0.1)
    store = RefusingStore(attempts.root / "store")
    said: list[str] = []

    def refuse() -> None:
        attempts.reaches(intent, 10)
        store.refuses = refusal
        until(lambda: attempts.ledger.trouble("stage1", intent.inputs_digest, 1), "the ledger says it")
        trouble = Ledger(attempts.store, "demo").trouble("stage1", intent.inputs_digest, 1)
        assert trouble is not None
        said.append(trouble.reason)
        assert trouble.published >= 10 and read_trouble(attempts.run_dir(intent)) == trouble.reason

    helper = threading.Thread(target=refuse)
    helper.start()
    ending = live_here(attempts, intent, store, patience_s=1.0, unsaved_s=1.0)
    helper.join()
    assert ending.class_ == "store" and str(refusal) in ending.reason and str(refusal) in said[0]
    assert ending.step is not None and ending.step < 1000
    assert f"it lies in {RunDirectory(attempts.run_dir(intent)).checkpoint(ending.step)}" in ending.reason
    assert RunDirectory(attempts.run_dir(intent)).checkpoint(ending.step).is_dir()
    folders = [path for path in (attempts.root / "store").glob("demo/stages/*/checkpoints/*") if not (path / "MANIFEST.json").exists()]
    assert len(folders) <= (1 if isinstance(refusal, Unreachable) else 0), "of a store that is away nothing can be removed"


class StumblingStore(AwayStore):
    """Its first download takes longer than the agent is patient, and then fails once."""

    stumbles = True

    def download(self, key: str, path: Path, *, patience_s: float | None = None) -> None:
        if self.stumbles:
            self.stumbles = False
            time.sleep(1.0)
            raise Unreachable("store: broken in the middle")
        super().download(key, path, patience_s=patience_s)


@pytest.mark.long
@pytest.mark.usefixtures("undisturbed")
def test_a_checkpoint_that_is_long_on_its_way_may_fail_once(attempts: Attempts) -> None:
    first = attempts.intend(config=stage_config(steps=5))
    attempts.live(first)
    intent = attempts.intend(stage="stage2", parent=attempts.commit(first))
    ending = live_here(attempts, intent, StumblingStore(attempts.root / "store"), patience_s=0.5)
    assert (ending.class_, ending.reason) == ("completed", "")


# --- The trainer's command and environment -------------------------------------------------------------------------------


def test_the_command_is_torchrun_on_a_free_port_unless_another_trainer_is_named(attempts: Attempts) -> None:
    named = attempts.intend(trainer=("train", "--dir={run_dir}", "-n", "{devices}"), devices=3, stage="named")
    assert command(named, Path("/run/it")) == ["train", "--dir=/run/it", "-n", "3"]
    default = command(attempts.intend(trainer=(), devices=2, stage="default"), Path("/run/it"))
    assert default[:4] == [sys.executable, "-P", "-m", "torch.distributed.run"]
    assert default[-3:] == ["-m", "opensora.train", "/run/it"]
    assert default[default.index("--nproc-per-node") + 1] == "2" and "--standalone" in default


def test_nodes_meet_where_the_operator_says_and_output_is_told_apart_by_rank(attempts: Attempts) -> None:
    words = command(attempts.intend(trainer=(), nodes=2, devices=4), Path("/run/it"), node=1)
    assert "--standalone" not in words
    assert "/" not in words[words.index("--rdzv-id") + 1]
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert (words[words.index("--tee") + 1], words[words.index("--log-dir") + 1]) == ("3", "/run/it/ranks")
    alone = command(attempts.intend(trainer=(), stage="alone"), Path("/run/it"))
    assert "--tee" not in alone, "one rank needs no prefix"
    assert alone[alone.index("--log-dir") + 1] == "/run/it/ranks", "torchrun would make a folder among the temporary files, and leave it"
    named = attempts.intend(trainer=("train", "{node}/{nodes}"), nodes=2, stage="named")
    assert command(named, Path("/run/it"), node=1) == ["train", "1/2"]


def test_nodes_that_have_nowhere_to_meet_are_a_config_error(attempts: Attempts) -> None:
    intent = attempts.intend(trainer=(), nodes=2)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    alone = subprocess.run(agent_argv(attempts, intent), env=env, capture_output=True, text=True, timeout=60)
    report = attempts.report(intent)
    assert alone.returncode == 64 and report is not None
    assert report.class_ == "config" and "PET_RDZV_ENDPOINT is not set" in report.reason


def test_flight_records_are_sent(attempts: Attempts) -> None:
    script = "import sys, pathlib; d = pathlib.Path(sys.argv[1], 'flight-recorder'); (d / 'rank-3').write_bytes(b'x' * 100); sys.exit(1)"
    intent = attempts.intend(trainer=(sys.executable, "-c", script, "{run_dir}"))
    attempts.live(intent)
    (key,) = attempts.store.list(attempts.ledger.keys.attempt(intent.stage, intent.inputs_digest, 1) + "/flight-recorder/")
    assert key.endswith("/000-rank-3") and len(attempts.store.read(key).data) == 100


@pytest.mark.parametrize(
    ("ranks", "node", "stands"),
    [
        ({0: 3, 1: 3}, 0, ([0, 1], "at step 3 in phase train")),
        ({4: 3, 5: 2}, 2, ([5], "at step 2 in phase train")),
        ({5: 3}, 2, ([4], "before their first heartbeat")),
        ({}, 0, ([0, 1], "before their first heartbeat")),
        ({}, 2, ([], "before their first heartbeat")),
        ({8: 1, 9: 1}, 2, ([8, 9], "at step 1 in phase train")),
    ],
)
def test_who_stands_is_told_from_the_heartbeats_of_this_node(ranks: dict[int, int], node: int, stands: tuple[list[int], str]) -> None:
    beats = [Heartbeat(rank, step, "train", 0.0) for rank, step in ranks.items()]
    assert who_stands(beats, 2, node) == stands


def test_cpu_devices_see_no_cuda_and_have_one_thread_each(attempts: Attempts) -> None:
    intent = attempts.intend()
    cpu = environment(intent, {"PATH": "/bin"}, Path("/run/it"))
    assert (cpu["PATH"], cpu["CUDA_VISIBLE_DEVICES"], cpu["OMP_NUM_THREADS"], cpu["PYTHONUNBUFFERED"]) == ("/bin", "", "1", "1")
    assert not any("NCCL" in name for name in cpu)
    gpu = environment(intent.model_copy(update={"device": "h100"}), {}, Path("/run/it"))
    assert gpu["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"].startswith("/run/it/flight-recorder/")
    assert not {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"} & set(gpu)


def test_an_agent_needs_no_torch_and_no_sdk() -> None:
    code = "import sys, orchestrator.agent.__main__, orchestrator.agent.start; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "orchestrator.agent.attempt" in loaded
    assert not {"torch", "numpy", "mlflow", "boto3", "botocore", "typer", "fsspec"} & set(loaded)
