"""What a stage is: one frozen, validated object, read from one complete YAML file.

Owns the schema that travels from a recipe to a run directory (`stage.yaml`), its defaults, units and cross-field rules.
Refuses to know where a stage runs (nodes, devices, stores, prices: `orchestrator.config`) and never imports torch, so that
the control plane can plan a stage without it.

Letters: T frames · H, W pixels · C latent channels.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]


class Frozen(BaseModel):
    """A part of a configuration: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Frozen):
    """STDiT (Open-Sora 1.0 report, section "Model"). The defaults are XL/2: 760M parameters, the 724M (in units of 2^20) of the report."""

    depth: PositiveInt = 28
    """Blocks; each is spatial attention, temporal attention, cross-attention and an MLP."""
    width: PositiveInt = 1152
    """Channels of the residual stream."""
    heads: PositiveInt = 16
    """Attention heads; must divide `width`."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden width of the MLP over `width`."""
    patch: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 2, 2)
    """Latent frames, rows and columns that make one token."""
    latent_channels: PositiveInt = 4
    """C: channels of the autoencoder's latents."""
    caption_width: PositiveInt = 4096
    """Channels of the text encoder's token vectors."""
    caption_tokens: PositiveInt = 120
    """Longest caption, in tokens; longer ones are cut."""
    caption_dropout: Fraction = 0.1
    """Share of training captions replaced by the null caption, for classifier-free guidance."""
    temporal_position: Literal["attention", "residual"] = "attention"
    """Where the temporal position enters: input of block 0's temporal attention (upstream), or the residual stream before block 0."""
    space_scale: PositiveFloat = 1.0
    """Spatial positions are divided by this: 0.5 for 256 pixels under a model made for 512."""
    time_scale: PositiveFloat = 1.0
    """Temporal positions are divided by this: new frame interval over the old one."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class IDDPM(Frozen):
    """Noise prediction over discrete steps with learned-range variance (Nichol & Dhariwal 2021), as Open-Sora 1.0 trained."""

    kind: Literal["iddpm"]
    steps: PositiveInt = 1000
    """Steps of the linear noise schedule."""


class Flow(Frozen):
    """Rectified flow: predict the velocity from noise to data along straight lines (Liu et al. 2022)."""

    kind: Literal["flow"]
    time: Literal["uniform", "logit-normal"] = "logit-normal"
    """Distribution of training times in (0, 1); logit-normal as in Esser et al. 2024."""
    shift: PositiveFloat = 1.0
    """Above 1, times of training and sampling move towards noise: shift t / (1 + (shift - 1) t), Esser et al. 2024, section 5.3.2."""


Objective = Annotated[IDDPM | Flow, Field(discriminator="kind")]


class DigitsSource(Frozen):
    """Captioned moving digits, made on the machine from the handwritten digits inside scikit-learn."""

    kind: Literal["digits"]
    clips: PositiveInt
    """How many different clips; clip i is a function of (seed, i)."""
    quality: Literal["plain", "high"] = "plain"
    """plain: noisy background and jittered motion; high: clean ones, for the last stage."""


class FolderSource(Frozen):
    """A folder of video files with a `captions.csv` (columns `path,text`; paths relative to the folder)."""

    kind: Literal["folder"]
    path: str
    """Local folder or fsspec URI."""


class ManifestSource(Frozen):
    """A CSV of clips at scale (path, text, frames), as the published stages used; its size is all that a plan needs."""

    kind: Literal["manifest"]
    path: str
    """CSV file or fsspec URI."""
    clips: PositiveInt
    """Rows."""


Source = Annotated[DigitsSource | FolderSource | ManifestSource, Field(discriminator="kind")]


class DataConfig(Frozen):
    """The clips of a stage, and the size in which the model sees them."""

    source: Source
    """Where the clips come from."""
    frames: PositiveInt
    """T: frames of a clip that the model sees. 1 trains on images."""
    frame_interval: PositiveInt = 1
    """Every how many source frames one is taken."""
    height: PositiveInt
    """Pixels."""
    width: PositiveInt
    """Pixels."""


class PatchAutoencoder(Frozen):
    """Embedded: patches onto their principal components, made from the first stage's own frames. Deterministic."""

    kind: Literal["patch"]
    factor: PositiveInt = 4
    """Pixels per latent row and column."""


