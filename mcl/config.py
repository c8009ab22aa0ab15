"""Every number in one place: the sizes of the networks and the settings of the method.

All are frozen dataclasses, which refuse values of a wrong type and impossible ones when they are
made, with the value and the legal range, before any weight is read. `from_dict` refuses unknown
keys.
"""
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Mapping, TypeVar, get_args

from .errors import InputError

T = TypeVar("T")
Legal = dict[str, tuple[bool, str]]         # of each field: that it holds, and the legal range
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text",
                         bool: "true or false"}
LAYERS, LEVELS, CHANNELS, FRAMES = 16, 8, 16384, 4096       # more is no network but an attack


def check_types(config: Any) -> None:
    """Raises InputError for a field whose value is not of the annotated type."""
    for one in dataclasses.fields(config):
        value, kind = getattr(config, one.name), one.type
        inner = get_args(kind)
        holds = (type(value) is tuple and all(is_a(v, inner[0]) for v in value) if inner
                 else is_a(value, kind))
        if not holds:
            what = WORDS.get(inner[0] if inner else one.type, "settings by name")
            raise InputError(f"{one.name} = {shown(value)} is not possible: "
                             + f"a list, each {what}" * bool(inner) + what * (not inner))


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value can stand in a field; whole numbers are numbers, and True is none."""
    allowed = (int, float) if kind is float else kind
    return isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))


def shown(value: Any) -> str:
    """A value for a message, cut where it is long; nested as deeply as may be."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def check_values(config: Any, legal: Legal) -> None:
    """Raises InputError for the first field that does not hold."""
    for name, (holds, values) in legal.items():
        if not holds:
            raise InputError(f"{name} = {shown(getattr(config, name))} is not possible: {values}")


def of_channels(widths: tuple[int, ...], divisor: int, levels: int = LEVELS) -> tuple[bool, str]:
    """That there is a width for each of some levels, each a multiple of what divides it."""
    step = math.lcm(2, divisor) if 0 < divisor <= CHANNELS else 0
    return (0 < step and 1 <= len(widths) <= levels
            and all(0 < w <= CHANNELS and w % step == 0 for w in widths),
            f"1 to {levels} multiples of {step or divisor}, up to {CHANNELS}")


def up_to(value: int, most: int, least: int = 1) -> tuple[bool, str]:
    return least <= value <= most, f"{least} to {most}" if least < most else f"{most}"


@dataclass(frozen=True)
class UNetConfig:
    """SD1.5's UNet with AnimateDiff's v3 motion modules, unless told otherwise."""
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)   # resolutions that have spatial transformers
    heads: int = 8
    text_channels: int = 768
    norm_groups: int = 32

    motion_modules: bool = True
    motion_heads: int = 8
    motion_attentions: int = 2          # along time, in each motion module; SparseCtrl's have 1
    motion_mid_block: bool = False      # v2 has one more module, in the middle
    norm_per_frame: bool = True         # v1 normalises residual blocks over the whole clip
    max_frames: int = 32                # length of the positional encoding; v1: 24

    def __post_init__(self) -> None:
        check_types(self)
        levels = range(len(self.block_out_channels))
        check_values(self, {
            "in_channels": up_to(self.in_channels, CHANNELS),
            "out_channels": up_to(self.out_channels, CHANNELS),
            "layers_per_block": up_to(self.layers_per_block, LAYERS),
            "heads": up_to(self.heads, CHANNELS), "norm_groups": up_to(self.norm_groups, CHANNELS),
            "motion_heads": up_to(self.motion_heads, CHANNELS),
            "motion_attentions": up_to(self.motion_attentions, LAYERS),
            "max_frames": up_to(self.max_frames, FRAMES),
            "text_channels": up_to(self.text_channels, CHANNELS),
            "attention_levels": (
                list(self.attention_levels) == sorted(set(self.attention_levels) & set(levels)),
                f"some of 0 to {len(levels) - 1}, rising"),
            "block_out_channels": of_channels(self.block_out_channels, math.lcm(
                self.norm_groups, self.heads, self.motion_heads if self.motion_modules else 1))})

    @property
    def time_channels(self) -> int:
        return 4 * self.block_out_channels[0]


