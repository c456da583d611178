"""Write the components of an export: transformer, autoencoder, text encoder with tokenizer, and scheduler.

Each function writes the weights, the configuration and the code of one component into its folder, and returns what model_index.json says of
it: `[module, class]`, and settings of the pipeline. Weights are copied from file to file, tensor by tensor.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.encoders import files as encoder_files
from opensora.encoders import protocol as encoders
from opensora.encoders.published import TOKENIZER_FILES
from opensora.export.files import Say, copy_weights, shapes_of, write_json, write_model, write_tensors
from opensora.export.source_code import write_code

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_transformer(reader: checkpoint.Reader, folder: Path, weights: str, dtype: torch.dtype, say: Say) -> list[str]:
    stage, names = reader.stage, reader.names(weights)
    shapes = {f"network.{name}": shape for name, shape in names.items()}
    facts = {"model": stage.model.model_dump(mode="json"), "input_size": stage.latent_shape[1:], "out_channels": stage.out_channels}
    folder.mkdir()
    write_model(folder, "OpenSoraTransformer", facts)
    size = write_tensors(folder / WEIGHTS, shapes, dtype, lambda name: reader.tensor(weights, name.removeprefix("network.")), say)
    say(f"transformer: {len(shapes)} tensors ({weights}), {size / 2**20:.1f} MiB")
    return [write_code("transformer", folder), "OpenSoraTransformer"]


def write_autoencoder(source: Path, stage: StageConfig, folder: Path, say: Say) -> dict[str, Any]:
    path = source / encoders.AUTOENCODER_FILE
    folder.mkdir()
    if stage.autoencoder.kind == "kl":
        named = encoders.KLAutoencoder.load(path)
        # the stage may have given it another scale than its own
        write_json(folder / "config.json", named.source.config | {"scaling_factor": named.scale, "shift_factor": named.shift})
        copy_weights(named.source.weights(), named.source.folder, folder)
        say(f"vae: AutoencoderKL of {stage.autoencoder.path}")
        how = {"vae_dtype": stage.autoencoder.dtype, "vae_frames": stage.autoencoder.micro_batch}
        return {"vae": ["diffusers", "AutoencoderKL"], **how}
    tensors, told = encoder_files.read(path, "patch", ("mean", "components", "deviation"), ("factor",))
    write_model(folder, "OpenSoraPatchAutoencoder", {"factor": told["factor"], "channels": len(tensors["components"])})
    write_tensors(folder / WEIGHTS, shapes_of(tensors), torch.float32, tensors.__getitem__)
    say("vae: patch autoencoder")
    return {"vae": [write_code("vae", folder), "OpenSoraPatchAutoencoder"]}


def write_text_encoder(source: Path, stage: StageConfig, root: Path, say: Say) -> dict[str, Any]:
    path, folder, words = source / encoders.TEXT_FILE, root / "text_encoder", root / "tokenizer"
    folder.mkdir()
    words.mkdir()
    if stage.text.kind == "t5":
        found = encoders.T5Encoder.load(path).source
        write_json(folder / "config.json", found.config)
        copy_weights(found.weights(), found.folder, folder)
        assert found.tokenizer is not None  # PublishedModel.find refuses a T5 without a tokenizer
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
    write_model(folder, "OpenSoraWordEncoder", {"words": count, "width": width})
    write_tensors(folder / WEIGHTS, shapes_of(tensors), torch.float32, tensors.__getitem__)
    write_json(words / "words.json", {"split": told.get("split", 1), "words": told["vocabulary"]})
    say(f"text_encoder: {count} words")
    return {
        "text_encoder": [write_code("text_encoder", folder), "OpenSoraWordEncoder"],
        "tokenizer": [write_code("tokenizer", words), "OpenSoraWords"],
    }


def write_scheduler(stage: StageConfig, folder: Path) -> list[str]:
    folder.mkdir()
    facts = {"objective": stage.objective.model_dump(mode="json"), "sampling": stage.sampling.model_dump(mode="json")}
    write_model(folder, "OpenSoraScheduler", facts, name="scheduler_config.json")
    return [write_code("scheduler", folder), "OpenSoraScheduler"]