class KLAutoencoder(Frozen):
    """A diffusers AutoencoderKL, frames as images."""

    kind: Literal["kl"]
    path: str
    """Local directory or hub id."""
    factor: PositiveInt = 8
    """Pixels per latent row and column."""
    scale: PositiveFloat = 0.18215
    """Latents are multiplied by this (Rombach et al. 2022: unit variance on their data)."""
    micro_batch: PositiveInt | None = None
    """Frames encoded at once; none: all."""


Autoencoder = Annotated[PatchAutoencoder | KLAutoencoder, Field(discriminator="kind")]


class WordEncoder(Frozen):
    """Embedded: one fixed random vector a word, the vocabulary taken from the captions. Nothing is downloaded."""

    kind: Literal["words"]


class T5Encoder(Frozen):
    """A transformers T5EncoderModel."""

    kind: Literal["t5"]
    path: str
    """Local directory or hub id."""


TextEncoder = Annotated[WordEncoder | T5Encoder, Field(discriminator="kind")]


class OptimizerConfig(Frozen):
    """AdamW."""

    lr: PositiveFloat = 2e-5
    """Learning rate, after the warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the squares' average."""
    weight_decay: NonNegativeFloat = 0.0
    """Share of a weight taken off at each step, times the learning rate."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate ends: `linear` and `cosine` reach 0 at the last step."""
    grad_clip: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient; none: no clipping."""


class CheckpointConfig(Frozen):
    """When the trainer saves, and what it keeps."""

    every_steps: PositiveInt
    """A checkpoint each so many steps, and one at the end."""
    keep_last: PositiveInt = 2
    """Checkpoints kept in the run directory; published ones are kept by the store's own rules."""


class ParentConfig(Frozen):
    """What a stage takes from its parent's checkpoint. Position tables are recomputed for the stage's own size, always."""

    weights: Literal["ema", "model"] = "ema"
    """Which of the parent's weights become this stage's weights. Its own EMA starts from them."""
    optimizer: Literal["reset", "carry"] = "reset"
    """Whether the optimizer's moments come along. The step count always starts at 0."""


class SamplingConfig(Frozen):
    """How clips are drawn from the stage's model, where nothing else is asked for."""

    steps: PositiveInt = 100
    """Network evaluations along the way from noise to clip (twice that under guidance)."""
    method: Literal["ancestral", "ddim", "euler"] = "ancestral"
    """euler belongs to objective flow; the other two to iddpm."""
    guidance: NonNegativeFloat = 7.0
    """Classifier-free guidance scale; 1 turns it off."""
    guidance_channels: Literal["all", "first3"] = "all"
    """Which latent channels are guided. first3 is what Open-Sora 1.0 did, inherited from GLIDE."""


class EvaluateConfig(Frozen):
    """Judge the finished stage on generated clips. Costs time of the stage, and is booked as such."""

    kind: Literal["digits"]
    clips: PositiveInt = 200
    """Generated clips that are judged."""
    frames: PositiveInt
    """Frames of the clips asked for; a stage of images is asked for images and for video of so many frames."""
    seed: NonNegativeInt = 0
    """Noise of clip i is a function of (seed, i), whatever the number of ranks."""


