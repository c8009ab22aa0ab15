"""One model out of many files: every tensor of them accounted for, every weight filled once."""
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Mapping

import torch
from torch import Tensor

import dataclasses

from .model_file import check_finite, build_on_meta, file_metadata
from ..config import ModelConfig, SampleConfig, SparseCtrlConfig
from ..presets import DISTILLED_PRESETS
from ..errors import InputError
from ..files import stream_safetensors
from ..networks.temporal import sinusoidal_positional_encoding
from . import key_mapping as rename
from .lora_math import Delta, bare
from .detect import BASE, MOTION, SPARSECTRL, TEXT, VAE, Source, distilled
from .lazy import LazyTensor
from .lora import Lora, all_deltas, merged
from .infer_config import made, sparsectrl_config, text_config, unet_config, vae_config

OPTIONS = {"unet": BASE, "vae": VAE, "text_encoder": TEXT, "motion": MOTION,
           "sparsectrl": SPARSECTRL}
WORDS = {"unet": "the UNet", "vae": "the VAE", "text_encoder": "the text encoder",
         "motion": "the motion module", "sparsectrl": "SparseCtrl"}


@dataclass(frozen=True)
class Plan:
    """A model that can be written: where each weight comes from, and what becomes of the rest."""
    config: ModelConfig
    weights: dict[str, LazyTensor]              # by our name, part first
    paths: dict[str, Path]                      # the file that each is in
    shapes: dict[str, tuple[int, ...]]
    changes: dict[str, list[Delta]]
    used: dict[Path, int]                       # how many tensors of a file
    dropped: dict[Path, Counter[str]]           # how many others, by the reason

    def tensors(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weights in the order of `shapes`, merged in float32 and cast once.

        Raises InputError for a value that is not finite, or that the dtype cannot hold.
        """
        for name, shape in self.shapes.items():
            weight = merged(self.weights[name].read().reshape(shape),
                            self.changes.get(name, ()), dtype)
            check_finite(self.paths[name], name, weight)
            yield weight


def missing(sources: Mapping[str, Source]) -> list[str]:
    """What a complete model still needs, and the options that give it."""
    return [f"{WORDS[part]} ({OPTIONS[part]})" for part in OPTIONS
            if part not in sources and part != "sparsectrl"]


def plan(name: str, parts: Mapping[str, Source], loras: list[Lora], ema: bool = False) -> Plan:
    """What to write for a model of these parts; reads little but names and shapes.

    parts   "unet", "vae", "text_encoder", "motion" and, if wanted, "sparsectrl", each from the
            source that has it
    loras   what is merged into them, in this order
    ema     take the moving averages of the UNet's weights

    Raises InputError where a part is missing, a tensor is missing, extra or mis-shaped, or a LoRA
    does not fit.
    """
    if missing(parts):
        raise InputError("a complete model still needs " + ", ".join(missing(parts)))
    taken, dropped = choose(parts, ema)
    for part in ("motion", "sparsectrl"):
        if part in parts:
            check_positions(parts[part])
    config = infer_config(name, parts)
    weights: dict[str, LazyTensor] = {}
    paths: dict[str, Path] = {}
    for part, source in parts.items():
        prefix = "unet" if part == "motion" else part
        new = {f"{prefix}.{ours}": source.checkpoint.tensors[theirs]
               for ours, theirs in taken[part].items()}
        weights |= new
        paths |= dict.fromkeys(new, source.path)
    shapes = {name: tuple(t.shape) for name, t in build_on_meta(config).state_dict().items()}
    check(paths, weights, shapes, parts)
    changes, unused = all_deltas(loras, shapes)
    used = Counter(paths.values())
    for lora in loras:
        path = lora.source.path
        used[path] = len(lora.source.checkpoint.tensors) - len(unused[path])
    reasons = {path: Counter(names.values()) for path, names in (dropped | unused).items()}
    for source in parts.values():
        # Every tensor is used once or dropped for a reason.
        assert used[source.path] + reasons[source.path].total() == len(source.checkpoint.tensors)
    return Plan(config, weights, paths, shapes, changes, used, reasons)


def choose(parts: Mapping[str, Source], ema: bool
           ) -> tuple[dict[str, dict[str, str]], dict[Path, dict[str, str]]]:
    """Of each part {our name: its name}, and of each file {its name: why it is not used}."""
    taken = {part: dict(source.parts[part]) for part, source in parts.items()}
    dropped = {source.path: dict(source.dropped) for source in parts.values()}
    if ema:
        take_averages(parts["unet"], taken["unet"], dropped[parts["unet"].path])
    for part, chosen in parts.items():
        for source in parts.values():
            if source is not chosen:
                dropped[source.path] |= {theirs: f"of {WORDS[part]}, which {OPTIONS[part]} gives"
                                         for theirs in source.parts.get(part, {}).values()}
    return taken, dropped


def take_averages(source: Source, taken: dict[str, str], dropped: dict[str, str]) -> None:
    """Puts LDM's moving averages in the place of the UNet's weights."""
    for ours, theirs in taken.items():
        average = rename.ema_name(theirs)
        if average not in dropped:
            raise InputError(f"{source.path}: it holds no moving average of {theirs}; "
                             "leave out --ema")
        taken[ours] = average
        del dropped[average]
        dropped[theirs] = "in whose place --ema took a moving average"


def check_positions(source: Source) -> None:
    """Raises InputError where a motion module's positions are not the sinusoids computed here."""
    for name in source.dropped:
        if rename.POSITIONS.search(name):
            found = source.checkpoint.tensors[name].read().float()
            # As exact as the coarsest numbers that hold them: fp8 rounds by up to a 16th.
            rounding = next((torch.finfo(kind).eps / 4 for kind in (
                torch.float8_e5m2, torch.float8_e4m3fn)
                if torch.equal(found.to(kind).float(), found)), 0)
            if found.ndim != 3 or found.shape[2] % 2 or not torch.allclose(
                    found[0], sinusoidal_positional_encoding(*found.shape[1:]), atol=max(5e-3, rounding)):
                raise InputError(f"{source.path}: {name} is not AnimateDiff's encoding of "
                                 "positions; such motion modules cannot be used here")


def infer_config(name: str, parts: Mapping[str, Source]) -> ModelConfig:
    """The sizes of all parts, and that they fit one another."""
    unet, motion, control = parts["unet"], parts["motion"], parts.get("sparsectrl")
    return made(
        unet.path, ModelConfig, name=name,
        unet=unet_config(unet.path, unet.shapes("unet"), unet.config("unet"),
                         motion.shapes("motion"), motion.config("motion"), motion.version,
                         motion.motion_max_seq_length),
        vae=vae_config(parts["vae"].path, parts["vae"].shapes("vae"),
                       parts["vae"].config("vae")),
        text_encoder=text_config(parts["text_encoder"].path, parts["text_encoder"].shapes("text_encoder"),
                         parts["text_encoder"].config("text_encoder")),
        sparsectrl=SparseCtrlConfig() if control is None else sparsectrl_config(
            control.path, control.shapes("sparsectrl"), control.config("sparsectrl"),
            control.motion_max_seq_length),
        sample=dataclasses.replace(DISTILLED_PRESETS.get(distilled(motion.path), SampleConfig()),
                                   num_frames=min(16, motion.motion_max_seq_length)))


def check(paths: Mapping[str, Path], weights: Mapping[str, LazyTensor],
          shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Source]) -> None:
    """Raises InputError for a weight that is missing, extra, quantised or of another shape.

    Ones at the end of a shape do not count: a 1x1 convolution is a linear layer.
    """
    for name in shapes:
        if name not in weights:
            part = ("motion" if name.startswith("unet.") and ".motion_modules." in name
                    else name.partition(".")[0])
            raise InputError(f"{parts[part].path}: the tensor {name} is missing")
    for name, tensor in weights.items():
        if name not in shapes:
            raise InputError(f"{paths[name]}: the tensor {name} belongs to no part of the model")
        if not tensor.dtype.is_floating_point:
            raise InputError(f"{paths[name]}: the tensor {name} is {tensor.dtype}: quantised "
                             "weights are not read here")
        if bare(tensor.shape) != bare(shapes[name]):
            raise InputError(f"{paths[name]}: the tensor {name} is {tensor.shape}, "
                             f"here it is {shapes[name]}")


def write(plan: Plan, path: Path, dtype: torch.dtype, tensors: Iterator[Tensor],
          sources: Mapping[str, str]) -> None:
    """Writes `plan.tensors(dtype)`, as they come, to a file that `load_model` reads."""
    stream_safetensors(path, plan.shapes, dtype, tensors, file_metadata(plan.config, sources, dtype))
