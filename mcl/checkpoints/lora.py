"""Changes to weights: the domain adapter, motion LoRAs, and LoRAs of every dialect.

Most say W += scale * alpha / rank * up @ down, for one weight; `changes` has the other forms. It
is computed and added in float32, and the sum is cast once. AnimateDiff's own loader leaves
alpha / rank out.
"""
import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..config import has_type, short_repr
from ..errors import InputError
from . import key_mapping as rename
from .lora_math import Delta, check_fit, rank_of
from .detect import LORAS, Source, read_source
from .lazy import LazyTensor
from .infer_config import count

ROLES = re.compile(
    r"^(?P<module>.+?)(?:"
    r"(?:\.lora_A(?:\.\w+)?|[._]lora\.down|\.lora_linear_layer\.down|\.lora_down)\.(?P<down>weight)"
    r"|(?:\.lora_B(?:\.\w+)?|[._]lora\.up|\.lora_linear_layer\.up|\.lora_up)\.(?P<up>weight)"
    r"|\.lora_mid\.(?P<mid>weight)|\.(?P<diff>diff|w_norm)|\.(?P<diff_b>diff_b|b_norm)"
    r"|\.lora_(?P<magnitude>magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|\.(?P<same>alpha|dora_scale|hada_w[12]_[ab]|hada_t[12]|lokr_w[12]|lokr_w[12]_[ab]|lokr_t2)"
    r"|\.(?P<glora>[ab][12])\.weight)$")
ELSEWHERE = (
    (r"^bundle_emb\.", "an embedding bundled with it, whose word prompts here do not know"),
    (r"text_projection|vision_model|visual_projection", "of CLIP, but not of its text encoder"))
PREFIXES = ((r"(^|\.)base_model\.model\.", r"\1"), (r"^lora_unet_", "unet."),
            (r"^lora_te1?_", "text_encoder."), (r"^(?=(down|up)_blocks\.|mid_block\.)", "unet."),
            (r"^(?=text_model\.|encoder\.layers\.)", "text_encoder."),
            (r"^text_encoder\.encoder\.", "text_encoder.text_model.encoder."))
IGNORE_ALPHA = "merge LoRAs as AnimateDiff's own loader does, by up @ down without alpha / rank"
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Lora:
    source: Source
    scale: float = 1.0
    ignore_alpha: bool = False          # as AnimateDiff's own loader does: W += scale * up @ down


def parse_scaled(text: str) -> tuple[Path, float]:
    """"file.safetensors:0.8" -> (file.safetensors, 0.8); 1 where no scale is given."""
    path, colon, scale = text.rpartition(":")
    try:
        value = float(scale) if colon and not os.path.exists(text) else math.nan
    except ValueError:
        value = math.nan
    return (Path(text), 1.0) if math.isnan(value) else (Path(path), value)


def open_lora(option: str, path: Path, scale: float = 1.0, ignore_alpha: bool = False) -> Lora:
    """A LoRA by the option it was given with. Raises InputError if it is something else."""
    source = read_source(path)
    if source.slot != option:
        fit = f"give it with {source.slot}" if source.slot in LORAS else (
            "convert_weights.py makes a model of it" if source.slot else "it is no LoRA")
        raise InputError(f"{path}: {source.title}, which is not for {option}: {fit}")
    if not math.isfinite(scale):
        raise InputError(f"{path}: the scale {scale} is not possible: a finite number")
    return Lora(source, scale, ignore_alpha)


