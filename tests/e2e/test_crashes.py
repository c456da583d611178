"""kill -9 of launcher, agent or rank at any moment, then launch again: the same weights, nothing twice, every second in the books.

Real processes: a launcher (tests/e2e/launch.py), its agents and guards, the stand-in trainer. Watched from outside.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from live_attempts import STAND_IN, Watcher, stage_config, until
from proofs import Proof

from orchestrator.accounting.cost import TOLERANCE, TOLERANCE_S, account
from orchestrator.accounting.history import History
from orchestrator.ledger import lineage
from orchestrator.ledger.store import Ledger
from orchestrator.local.attempt_lock import ALIVE, is_locked
from orchestrator.local.processes import Process
from orchestrator.recipe.pipeline import Pipeline, Resources, Stage, StageSpec
from orchestrator.stores.folder import FolderStore

sys.path.insert(0, str(Path(__file__).parent))
from fates import for_agents

LAUNCH = str(Path(__file__).parent / "launch.py")
STAGES = ("stage1", "stage2", "stage3")
SEED = 20261123
UNBORN_S = 0.5
"""An interpreter's start on a busy machine; 0.05 s on an idle one."""


def chain(*, step_ms: float = 8, steps: int = 20, devices: int = 2) -> Pipeline:
    """Three stages of the stand-in trainer, a quarter of a second each."""
    stages = tuple(
        Stage(
            spec=StageSpec(
                name=name,
                config="x.yaml",
                parent=parent,
                resources=Resources(devices_per_node=devices, device="cpu-core"),
                hang_timeout_s=30,
            ),
            config=stage_config(steps=steps, every_steps=5, seed=number, evaluate=parent == "stage2"),
        )
        for number, (name, parent) in enumerate(zip(STAGES, (None, *STAGES), strict=False))
    )
    return Pipeline(
        name="demo", backend="local", store="store", tracking="none", experiment="demo", budget_usd=None, flush_s=0.2,
        trainer=(sys.executable, STAND_IN, "{run_dir}", "{devices}", "--step-ms", str(step_ms)), stages=stages,
    )  # fmt: skip


