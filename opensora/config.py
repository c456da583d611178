"""What a stage is: one frozen, validated object, read from one complete YAML file.

Owns the schema that travels from a recipe to a run directory (`stage.yaml`), its defaults, units and cross-field rules.
Refuses to know where a stage runs (nodes, devices, stores, prices: `orchestrator.recipe.pipeline`) and never imports torch, so that
the control plane can plan a stage without it.

Letters: T frames · H, W pixels · C latent channels.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

from opensora import docstrings

_HALF = re.compile("[\ud800-\udfff]")
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Unit:
    """What a number of a configuration counts, for `osctl explain` and for editors: `Annotated[PositiveInt, Unit("pixels")]`.

    Every number has one; of a number without a unit it says what the number is (`ratio`, `seed`).
    """

    name: str

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The field's schema with the key `unit`."""
        return {**handler(core_schema), "unit": self.name}


class Frozen(BaseModel):
    """A part of a configuration: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The schema, each field with what stands under it in the source."""
        schema = handler(core_schema)
        fields = handler.resolve_ref_schema(schema).get("properties", {})
        for kind in cls.__mro__:
            for name, text in docstrings.of_fields(kind).items() if issubclass(kind, Frozen) else ():
                if name in fields:
                    fields[name].setdefault("description", text)
        return schema

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        """Half of a surrogate pair, which is how Python has the bytes of a name that is no UTF-8, is in no JSON: what is written with
        one could never be read again."""
        for name, value in self:
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, str) and not part.isascii() and _HALF.search(part):
                    raise ValueError(f"{name} {part!r} is no UTF-8; rename what it names, or write it anew")
        return self


ADDED = ("accumulate", "masks", "judging", "routing")
ADDED_TO_DATA, ADDED_TO_SAMPLING = ("fps", "max_left_out"), ("guidance_interval", "guidance_rescale")
ADDED_TO_IDDPM, ADDED_TO_OPTIMIZER = ("min_snr",), ("matrices", "momentum")
"""Fields of `StageConfig`, of `DataConfig`, of `SamplingConfig`, of `IDDPM` and of `OptimizerConfig` that 0.1.0 did not have."""


def without_added(part: Frozen, content: dict[str, Any], added: tuple[str, ...]) -> dict[str, Any]:
    """Fields that a later release than 0.1.0 added are left out while they have their default: what is written then has the digest that it
    always had, and an older release can read it."""
    for name in added:
        if name in content and getattr(part, name) == type(part).model_fields[name].default:
            del content[name]
    return content