class StageConfig(Frozen):
    """One stage of a recipe. A stage is data: the same trainer runs all of them."""

    model: ModelConfig = ModelConfig()
    """The network."""
    objective: Objective
    """What the network learns to predict."""
    data: DataConfig
    """What it learns from."""
    autoencoder: Autoencoder
    """What makes latents of frames, and frames of latents; never trained."""
    text: TextEncoder
    """What makes vectors of captions; never trained."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the weights move."""
    ema_decay: Fraction = 0.9999
    """Decay of the moving average of the weights, in fp32; it is warmed up by (1 + step) / (10 + step) where that is smaller."""
    steps: NonNegativeInt
    """Optimizer steps. 0: an import, nothing is trained."""
    batch_size: PositiveInt
    """Clips per device and step."""
    freeze: Literal["none", "temporal"] = "none"
    """temporal: the temporal attention stays at its zero effect (stage 1 on images)."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Autocast type on CUDA. A CPU always computes in fp32."""
    grad_checkpoint: bool = False
    """Recompute each block's activations in the backward pass."""
    seed: NonNegativeInt = 42
    """Base seed. Noise and times are drawn from (seed, data-parallel rank, step), so ranks differ and a resume repeats nothing."""
    checkpoint: CheckpointConfig
    """When to save."""
    parent: ParentConfig = ParentConfig()
    """What is carried over from the stage before."""
    weights: str | None = None
    """Weights imported at step 0 where there is no parent stage: a local file or directory. Refused where a key is unknown."""
    sampling: SamplingConfig = SamplingConfig()
    """How clips are drawn."""
    prompts: tuple[str, ...] = ()
    """Clips drawn at the end of the stage, with the EMA weights."""
    evaluate: EvaluateConfig | None = None
    """The judge at the end of the stage; none: nobody judges."""

    @model_validator(mode="after")
    def _fits_together(self) -> StageConfig:
        flow = self.objective.kind == "flow"
        if flow != (self.sampling.method == "euler"):
            raise ValueError(f"sampling method {self.sampling.method} does not belong to objective {self.objective.kind}")
        _, rows, columns = self.model.patch
        for name, pixels, patch in (("height", self.data.height, rows), ("width", self.data.width, columns)):
            step = self.autoencoder.factor * patch
            if pixels % step:
                raise ValueError(
                    f"data.{name} {pixels} is not a multiple of {step} (autoencoder factor {self.autoencoder.factor} x patch {patch})"
                )
        if self.data.frames % self.model.patch[0]:
            raise ValueError(f"data.frames {self.data.frames} is not a multiple of patch frames {self.model.patch[0]}")
        if self.freeze == "temporal" and self.data.frames != 1:
            raise ValueError(f"freeze temporal trains on single images, data.frames is {self.data.frames}")
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one clip's latents."""
        factor = self.autoencoder.factor
        return self.model.latent_channels, self.data.frames, self.data.height // factor, self.data.width // factor

    @property
    def tokens(self) -> tuple[int, int]:
        """(T, S): latent frames and spatial tokens a frame, after patching."""
        _, frames, rows, columns = self.latent_shape
        pt, ph, pw = self.model.patch
        return frames // pt, (rows // ph) * (columns // pw)

    @property
    def out_channels(self) -> int:
        """C for flow; 2C for iddpm, whose second half is the variance."""
        return self.model.latent_channels * (2 if self.objective.kind == "iddpm" else 1)

    def digest(self) -> str:
        """sha256 of the canonical JSON, in hex: equal for equal stages, whatever their YAML looked like."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_stage(path: Path) -> StageConfig:
    """The resolved stage of a run directory.

    Raises:
        pydantic.ValidationError, yaml.YAMLError: for what a person wrote wrong; `orchestrator.config` turns these into one line.
    """
    return StageConfig.model_validate(yaml.safe_load(path.read_text()))


def write_stage(stage: StageConfig, path: Path) -> None:
    """Write every field, defaults included: what ran is readable without the code that ran it."""
    content: dict[str, Any] = stage.model_dump(mode="json")
    path.write_text(yaml.safe_dump(content, sort_keys=False))
