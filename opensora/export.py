"""A checkpoint as a folder that diffusers opens: `python -m opensora.export CHECKPOINT_DIR OUT`.

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained("OUT", custom_pipeline="OUT", trust_remote_code=True)
    clip = pipeline("a digit 3 moving left", generator=torch.Generator().manual_seed(0)).frames[0]

Owns the folder: weights, encoders, configuration, and the code that runs them. That code is this package's own source, file by file
(`opensora.exported` and what it imports), with three changes: imports are relative and begin with `opensora_`, since diffusers puts the
files of all local folders side by side; `rearrange` stands for einops; and the configuration has no pydantic. So it runs where only
torch, diffusers and transformers are installed, and gives the frames of `opensora.sample`.

The folder is built under a hidden name and renamed: it is whole or it is not there. An existing one is never written to. What a killed
export left there, the next one removes, whatever its name: an export holds a lock on its folder while it lives. Weights go from file to
file tensor by tensor.
"""

from __future__ import annotations

import argparse
import ast
import errno
import fcntl
import importlib.metadata
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opensora import checkpoint, encoder_files, encoders
from opensora.checkpoint import DTYPES
from opensora.config import StageConfig, write_stage
from opensora.errors import ConfigError, DiskFull, TrainerError
from opensora.pretrained_encoders import TOKENIZER_FILES

PACKAGE = Path(__file__).parent
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model.safetensors"
NAME_CHARACTERS = 40
"""Of the target's name in that of the hidden folder: a name has a longest length, too."""

Say = Callable[[str], None]


