"""Exports are opened by a fresh process with a stock diffusers (opened_by_diffusers.py): it starts once for all clips of this file."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from tiny_encoders import WIDTH, make_autoencoder, make_text

from opensora import checkpoint, export, sample, train, weights
from opensora.config import StageConfig, write_stage
from opensora.errors import ConfigError, DiskFull, ParentError
from opensora.exported.rearrange import rearrange as stand_in
from opensora.model import STDiT
from opensora.run_directory import RunDirectory
from opensora.saver import Saver

PROMPTS = ["a digit 3 moving left", "a digit 7 moving up"]
STOCK = {"torch", "diffusers", "transformers", "numpy", "PIL"}


def trained(folder: Path, stage: StageConfig) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    write_stage(stage, folder / "stage.yaml")
    run = RunDirectory(folder, rank=0)
    assert train.run_reported(run, train.Notice()) == 0
    return checkpoint.directory(run.checkpoints, stage.steps)


@pytest.fixture
def video(tmp_path: Path, tiny_stage: Callable[..., StageConfig]) -> Path:
    """Two steps, at a rate at which they matter."""
    return trained(tmp_path / "video", tiny_stage(data={"frames": 4}, steps=2, optimizer={"warmup_steps": 0, "lr": 0.1}))


def drawn(path: Path, seeds: list[int], frames: int = 4, **sampling: Any) -> np.ndarray[Any, Any]:
    sampler = sample.Sampler.open(path, device=torch.device("cpu"))
    sampler.sampling = sampler.sampling.model_copy(update=sampling)
    return sampler.generate(PROMPTS[: len(seeds)], frames, seeds).numpy()


def stock_diffusers(jobs: list[dict[str, Any]], home: Path) -> None:
    """Runs the jobs in a fresh process, outside of this checkout."""
    script = Path(__file__).parents[1] / "opened_by_diffusers.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", str(script)], input=json.dumps(jobs), cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_stock_diffusers_draws_the_same_frames(video: Path, tmp_path: Path, tiny_stage: Callable[..., StageConfig]) -> None:
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
    export.export(video, tmp_path / "0")
    export.export(video, tmp_path / "1", dtype="bf16", weights="model")
    export.export(diffusion, tmp_path / "2")
    export.export(published, tmp_path / "3")
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
    assert load_file(again / "transformer" / export.WEIGHTS).keys() == load_file(flow / "transformer" / export.WEIGHTS).keys()


def test_an_export_is_loaded_as_weights(video: Path, tmp_path: Path) -> None:
    reader = checkpoint.open_(video)
    for dtype, source in (("fp32", "ema"), ("bf16", "model")):
        folder = tmp_path / dtype
        export.export(video, folder, dtype=dtype, weights=source)  # type: ignore[arg-type]
        for path in (folder, folder / "transformer"):
            model = STDiT(reader.stage.model, reader.stage.latent_shape[1:], reader.stage.out_channels)
            assert weights.load(path, model).format == "osctl export"
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, reader.tensor(source, name).to(export.TYPES[dtype]).float()), name


def test_of_a_checkpoint_the_moving_average_is_loaded_as_weights(video: Path) -> None:
    reader = checkpoint.open_(video)
    model = STDiT(reader.stage.model, reader.stage.latent_shape[1:], reader.stage.out_channels)
    assert weights.load(video, model).format == "opensora"
    assert all(torch.equal(tensor, reader.tensor("ema", name)) for name, tensor in model.state_dict().items())
    assert not all(torch.equal(tensor, reader.tensor("model", name)) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_two_nodes_is_exported_as_one_of_one(video: Path, tmp_path: Path) -> None:
    reader, both = checkpoint.open_(video), tmp_path / "both"
    both.mkdir()
    files: dict[str, int] = {}
    for node in (0, 1):
        saver = Saver(tmp_path / f"node{node}", reader.stage, shard=node, shards=2, here=(node,), device=torch.device("cpu"))
        pieces = {part: checkpoint.share(reader.part(part), node, 2) for part in checkpoint.TENSORS}
        saver.save(pieces, video, step=2, world_size=2, seen=reader.record.seen, clips="", carried=(), reset=(), node=node)
        saver.wait()
        for file in checkpoint.directory(tmp_path / f"node{node}", 2).iterdir():
            shutil.copyfile(file, both / file.name)
            files |= {file.name: file.stat().st_size} if file.name != checkpoint.RECORD else {}
    record = json.loads((both / checkpoint.RECORD).read_text())
    (both / checkpoint.RECORD).write_text(json.dumps(record | {"files": files}))
    assert (both / "ema-00002-of-00002.safetensors").is_file()
    export.export(video, tmp_path / "of one")
    export.export(both, tmp_path / "of two")
    one, two = (load_file(tmp_path / name / "transformer" / export.WEIGHTS) for name in ("of one", "of two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_every_file_imports_what_lies_beside_it_and_stock_packages_alone(video: Path, tmp_path: Path) -> None:
    export.export(video, tmp_path / "out")
    texts: dict[str, set[str]] = {}
    for file in (tmp_path / "out").rglob("*.py"):
        texts.setdefault(file.name, set()).add(file.read_text())
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                modules = [node.module] if node.module else [name.name for name in node.names]
                assert all((file.parent / f"{module}.py").is_file() for module in modules), (file, modules)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                assert {name.split(".")[0] for name in names} <= STOCK | set(sys.stdlib_module_names), (file, names)
    # diffusers puts the files of all folders into one: a name may not mean two things
    assert "opensora_config.py" in texts and all(len(each) == 1 for each in texts.values())


def patterns() -> list[tuple[str, list[str]]]:
    """Each `rearrange` that an export holds: its pattern, and the axes that it is given the sizes of."""
    found = {}
    for module in export._modules():
        if module in ("opensora.config", "opensora.exported.rearrange"):
            continue
        for node in ast.walk(ast.parse(export._path(module).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "rearrange":
                assert isinstance(node.args[1], ast.Constant)
                found[str(node.args[1].value)] = [str(keyword.arg) for keyword in node.keywords]
    return sorted(found.items())


@pytest.mark.parametrize(("pattern", "given"), patterns())
def test_rearrange_without_einops_is_that_of_einops(pattern: str, given: list[str]) -> None:
    left = pattern.split("->")[0]
    axes = {name: 2 + number for number, name in enumerate(dict.fromkeys(left.replace("(", " ").replace(")", " ").split()))}
    groups = re.findall(r"\([^()]*\)|\S+", left)
    shape = [int(np.prod([axes[name] for name in group.strip("()").split()])) for group in groups]
    tensor, sizes = torch.arange(float(np.prod(shape))).reshape(shape), {name: axes[name] for name in given}
    assert torch.equal(stand_in(tensor, pattern, **sizes), rearrange(tensor, pattern, **sizes))


def test_rearrange_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        stand_in(torch.zeros(5, 2), "(a b) c -> a b c", b=2)
    with pytest.raises(ValueError, match="does not divide"):
        stand_in(torch.zeros(6, 2), "(a b) c -> a b c", a=2, b=2)


def test_nothing_is_written_over_and_nothing_half_written_stays(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"nowhere does not exist; make it first"):
        export.export(video, tmp_path / "nowhere" / "out")
    with pytest.raises(ParentError):
        export.export(tmp_path, out)
    with monkeypatch.context() as patched:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(export, "_scheduler", full)
        with pytest.raises(DiskFull, match="nothing is left of it"):
            export.export(video, out)
    (video / "autoencoder.safetensors").rename(tmp_path / "kept")
    (video / "autoencoder.safetensors").write_bytes((tmp_path / "kept").read_bytes()[:-4] + b"1234")
    (video / "text.safetensors").write_bytes(b"x" * (video / "text.safetensors").stat().st_size)
    with pytest.raises(ParentError, match=r"text\.safetensors"):
        export.export(video, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "video"]
    out.mkdir()
    with pytest.raises(ConfigError, match="nothing is written over"):
        export.export(video, out)


def test_the_command_says_what_it_wrote_on_stderr_and_where_on_stdout(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(video), str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out'}\n" and "transformer: 54 tensors (ema)" in said.err
    assert export.main([str(video), str(tmp_path / "out")]) == 2
    (video / "ema.safetensors").unlink()
    assert export.main([str(video), str(tmp_path / "other")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)


def test_tensors_are_asked_for_one_by_one_and_the_file_is_safetensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b.c": torch.tensor(2.5), "d": torch.randn(2, 0), "e": torch.randn(4, 4).T}
    asked = []

    def tensor(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    for dtype in (torch.float32, torch.bfloat16):
        size = export.write_tensors(tmp_path / "x", {name: tuple(value.shape) for name, value in tensors.items()}, dtype, tensor)
        assert size == (tmp_path / "x").stat().st_size
        found = load_file(tmp_path / "x")
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], value.to(dtype)) for name, value in tensors.items())
    assert asked == [*tensors, *tensors]