class ModelConfig(Frozen):
    """STDiT (Open-Sora 1.0 report, section "Model"). The defaults are XL/2: 760M parameters, the 724M (in units of 2^20) of the report."""

    depth: Annotated[PositiveInt, Unit("blocks")] = 28
    """Blocks; each is spatial attention, temporal attention, cross-attention and an MLP."""
    width: Annotated[PositiveInt, Unit("channels")] = 1152
    """Channels of the residual stream."""
    heads: Annotated[PositiveInt, Unit("heads")] = 16
    """Attention heads; must divide `width`."""
    mlp_ratio: Annotated[PositiveFloat, Unit("ratio")] = 4.0
    """Hidden width of the MLP over `width`."""
    patch: Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Unit("latent frames, rows, columns")] = (1, 2, 2)
    """Latent frames, rows and columns that make one token."""
    latent_channels: Annotated[PositiveInt, Unit("channels")] = 4
    """C: channels of the autoencoder's latents."""
    caption_width: Annotated[PositiveInt, Unit("channels")] = 4096
    """Channels of the text encoder's token vectors."""
    caption_tokens: Annotated[PositiveInt, Unit("tokens")] = 120
    """Longest caption, in tokens; longer ones are cut."""
    caption_dropout: Annotated[Fraction, Unit("fraction")] = 0.1
    """Share of training captions replaced by the null caption, for classifier-free guidance."""
    temporal_position: Literal["attention", "residual"] = "attention"
    """Where the temporal position enters: input of block 0's temporal attention (upstream), or the residual stream before block 0."""
    space_scale: Annotated[PositiveFloat, Unit("ratio")] = 1.0
    """Spatial positions are divided by this: 0.5 for 256 pixels under a model made for 512."""
    time_scale: Annotated[PositiveFloat, Unit("ratio")] = 1.0
    """Temporal positions are divided by this: new frame interval over the old one."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class IDDPM(Frozen):
    """Noise prediction over discrete steps with learned-range variance (Nichol & Dhariwal 2021), as Open-Sora 1.0 trained."""

    kind: Literal["iddpm"]
    steps: Annotated[PositiveInt, Unit("diffusion steps")] = 1000
    """Steps of the linear noise schedule."""
    min_snr: Annotated[PositiveFloat | None, Unit("signal-to-noise ratio")] = None
    """Weigh the squared error of the noise by min(SNR, this) / SNR, so that steps with little noise count less; 5 in the paper; none: all
    steps count alike (Min-SNR, Hang et al., arXiv:2303.09556 §3.4)."""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """See `without_added`."""
        return without_added(self, write(self), ADDED_TO_IDDPM)


class Flow(Frozen):
    """Rectified flow: predict the velocity from noise to data along straight lines (Liu et al. 2022)."""

    kind: Literal["flow"]
    time: Literal["uniform", "logit-normal"] = "logit-normal"
    """Distribution of training times in (0, 1); logit-normal as in Esser et al. 2024."""
    shift: Annotated[PositiveFloat, Unit("factor")] = 1.0
    """Above 1, times of training and sampling move towards noise: shift t / (1 + (shift - 1) t), Esser et al. 2024, section 5.3.2."""


Objective = Annotated[IDDPM | Flow, Field(discriminator="kind")]


class DigitsSource(Frozen):
    """Captioned moving digits, made on the machine from the handwritten digits inside scikit-learn."""

    kind: Literal["digits"]
    clips: Annotated[PositiveInt, Unit("clips")]
    """How many different clips; clip i is a function of (seed, i)."""
    quality: Literal["plain", "high"] = "plain"
    """plain: noisy background and jittered motion; high: clean ones, for the last stage."""


class FolderSource(Frozen):
    """A folder of video files with a `captions.csv` (columns `path,text`; paths relative to the folder), or in another layout that people
    have: `metadata.csv`, lines of captions and videos, `a.mp4` with `a.txt`."""

    kind: Literal["folder"]
    path: str
    """Local folder or fsspec URI."""


class ManifestSource(Frozen):
    """A table of clips at scale (path, text), as the published stages used. Paths may lie anywhere; a plan needs its size alone."""

    kind: Literal["manifest"]
    path: str
    """CSV, JSON or JSON lines: a file or fsspec URI."""
    clips: Annotated[PositiveInt, Unit("clips")]
    """Rows."""


Source = Annotated[DigitsSource | FolderSource | ManifestSource, Field(discriminator="kind")]


class Bucket(Frozen):
    """One size of clips, and how many of them make a batch."""

    frames: Annotated[PositiveInt, Unit("frames")]
    """T: 1 is an image."""
    height: Annotated[PositiveInt, Unit("pixels")]
    """Pixels."""
    width: Annotated[PositiveInt, Unit("pixels")]
    """Pixels."""
    batch_size: Annotated[PositiveInt, Unit("clips a data-parallel rank")]
    """Clips of this size per data-parallel rank and step."""


class DataConfig(Frozen):
    """The clips of a stage, and the sizes in which the model sees them."""

    source: Source
    """Where the clips come from."""
    frames: Annotated[PositiveInt, Unit("frames")]
    """T: frames of a clip. 1 trains on images."""
    frame_interval: Annotated[PositiveInt, Unit("frames")] = 1
    """Every how many source frames one is taken, whatever the rate of the file."""
    fps: Annotated[PositiveFloat | None, Unit("frames a second")] = None
    """Take frames by time, so many a second, whatever the rates of the files; none: count them, by frame_interval."""
    height: Annotated[PositiveInt, Unit("pixels")]
    """Pixels."""
    width: Annotated[PositiveInt, Unit("pixels")]
    """Pixels."""
    buckets: tuple[Bucket, ...] = ()
    """Sizes to train on where there are several: each clip goes to the one that fits it best. frames x height x width above is then
    what is drawn from the model, and what `space_scale` is meant for. None: that size alone, with the stage's batch_size."""
    horizontal_flip: bool = False
    """Mirror clips at random, once an epoch. Clips whose caption names a side or a turn (left, clockwise) never are."""
    max_left_out: Annotated[Fraction, Unit("fraction")] = 0.5
    """Share of the clips that may be left out (missing, broken, too short). With more the stage ends before its first step; 1: never."""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """See `without_added`."""
        return without_added(self, write(self), ADDED_TO_DATA)

    @model_validator(mode="after")
    def _by_time_or_by_counting(self) -> DataConfig:
        if self.fps is not None and self.frame_interval != 1:
            counted = f"frame_interval {self.frame_interval} by counting"
            raise ValueError(f"fps {self.fps:g} takes frames by time, {counted}. Keep one of the two")
        return self


