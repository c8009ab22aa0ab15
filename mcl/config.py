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
WORDS: dict[Any, str] = {int: "a whole number", float: "a finite number", str: "text",
                         bool: "true or false"}
LAYERS, LEVELS, CHANNELS, FRAMES = 16, 8, 16384, 4096       # more is no network but an attack
VOCABULARY = 49408                          # of CLIP's tokenizer
SPACINGS = ("uneven", "linspace", "leading", "trailing", "lcm")
SOLVERS = ("ddim", "lcm")
LCM_STEPS = 50                              # that consistency models are distilled on


def within(default: Any, least: float, most: float = math.inf) -> Any:
    """A field whose value, or each of whose values, lies in a range, ends included."""
    return field(default=default, metadata={"range": (least, most)})


class Checked:
    """A config that refuses, when it is made, what cannot be. Lists become tuples."""

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):        # type: ignore[arg-type]
            value, each = getattr(self, one.name), get_args(one.type)[:1]
            if each and isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, one.name, value)
            values = value if each and isinstance(value, tuple) else (value,)
            if (each and type(value) is not tuple) or not all(
                    is_a(v, each[0] if each else one.type) for v in values):
                word = WORDS.get(each[0] if each else one.type, "settings by name")
                self.refuse(one.name, f"a list, each {word}" if each else word)
            least, most = one.metadata.get("range", (None, None))
            if least is not None and not all(least <= v <= most for v in values):
                self.refuse(one.name, f"{least} or more" if most == math.inf else
                            f"{least} to {most}" if least < most else str(most))
        for name, (holds, legal) in self.rules().items():
            if not holds:
                self.refuse(name, legal)

    def rules(self) -> dict[str, tuple[bool, str]]:
        """Of fields: whether the value is possible beside the others, and which are."""
        return {}

    def refuse(self, name: str, legal: str) -> None:
        raise InputError(f"{name} = {shown(getattr(self, name))} is not possible: {legal}")


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value can stand in a field; whole numbers are numbers, and True is none."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and (
            math.isfinite(value))
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def shown(value: Any) -> str:
    """A value for a message, cut where it is long; nested as deeply as may be."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def of_channels(widths: tuple[int, ...], divisor: int) -> tuple[bool, str]:
    """That there is a width for each of some levels, each a multiple of what divides it."""
    step = math.lcm(2, divisor)
    return (1 <= len(widths) <= LEVELS and all(w % step == 0 for w in widths),
            f"1 to {LEVELS} multiples of {step}, up to {CHANNELS}")


@dataclass(frozen=True)
class UNetConfig(Checked):
    """SD1.5's UNet with AnimateDiff's v3 motion modules, unless told otherwise."""
    in_channels: int = within(4, 1, CHANNELS)
    out_channels: int = within(4, 1, CHANNELS)
    block_out_channels: tuple[int, ...] = within((320, 640, 1280, 1280), 1, CHANNELS)
    layers_per_block: int = within(2, 1, LAYERS)
    attention_levels: tuple[int, ...] = (0, 1, 2)   # resolutions that have spatial transformers
    heads: int = within(8, 1, CHANNELS)
    text_channels: int = within(768, 1, CHANNELS)
    norm_groups: int = within(32, 1, CHANNELS)

    motion_modules: bool = True
    motion_heads: int = within(8, 1, CHANNELS)
    motion_attentions: int = within(2, 1, LAYERS)   # in each motion module; SparseCtrl's have 1
    motion_mid_block: bool = False      # v2 has one more module, in the middle
    norm_per_frame: bool = True         # v1 normalises residual blocks over the whole clip
    max_frames: int = within(32, 1, FRAMES)         # of the positional encoding; v1: 24

    def rules(self) -> dict[str, tuple[bool, str]]:
        levels = range(len(self.block_out_channels))
        return {"attention_levels": (
            list(self.attention_levels) == sorted(set(self.attention_levels) & set(levels)),
            f"some of 0 to {len(levels) - 1}, rising"),
            "block_out_channels": of_channels(self.block_out_channels, math.lcm(
                self.norm_groups, self.heads, self.motion_heads if self.motion_modules else 1))}

    @property
    def time_channels(self) -> int:
        return 4 * self.block_out_channels[0]


@dataclass(frozen=True)
class SparseCtrlConfig(Checked):
    """What SparseCtrl takes beside the UNet's own sizes: pictures or sketches of some frames."""
    kind: str = ""                      # "rgb" or "scribble"; "" where a model has none
    motion_heads: int = within(8, 1, CHANNELS)
    max_frames: int = within(32, 1, FRAMES)
    # Of the convolutions that bring a sketch down to the size of the latents.
    sketch_channels: tuple[int, ...] = within((16, 32, 96, 256), 1, CHANNELS)

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {"kind": (self.kind in ("", "rgb", "scribble"), "rgb, scribble, or none"),
                "sketch_channels": (1 <= len(self.sketch_channels) <= LEVELS,
                                    f"1 to {LEVELS} numbers")}


