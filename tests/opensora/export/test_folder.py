"""Exports are opened by a fresh process with a stock diffusers (opened_by_diffusers.py): it starts once for all clips of this file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_encoders import WIDTH, make_autoencoder, make_text

from opensora.checkpoint import foreign as weights
from opensora.checkpoint import reader as checkpoint
from opensora.checkpoint.writer import Saver
from opensora.config import StageConfig
from opensora.errors import ConfigError, DiskFull, ParentError
from opensora.evaluation.saved_model import open_model
from opensora.export import components, export, folder
from opensora.model.stdit import STDiT

PROMPTS = ["a digit 3 moving left", "a digit 7 moving up"]


def drawn(path: Path, seeds: list[int], frames: int = 4, **sampling: Any) -> np.ndarray[Any, Any]:
    sampler = open_model(path, torch.device("cpu"))
    return sampler.generate(PROMPTS[: len(seeds)], frames, seeds, sampler.stage.sampling.model_copy(update=sampling)).numpy()


def stock_diffusers(jobs: list[dict[str, Any]], home: Path) -> None:
    """Runs the jobs in a fresh process, outside of this checkout."""
    script = Path(__file__).parents[2] / "opened_by_diffusers.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", str(script)], input=json.dumps(jobs), cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_a_stock_diffusers_draws_the_same_frames(
    video: Path, trained: Callable[[Path, StageConfig], Path], tmp_path: Path, tiny_stage: Callable[..., StageConfig]
) -> None:
    noisy = {"kind": "iddpm", "steps": 100}
    sampling = {"steps": 5, "method": "ancestral", "guidance": 3.0, "guidance_channels": "first3"}
    upstream = tiny_stage(data={"frames": 4}, steps=2, optimizer={"warmup_steps": 0, "lr": 0.1}, objective=noisy, sampling=sampling)
    diffusion = trained(tmp_path / "diffusion", upstream)
    make_autoencoder(tmp_path / "published" / "vae", scaling_factor=0.7)
    make_text(tmp_path / "published" / "text_encoder", tmp_path / "published" / "tokenizer")
    path = str(tmp_path / "published")
    named = tiny_stage(
        data={"frames": 4},
        steps=2,
        optimizer={"warmup_steps": 0, "lr": 0.1},
        model={"caption_width": WIDTH, "caption_tokens": 24},
        autoencoder={"kind": "kl", "path": path, "factor": 2, "scale": 0.3, "micro_batch": 3, "dtype": "bf16"},
        text={"kind": "t5", "path": path, "dtype": "bf16"},
    )
    published = trained(tmp_path / "by name", named)
    export(video, tmp_path / "0")
    export(video, tmp_path / "1", dtype="bf16", weights="model")
    export(diffusion, tmp_path / "2")
    export(published, tmp_path / "3")
    for number in range(4):
        (tmp_path / f"{number}").rename(tmp_path / f"moved-{number}")
    flow, bf16, chain, whole, again = (tmp_path / name for name in ("moved-0", "moved-1", "moved-2", "moved-3", "again"))

    def job(folder: Path, name: str, seeds: list[int], opened: dict[str, Any], **draw: Any) -> dict[str, Any]:
        shown = {"prompt": PROMPTS[: len(seeds)], "output_type": "pt", **draw}
        return {"folder": str(folder), "open": opened, "draw": shown, "seeds": seeds, "save": str(tmp_path / f"{name}.npy")}

    asked = {"num_frames": 6, "num_inference_steps": 3, "guidance_scale": 1.0}
    jobs = [
        job(flow, "plain", [3, 4], {"custom_pipeline": str(flow)}) | {"save_pretrained": str(again)},
        job(flow, "asked", [5], {"custom_pipeline": str(flow / "pipeline.py")}, **asked),
        job(flow, "pil", [3], {}, output_type="pil"),
        job(flow, "np", [3], {}, output_type="np"),
        job(flow, "wide", [3], {}, height=16, width=32),
        job(bf16, "bf16", [3], {}),
        job(chain, "chain", [3, 4], {"custom_pipeline": str(chain)}),
        job(whole, "whole", [3], {"custom_pipeline": str(whole)}, prompt=["A  digit 3&nbsp;moving left <br/>"]),
    ]
    stock_diffusers(jobs, tmp_path)
    found = {name: np.load(tmp_path / f"{name}.npy") for name in ("plain", "asked", "pil", "np", "wide", "bf16", "chain", "whole")}
    ours = drawn(video, [3, 4])
    assert np.array_equal(found["plain"], ours) and ours.std() > 10
    assert np.array_equal(found["chain"], drawn(diffusion, [3, 4]))
    assert np.array_equal(found["whole"], drawn(published, [3])) and found["whole"].std() > 10
    assert np.array_equal(found["asked"], drawn(video, [5], frames=6, steps=3, guidance=1.0))
    first = drawn(video, [3])
    assert np.array_equal(found["pil"], first)
    assert np.array_equal(found["np"], first.astype(np.float32) / 255)
    assert found["wide"].shape == (1, 4, 16, 32, 3)
    assert found["bf16"].shape == first.shape and not np.array_equal(found["bf16"], first)
    assert load_file(again / "transformer" / components.WEIGHTS).keys() == load_file(flow / "transformer" / components.WEIGHTS).keys()


def test_an_export_is_loaded_as_weights(video: Path, tmp_path: Path) -> None:
    reader = checkpoint.Reader(video)
    for dtype, source in (("fp32", "ema"), ("bf16", "model")):
        folder = tmp_path / dtype
        export(video, folder, dtype=dtype, weights=source)  # type: ignore[arg-type]
        for path in (folder, folder / "transformer"):
            model = STDiT(reader.stage.model, reader.stage.latent_shape[1:], reader.stage.out_channels)
            assert weights.load(path, model).format == "osctl export"
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, reader.tensor(source, name).to(components.TYPES[dtype]).float()), name


def test_of_a_checkpoint_the_moving_average_is_loaded_as_weights(video: Path) -> None:
    reader = checkpoint.Reader(video)
    model = STDiT(reader.stage.model, reader.stage.latent_shape[1:], reader.stage.out_channels)
    assert weights.load(video, model).format == "opensora"
    assert all(torch.equal(tensor, reader.tensor("ema", name)) for name, tensor in model.state_dict().items())
    assert not all(torch.equal(tensor, reader.tensor("model", name)) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_two_nodes_is_exported_as_one_of_one(video: Path, tmp_path: Path) -> None:
    reader, both = checkpoint.Reader(video), tmp_path / "both"
    both.mkdir()
    files: dict[str, int] = {}
    for node in (0, 1):
        saver = Saver(tmp_path / f"node{node}", reader.stage, writer=node, writers=2, here=(node,), device=torch.device("cpu"))
        shards = {part: checkpoint.divide(reader.part(part), node, 2) for part in checkpoint.TENSORS}
        saver.save(shards, video, step=2, world_size=2, seen=reader.record.seen, clips="", carried=(), reset=(), node=node)
        saver.wait()
        for file in checkpoint.directory(tmp_path / f"node{node}", 2).iterdir():
            shutil.copyfile(file, both / file.name)
            files |= {file.name: file.stat().st_size} if file.name != checkpoint.RECORD else {}
    record = json.loads((both / checkpoint.RECORD).read_text())
    (both / checkpoint.RECORD).write_text(json.dumps(record | {"files": files}))
    assert (both / "ema-00002-of-00002.safetensors").is_file()
    export(video, tmp_path / "of one")
    export(both, tmp_path / "of two")
    one, two = (load_file(tmp_path / name / "transformer" / components.WEIGHTS) for name in ("of one", "of two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_nothing_is_written_over_and_nothing_half_written_stays(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"nowhere does not exist; make it first"):
        export(video, tmp_path / "nowhere" / "out")
    with pytest.raises(ParentError):
        export(tmp_path, out)
    with monkeypatch.context() as patched:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(folder, "write_scheduler", full)
        with pytest.raises(DiskFull, match="nothing is left of it"):
            export(video, out)
    (video / "autoencoder.safetensors").rename(tmp_path / "kept")
    (video / "autoencoder.safetensors").write_bytes((tmp_path / "kept").read_bytes()[:-4] + b"1234")
    (video / "text.safetensors").write_bytes(b"x" * (video / "text.safetensors").stat().st_size)
    with pytest.raises(ParentError, match=r"text\.safetensors"):
        export(video, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "video"]
    out.mkdir()
    with pytest.raises(ConfigError, match="nothing is written over"):
        export(video, out)