def deltas(lora: Lora, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Delta],
                                                                     dict[str, str]]:
    """What a LoRA changes: {weight's name, as "unet.conv_in.weight": its change}.

    shapes  of all the model's weights, by name
    Returns also {tensor of the LoRA: why it is not used}. Raises InputError for a module that the
    model does not have, a shape that does not fit, and half a pair.
    """
    path, tensors = lora.source.path, lora.source.checkpoint.tensors
    weights = {flat(name.removesuffix(".weight")): name for name in shapes
               if name.endswith(".weight")}
    layers = count(shapes, "unet.down_blocks.0.resnets")
    has_middle = any(".mid_block.motion_modules." in name for name in shapes)
    peft = peft_config(lora.source)
    result: dict[str, Delta] = {}
    dropped = {name: why for pattern, why in ELSEWHERE for name in tensors
               if re.search(pattern, name)}
    for module, roles in by_module(path, tensors.keys() - dropped.keys()).items():
        if "mid_block" in module and "motion_modules" in module and not has_middle:
            dropped |= {name: "of the middle block's motion module, which only v2 has"
                        for name in roles.values()}
            continue
        weight = weights.get(flat(our_module(module, layers)))
        if weight is None:
            raise InputError(f"{path}: it changes {module}, which this model does not have")
        factors = {role: tensors[name] for role, name in roles.items()}
        bias, shift = weight.removesuffix("weight") + "bias", factors.pop("diff_b", None)
        if shift is not None and bias not in shapes:
            dropped[roles["diff_b"]] = "of a bias that this layer does not have"
        elif shift is not None:
            result[bias] = one_delta(path, module, {"diff": shift}, shapes[bias], {}, lora)
        if factors.keys() - {"alpha"} or shift is None:
            if weight in result:
                raise InputError(f"{path}: {module} has not exactly one pair of down and up")
            result[weight] = one_delta(path, module, factors, shapes[weight], alphas(
                peft, weight.partition(".")[0]), lora)
    return result, dropped


def alphas(peft: Mapping[str, Any], part: str) -> dict[str, Any]:
    """alpha and the rank of one part by PEFT's config; empty where it has none."""
    alpha = next((peft[key] for key in (f"{part}.lora_alpha", "lora_alpha", "alpha")
                  if peft.get(key)), None)
    return {} if alpha is None else {"alpha": alpha, "rank": peft.get(f"{part}.r", peft.get("r"))}


def by_module(path: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """{module as the LoRA calls it: {its role, as "down", "up" or "alpha": tensor's name}}."""
    modules: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        found = ROLES.match(name)
        if not found:
            raise InputError(f"{path}: {name} is nothing that a LoRA of a known kind holds")
        role = found["same"] or found["glora"] or next(
            role for role, value in found.groupdict().items() if value and role != "module")
        if role in modules.setdefault(found["module"], {}):
            raise InputError(f"{path}: {found['module']} has two of {role}")
        modules[found["module"]][role] = name
    return modules


def one_delta(path: Path, module: str, factors: Mapping[str, LazyTensor], shape: Sequence[int],
              peft: Mapping[str, Any], lora: Lora) -> Delta:
    """Raises InputError where the factors have not the shape of the weight between them."""
    alpha: Any = peft.get("alpha")
    rest = {role: t for role, t in factors.items() if role != "alpha"}
    sizes = {role: t.shape for role, t in rest.items()}
    try:
        fits, rank = check_fit(rest, shape), rank_of(sizes)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"{path}: {module} has not exactly one pair of down and up, nor the "
                         f"factors of another form ({', '.join(sizes)})") from error
    if not fits or rank == 0 or not all(t.dtype.is_floating_point for t in rest.values()):
        raise InputError(f"{path}: {module} is {' and '.join(map(str, sizes.values()))}, made for "
                         f"another model: the weight here is {tuple(shape)}")
    if "alpha" in factors:
        alpha = factors["alpha"].read().flatten()[:1].float().sum().item()
    if alpha is not None and not (has_type(alpha, float) and math.isfinite(alpha)):
        raise InputError(f"{path}: the alpha of {module} is {short_repr(alpha)}")
    if rank is None:            # whole matrices have no rank, but PEFT divides by the one it had
        known = alpha is not None and "alpha" not in factors and has_type(peft.get("rank"), int)
        alpha, rank = (alpha, peft["rank"]) if known and "lokr_w1" in rest else (1, 1)
    if lora.ignore_alpha or not alpha:      # kohya's trainer takes zero for the rank, too
        alpha = rank
    return Delta(rest, alpha, rank, lora.scale)