@dataclass(frozen=True)
class VAEConfig(Checked):
    latent_channels: int = within(4, 1, CHANNELS)
    block_out_channels: tuple[int, ...] = within((128, 256, 512, 512), 1, CHANNELS)
    layers_per_block: int = within(2, 1, LAYERS)
    norm_groups: int = within(32, 1, CHANNELS)
    scaling_factor: float = 0.18215

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {"block_out_channels": of_channels(self.block_out_channels, self.norm_groups),
                "scaling_factor": (self.scaling_factor > 0, "above 0")}

    @property
    def downsampling(self) -> int:
        """Pixels to the side of one latent position."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TowerConfig(Checked):
    """The layers of CLIP's two transformers, the one of texts and the one of pictures."""
    hidden_size: int = within(768, 1, CHANNELS)
    intermediate_size: int = within(3072, 1, 4 * CHANNELS)
    layers: int = within(12, 1, 8 * LAYERS)
    heads: int = within(12, 1, CHANNELS)

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {"hidden_size": (self.hidden_size % self.heads == 0,
                                f"a multiple of {self.heads}, up to {CHANNELS}")}


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    vocab_size: int = within(49408, VOCABULARY, 1 << 20)
    max_length: int = within(77, 3, FRAMES)


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """CLIP's tower of pictures, which only measures; the defaults are clip-vit-base-patch32's."""
    patch: int = within(32, 1, 1024)    # pixels along the side of a square
    grid: int = within(7, 1, 1024)      # patches along the side of a picture


@dataclass(frozen=True)
class ScheduleConfig(Checked):
    """Betas linear in beta itself: AnimateDiff's, not Stable Diffusion's own."""
    train_steps: int = within(1000, 1000, 1000)
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {"beta_start": (0 < self.beta_start < 1, "above 0 and below 1"),
                "beta_end": (self.beta_start <= self.beta_end < 1, "beta_start or more, below 1")}