class PatchAutoencoder(Frozen):
    """Embedded: patches onto their principal components, made from the first stage's own frames. Deterministic."""

    kind: Literal["patch"]
    factor: Annotated[PositiveInt, Unit("pixels")] = 4
    """Pixels per latent row and column."""


class KLAutoencoder(Frozen):
    """A diffusers AutoencoderKL, frames as images."""

    kind: Literal["kl"]
    path: str
    """Folder, s3://…, hub id (owner/name, owner/name@revision), or a name given by osctl weights add."""
    factor: Annotated[PositiveInt, Unit("pixels")] = 8
    """Pixels per latent row and column."""
    scale: Annotated[PositiveFloat | None, Unit("ratio")] = None
    """Latents are multiplied by this; none: `scaling_factor` of its own config.json (0.18215 for Stable Diffusion's)."""
    posterior: Literal["sample", "mode"] = "sample"
    """Which point of the encoder's distribution is a clip's latent. Drawn once, from the clip's index, when the clip is cached."""
    micro_batch: Annotated[PositiveInt | None, Unit("frames")] = 16
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
    """AdamW, and Muon where `matrices` says so."""

    lr: Annotated[PositiveFloat, Unit("per step")] = 2e-5
    """Learning rate, after the warm-up."""
    betas: Annotated[tuple[Fraction, Fraction], Unit("fraction")] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    eps: Annotated[PositiveFloat, Unit("absolute")] = 1e-8
    """Added to the root of the squares' average."""
    weight_decay: Annotated[NonNegativeFloat, Unit("per step, times lr")] = 0.0
    """Share of a weight taken off at each step, times the learning rate."""
    warmup_steps: Annotated[NonNegativeInt, Unit("optimizer steps")] = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate ends: `linear` and `cosine` reach 0 at the last step."""
    grad_clip: Annotated[PositiveFloat | None, Unit("norm")] = 1.0
    """Largest norm of the whole gradient; none: no clipping."""
    matrices: Literal["adamw", "muon"] = "adamw"
    """What moves the matrices of the blocks. muon: gradients averaged and made orthogonal (Jordan et al. 2024), with AdamW's learning rate
    and decay, since its updates are scaled to AdamW's size (Liu et al., arXiv:2502.16982 §2.2); all else stays AdamW's."""
    momentum: Annotated[Fraction, Unit("fraction")] = 0.95
    """muon: decay of the average of the gradient."""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """See `without_added`."""
        return without_added(self, write(self), ADDED_TO_OPTIMIZER)


class CheckpointConfig(Frozen):
    """When the trainer saves, and what it keeps."""

    every_steps: Annotated[PositiveInt, Unit("optimizer steps")]
    """A checkpoint each so many steps, and one at the end."""
    keep_last: Annotated[PositiveInt, Unit("checkpoints")] = 2
    """Checkpoints kept in the run directory, on several nodes three at least; published ones are kept by the store's own rules."""
    keep_every: Annotated[PositiveInt | None, Unit("optimizer steps")] = None
    """Of the older ones, those whose step is a multiple of this are kept too; none: none of them."""
    background: bool = True
    """Copy to memory, then write while training goes on. Off: training stands still, and the copy's memory is saved."""


