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
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

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
    """A CSV of clips at scale (path, text), as the published stages used. Paths may lie anywhere; a plan needs its size alone."""

    kind: Literal["manifest"]
    path: str
    """CSV file or fsspec URI."""
    clips: PositiveInt
    """Rows."""


Source = Annotated[DigitsSource | FolderSource | ManifestSource, Field(discriminator="kind")]


class Bucket(Frozen):
    """One size of clips, and how many of them make a batch."""

    frames: PositiveInt
    """T: 1 is an image."""
    height: PositiveInt
    """Pixels."""
    width: PositiveInt
    """Pixels."""
    batch_size: PositiveInt
    """Clips of this size per data-parallel rank and step."""


class DataConfig(Frozen):
    """The clips of a stage, and the sizes in which the model sees them."""

    source: Source
    """Where the clips come from."""
    frames: PositiveInt
    """T: frames of a clip. 1 trains on images."""
    frame_interval: PositiveInt = 1
    """Every how many source frames one is taken."""
    height: PositiveInt
    """Pixels."""
    width: PositiveInt
    """Pixels."""
    buckets: tuple[Bucket, ...] = ()
    """Sizes to train on where there are several: each clip goes to the one that fits it best. frames x height x width above is then
    what is drawn from the model, and what `space_scale` is meant for. None: that size alone, with the stage's batch_size."""
    horizontal_flip: bool = False
    """Mirror clips at random, once an epoch. Clips whose caption names a side or a turn (left, clockwise) never are."""


class PatchAutoencoder(Frozen):
    """Embedded: patches onto their principal components, made from the first stage's own frames. Deterministic."""

    kind: Literal["patch"]
    factor: PositiveInt = 4
    """Pixels per latent row and column."""


class KLAutoencoder(Frozen):
    """A diffusers AutoencoderKL, frames as images."""

    kind: Literal["kl"]
    path: str
    """Folder, s3://…, hub id (owner/name, owner/name@revision), or a name given by osctl weights add."""
    factor: PositiveInt = 8
    """Pixels per latent row and column."""
    scale: PositiveFloat | None = None
    """Latents are multiplied by this; none: `scaling_factor` of its own config.json (0.18215 for Stable Diffusion's)."""
    posterior: Literal["sample", "mode"] = "sample"
    """Which point of the encoder's distribution is a clip's latent. Drawn once, from the clip's index, when the clip is cached."""
    micro_batch: PositiveInt | None = 16
    """Frames encoded or decoded at once; none: all."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type that it computes in."""


Autoencoder = Annotated[PatchAutoencoder | KLAutoencoder, Field(discriminator="kind")]


class WordEncoder(Frozen):
    """Embedded: one fixed random vector a word, the vocabulary taken from the captions. Nothing is downloaded."""

    kind: Literal["words"]


class T5Encoder(Frozen):
    """A transformers T5EncoderModel."""

    kind: Literal["t5"]
    path: str
    """Folder, s3://…, hub id (owner/name, owner/name@revision), or a name given by osctl weights add."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Type that it computes in. T5 overflows in fp16."""


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
    """Checkpoints kept in the run directory, on several nodes three at least; published ones are kept by the store's own rules."""
    keep_every: PositiveInt | None = None
    """Of the older ones, those whose step is a multiple of this are kept too; none: none of them."""
    background: bool = True
    """Copy to memory, then write while training goes on. Off: training stands still, and the copy's memory is saved."""


class Activations(Frozen):
    """What the forward pass keeps for the backward pass: less memory for more time. `osctl plan` shows what each choice needs."""

    recompute: Literal["none", "selective", "full", "auto"] = "none"
    """none: keep all. selective: keep the results of matrix products and attention, recompute what is cheap. full: keep what lies between
    groups of blocks. auto: the fastest that fits the device, on CUDA."""
    every: PositiveInt = 1
    """full: blocks of a group. More keep fewer boundaries and need more memory while a group is recomputed."""
    offload: bool = False
    """full: boundaries wait in host memory."""
    mlp_chunks: PositiveInt = 1
    """Parts of the tokens that the MLP goes through one after the other, each recomputed in the backward pass; 1: all at once."""

    @model_validator(mode="after")
    def _only_of_full(self) -> Activations:
        if self.recompute != "full" and (self.every > 1 or self.offload):
            raise ValueError(f"every and offload belong to recompute full, this is {self.recompute}")
        return self


class Parallel(Frozen):
    """How the ranks share the work."""

    strategy: Literal["ddp", "fsdp", "colossalai"] = "ddp"
    """ddp: every rank holds everything. fsdp: weights, gradients and optimizer are divided (torch's FSDP2). colossalai: its Booster."""
    sequence: PositiveInt = 1
    """Ranks that share each clip: a rank holds a part of the frames, or of the spatial tokens, and they exchange twice a block (DSP,
    Zhao et al., arXiv:2403.10266). Must divide the number of ranks."""
    shard: PositiveInt | None = None
    """fsdp: ranks that divide one copy of the weights; the others hold further copies (HSDP). Must divide their number; none: all."""
    plugin: Literal["torch_ddp", "low_level_zero", "gemini", "hybrid_parallel"] = "torch_ddp"
    """colossalai: the Booster plugin. All but torch_ddp need CUDA."""

    @property
    def ranks_a_clip(self) -> int:
        """Neighbouring ranks that see the same clips: they share each, or the layers that it goes through (hybrid_parallel: two)."""
        return self.sequence * (2 if self.plugin == "hybrid_parallel" else 1)

    @model_validator(mode="after")
    def _belong_together(self) -> Parallel:
        if self.shard is not None and self.strategy != "fsdp":
            raise ValueError(f"shard belongs to strategy fsdp, this is {self.strategy}")
        if self.plugin != "torch_ddp" and self.strategy != "colossalai":
            raise ValueError(f"plugin belongs to strategy colossalai, this is {self.strategy}")
        if self.sequence > 1 and self.strategy == "colossalai":
            raise ValueError(f"sequence {self.sequence} goes with ddp or fsdp, not with colossalai")
        return self


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