@dataclass(frozen=True)
class SparseCtrlConfig:
    """What SparseCtrl takes beside the UNet's own sizes: pictures or sketches of some frames."""
    kind: str = ""                      # "rgb" or "scribble"; "" where a model has none
    motion_heads: int = 8
    max_frames: int = 32
    # Of the convolutions that bring a sketch down to the size of the latents.
    sketch_channels: tuple[int, ...] = (16, 32, 96, 256)

    def __post_init__(self) -> None:
        check_types(self)
        check_values(self, {
            "kind": (self.kind in ("", "rgb", "scribble"), "rgb, scribble, or none"),
            "motion_heads": up_to(self.motion_heads, CHANNELS),
            "max_frames": up_to(self.max_frames, FRAMES),
            "sketch_channels": (1 <= len(self.sketch_channels) <= LEVELS and all(
                0 < c <= CHANNELS for c in self.sketch_channels),
                f"1 to {LEVELS} numbers of 1 to {CHANNELS}")})


@dataclass(frozen=True)
class VAEConfig:
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        check_types(self)
        check_values(self, {
            "latent_channels": up_to(self.latent_channels, CHANNELS),
            "layers_per_block": up_to(self.layers_per_block, LAYERS),
            "norm_groups": up_to(self.norm_groups, CHANNELS),
            "block_out_channels": of_channels(self.block_out_channels, self.norm_groups),
            "scaling_factor": (0 < self.scaling_factor < math.inf, "a finite number above 0")})

    @property
    def downsampling(self) -> int:
        """Pixels to the side of one latent position."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    layers: int = 12
    heads: int = 12
    max_length: int = 77

    def __post_init__(self) -> None:
        check_types(self)
        check_values(self, {
            "vocab_size": up_to(self.vocab_size, 1 << 20, least=VOCABULARY),
            "intermediate_size": up_to(self.intermediate_size, 4 * CHANNELS),
            "layers": up_to(self.layers, 8 * LAYERS), "heads": up_to(self.heads, CHANNELS),
            "hidden_size": (0 < self.hidden_size <= CHANNELS and self.hidden_size % self.heads == 0,
                            f"a multiple of {self.heads}, up to {CHANNELS}"),
            "max_length": up_to(self.max_length, FRAMES, least=3)})


VOCABULARY = 49408                          # of CLIP's tokenizer


@dataclass(frozen=True)
class ScheduleConfig:
    """Betas linear in beta itself: AnimateDiff's, not Stable Diffusion's own."""
    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def __post_init__(self) -> None:
        check_types(self)
        check_values(self, {
            "train_steps": up_to(self.train_steps, 1000, least=1000),
            "beta_start": (0 < self.beta_start < 1, "above 0 and below 1"),
            "beta_end": (self.beta_start <= self.beta_end < 1, "beta_start or more, below 1")})


@dataclass(frozen=True)
class SampleConfig:
    """Every number of the method; the defaults are the published ones for camera motion."""
    steps: int = 100
    guidance_steps: int = 50            # the first steps, which the motion guides
    guidance_span: float = 0.3          # the share of the noise range that they cover
    spacing: str = "uneven"             # or "linspace", "leading": of the timesteps
    cfg_scale: float = 8.5              # uncond + s * (cond - uncond)
    cfg_share: float = 1.0              # of the steps, the first, that s applies to; then it is 1

    motion_scale: float = 2000.0        # lambda, at 16 frames of 512x512
    semantic_scale: float = 0.0         # weight of semantic guidance, where there is any
    warmup: int = 10                    # guided steps over which lambda rises at the start
    cooldown: int = 10                  # and falls at the end
    guidance_every: int = 1             # guided steps to one gradient, which they all use

    extract_t: int = 400                # t_alpha: the noise under which the reference is read
    top_k: int = 1                      # values kept of each row of a map
    blocks: tuple[str, ...] = ("up_blocks.1",)
    block_weights: tuple[float, ...] = ()   # of each of them in the loss; 1 where none are given
    inversion_steps: int = 0            # 0: the reference is noised once; else inverted by DDIM

    frames: int = 16
    height: int = 512                   # of the picture, in pixels
    width: int = 512
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        check_values(self, {
            "steps": (1 <= self.steps <= 1000, "1 to 1000"),
            "guidance_steps": (0 <= self.guidance_steps <= self.steps,
                               f"0 to the number of steps, {self.steps}"),
            "guidance_span": (0 < self.guidance_span <= 1, "above 0, up to 1"),
            "spacing": (self.spacing in SPACINGS, "one of " + ", ".join(SPACINGS)),
            "cfg_scale": (0 <= self.cfg_scale < math.inf, "0 or more"),
            "cfg_share": (0 <= self.cfg_share <= 1, "0 to 1"),
            "motion_scale": (0 <= self.motion_scale < math.inf, "0 or more"),
            "semantic_scale": (0 <= self.semantic_scale < math.inf, "0 or more"),
            "warmup": (self.warmup >= 0, "0 or more"),
            "cooldown": (self.cooldown >= 0, "0 or more"),
            "guidance_every": (self.guidance_every >= 1, "1 or more"),
            "extract_t": (0 <= self.extract_t <= 999, "0 to 999"),
            "frames": (self.frames >= 1, "1 or more"),
            "top_k": (1 <= self.top_k <= self.frames, f"1 to the number of frames, {self.frames}"),
            "blocks": (len(self.blocks) > 0, "at least one block"),
            "block_weights": (len(self.block_weights) in (0, len(self.blocks))
                              and all(0 <= w < math.inf for w in self.block_weights),
                              f"none, or one of 0 or more for each of {len(self.blocks)} blocks"),
            "inversion_steps": (0 <= self.inversion_steps <= 1000, "0 to 1000"),
            "height": (self.height >= 1, "1 or more"),
            "width": (self.width >= 1, "1 or more"),
        })


SPACINGS = ("uneven", "linspace", "leading")


@dataclass(frozen=True)
class ModelConfig:
    """A whole model, and the settings that suit it. The defaults are SD1.5 + AnimateDiff v3."""
    name: str = "sd15"
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sparsectrl: SparseCtrlConfig = field(default_factory=SparseCtrlConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    fps: int = 8
    vocabulary: tuple[str, ...] = ()    # the words it was trained on, if they can be listed

    def __post_init__(self) -> None:
        check_types(self)
        unet, control = self.unet, self.sparsectrl
        check_values(self, {"fps": up_to(self.fps, 1000), "sparsectrl": (
            not control.kind or of_channels(unet.block_out_channels, control.motion_heads)[0],
            f"its motion_heads are to divide the UNet's channels, {unet.block_out_channels}")})
        for ours, theirs, what in (
                (unet.in_channels, self.vae.latent_channels, "channels of latents"),
                (unet.text_channels, self.text.hidden_size, "channels of text")):
            if ours != theirs:
                raise InputError(f"its UNet takes {ours} {what}, the rest gives {theirs}")


SD15 = ModelConfig()
SD15_V2 = dataclasses.replace(SD15, unet=UNetConfig(motion_mid_block=True))
SD15_V1 = dataclasses.replace(SD15, unet=UNetConfig(norm_per_frame=False, max_frames=24))

TINY = ModelConfig(
    name="tiny",
    unet=UNetConfig(block_out_channels=(48, 96, 192), layers_per_block=1, attention_levels=(1, 2),
                    heads=4, text_channels=64, norm_groups=8, motion_heads=4, max_frames=16),
    vae=VAEConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_groups=8,
                  scaling_factor=1.0),
    text=TextConfig(hidden_size=64, intermediate_size=256, layers=2, heads=4),
    sample=SampleConfig(height=128, width=128))


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts and lists, for JSON."""
    return dataclasses.asdict(config)


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """A config of the given kind; what is left out keeps its default.

    Raises InputError for a key that the kind does not have, and for values it refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}      # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise InputError(f"{kind.__name__} is {shown(values)}, where settings by name are wanted")
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise InputError(f"unknown setting {unknown[0]!r} in {kind.__name__}: "
                         f"it has {', '.join(fields)}")
    parsed = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(fields[key].type):
            value = from_dict(fields[key].type, value)          # type: ignore[arg-type]
        parsed[key] = tuple(value) if isinstance(value, list) else value
    return kind(**parsed)