class Activations(Frozen):
    """What the forward pass keeps for the backward pass: less memory for more time. `osctl plan` shows what each choice needs."""

    recompute: Literal["none", "selective", "full", "auto"] = "none"
    """none: keep all. selective: keep the results of matrix products and attention, recompute what is cheap. full: keep what lies between
    groups of blocks. auto: the fastest that fits the device, on CUDA."""
    every: Annotated[PositiveInt, Unit("blocks")] = 1
    """full: blocks of a group. More keep fewer boundaries and need more memory while a group is recomputed."""
    offload: bool = False
    """full: boundaries wait in host memory."""
    mlp_chunks: Annotated[PositiveInt, Unit("parts")] = 1
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
    sequence: Annotated[PositiveInt, Unit("ranks")] = 1
    """Ranks that share each clip: a rank holds a part of the frames, or of the spatial tokens, and they exchange twice a block (DSP,
    Zhao et al., arXiv:2403.10266). Must divide the number of ranks."""
    shard: Annotated[PositiveInt | None, Unit("ranks")] = None
    """fsdp: ranks that divide one copy of the weights; the others hold further copies (HSDP). Must divide their number; none: all."""
    plugin: Literal["torch_ddp", "low_level_zero", "gemini", "hybrid_parallel"] = "torch_ddp"
    """colossalai: the Booster plugin. All but torch_ddp need CUDA."""

    @property
    def ranks_per_clip(self) -> int:
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


class MaskConfig(Frozen):
    """Shares of the training clips of which some frames are given: the model sees these clean, at time 0, and learns the others only
    (Open-Sora 1.1 and 1.2, "mask strategy"). What is left of 1 has no given frames. An image has none either."""

    first_frame: Annotated[Fraction, Unit("fraction of clips")] = 0.0
    """The first frame is given: image to video."""
    last_frame: Annotated[Fraction, Unit("fraction of clips")] = 0.0
    """The last frame is given."""
    both_frames: Annotated[Fraction, Unit("fraction of clips")] = 0.0
    """The first and the last frame are given: in-betweening."""
    first_quarter: Annotated[Fraction, Unit("fraction of clips")] = 0.0
    """The first quarter is given, rounded down, at least one frame: extension of a clip."""
    last_quarter: Annotated[Fraction, Unit("fraction of clips")] = 0.0
    """The last quarter is given."""
    both_quarters: Annotated[Fraction, Unit("fraction of clips")] = 0.0
    """The first and the last quarter are given: loops."""
    random: Annotated[Fraction, Unit("fraction of clips")] = 0.0
    """Up to a half of the frames are given, anywhere."""

    @model_validator(mode="after")
    def _are_shares(self) -> MaskConfig:
        total = sum(value for _, value in self)
        if not 0 < total <= 1 + 1e-9:
            raise ValueError(f"the shares add up to {total:g}. Give some, of 1 at most together, for example first_frame: 0.25")
        return self


