"""Configuration: the sizes of the networks and the settings of the method.

Every config is a frozen dataclass that validates its fields when it is created, before any weight
is read. A setting is declared once, with its type, default, range and help text; the options of the
command line are generated from `SampleConfig`.
"""
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_args

from .errors import InputError

T = TypeVar("T")
TYPE_NAMES = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
# Upper bounds. A file that asks for more describes no real network.
MAX_LAYERS, MAX_LEVELS, MAX_CHANNELS, MAX_FRAMES, MAX_SIDE = 16, 8, 16384, 4096, 16384
short_repr = reprlib.repr                   # cuts long and deep values
VOCABULARY_SIZE = 49408                     # tokens of CLIP's tokenizer
SPACINGS = ("motionclone", "linspace", "leading", "trailing", "lcm")
LCM_STEPS = 50                              # timesteps that consistency models are distilled on


def bounded(default: Any, low: float = -math.inf, high: float = math.inf, help: str = "",
            choices: tuple[str, ...] = ()) -> Any:
    """Declare a dataclass field with its legal values and its help text.

    Args:
        default: Default value. A tuple declares a list, and the bounds hold for each element.
        low: Smallest legal value.
        high: Largest legal value.
        help: Documentation of the field, which the command line shows too.
        choices: The legal values of a text field; empty for any text.
    """
    return field(default=default, metadata=dict(low=low, high=high, help=help, choices=choices))


Check = tuple[str, bool, str]               # a field, whether its value is legal, the legal values


class ValidatedConfig:
    """Base class that validates its fields on construction and converts lists to tuples.

    Raises InputError for a value of a wrong type or out of its range.
    """

    def __post_init__(self) -> None:
        for spec in fields(self):       # type: ignore[arg-type]
            name, value, types = spec.name, getattr(self, spec.name), get_args(spec.type)
            if types and isinstance(value, list):
                object.__setattr__(self, name, value := tuple(value))
            kind, elements = (types[0], value) if types else (spec.type, (value,))
            legal = TYPE_NAMES.get(kind, "a group of settings by name")  # type: ignore[arg-type]
            self.check(name, type(elements) is tuple and all(has_type(e, kind) for e in elements),
                       f"a list, each {legal}" if types else legal)
            low, high = spec.metadata.get("low", -math.inf), spec.metadata.get("high", math.inf)
            in_range = kind not in (int, float) or all(low <= number <= high for number in elements)
            self.check(name, in_range, f"between {low} and {high}")
            choices = spec.metadata.get("choices", ())
            self.check(name, not choices or value in choices, "one of " + ", ".join(choices))
        for check in self.constraints():
            self.check(*check)

    def constraints(self) -> list[Check]:
        """Return the conditions between fields, whose types and ranges are already checked."""
        return []

    def check(self, name: str, is_legal: bool, legal: str) -> None:
        """Raise InputError with the value of a field and the legal values, unless it is legal."""
        if not is_legal:
            value = short_repr(getattr(self, name))
            raise InputError(f"{name} = {value} is out of range: it must be {legal}")

    def channels_check(self, name: str, *divisors: int) -> Check:
        """Return the condition that the widths of a field are multiples of all divisors."""
        widths, step = getattr(self, name), math.lcm(*divisors)
        is_legal = 1 <= len(widths) <= MAX_LEVELS and all(width % step == 0 for width in widths)
        return name, is_legal, f"1 to {MAX_LEVELS} multiples of {step}, up to {MAX_CHANNELS}"