@dataclass(frozen=True)
class SampleConfig(Checked):
    """Every number of the method; the defaults are the published ones for camera motion."""
    steps: int = within(100, 1, 1000)
    guidance_steps: int = within(50, 0)     # the first steps, which the motion guides
    guidance_span: float = 0.3          # the share of the noise range that they cover
    spacing: str = "uneven"             # or another of SPACINGS: of the timesteps
    solver: str = "ddim"                # or "lcm", which puts back fresh noise at each step
    cfg_scale: float = within(8.5, 0)   # uncond + s * (cond - uncond)
    cfg_share: float = within(1.0, 0, 1)    # of the steps, the first, that s applies to

    motion_weight: float = within(2000.0, 0)     # lambda, at 16 frames of 512x512
    warmup: int = within(10, 0)         # guided steps over which lambda rises at the start
    cooldown: int = within(10, 0)       # and falls at the end
    guidance_every: int = within(1, 1)  # guided steps to one gradient, which they all use
    guidance_repeats: int = within(1, 1)    # times that a step is taken which takes a gradient

    extract_t: int = within(400, 0, 999)    # t_alpha: the noise under which the reference is read
    top_k: int = within(1, 1)           # values kept of each row of a map
    blocks: tuple[str, ...] = ("up_blocks.1",)
    block_weights: tuple[float, ...] = within((), 0)    # of each in the loss; 1 where not given
    inversion_steps: int = within(0, 0, 1000)   # 0: the reference is noised once; else inverted

    semantic_scale: float = within(0.0, 0)      # weight of semantic guidance, where there is any
    semantic_blocks: tuple[str, ...] = ("up_blocks.1",)     # whose keys it compares
    mask_threshold: float = within(0.3, 0, 1)   # of the attention to the subject's word

    frames: int = within(16, 1)
    window: int = within(0, 0)          # that the UNet sees at once; 0: all that it can
    overlap: float = within(0.25, 0, 0.9)   # the share of a window that its neighbour sees too
    loop: bool = False                  # the last window runs into the first
    height: int = within(512, 1)        # of the picture, in pixels
    width: int = within(512, 1)
    negative_prompt: str = ""

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {"guidance_steps": (self.guidance_steps <= self.steps,
                                   f"0 to the number of steps, {self.steps}"),
                "guidance_span": (0 < self.guidance_span <= 1, "above 0, up to 1"),
                "spacing": (self.spacing in SPACINGS, "one of " + ", ".join(SPACINGS)),
                "solver": (self.solver in SOLVERS, "one of " + ", ".join(SOLVERS)),
                "steps": (self.spacing != "lcm" or self.steps <= LCM_STEPS,
                          f"1 to {LCM_STEPS} with spacing lcm"),
                "semantic_scale": (not self.semantic_scale or self.solver == "ddim",
                                   "0 with solver lcm, whose clips are not of one noise"),
                "top_k": (self.top_k <= self.frames,
                          f"1 to the number of frames, {self.frames}"),
                "blocks": (len(self.blocks) > 0, "at least one block"),
                "semantic_blocks": (len(self.semantic_blocks) > 0, "at least one block"),
                "block_weights": (len(self.block_weights) in (0, len(self.blocks)),
                                  f"none, or one for each of {len(self.blocks)} blocks")}

    @property
    def weights_of_blocks(self) -> dict[str, float]:
        """In the motion loss, by the blocks' names; empty where all are 1."""
        return dict(zip(self.blocks, self.block_weights))


# What distilled motion modules are published with: AnimateDiff-Lightning (arXiv 2403.12706) and
# AnimateLCM (arXiv 2402.00769). Guided are the steps from t = 700 up, the method's own span, each
# three times: what so few lose of the motion once, BENCHMARKS.md tells.
GUIDED_THRICE = {"guidance_repeats": 3, "warmup": 0, "cooldown": 0}
FEW_STEPS: dict[str, dict[str, Any]] = {
    **{f"lightning-{steps}": {"steps": steps, "guidance_steps": guided, "spacing": "trailing",
                              "cfg_scale": 1.0, **GUIDED_THRICE}
       for steps, guided in ((2, 1), (4, 2), (8, 3))},
    "animatelcm": {"steps": 6, "guidance_steps": 2, "spacing": "lcm", "solver": "lcm",
                   "cfg_scale": 2.0, **GUIDED_THRICE}}


@dataclass(frozen=True)
class ModelConfig(Checked):
    """A whole model, and the settings that suit it. The defaults are SD1.5 + AnimateDiff v3."""
    name: str = "sd15"
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sparsectrl: SparseCtrlConfig = field(default_factory=SparseCtrlConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    fps: int = within(8, 1, 1000)
    vocabulary: tuple[str, ...] = ()    # the words it was trained on, if they can be listed
    # What the clips that it follows have, as measure/door.py says; moves_from 0: it is unknown.
    moves_from: float = within(0.0, 0)
    error_to: float = within(1.0, 0)

    def rules(self) -> dict[str, tuple[bool, str]]:
        unet, control = self.unet, self.sparsectrl
        for ours, theirs, what in (
                (unet.in_channels, self.vae.latent_channels, "channels of latents"),
                (unet.text_channels, self.text.hidden_size, "channels of text")):
            if ours != theirs:
                raise InputError(f"its UNet takes {ours} {what}, the rest gives {theirs}")
        return {"sparsectrl": (
            not control.kind or of_channels(unet.block_out_channels, control.motion_heads)[0],
            f"its motion_heads are to divide the UNet's channels, {unet.block_out_channels}")}


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
        parsed[key] = value
    return kind(**parsed)