class RoutingConfig(Frozen):
    """Tokens that skip the middle blocks in training, as tubes: places of the frame, in all frames of a clip (TREAD, Krause et al.,
    arXiv:2501.04765 §3). Sampling and evaluation use all tokens."""

    rate: Annotated[Annotated[float, Field(ge=0, lt=1)], Unit("fraction of the tubes")]
    """Share of each clip's tubes that skip the middle blocks, another set for each clip and step; 0.5 in the paper. 0: none skips."""
    first_blocks: Annotated[PositiveInt, Unit("blocks")] = 2
    """Blocks at the beginning that all tokens go through."""
    last_blocks: Annotated[PositiveInt, Unit("blocks")] = 4
    """Blocks at the end that all tokens go through."""

    def tubes_through(self, tubes: int) -> int:
        """Of so many tubes, those that go through all blocks: at least one."""
        return max(1, round(tubes * (1 - self.rate)))


class ParentConfig(Frozen):
    """What a stage takes from its parent's checkpoint. Position tables are recomputed for the stage's own size, always."""

    weights: Literal["ema", "model"] = "ema"
    """Which of the parent's weights become this stage's weights. Its own EMA starts from them."""
    optimizer: Literal["reset", "carry"] = "reset"
    """Whether the optimizer's moments come along. The step count always starts at 0."""


SamplingMethod = Literal["ancestral", "ddim", "dpm-solver++", "unipc", "euler", "heun"]
SAMPLING_METHODS: Mapping[str, tuple[SamplingMethod, ...]] = {
    "iddpm": ("ancestral", "ddim", "dpm-solver++", "unipc"),
    "flow": ("euler", "heun"),
}
"""By kind of the objective that they belong to."""