ADDED = ("accumulate",)
"""Fields of `StageConfig` that 0.1.0 did not have."""


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
    """Clips per data-parallel rank and part of a step; with `data.buckets` each bucket has its own, and this one is not used."""
    accumulate: PositiveInt = 1
    """Parts of a step, one after the other, whose gradients are added up: half the devices with twice the parts have the same global
    batch, and the stage goes on where it was."""
    freeze: Literal["none", "temporal"] = "none"
    """temporal: the temporal attention stays at its zero effect (stage 1 on images)."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Autocast type on CUDA. A CPU always computes in fp32."""
    activations: Activations = Activations()
    """What is kept for the backward pass."""
    parallel: Parallel = Parallel()
    """How the ranks share the work."""
    compile: bool = True
    """Compile each block on CUDA (torch.compile). A CPU gains nothing from it and never compiles."""
    loss_spike: Annotated[float, Field(gt=1)] | None = 10.0
    """The stage ends (class spike) when the loss stays above so many times the median of 100 steps for 3 steps in a row; none: never."""
    seed: NonNegativeInt = 42
    """Base seed. Noise and times are drawn from (seed, data-parallel rank, step), so ranks differ and a resume repeats nothing."""
    checkpoint: CheckpointConfig
    """When to save."""
    parent: ParentConfig = ParentConfig()
    """What is carried over from the stage before."""
    weights: str | None = None
    """Weights imported at step 0 where there is no parent stage: a file or folder, s3://…, https://…, owner/name@revision of the hub, or a
    name given by osctl weights add. Refused where a key is unknown."""
    sampling: SamplingConfig = SamplingConfig()
    """How clips are drawn."""
    prompts: tuple[str, ...] = ()
    """Clips drawn at the end of the stage, with the EMA weights."""
    evaluate: EvaluateConfig | None = None
    """The judge at the end of the stage; none: nobody judges."""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields that a later release than 0.1.0 added are left out while they have their default: what is written then has the digest
        that it always had, and an older release can read it."""
        content: dict[str, Any] = write(self)
        for name in ADDED:
            if content.get(name) == StageConfig.model_fields[name].default:
                content.pop(name, None)
        return content

    @model_validator(mode="after")
    def _fits_together(self) -> StageConfig:
        flow = self.objective.kind == "flow"
        if flow != (self.sampling.method == "euler"):
            raise ValueError(f"sampling method {self.sampling.method} does not belong to objective {self.objective.kind}")
        frames, rows, columns = self.model.patch
        places: list[tuple[str, DataConfig | Bucket]] = [("data", self.data)]
        places += [(f"data.buckets.{number}", bucket) for number, bucket in enumerate(self.data.buckets)]
        factor = self.autoencoder.factor
        for place, size in places:
            for name, pixels, patch in (("height", size.height, rows), ("width", size.width, columns)):
                if pixels % (factor * patch):
                    raise ValueError(
                        f"{place}.{name} {pixels} is not a multiple of {factor * patch} (autoencoder factor {factor} x patch {patch})"
                    )
            if size.frames % frames:
                raise ValueError(f"{place}.frames {size.frames} is not a multiple of patch frames {frames}")
            if self.freeze == "temporal" and size.frames != 1:
                raise ValueError(f"freeze temporal trains on single images, {place}.frames is {size.frames}")
        sizes = [(bucket.frames, bucket.height, bucket.width) for bucket in self.data.buckets]
        for number, size_of in enumerate(sizes):
            if size_of in sizes[:number]:
                raise ValueError(f"data.buckets.{number}: {'x'.join(map(str, size_of))} is there already; one batch_size a size")
        return self

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The sizes that the stage trains on: `data.buckets`, or the one size of `data`."""
        data = self.data
        return data.buckets or (Bucket(frames=data.frames, height=data.height, width=data.width, batch_size=self.batch_size),)

    def latent_shape_of(self, size: Bucket | DataConfig) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip of this size."""
        return self.model.latent_channels, size.frames, size.height // self.autoencoder.factor, size.width // self.autoencoder.factor

    def tokens_of(self, size: Bucket | DataConfig) -> tuple[int, int]:
        """(T, S) of a clip of this size: latent frames and spatial tokens a frame, after patching."""
        _, frames, rows, columns = self.latent_shape_of(size)
        pt, ph, pw = self.model.patch
        return frames // pt, (rows // ph) * (columns // pw)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip of `data`'s size."""
        return self.latent_shape_of(self.data)

    @property
    def tokens(self) -> tuple[int, int]:
        """(T, S) of a clip of `data`'s size."""
        return self.tokens_of(self.data)

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