def export(
    source: Path,
    target: Path,
    *,
    weights: Literal["ema", "model"] = "ema",
    dtype: Literal["fp32", "bf16"] = "fp32",
    say: Say = lambda _: None,
) -> None:
    """Write the folder.

    Args:
        source: a checkpoint directory.
        target: a folder that does not exist, in one that does.
        weights: which of the checkpoint's.
        dtype: of the transformer's weights in the file.
        say: is told what was written.

    Raises:
        ConfigError: the target cannot be made, or an encoder that the checkpoint names is not there.
        ParentError: the checkpoint is not whole, or what it names is another model now.
        DiskFull: what was written is removed.
    """
    if target.exists():
        raise ConfigError(f"export {target}: it exists, and nothing is written over; remove it or name another folder")
    if not target.parent.is_dir():
        raise ConfigError(f"export {target}: the folder {target.parent} does not exist; make it first")
    reader = checkpoint.open_(source)
    try:
        _sweep(target.parent)
        partial, lock = _begin(target)
    except OSError as error:
        raise _refused(target, error) from error
    try:
        index: dict[str, Any] = {"_class_name": ["pipeline", "OpenSoraPipeline"], "_diffusers_version": _diffusers()}
        index["transformer"] = _transformer(reader, partial / "transformer", weights, TYPES[dtype], say)
        index |= _autoencoder(source, reader.stage, partial / "vae", say)
        index |= _text(source, reader.stage, partial, say)
        index["scheduler"] = _scheduler(reader.stage, partial / "scheduler")
        _write_code("pipeline", partial, as_name="pipeline")
        _write_json(partial / "model_index.json", index)
        write_stage(reader.stage, partial / "stage.yaml")
        (partial / "README.md").write_text(_readme(reader, weights, index))
        partial.rename(target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _refused(target: Path, error: OSError) -> Exception:
    if error.errno in checkpoint.FULL:
        return DiskFull(f"export {target}: {error}; nothing is left of it, make room and export again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(f"export {target}: {error.strerror}; name a folder that can be written")
    return error


def _begin(target: Path) -> tuple[Path, int]:
    """A hidden folder beside the target, and the descriptor that locks it for as long as this process lives."""
    while True:
        partial = target.parent / f".{target.name[:NAME_CHARACTERS]}.osctl-{secrets.token_hex(4)}.partial"
        partial.mkdir()
        try:
            lock = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another export saw it before it was locked
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if partial.is_dir():
                return partial, lock
        except BlockingIOError:
            pass  # another export is about to sweep it away: make another one
        os.close(lock)


def _sweep(folder: Path) -> None:
    """Remove what killed exports left in this folder, whatever they were to be called."""
    for left in folder.glob(".*.osctl-????????.partial"):
        with suppress(OSError):  # somebody else's, or gone
            lock = os.open(left, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


# ------------------------------------------------------------------------------------------------------------------
# Components: each returns its line of model_index.json, [module, class]
# ------------------------------------------------------------------------------------------------------------------


def _transformer(reader: checkpoint.Reader, folder: Path, weights: str, dtype: torch.dtype, say: Say) -> list[str]:
    stage, names = reader.stage, reader.names(weights)
    shapes = {f"network.{name}": shape for name, shape in names.items()}
    facts = {"model": stage.model.model_dump(mode="json"), "input_size": stage.latent_shape[1:], "out_channels": stage.out_channels}
    folder.mkdir()
    _write_model(folder, "OpenSoraTransformer", facts)
    size = write_tensors(folder / WEIGHTS, shapes, dtype, lambda name: reader.tensor(weights, name.removeprefix("network.")), say)
    say(f"transformer: {len(shapes)} tensors ({weights}), {size / 2**20:.1f} MiB")
    return [_write_code("transformer", folder), "OpenSoraTransformer"]


def _autoencoder(source: Path, stage: StageConfig, folder: Path, say: Say) -> dict[str, Any]:
    path = source / encoders.AUTOENCODER_FILE
    folder.mkdir()
    if stage.autoencoder.kind == "kl":
        named = encoders.KLAutoencoder.load(path)
        # its own scale may not be the one that the stage gave it
        _write_json(folder / "config.json", named.source.config | {"scaling_factor": named.scale, "shift_factor": named.shift})
        _copy(named.source.weights(), named.source.folder, folder)
        say(f"vae: AutoencoderKL of {stage.autoencoder.path}")
        how = {"vae_dtype": stage.autoencoder.dtype, "vae_frames": stage.autoencoder.micro_batch}
        return {"vae": ["diffusers", "AutoencoderKL"], **how}
    tensors, told = encoder_files.read(path, "patch", ("mean", "components", "deviation"), ("factor",))
    _write_model(folder, "OpenSoraPatchAutoencoder", {"factor": told["factor"], "channels": len(tensors["components"])})
    write_tensors(folder / WEIGHTS, _shapes(tensors), torch.float32, tensors.__getitem__)
    say("vae: patch autoencoder")
    return {"vae": [_write_code("vae", folder), "OpenSoraPatchAutoencoder"]}


def _text(source: Path, stage: StageConfig, root: Path, say: Say) -> dict[str, Any]:
    path, folder, words = source / encoders.TEXT_FILE, root / "text_encoder", root / "tokenizer"
    folder.mkdir()
    words.mkdir()
    if stage.text.kind == "t5":
        found = encoders.T5Encoder.load(path).source
        _write_json(folder / "config.json", found.config)
        _copy(found.weights(), found.folder, folder)
        assert found.tokenizer is not None  # Source.find of a T5 refuses one without
        for name in TOKENIZER_FILES:
            if (found.tokenizer / name).is_file():
                shutil.copyfile(found.tokenizer / name, words / name)
        say(f"text_encoder: T5EncoderModel of {stage.text.path}")
        tokenizer = json.loads((words / "tokenizer_config.json").read_bytes()) if (words / "tokenizer_config.json").is_file() else {}
        return {
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", tokenizer.get("tokenizer_class") or "T5TokenizerFast"],
            "text_dtype": stage.text.dtype,
            "clean_captions": True,
        }
    tensors, told = encoder_files.read(path, "words", ("vectors",), ("vocabulary",))
    count, width = tensors["vectors"].shape
    _write_model(folder, "OpenSoraWordEncoder", {"words": count, "width": width})
    write_tensors(folder / WEIGHTS, _shapes(tensors), torch.float32, tensors.__getitem__)
    _write_json(words / "words.json", told["vocabulary"])
    say(f"text_encoder: {count} words")
    return {
        "text_encoder": [_write_code("text_encoder", folder), "OpenSoraWordEncoder"],
        "tokenizer": [_write_code("tokenizer", words), "OpenSoraWords"],
    }


def _scheduler(stage: StageConfig, folder: Path) -> list[str]:
    folder.mkdir()
    facts = {"objective": stage.objective.model_dump(mode="json"), "sampling": stage.sampling.model_dump(mode="json")}
    _write_model(folder, "OpenSoraScheduler", facts, name="scheduler_config.json")
    return [_write_code("scheduler", folder), "OpenSoraScheduler"]


# ------------------------------------------------------------------------------------------------------------------
# Code
# ------------------------------------------------------------------------------------------------------------------


COMPONENTS = ("pipeline", "transformer", "scheduler", "vae", "text_encoder", "tokenizer")


def _write_code(name: str, folder: Path, *, as_name: str | None = None) -> str:
    """A module of `opensora.exported` and all that it imports of this package. Returns its name there."""
    modules, root = _modules(), f"opensora.exported.{name}"
    needed, waiting = {root}, [root]
    while waiting:
        new = modules[waiting.pop()].needs - needed
        needed |= new
        waiting += new
    for module in needed - {root}:
        (folder / f"{_there(module)}.py").write_text(modules[module].text)
    # diffusers copies what a component's file imports, and not what those files import in turn
    beside = "".join(f"from .{_there(module)} import __name__ as _\n" for module in sorted(needed - {root}))
    future = "from __future__ import annotations\n"
    head, tail = modules[root].text.split(future)
    named = as_name or _there(root)
    (folder / f"{named}.py").write_text(f"{head}{future}\n{beside}{tail}")
    return named


@dataclass(frozen=True)
class _Module:
    text: str
    needs: frozenset[str]


@cache
def _modules() -> dict[str, _Module]:
    """All modules of this package that any component needs, as they are written into an export.

    One text each, whichever component it is for: diffusers puts the files of all components into one folder.
    """
    found: dict[str, _Module] = {}
    fields: set[str] = set()  # what is needed of opensora.config
    waiting = [f"opensora.exported.{name}" for name in COMPONENTS]
    while waiting:
        module = waiting.pop()
        if module not in found and module != "opensora.config":
            text, needs, names = _adapted(_path(module).read_text())
            found[module] = _Module(text, frozenset(needs))
            waiting += needs
            fields |= names
    found["opensora.config"] = _Module(_plain_config(fields), frozenset())
    return found


def _adapted(text: str) -> tuple[str, list[str], set[str]]:
    """A module's text with other imports, the modules of this package it imports, the names it takes from `opensora.config`."""
    lines, needs, fields = text.splitlines(keepends=True), [], set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or node.module is None or node.module.split(".")[0] not in ("opensora", "einops"):
            assert not (isinstance(node, ast.Import) and any(name.name.split(".")[0] == "opensora" for name in node.names))
            continue
        names = [(name.name, name.asname) for name in node.names]
        if node.module == "opensora":
            new = "from . import " + ", ".join(f"{_there(f'opensora.{name}')} as {alias or name}" for name, alias in names)
            needs += [f"opensora.{name}" for name, _ in names]
        else:
            module = "opensora.exported.rearrange" if node.module == "einops" else node.module
            new = f"from .{_there(module)} import " + ", ".join(f"{name} as {alias}" if alias else name for name, alias in names)
            needs.append(module)
            fields |= {name for name, _ in names} if module == "opensora.config" else set()
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + new + "\n"] + [""] * (node.end_lineno - node.lineno)
    return "".join(lines), needs, fields


def _plain_config(names: Iterable[str]) -> str:
    """Classes of `opensora.config` with their fields, defaults and words, without what checks them: values come from a checked stage."""
    text = _path("opensora.config").read_text()
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    parts = [
        '"""The parts of osctl\'s configuration that the code beside this file needs, as `opensora.config` describes them."""\n',
        "from __future__ import annotations\n",
        "from dataclasses import dataclass\nfrom typing import Any, Literal\n",
    ]
    for name, node in classes.items():
        if name in names:
            kept = [part for part in node.body if isinstance(part, ast.AnnAssign | ast.Expr)]
            body = "\n".join(f"    {ast.get_source_segment(text, part)}" for part in kept)
            parts.append(f"\n@dataclass(frozen=True)\nclass {name}:\n{body}\n")
    parts += [f"\n{name} = Any\n" for name in sorted(set(names) - classes.keys())]  # unions of classes: in annotations alone
    return "\n".join(parts)


def _path(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _there(module: str) -> str:
    """A module's name in an export, where all lie side by side."""
    return "opensora_" + module.removeprefix("opensora.").removeprefix("exported.").replace(".", "_")


# ------------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------------


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, tensor: Callable[[str], Tensor], say: Say = lambda _: None
) -> int:
    """A safetensors file of one type, written tensor by tensor: `tensor(name)` is asked for when its turn comes. Returns its bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    written, told = 0, 0
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in shapes:
            written += file.write(tensor(name).to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if written - told >= 2**28:
                told = written
                say(f"{path.parent.name}: {written / 2**20:.0f} of {end / 2**20:.0f} MiB")
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _copy(weights: Iterable[Path], source: Path, folder: Path) -> None:
    """Weight files and the index of their shards."""
    for path in (*weights, *source.glob("*.safetensors.index.json")):
        shutil.copyfile(path, folder / path.name)


def _write_model(folder: Path, kind: str, facts: Mapping[str, Any], *, name: str = "config.json") -> None:
    _write_json(folder / name, {"_class_name": kind, "_diffusers_version": _diffusers(), **facts})


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _diffusers() -> str:
    return importlib.metadata.version("diffusers")


def _readme(reader: checkpoint.Reader, weights: str, index: Mapping[str, Any]) -> str:
    stage, encoder = reader.stage, index.get("text_dtype", "fp32")
    kept = ', torch_dtype={"default": torch.float32, "text_encoder": torch.bfloat16}' if encoder == "bf16" else ""
    frames, height, width = stage.data.frames, stage.data.height, stage.data.width
    prompt = stage.prompts[0] if stage.prompts else "a digit 3 moving left"
    return f"""# A text-to-video model, exported by osctl

STDiT of {stage.model.depth} blocks and width {stage.model.width}, step {reader.record.step} of {reader.record.steps}
({"moving average" if weights == "ema" else "last"} weights), for clips of {frames}x{height}x{width}. `stage.yaml` says how it was trained.

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True{kept})
frames = pipeline({prompt!r}, generator=torch.Generator().manual_seed(0)).frames[0]  # PIL images
```

The code beside the weights is osctl's own, copied; it needs torch 2.11 or newer, diffusers and transformers.
"""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m opensora.export", description="Write a checkpoint as a folder that diffusers opens.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint directory, for example run/checkpoints/step-00000100")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="the moving average, or the last weights [ema]")
    parser.add_argument("--dtype", choices=tuple(TYPES), default="fp32", help="type of the transformer's weights [fp32]")
    return parser.parse_args(argv)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """0 done · 1 it failed · 2 the command is wrong."""
    args = _arguments(argv)
    try:
        export(args.checkpoint, args.out, weights=args.weights, dtype=args.dtype, say=_say)
    except TrainerError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if error.kind == "config" else 1
    sys.stdout.write(f"{args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
