"""Plans one model from many checkpoints, with every tensor accounted for."""
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..config import ModelConfig
from ..errors import InputError
from ..files import LazyTensor
from ..networks.temporal import sinusoidal_positional_encoding
from .detect import FOREIGN_PART_NOTE, OPTIONS, PART_NAMES, DetectedCheckpoint
from .infer_config import infer_config
from .key_mapping import POSITIONAL_ENCODING, ema_key
from .lora import Lora, apply_deltas, collect_deltas
from .lora_math import WeightDelta, squeeze_trailing
from .model_file import build_on_meta, check_finite, check_names


class ConversionPlan(NamedTuple):
    """A model that can be written: the source of each weight, and the use of each tensor.

    Attributes:
        config: Sizes and settings of the model.
        weights: The weights by name, such as "unet.conv_in.weight".
        paths: The file of each part.
        shapes: The shape of each weight, by name, in the order in which they are written.
        deltas: Changes of weights by LoRAs, by name.
        ignored: How many tensors of each file are not used, by the reason. All others are used.
    """

    config: ModelConfig
    weights: dict[str, LazyTensor]
    paths: dict[str, Path]
    shapes: dict[str, torch.Size]
    deltas: dict[str, list[WeightDelta]]
    ignored: dict[Path, Counter[str]]

    def tensors(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yield the weights in the order of `shapes`, merged in float32 and converted once.

        Raises:
            InputError: If a value is not finite, or `dtype` cannot hold it.
        """
        for name, shape in self.shapes.items():
            weight = apply_deltas(self.weights[name].read().reshape(shape),
                                  self.deltas.get(name, ()), dtype)
            check_finite(self.paths[part_of(name)], name, weight)
            yield weight


def missing_parts(parts: Container[str]) -> list[str]:
    """Return the parts that a complete model also needs, each with its option."""
    return [f"the {PART_NAMES[part]} ({option})" for part, option in OPTIONS.items()
            if part not in parts and part != "sparsectrl"]


def plan_conversion(name: str, parts: Mapping[str, DetectedCheckpoint], loras: Sequence[Lora],
                    ema: bool = False) -> ConversionPlan:
    """Return the plan for a model of these parts. Reads little but names and shapes.

    Warns of tensors of another method, without which the motion may differ.

    Args:
        name: Name of the model.
        parts: The checkpoints that give "unet", "vae", "text_encoder", "motion" and, optionally,
            "sparsectrl". One checkpoint may give several parts.
        loras: LoRAs that are merged into the weights, in this order.
        ema: Use the moving averages of the UNet's weights.

    Raises:
        InputError: If a part is missing, a tensor is missing, extra or misshapen, or a LoRA does
            not fit.
    """
    if missing := missing_parts(parts):
        raise InputError(f"{name}: the model is not complete. Add {', '.join(missing)}")
    for part in parts.keys() & {"motion", "sparsectrl"}:
        check_positional_encodings(parts[part])
    config = infer_config(name, parts)
    shapes = {name: t.shape for name, t in build_on_meta(config).state_dict().items()}
    weights: dict[str, LazyTensor] = {}
    key_maps = {part: checkpoint.key_maps[part] for part, checkpoint in parts.items()}
    if ema:
        key_maps["unet"] = use_ema_weights(parts["unet"], key_maps["unet"])
    for part, checkpoint in parts.items():
        part_weights = {f"{'unet' if part == 'motion' else part}.{target}": checkpoint.tensors[key]
                        for target, key in key_maps[part].items()}
        check_weights(checkpoint.path, part_weights, {
            name: shape for name, shape in shapes.items() if part_of(name) == part})
        weights |= part_weights
    deltas, ignored = collect_deltas(loras, shapes)
    ignored |= {c.path: ignored_tensors(c, parts, key_maps) for c in parts.values()}
    for path, reasons in ignored.items():
        for reason in {reason for reason in reasons.values() if reason.endswith(FOREIGN_PART_NOTE)}:
            warnings.warn(f"{path}: ignored tensors {reason}", stacklevel=3)
    paths = {part: checkpoint.path for part, checkpoint in parts.items()}
    counts = {path: Counter(reasons.values()) for path, reasons in ignored.items()}
    return ConversionPlan(config, weights, paths, shapes, deltas, counts)


def part_of(name: str) -> str:
    """Return the part of a model that gives a weight."""
    part = name.partition(".")[0]
    return "motion" if part == "unet" and ".motion_modules." in name else part


def use_ema_weights(checkpoint: DetectedCheckpoint, key_map: Mapping[str, str]) -> dict[str, str]:
    """Return a key map in which LDM's moving averages replace the weights of the UNet."""
    averages = {target: ema_key(key) for target, key in key_map.items()}
    for key in averages.values() - checkpoint.tensors.keys():
        raise InputError(f"{checkpoint.path}: the moving average {key} is missing. Leave out --ema")
    return averages


def ignored_tensors(checkpoint: DetectedCheckpoint, parts: Mapping[str, DetectedCheckpoint],
                    key_maps: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return why each tensor that is not used is ignored, by key.

    Every tensor is used once, or is ignored for a reason.

    Args:
        checkpoint: The checkpoint.
        parts: The checkpoint of each part.
        key_maps: The key map of each part, whose keys are used.
    """
    used = [key for part in parts if parts[part] is checkpoint for key in key_maps[part].values()]
    reasons = {key: f"of the {PART_NAMES[part]}, which {OPTIONS[part]} gives"
               if parts[part] is not checkpoint else "replaced by a moving average (--ema)"
               for part, key_map in checkpoint.key_maps.items() for key in key_map.values()}
    reasons |= checkpoint.ignored
    ignored = {key: reasons[key] for key in checkpoint.tensors.keys() - set(used)}
    assert len(used) + len(ignored) == len(checkpoint.tensors)
    return ignored


def check_positional_encodings(checkpoint: DetectedCheckpoint) -> None:
    """Raise InputError for positional encodings other than the sinusoids that are computed."""
    for key in filter(POSITIONAL_ENCODING.search, checkpoint.ignored):
        encoding = checkpoint.tensors[key].read().float()
        # fp8 numbers, even if they are stored in another type, are rounded by up to a 16th.
        rounding = [torch.finfo(dtype).eps / 4 for dtype in (torch.float8_e5m2, torch.float8_e4m3fn)
                    if torch.equal(encoding.to(dtype).float(), encoding)]
        if encoding.ndim != 3 or encoding.shape[2] % 2 or not torch.allclose(
                encoding[0], sinusoidal_positional_encoding(*encoding.shape[1:]),
                atol=max([5e-3, *rounding])):
            raise InputError(f"{checkpoint.path}: {key} is not AnimateDiff's positional encoding. "
                             "Give a motion module of AnimateDiff")


def check_weights(path: Path, weights: Mapping[str, LazyTensor],
                  shapes: Mapping[str, torch.Size]) -> None:
    """Raise InputError for a weight that is missing, extra, quantized or of another shape."""
    check_names(path, set(weights), shapes)
    for name, tensor in weights.items():
        if not tensor.dtype.is_floating_point:
            raise InputError(f"{path}: the tensor {name} is {tensor.dtype}: quantized weights are "
                             "not supported. Give a file in fp16, bf16 or fp32")
        if squeeze_trailing(tensor.shape) != squeeze_trailing(shapes[name]):
            raise InputError(f"{path}: the tensor {name} is {tensor.shape}; expected "
                             f"{tuple(shapes[name])}. Give a checkpoint for Stable Diffusion 1.5")
