"""A stage on published encoders, from video files to a clip: real AutoencoderKL and T5, a few thousand weights each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file
from tiny_encoders import WIDTH, make_autoencoder, make_text

from opensora import sample, train
from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.evaluation.saved_model import open_model
from opensora.evaluation.video_files import write_mp4
from opensora.latents.prepared import Prepared
from opensora.training.run_directory import RunDirectory
from opensora.training.trainer import DrainRequest

CAPTIONS = ("a bright square", "Тёмный <b>квадрат</b>", "一个方块", "a square that grows and grows and grows")
FRAMES = 2


@pytest.fixture
def stage(tmp_path: Path, tiny_stage: Callable[..., StageConfig]) -> StageConfig:
    """Four clips of noise of different brightness, a VAE of two pixels per latent, a T5 that reads bytes."""
    clips = tmp_path / "clips"
    clips.mkdir()
    lines = ["path,text"]
    for number, caption in enumerate(CAPTIONS):
        pixels = torch.randint(0, 60 * number + 60, (4, 16, 16, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        write_mp4(clips / f"{number}.mp4", pixels)
        lines.append(f"{number}.mp4,{caption}")
    (clips / "captions.csv").write_text("\n".join(lines) + "\n")
    make_autoencoder(tmp_path / "models" / "vae")
    make_text(tmp_path / "models" / "text_encoder", tmp_path / "models" / "tokenizer")
    return tiny_stage(
        model={"caption_width": WIDTH, "caption_tokens": 20},
        data={"source": {"kind": "folder", "path": str(clips)}, "frames": FRAMES, "height": 16, "width": 16},
        autoencoder={"kind": "kl", "path": str(tmp_path / "models"), "factor": 2, "micro_batch": 3},
        text={"kind": "t5", "path": str(tmp_path / "models"), "dtype": "fp32"},
        steps=2,
        batch_size=2,
        checkpoint={"every_steps": 1},
        prompts=["a bright square"],
    )


def test_a_stage_trains_on_published_encoders_and_draws_from_its_checkpoint(
    tmp_path: Path, stage: StageConfig, make_run: Callable[..., RunDirectory]
) -> None:
    run = make_run(stage)
    assert train.run_reported(run, DrainRequest()) == 0
    result = json.loads((run.path / "result.json").read_text())
    assert (result["status"], result["step"]) == ("completed", 2)
    assert len(list(run.samples.glob("*.mp4"))) == 1

    made = checkpoint.directory(run.checkpoints, 2)
    assert sum((made / name).stat().st_size for name in ("autoencoder.safetensors", "text.safetensors")) < 2048
    assert load_file(made / "text.safetensors") == {}
    drawn = []
    for seed in ("5", "5", "6"):
        out = tmp_path / "drawn.mp4"
        assert sample.main([str(made), "--prompt", "一个方块", "--out", str(out), "--seed", seed]) == 0
        with av.open(str(out)) as video:
            drawn.append([frame.to_ndarray(format="rgb24").tobytes() for frame in video.decode(video=0)])
    assert [len(frames) for frames in drawn] == [FRAMES] * 3
    assert drawn[0] == drawn[1] != drawn[2]


def test_captions_lie_in_the_cache_at_their_true_lengths(stage: StageConfig, make_run: Callable[..., RunDirectory]) -> None:
    run = make_run(stage)
    assert train.run_reported(run, DrainRequest()) == 0
    (directory,) = run.latents.iterdir()
    prepared = Prepared.open(directory, stage)
    lengths = dict(zip(prepared.captions, prepared.offsets.diff().tolist(), strict=True))
    # bytes of the cleaned caption and the end of the sequence, at most 20: NFKC Cyrillic has two a letter, Chinese three
    assert lengths == {CAPTIONS[0]: 16, CAPTIONS[1]: 20, CAPTIONS[2]: 13, CAPTIONS[3]: 20}


def test_a_stage_goes_on_with_its_parents_published_encoders_and_refuses_others_under_their_name(
    tmp_path: Path,
    stage: StageConfig,
    make_run: Callable[..., RunDirectory],
    complete: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    parent = complete(stage)
    child = stage.model_copy(update={"seed": 8})
    made = complete(child, parent=parent)
    assert (made / "text.safetensors").read_bytes() == (parent / "text.safetensors").read_bytes()

    shutil.rmtree(tmp_path / "models" / "vae")
    make_autoencoder(tmp_path / "models" / "vae", seed=1)
    run = make_run(child, parent=parent)
    assert train.run_reported(run, DrainRequest()) == 1
    result = json.loads((run.path / "result.json").read_text())
    assert result["class"] == "parent" and "another model lies there now" in result["reason"]
    assert sample.main([str(made), "--prompt", "a square", "--out", str(tmp_path / "out.mp4")]) == 1
    assert "another model lies there now" in capsys.readouterr().err


def test_imports_serve_wherever_they_were_brought_to(
    tmp_path: Path, stage: StageConfig, make_run: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage names them; a store has them by digest, and each machine elsewhere. The checkpoint knows the name alone."""
    from orchestrator.inputs import imports
    from orchestrator.inputs.import_sources import ImportSources
    from orchestrator.stores.folder import FolderStore

    store, sources = FolderStore(tmp_path / "store"), ImportSources(tmp_path / "home")
    digests = {}
    for role in ("autoencoder", "text"):
        found = sources.fetch(str(tmp_path / "models"), role)  # type: ignore[arg-type]
        digests[role] = imports.put(store, found.imported, found.files)
    shutil.rmtree(tmp_path / "models")
    named = stage.model_copy(
        update={
            "autoencoder": stage.autoencoder.model_copy(update={"path": "sd-vae"}),
            "text": stage.text.model_copy(update={"path": "owner/t5@v1"}),
        }
    )

    def brought_to(node: str) -> None:
        places = {
            name: str(imports.fetch(store, digests[role], tmp_path / node / digests[role]))
            for role, name in (("autoencoder", "sd-vae"), ("text", "owner/t5@v1"))
        }
        (tmp_path / node / "imports.json").write_text(json.dumps({"schema": 1, "places": places}))
        monkeypatch.setenv("OSCTL_PLACES", str(tmp_path / node / "imports.json"))

    brought_to("one")
    run = make_run(named)
    assert train.run_reported(run, DrainRequest()) == 0
    made = checkpoint.directory(run.checkpoints, 2)
    assert "sd-vae" in (made / "stage.yaml").read_text() and str(tmp_path) not in (made / "autoencoder.safetensors").read_text(
        errors="replace"
    )
    shutil.rmtree(tmp_path / "one")
    brought_to("two")
    drawn = open_model(made, torch.device("cpu")).generate(["a bright square"], FRAMES, [0])
    assert drawn.shape[:2] == (1, FRAMES)