def all_deltas(loras: Sequence[Lora], shapes: Mapping[str, Sequence[int]]
               ) -> tuple[dict[str, list[Delta]], dict[Path, dict[str, str]]]:
    """`deltas` of several: {weight's name: its changes, in order}, {file: what is not used}."""
    changes: dict[str, list[Delta]] = {}
    unused: dict[Path, dict[str, str]] = {}
    for lora in loras:
        found, unused[lora.source.path] = deltas(lora, shapes)
        for weight, delta in found.items():
            changes.setdefault(weight, []).append(delta)
    return changes, unused


def merged(weight: Tensor, changes: Sequence[Delta], dtype: torch.dtype) -> Tensor:
    """A weight with its changes, added in float32, in the dtype wanted; always a new tensor."""
    for change in changes:
        weight = change.add_to(weight.float())
    return weight.to(dtype, copy=True)


@dataclass(frozen=True)
class Merge:
    """LoRAs as an edit for `load_model`: they are merged into the weights as these are read."""
    changes: Mapping[str, Sequence[Delta]]
    sha256: str

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        return merged(weight, self.changes[name], torch.float32) if name in self.changes else weight


def merge(loras: Sequence[Lora], shapes: Mapping[str, Sequence[int]]) -> Merge:
    """Of LoRAs into a model whose weights have these shapes. Raises InputError as `deltas` does."""
    texts = []
    for lora in loras:
        for path in lora.source.checkpoint.files:
            with open(path, "rb") as file:
                texts.append(hashlib.file_digest(file, "sha256").hexdigest())
        texts.append(f":{lora.scale}{' without alpha' * lora.ignore_alpha}")
    return Merge(all_deltas(loras, shapes)[0],
                 hashlib.sha256(" ".join(texts).encode()).hexdigest())


def flat(name: str) -> str:
    return name.replace(".", "_")


def our_module(module: str, layers: int) -> str:
    """The module of a LoRA's name as we call it; dots may be underscores."""
    for pattern, ours in PREFIXES:
        module = re.sub(pattern, ours, module)
    module = module.replace(".processor.", ".")
    if module.startswith("text_encoder."):
        before, _, last = module.removesuffix(".0").rpartition(".")
        return f"{before}.{OLD_TEXT[last]}" if last in OLD_TEXT else module
    ldm = re.fullmatch(r"unet\.(?:(input|output)_blocks_(\d+)_(\d+)|middle_block_(\d)|"
                       r"(time_embed_\d|out_\d))(?:_(.+))?", module)
    if ldm:
        inner = {flat(theirs): theirs for theirs in rename.RESNET}.get(ldm[6], ldm[6] or "")
        head = (f"{ldm[1]}_blocks.{ldm[2]}.{ldm[3]}" if ldm[1] else
                f"middle_block.{ldm[4]}" if ldm[4] else f"{ldm[5][:-2]}.{ldm[5][-1]}")
        return "unet." + rename.unet_from_ldm(f"{head}.{inner}.", layers).rstrip(".")
    if ".motion_modules." in module:
        module = "unet." + rename.motion_name(module)
    return module + ".0" if module.endswith("to_out") else module


def peft_config(source: Source) -> dict[str, Any]:
    """What PEFT keeps beside the tensors, alpha above all; empty for a LoRA of another kind."""
    config = source.checkpoint.configs.get("peft", {})
    unread = {"alpha_pattern", "use_rslora"}
    if not any("magnitude_vector" in name for name in source.checkpoint.tensors):
        unread.add("use_dora")
    for key, value in config.items():
        if value and key.rpartition(".")[2] in unread:
            raise InputError(f"{source.path}: a PEFT LoRA with {key}, which is not read here")
    return config