class Site:
    """One pipeline in one folder, and a watcher that sees every agent from the outside."""

    def __init__(self, root: Path, pipeline: Pipeline | None = None):
        root.mkdir(parents=True)
        self.root, self.pipeline = root, pipeline or chain()
        (root / "pipeline.json").write_text(self.pipeline.model_dump_json())
        self.launchers: list[subprocess.Popen[str]] = []
        self.agents: dict[str, Watcher] = {}
        self.late_s = 0.0
        """How late this machine wakes a waiting process at worst: no watcher is better than that, at either end of a life."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        """Agents are named by their launcher as soon as they are started; their lives are read from the kernel."""
        began = time.monotonic()
        while not self._over.wait(0.005):
            for line in self._named():
                name, pid = line.rsplit(" ", 1)
                if name not in self.agents:
                    with suppress(ProcessLookupError):
                        self.agents[name] = Watcher(Process.of(int(pid)))
            began, last = time.monotonic(), began
            self.late_s = max(self.late_s, began - last - 0.005)

    def _named(self) -> list[str]:
        with suppress(FileNotFoundError):
            return (self.root / "agents.log").read_text().splitlines()
        return []

    def close(self) -> None:
        for launcher in self.launchers:
            launcher.kill()
            launcher.communicate()
        self._over.set()
        self._thread.join()

    @property
    def ledger(self) -> Ledger:
        return Ledger(FolderStore(self.root / "store"), "demo")

    # launching

    def start(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        launcher = subprocess.Popen(
            [sys.executable, LAUNCH, str(self.root), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env,
        )  # fmt: skip
        self.launchers.append(launcher)
        return launcher

    def finish(self, launcher: subprocess.Popen[str]) -> dict[str, Any]:
        output, errors = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, (launcher.returncode, output, errors)
        result: dict[str, Any] = json.loads(output)
        return result

    def launch(self, *arguments: str) -> dict[str, Any]:
        return self.finish(self.start(*arguments))

    def processes(self, *, agents: bool = True, trainers: bool = True) -> list[int]:
        """Pids of agents, and of trainers' parents and ranks, below this root. Guards are seen by their locks."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(FileNotFoundError, ProcessLookupError):
                    words = (entry / "cmdline").read_text().split("\0")
                    if any(word.startswith(f"{self.root}/runs") for word in words) and (
                        agents if "orchestrator.agent" in words else trainers
                    ):
                        found.append(int(entry.name))
        return found

    def victim(self, kind: str, launcher: subprocess.Popen[str], choose: random.Random) -> int | None:
        """Pid to kill after a random while; none where the launch was over before."""
        if kind == "launcher":
            time.sleep(choose.uniform(0.0, 2.5))
            return launcher.pid if launcher.poll() is None else None
        wanted = {"agents": kind == "agent", "trainers": kind == "rank"}
        while launcher.poll() is None and not self.processes(**wanted):
            time.sleep(0.01)
        time.sleep(choose.uniform(0.0, 0.5))
        found = self.processes(**wanted)
        return choose.choice(found) if found else None

    # what must hold in the end, seen from outside

    def digests(self) -> dict[str, str]:
        ledger = self.ledger
        results = [ledger.committed(stage, inputs_digest) for stage, inputs_digest in ledger.stages()]
        return {result.stage: result.weights_digest for result in results if result}

    def check(self, digests: dict[str, str]) -> None:
        ledger = self.ledger
        assert self.digests() == digests
        assert sorted(stage for stage, _ in ledger.stages()) == list(STAGES), "every stage has run with one set of inputs"
        committed = [event.stage for event in ledger.events() if event.kind == "committed"]
        assert sorted(filter(None, committed)) == list(STAGES), "committed once, and logged once"
        (last,) = ledger.inputs_of("stage3")
        assert all(link.ok for link in lineage.links(ledger, "stage3", last, full=True))
        assert self.processes() == [] and not any(is_locked(path.parent) for path in self.root.glob("runs/*/agent.json")), "left behind"
        self.check_books(ledger)

    def check_books(self, ledger: Ledger) -> None:
        """Each device-second that the watcher saw is in exactly one category of exactly one attempt."""
        history = History(ledger)
        for stage in self.pipeline.stages:
            (inputs_digest,) = ledger.inputs_of(stage.name)
            times = [one.time for one in history.attempts(stage.name, inputs_digest, time.time())]
            bill = account(times)
            assert not list(bill.remarks())
            done_again = [time.resumed_from for time in times[1:]]
            assert done_again == sorted(done_again), "an attempt went on from behind an earlier one"
            for time_, line in zip(times, bill.attempts, strict=True):
                assert time_.ended is not None, f"{stage.name} a{time_.attempt} has no outcome"
                name = f"demo_{stage.name}@{inputs_digest}_a{time_.attempt}"
                watcher = self.agents.get(name)
                if watcher is None:
                    continue
                wall = line.devices * (watcher.death - watcher.started)
                doubt = max(TOLERANCE * wall, (TOLERANCE_S + 2 * self.late_s) * line.devices)
                assert all(seconds >= 0 for seconds in line.seconds.values())
                if not (self.root / "runs" / name / ALIVE).exists():
                    # Killed after its launcher, and before Python had begun to run it: nobody is left who could know when.
                    assert wall <= UNBORN_S * line.devices, (stage.name, time_.attempt, wall)
                    continue
                assert abs(line.held_s - wall) <= doubt, (stage.name, time_.attempt, line.held_s, wall, doubt)


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[list[Site]]:
    opened: list[Site] = []
    yield opened
    for site in opened:
        site.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A pipeline that nothing befell. Its launcher and its agents have written down their effects."""
    site = Site(tmp_path_factory.mktemp("undisturbed") / "site")
    try:
        result = site.finish(site.start(env=for_agents("", site.root / "agents")))
        assert result["status"] == "succeeded"
        yield site
    finally:
        site.close()


@pytest.fixture(scope="module")
def unbroken(undisturbed: Site) -> dict[str, str]:
    """Its weight digests."""
    digests = undisturbed.digests()
    assert sorted(digests) == list(STAGES)
    undisturbed.check(digests)
    assert len(undisturbed.agents) == 3
    return digests


# --- Side effects ------------------------------------------------------------------------------------------------------------------

KINDS = (
    "lease", "revision", "event-launched", "intent", "event-attempt", "process.start", "outcome", "event-outcome", "event-retry",
    "committed", "event-committed", "event-ended", "release",
)  # fmt: skip
"""Every kind of effect that a launch without a stop has, in an order in which few launches reach each of them."""


def killed_at(tmp_path: Path, unbroken: dict[str, str], sites: list[Site], fates: Sequence[tuple[str, str]]) -> None:
    """Launch after launch, each dying at its first effect of one kind, until none is left to die at; then one that lives."""
    reached = []
    for kind, when in fates:
        if not sites or len(sites[-1].digests()) == len(STAGES):
            sites.append(Site(tmp_path / f"{kind}-{when}"))
        launcher = sites[-1].start("--die", f"{kind}:{when}")
        if kind == "event-retry":
            (agent,) = until(lambda: sites[-1].processes(trainers=False), "an agent")
            os.kill(agent, signal.SIGKILL)
        launcher.communicate(timeout=120)
        assert launcher.returncode == -signal.SIGKILL, f"{kind} was not reached"
        reached += (sites[-1].root / "effects.log").read_text().splitlines()[-1:]
    assert reached == [f"died {when} {kind}" for kind, when in fates]
    for site in sites:
        site.launch()
        site.check(unbroken)


def test_killed_before_or_after_each_kind_of_side_effect(tmp_path: Path, unbroken: dict[str, str], sites: list[Site]) -> None:
    """Before one kind and after the next: tests/orchestrator/driver has both for every single effect, in one process."""
    killed_at(tmp_path, unbroken, sites, list(zip(KINDS, itertools.cycle(("before", "after")))))


@pytest.mark.prove("kinds-of-effects")
def test_killed_before_and_after_each_kind_of_side_effect(
    tmp_path: Path, unbroken: dict[str, str], sites: list[Site], proof: Proof
) -> None:
    fates = list(itertools.product(KINDS, ("before", "after")))
    killed_at(tmp_path, unbroken, sites, fates)
    proof.count(len(fates))


def test_what_goes_through_the_port_is_what_an_outside_listing_shows(undisturbed: Site) -> None:
    root = undisturbed.root
    logs = [root / "effects.log", *(root / "agents").glob("agent-*.log")]
    done = [line.split(" ", 1) for log in logs for line in log.read_text().splitlines()]
    store = root / "store"
    listed = {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file() and not path.is_relative_to(store / ".tmp")}
    assert {subject for kind, subject in done if not kind.startswith("process.")} == {re.sub(r"@\d+$", "", name) for name in listed}
    started = sorted(subject.replace("/", "_") for kind, subject in done if kind == "process.start")
    assert started == sorted(2 * [path.name for path in (root / "runs").iterdir()]), "each agent, and each agent's trainer"


@pytest.mark.prove("effects-of-processes")
def test_effects_of_real_processes_with_each_fate(tmp_path: Path, unbroken: dict[str, str], sites: list[Site], proof: Proof) -> None:
    """Each effect of a launcher, or each of the agent of its first attempt, in a pipeline of its own. Six pieces try all fates."""
    who, when = list(itertools.product(("launcher", "agent"), ("lost", "before", "after")))[proof.seed % 6]
    for at in itertools.count(1):
        site, folder = Site(tmp_path / f"{at}"), tmp_path / f"{at}-agents"
        sites.append(site)
        fate = f"{at}:{when}"
        launcher = site.start("--die", fate) if who == "launcher" else site.start(env=for_agents(fate, folder))
        launcher.communicate(timeout=120)
        logs = [site.root / "effects.log"] if who == "launcher" else list(folder.glob("agent-*.log"))
        met = any(line.startswith(("died", "lost")) for log in logs for line in log.read_text().splitlines())
        if launcher.returncode != 0:
            site.launch()
        site.check(unbroken)
        site.close()
        if not met:
            proof.count(note=f"{who}, {when}: {at - 1} effects")
            assert at > 20
            return
        proof.count()


def moments(tmp_path: Path, sites: list[Site], digests: dict[str, str], count: int, seed: int) -> dict[str, int]:
    """Kill launcher, agent or rank at `count` random moments, over as many pipelines as that takes. How often each was hit."""
    choose = random.Random(seed)
    hits = {"launcher": 0, "agent": 0, "rank": 0}
    while sum(hits.values()) < count:
        site = Site(tmp_path / f"site{len(sites)}")
        sites.append(site)
        launcher, spared = site.start(), 0
        while launcher.poll() is None or launcher.returncode != 0:
            if launcher.returncode is not None:
                launcher, spared = site.start(), 0
            if sum(hits.values()) >= count:
                break
            # Three attempts in a row without a checkpoint would rightly end the launch as failed: the launcher is next then.
            fewest = [kind for kind in hits if hits[kind] == min(hits.values())]
            victim = choose.choice(fewest) if spared < 2 else "launcher"
            pid = site.victim(victim, launcher, choose)
            if pid is None:
                continue
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                hits[victim] += 1
                spared += victim != "launcher"
            if victim == "launcher":
                launcher.wait()
        launcher.communicate(timeout=120)
        if launcher.returncode != 0:
            site.launch()
        site.check(digests)
        site.close()
    return hits


@pytest.mark.long
def test_killed_at_ten_random_moments(tmp_path: Path, unbroken: dict[str, str], sites: list[Site]) -> None:
    hits = moments(tmp_path, sites, unbroken, 10, SEED)
    assert sum(hits.values()) == 10 and min(hits.values()) > 0, hits


@pytest.mark.prove("random-kills")
def test_killed_at_a_hundred_random_moments(tmp_path: Path, unbroken: dict[str, str], sites: list[Site], proof: Proof) -> None:
    hits = moments(tmp_path, sites, unbroken, 120, SEED + 1 + proof.seed)
    assert sum(hits.values()) == 120
    proof.count(120, f"{hits} over {len(sites)} pipelines")


# --- Two at once -------------------------------------------------------------------------------------------------------------------


def test_of_launchers_at_once_one_drives_and_the_others_are_told_who(tmp_path: Path, unbroken: dict[str, str], sites: list[Site]) -> None:
    site = Site(tmp_path / "site")
    sites.append(site)
    launchers = [site.start() for _ in range(3)]
    outputs = [launcher.communicate(timeout=120) for launcher in launchers]
    codes = [launcher.returncode for launcher in launchers]
    winner = codes.index(0)
    for number, (code, (_, errors)) in enumerate(zip(codes, outputs, strict=True)):
        if number != winner:
            assert code == 4 and f":{launchers[winner].pid}" in errors, (code, errors)
    site.check(unbroken)


def test_launching_again_does_nothing_twice(tmp_path: Path, unbroken: dict[str, str], sites: list[Site]) -> None:
    site = Site(tmp_path / "site", chain(step_ms=1))
    sites.append(site)
    site.launch()
    before = sorted(path for path in (site.root / "store/demo/stages").rglob("*"))
    assert site.launch()["status"] == "succeeded"
    assert sorted(path for path in (site.root / "store/demo/stages").rglob("*")) == before
    site.check(unbroken)


def test_a_holder_that_stood_still_beyond_its_lease_is_fenced(tmp_path: Path, unbroken: dict[str, str], sites: list[Site]) -> None:
    site = Site(tmp_path / "site")
    sites.append(site)
    first = site.start("--ttl", "1")
    until(site.processes, "an agent")
    os.kill(first.pid, signal.SIGSTOP)
    time.sleep(1.1)
    second = site.start("--ttl", "1")
    until(lambda: (lease := site.ledger.lease()) is not None and lease.epoch == 2, "the lease of the second")
    os.kill(first.pid, signal.SIGCONT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 4 and "taken over" in errors, errors
    site.finish(second)
    site.check(unbroken)
    by_first = [event for event in site.ledger.events() if event.epoch == 1 and event.kind in ("outcome", "committed", "ended")]
    assert by_first == []


# --- Stops -------------------------------------------------------------------------------------------------------------------------


def test_interrupted_once_it_saves_and_the_next_launch_goes_on(tmp_path: Path, sites: list[Site]) -> None:
    site = Site(tmp_path / "site", chain(steps=200))
    sites.append(site)
    launcher = site.start("stage1")
    until(lambda: list((site.root / "store").glob("demo/stages/stage1@*/checkpoints/*/MANIFEST.json")), "a checkpoint")
    launcher.send_signal(signal.SIGINT)
    output, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 130, (output, errors)
    assert json.loads(output)["status"] == "suspended"
    (inputs_digest,) = site.ledger.inputs_of("stage1")
    outcome = site.ledger.outcome("stage1", inputs_digest, 1)
    assert outcome is not None and outcome.class_ == "drained" and outcome.step and outcome.step < 200
    assert site.processes() == []
    site.launch("stage1")
    second = site.ledger.intent("stage1", inputs_digest, 2)
    assert second is not None and second.resume is not None and second.resume.step == outcome.step


def test_interrupted_twice_it_ends_at_once(tmp_path: Path, sites: list[Site]) -> None:
    site = Site(tmp_path / "site", chain(steps=2000))
    sites.append(site)
    launcher = site.start("stage1")
    until(lambda: list((site.root / "store").glob("demo/stages/stage1@*/checkpoints/*/MANIFEST.json")), "a checkpoint")
    launcher.send_signal(signal.SIGTERM)  # launch.py: kill
    launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert site.processes() == []


def test_a_cancel_written_by_another_process_drains_the_launch(tmp_path: Path, sites: list[Site]) -> None:
    site = Site(tmp_path / "site", chain(steps=2000))
    sites.append(site)
    launcher = site.start("stage1")
    until(lambda: list((site.root / "store").glob("demo/stages/stage1@*/checkpoints/*/MANIFEST.json")), "a checkpoint")
    assert site.ledger.ask_cancel(time.time())
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 130 and json.loads(output)["status"] == "cancelled"