def has_type(value: Any, kind: Any) -> bool:
    """Return True if a value fits a field's type. Integers fit float; booleans fit only bool."""
    if kind is float:
        return has_type(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


@dataclass(frozen=True)
class UNetConfig(ValidatedConfig):
    """Sizes of the 3-D UNet. The defaults are Stable Diffusion 1.5 with AnimateDiff v3."""

    in_channels: int = bounded(4, 1, MAX_CHANNELS)
    out_channels: int = bounded(4, 1, MAX_CHANNELS)
    block_out_channels: tuple[int, ...] = bounded((320, 640, 1280, 1280), 1, MAX_CHANNELS)
    layers_per_block: int = bounded(2, 1, MAX_LAYERS)
    cross_attention_levels: tuple[int, ...] = (0, 1, 2)     # resolutions with spatial transformers
    num_attention_heads: int = bounded(8, 1, MAX_CHANNELS)
    cross_attention_dim: int = bounded(768, 1, MAX_CHANNELS)
    norm_num_groups: int = bounded(32, 1, MAX_CHANNELS)

    motion_modules: bool = True
    motion_num_attention_heads: int = bounded(8, 1, MAX_CHANNELS)
    motion_num_attention_blocks: int = bounded(2, 1, MAX_LAYERS)    # per motion module
    motion_mid_block: bool = False          # AnimateDiff v2 has a motion module in the middle block
    inflated_groupnorm: bool = True         # False for v1: residual blocks normalize whole clips
    motion_max_seq_length: int = bounded(32, 1, MAX_FRAMES)         # frames; 24 for v1

    def constraints(self) -> list[Check]:
        """Return the conditions between fields."""
        levels, cross = range(len(self.block_out_channels)), self.cross_attention_levels
        divisors = (2, self.norm_num_groups, self.num_attention_heads,
                    self.motion_num_attention_heads if self.motion_modules else 1)
        return [self.channels_check("block_out_channels", *divisors),
                ("cross_attention_levels", cross == tuple(i for i in levels if i in cross),
                 f"some of 0 to {len(levels) - 1}, in rising order")]


@dataclass(frozen=True)
class SparseCtrlConfig(ValidatedConfig):
    """Sizes of SparseCtrl that are not the UNet's own."""

    kind: str = bounded("", choices=("", "rgb", "scribble"))        # "" for a model without it
    motion_num_attention_heads: int = bounded(8, 1, MAX_CHANNELS)
    motion_max_seq_length: int = bounded(32, 1, MAX_FRAMES)
    # Widths of the convolutions that reduce a sketch to the size of the latents.
    conditioning_embedding_channels: tuple[int, ...] = bounded((16, 32, 96, 256), 1, MAX_CHANNELS)

    def constraints(self) -> list[Check]:
        """Return the conditions between fields."""
        return [self.channels_check("conditioning_embedding_channels")]


@dataclass(frozen=True)
class VAEConfig(ValidatedConfig):
    """Sizes of the autoencoder. The defaults are Stable Diffusion 1.5's."""

    latent_channels: int = bounded(4, 1, MAX_CHANNELS)
    block_out_channels: tuple[int, ...] = bounded((128, 256, 512, 512), 1, MAX_CHANNELS)
    layers_per_block: int = bounded(2, 1, MAX_LAYERS)
    norm_num_groups: int = bounded(32, 1, MAX_CHANNELS)
    scaling_factor: float = 0.18215

    def constraints(self) -> list[Check]:
        """Return the conditions between fields."""
        return [self.channels_check("block_out_channels", 2, self.norm_num_groups),
                ("scaling_factor", self.scaling_factor > 0, "above 0")]

    @property
    def downsampling(self) -> int:
        """Pixels along the side of one latent position."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class CLIPTextConfig(ValidatedConfig):
    """Sizes of CLIP's text encoder. The defaults are those of Stable Diffusion 1.5."""

    hidden_size: int = bounded(768, 1, MAX_CHANNELS)
    intermediate_size: int = bounded(3072, 1, 4 * MAX_CHANNELS)
    num_hidden_layers: int = bounded(12, 1, 8 * MAX_LAYERS)
    num_attention_heads: int = bounded(12, 1, MAX_CHANNELS)
    vocab_size: int = bounded(VOCABULARY_SIZE, VOCABULARY_SIZE, 1 << 20)
    max_position_embeddings: int = bounded(77, 3, MAX_FRAMES)

    def constraints(self) -> list[Check]:
        """Return the conditions between fields."""
        return [("hidden_size", self.hidden_size % self.num_attention_heads == 0,
                 f"a multiple of {self.num_attention_heads}, up to {MAX_CHANNELS}")]


@dataclass(frozen=True)
class SampleConfig(ValidatedConfig):
    """Settings of the method. The defaults are the published ones for camera motion."""

    steps: int = bounded(100, 1, 1000, "sampling steps")
    guidance_steps: int = bounded(50, 0, 1000, "guided steps, from the first step on")
    guidance_noise_range: float = bounded(0.3, 0, 1, "fraction of the noise levels that is guided")
    timestep_spacing: str = bounded("motionclone", help="timestep spacing", choices=SPACINGS)
    sampler: str = bounded("ddim", choices=("ddim", "lcm"), help="DDIM or consistency sampling")
    cfg_scale: float = bounded(8.5, 0, 1000, "classifier-free guidance scale")
    cfg_start_fraction: float = bounded(0.0, 0, 1, "fraction of the steps after which CFG starts")
    cfg_end_fraction: float = bounded(1.0, 0, 1, "fraction of the steps after which CFG ends")
    negative_prompt: str = bounded("", help="what the clip should not show")

    method: str = bounded("single-step", help="noise the reference once, or invert it",
                          choices=("single-step", "inversion"))
    motion_weight: float = bounded(2000.0, 0, 1e38, "weight of the motion loss; 0 for no guidance")
    guidance_warmup_steps: int = bounded(10, 0, 1000, "steps in which the guidance weight rises")
    guidance_cooldown_steps: int = bounded(10, 0, 1000, "steps in which the guidance weight falls")
    guidance_interval: int = bounded(1, 1, 1000, "compute the gradient in every n-th guided step")
    guidance_repeats: int = bounded(1, 1, 100, "times that each step with a gradient is taken")
    extraction_timestep: int = bounded(400, 0, 999, "noise level at which the motion is extracted")
    top_k: int = bounded(1, 0, MAX_FRAMES, "values kept of each attention row; 0 keeps all")
    guidance_blocks: tuple[str, ...] = bounded(("up_blocks.1",), help="blocks that are cloned")
    guidance_block_weights: tuple[float, ...] = bounded((), 0, 1e38, "their weights in the loss")

    inversion_steps: int = bounded(100, 1, 1000, "DDIM steps of --method inversion")
    ref_prompt: str = bounded("", help="what the reference shows, for inversion and subject")
    subject: tuple[str, ...] = bounded((), help="the subject's words in ref_prompt and in prompt")
    semantic_scale: float = bounded(0.0, 0, 1e38, "weight of semantic guidance")
    semantic_blocks: tuple[str, ...] = bounded(("up_blocks.1",), help="blocks that it compares")
    mask_threshold: float = bounded(0.3, 0, 1, "attention above which a position is the subject")

    num_frames: int = bounded(16, 1, MAX_FRAMES, "length of the clip")
    height: int = bounded(512, 1, MAX_SIDE, "height in pixels")
    width: int = bounded(512, 1, MAX_SIDE, "width in pixels")
    context_length: int = bounded(0, 0, MAX_FRAMES, "frames that the UNet sees at once; 0 for all")
    context_overlap: float = bounded(0.25, 0, 0.9, "fraction that neighboring windows share")
    closed_loop: bool = bounded(False, help="join the end of the clip to its beginning")
    memory: str = bounded("auto", choices=("auto", "low", "high"), help="low: less memory, slower")

    def constraints(self) -> list[Check]:
        """Return the conditions between fields."""
        blocks, weights = len(self.guidance_blocks), len(self.guidance_block_weights)
        return [
            ("guidance_steps", self.guidance_steps <= self.steps,
             f"between 0 and {self.steps}, the number of steps"),
            ("guidance_noise_range", self.guidance_noise_range > 0, "above 0, up to 1"),
            ("steps", self.timestep_spacing != "lcm" or self.steps <= LCM_STEPS,
             f"between 1 and {LCM_STEPS} with timestep_spacing lcm"),
            ("semantic_scale", not self.semantic_scale or self.sampler == "ddim",
             "0 with sampler lcm, which adds new noise in every step"),
            ("top_k", self.top_k <= self.num_frames,
             f"between 1 and {self.num_frames}, the number of frames, or 0 for all"),
            ("subject", len(self.subject) in (0, 2), "two words"),
            ("guidance_blocks", blocks > 0, "at least one block"),
            ("semantic_blocks", len(self.semantic_blocks) > 0, "at least one block"),
            ("guidance_block_weights", weights in (0, blocks), f"empty, or {blocks} numbers")]

    @property
    def block_weight_map(self) -> dict[str, float]:
        """Weight of each guidance block in the loss, by name; empty where all are 1."""
        return dict(zip(self.guidance_blocks, self.guidance_block_weights, strict=False))


@dataclass(frozen=True)
class ModelConfig(ValidatedConfig):
    """A whole model and the settings that suit it. The defaults are SD 1.5 with AnimateDiff v3."""

    name: str = "sd15"
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    sparsectrl: SparseCtrlConfig = field(default_factory=SparseCtrlConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    fps: int = bounded(8, 1, 1000)              # frame rate of the training clips
    training_vocabulary: tuple[str, ...] = ()   # words of the training captions, if they are few
    # Limits of the references that the model follows (evaluation/report.py); 0 for unknown.
    min_reference_motion: float = bounded(0.0, 0)
    max_denoising_error: float = bounded(1.0, 0)

    def constraints(self) -> list[Check]:
        """Return the conditions between fields."""
        unet, heads = self.unet, self.sparsectrl.motion_num_attention_heads
        has_heads = not self.sparsectrl.kind or unet.channels_check("block_out_channels", heads)[1]
        return [("vae", unet.in_channels == self.vae.latent_channels,
                 f"one with {unet.in_channels} latent channels, as the UNet takes"),
                ("text_encoder", unet.cross_attention_dim == self.text_encoder.hidden_size,
                 f"one of hidden size {unet.cross_attention_dim}, as the UNet takes"),
                ("sparsectrl", has_heads, f"one whose heads divide {unet.block_out_channels}")]

    def latent_shape(self, config: SampleConfig) -> tuple[int, int, int, int, int]:
        """Return the shape (1, c, f, h, w) of a clip's latents.

        Raises:
            InputError: If height or width is not a multiple of the VAE's downsampling factor.
        """
        s = self.vae.downsampling
        if config.height % s or config.width % s:
            raise InputError(f"size {config.width}x{config.height}: use multiples of {s} pixels")
        return 1, self.unet.in_channels, config.num_frames, config.height // s, config.width // s


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return a config of the given class; fields that are left out keep their defaults.

    Raises:
        InputError: If a key is not a field of the class, or a value is not legal.
    """
    types = {spec.name: spec.type for spec in fields(kind)}     # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise InputError(f"{kind.__name__} is {short_repr(values)}: it must be settings by name")
    if unknown := sorted(set(values) - set(types)):
        raise InputError(f"{kind.__name__} has no setting {unknown[0]!r}: use {', '.join(types)}")
    return kind(**{name: from_dict(types[name], value)          # type: ignore[arg-type]
                   if is_dataclass(types[name]) else value for name, value in values.items()})