class SamplingConfig(Frozen):
    """How clips are drawn from the stage's model, where nothing else is asked for."""

    steps: Annotated[PositiveInt, Unit("sampling steps")] = 100
    """Network evaluations along the way from noise to clip (twice that under guidance)."""
    method: SamplingMethod = "ancestral"
    """euler and heun belong to objective flow; the others to iddpm. heun evaluates the network twice a step."""
    guidance: Annotated[NonNegativeFloat, Unit("scale")] = 7.0
    """Classifier-free guidance scale; 1 turns it off."""
    guidance_channels: Literal["all", "first3"] = "all"
    """Which latent channels are guided. first3 is what Open-Sora 1.0 did, inherited from GLIDE."""
    guidance_interval: Annotated[tuple[Fraction, Fraction], Unit("noise level, 0 clean to 1 noise")] = (0.0, 1.0)
    """Guide only at these times; elsewhere the network is evaluated once and not twice (Kynkäänniemi et al., arXiv:2404.07724)."""
    guidance_rescale: Annotated[Fraction, Unit("fraction")] = 0.0
    """How far a guided prediction gets the standard deviation of the unguided one back (Lin et al., arXiv:2305.08891 §3.4)."""

    @model_serializer(mode="wrap")
    def _without_added(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_added(self, write(self), ADDED_TO_SAMPLING)

    @model_validator(mode="after")
    def _interval_rises(self) -> SamplingConfig:
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(f"guidance_interval {low:g} to {high:g}: it is empty. Give the lower noise level first, as [0.1, 0.8]")
        return self


class EvaluateConfig(Frozen):
    """Judge the finished stage on generated clips. Costs time of the stage, and is booked as such."""

    kind: Literal["digits"]
    clips: Annotated[PositiveInt, Unit("clips")] = 200
    """Generated clips that are judged."""
    frames: Annotated[PositiveInt, Unit("frames")]
    """Frames of the clips asked for; a stage of images is asked for images and for video of so many frames."""
    seed: Annotated[NonNegativeInt, Unit("seed")] = 0
    """Noise of clip i is a function of (seed, i), whatever the number of ranks."""
    held_out_clips: Annotated[NonNegativeInt, Unit("clips")] = 120
    """Clips that no stage trains on, whose loss is read at ten noise levels each, where the evaluation runs beside the training or by
    `osctl eval`; 0: none."""

    @model_serializer(mode="wrap")
    def _without_added(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_added(self, write(self), ("held_out_clips",))


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
    ema_decay: Annotated[Fraction, Unit("fraction a step")] = 0.9999
    """Decay of the moving average of the weights, in fp32; it is warmed up by (1 + step) / (10 + step) where that is smaller."""
    steps: Annotated[NonNegativeInt, Unit("optimizer steps")]
    """Optimizer steps. 0: an import, nothing is trained."""
    batch_size: Annotated[PositiveInt, Unit("clips a data-parallel rank")]
    """Clips per data-parallel rank and part of a step; with `data.buckets` each bucket has its own, and this one is not used."""
    accumulate: Annotated[PositiveInt, Unit("parts of a step")] = 1
    """Parts of a step, one after the other, whose gradients are added up: half the devices with twice the parts have the same global
    batch, and the stage goes on where it was."""
    freeze: Literal["none", "temporal"] = "none"
    """temporal: the temporal attention stays at its zero effect (stage 1 on images)."""
    masks: MaskConfig | None = None
    """Given frames, for image to video, extension and loops (osctl sample --first-frame, --extend, --loop); none: never any."""
    routing: RoutingConfig | None = None
    """Tokens that skip the middle blocks in training, for fewer operations a step; none: all tokens go through all blocks."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Autocast type on CUDA. A CPU always computes in fp32."""
    activations: Activations = Activations()
    """What is kept for the backward pass."""
    parallel: Parallel = Parallel()
    """How the ranks share the work."""
    compile: bool = True
    """Compile each block on CUDA (torch.compile). A CPU gains nothing from it and never compiles."""
    loss_spike: Annotated[Annotated[float, Field(gt=1)] | None, Unit("factor")] = 10.0
    """The stage ends (class spike) when the loss stays above so many times the median of 100 steps for 3 steps in a row; none: never."""
    seed: Annotated[NonNegativeInt, Unit("seed")] = 42
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
    """How the finished stage is evaluated; none: not at all."""

    judging: Literal["gang", "beside"] = "gang"
    """Who draws the samples and evaluates: the stage's own ranks, which hold their devices meanwhile, or a process beside the next stage. A
    driver that can do the latter sets it by itself."""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """See `without_added`."""
        return without_added(self, write(self), ADDED)

    @model_validator(mode="after")
    def _fits_together(self) -> StageConfig:
        fit = SAMPLING_METHODS[self.objective.kind]
        if self.sampling.method not in fit:
            fact = f"sampling method {self.sampling.method} does not belong to objective {self.objective.kind}"
            raise ValueError(f"{fact}. Use {' or '.join(fit)}")
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
        if self.masks is not None and all(bucket.frames < 2 * frames for bucket in self.buckets):
            raise ValueError(f"masks give some frames of a clip, and the clips have {self.data.frames}. Train on longer ones, or without")
        routing, depth = self.routing, self.model.depth
        if routing is not None and routing.first_blocks + routing.last_blocks >= depth:
            kept = f"first_blocks {routing.first_blocks} and last_blocks {routing.last_blocks}"
            raise ValueError(f"routing: {kept} leave none of {depth} blocks to skip. Lower them, or set routing: null")
        if self.optimizer.matrices == "muon" and self.parallel.strategy == "colossalai":
            raise ValueError("optimizer.matrices muon goes with parallel.strategy ddp or fsdp, not with colossalai")
        if routing is not None and self.parallel.strategy == "colossalai":
            raise ValueError("routing goes with parallel.strategy ddp or fsdp, not with colossalai")
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
        pydantic.ValidationError, yaml.YAMLError: for what a person wrote wrong; `orchestrator.recipe.resolve` turns these into one line.
    """
    return StageConfig.model_validate(yaml.safe_load(path.read_text()))


def write_stage(stage: StageConfig, path: Path) -> None:
    """Write every field, defaults included: what ran is readable without the code that ran it."""
    content: dict[str, Any] = stage.model_dump(mode="json")
    path.write_text(yaml.safe_dump(content, sort_keys=False))
