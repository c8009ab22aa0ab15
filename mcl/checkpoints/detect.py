"""What a checkpoint is, by the names and shapes of its tensors, and what it is not."""
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import key_mapping as rename
from .lazy import Checkpoint, LazyTensor
from .containers import open_checkpoint
from .infer_config import check_config, count

BASE, VAE, TEXT, MOTION = "--base", "--vae", "--text-encoder", "--motion-module"
SPARSECTRL = "--sparsectrl"
ADAPTER, LORA, MOTION_LORA, WEIGHTS = "--adapter", "--lora", "--motion-lora", "--weights"
LORAS = (ADAPTER, LORA, MOTION_LORA)

UNET_LDM = "model.diffusion_model."
PREFIXES = {"unet": (UNET_LDM, "unet."), "vae": ("first_stage_model.", "vae."),
            "text_encoder": ("cond_stage_model.transformer.", "text_encoder.")}
LANDMARKS = {"unet": "down_blocks.0.resnets.0.conv1.weight", "vae": "decoder.conv_in.weight",
             "text_encoder": "embeddings.token_embedding.weight"}
# A name that this finds in a checkpoint says that it is something else, and what.
FOREIGN = (
    (r"^conditioner\.embedders\.|^lora_te2_|(^|\.)add_embedding\.", "Stable Diffusion XL"),
    (r"^cond_stage_model\.model\.", "Stable Diffusion 2"),
    (r"\.oft_(blocks|diag)|\.oft_R\b|\.on_input$|(^|\.)ia3_", "an OFT or IA3 (LyCORIS)"),
    (r"temporal_attentions|positional_encoding$", "a Hotshot-XL motion module"),
    (r"^(string_to_param|emb_params|clip_[lg]$|<[^ ]+>$)",
     "a textual inversion embedding, which gives a word of its own a meaning"),
    (r"^(image_proj|ip_adapter)\b", "an IP-Adapter"))
DROPPED = (
    (r"position_ids$", "numbers of positions, counted here"),
    (r"\.loss\.|^loss\.", "of the training's loss"),
    (r"num_batches_tracked$|\.colorize$", "counters of the training"),
    (r"^model_ema\.", "moving averages, which --ema takes"),
    (r"^(betas|alphas|sqrt_|log_one|posterior_|logvar$|lvlb_|scale_factor$)",
     "Stable Diffusion's own noise schedule; AnimateDiff's is used"),
    (r"(^|\.)(vision_model\.|text_projection(\.|$)|visual_projection\.|logit_scale$)",
     "of CLIP, but not of its text encoder"))
V_PREDICTION = {"v_pred", "ztsnr"}                  # tensors without values: signs of trainers
V_METADATA = ("modelspec.prediction_type", "prediction_type", "yaml")
OURS = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out|"
                  r"time_embedding)\.")
TEXT_WIDTHS = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL",
               1280: "Stable Diffusion XL's refiner"}
LYCORIS = re.compile(r"\.(hada_[wt]\d|lokr_[wt]\d|[wb]_norm$|diff(_b)?$|[ab][12]\.weight$)")
LORA_NAME = re.compile(r"[._]lora(\.|_down\.|_up\.|_mid\.|_A\.|_B\.|_linear_layer\.)|"
                       + LYCORIS.pattern)
CONTROLNET = re.compile(r"control_model\.|(controlnet\.)?(module\.)?controlnet_cond_embedding\.")
CHANNELS = {9: "an inpainting model", 8: "InstructPix2Pix"}
V1_FRAMES, SD15_WIDTH = 24, 320


@dataclass(frozen=True)
class Source:
    """A file or folder that is known for what it is."""
    path: Path
    slot: str                           # the option that it is for; "" if it cannot be used here
    title: str
    checkpoint: Checkpoint
    parts: dict[str, dict[str, str]] = field(default_factory=dict)  # part -> our name -> its name
    dropped: dict[str, str] = field(default_factory=dict)           # its name -> why
    version: str = ""                   # of a motion module
    motion_max_seq_length: int = 0

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        return {ours: self.checkpoint.tensors[theirs].shape
                for ours, theirs in self.parts.get(part, {}).items()}

    def config(self, part: str) -> dict[str, Any]:
        """The config.json of one part, or of the file's own folder; empty where there is none."""
        return self.checkpoint.configs.get(part, self.checkpoint.configs.get("", {}))


def read_source(path: Path) -> Source:
    """Opens a checkpoint and says what it is; reads no weights.

    Raises InputError, by the name of what it is, for what cannot be part of a model here.
    """
    return detect(path, open_checkpoint(path))


def detect(path: Path, checkpoint: Checkpoint) -> Source:
    """`read_source` of what is already open."""
    tensors = checkpoint.tensors
    for pattern, what in FOREIGN:
        names = (*tensors, *checkpoint.non_tensors)
        found = next((name for name in names if re.search(pattern, name)), None)
        if found:
            raise InputError(f"{path}: {what} ({found}), which cannot be used here")
    if checkpoint.metadata.get("format", "").startswith("mcl-model"):
        return Source(path, WEIGHTS, "a converted model of this project", checkpoint)
    if checkpoint.metadata.get("format", "").startswith("mcl-motion"):
        raise InputError(f"{path}: a kept motion, which python sample.py --motion takes")
    if not tensors:
        raise InputError(f"{path}: a checkpoint without tensors")
    if any(map(CONTROLNET.match, tensors)) and not has(tensors, UNET_LDM):
        return controlnet(path, checkpoint)
    if any(map(LORA_NAME.search, tensors)):
        return lora(path, checkpoint)
    moving = any(".motion_modules." in name for name in tensors)
    if moving and not (has(tensors, "unet.") and has(tensors, "vae.")):
        return motion_module(path, checkpoint)
    return networks(path, checkpoint)


def has(tensors: dict[str, LazyTensor], before: str) -> bool:
    return any(name.startswith(before) for name in tensors)


def controlnet(path: Path, checkpoint: Checkpoint) -> Source:
    if not any(".motion_modules." in name for name in checkpoint.tensors):
        raise InputError(f"{path}: a plain ControlNet, which cannot be used here; SparseCtrl has "
                         "motion modules")
    names, dropped, length = with_positions(path, checkpoint.tensors)
    kind = "rgb" if "controlnet_cond_embedding.weight" in names else "scribble"
    return Source(path, SPARSECTRL, f"AnimateDiff's SparseCtrl ({kind})", checkpoint,
                  {"sparsectrl": names}, dropped, motion_max_seq_length=length or 32)


def with_positions(path: Path, tensors: dict[str, LazyTensor]
                   ) -> tuple[dict[str, str], dict[str, str], int]:
    """Of what has motion modules: {our name: its name}, {position encoding: why it is dropped},
    and the number of positions, 0 where there are none."""
    names: dict[str, str] = {}
    dropped: dict[str, str] = {}
    lengths: set[int] = set()
    for name, tensor in tensors.items():
        ours = rename.motion_name(name)
        if rename.POSITIONS.search(ours):
            dropped[name] = "encodings of positions, computed here"
            lengths.update(tensor.shape[1:2])
        else:
            put(path, names, ours, name)
    if len(lengths) > 1:
        raise InputError(f"{path}: its encodings of positions differ in length: {sorted(lengths)}")
    return names, dropped, min(lengths, default=0)


def lora(path: Path, checkpoint: Checkpoint) -> Source:
    """Which of the three kinds of low-rank weights; all are merged alike."""
    tensors = checkpoint.tensors
    for name, tensor in tensors.items():
        if re.search(r"attn2[._](processor\.)?to_k.*(down|lora_A|hada_w1_b|\.diff$)", name):
            refuse_width(path, tensor.shape, "a LoRA for ")
    if any("motion_modules" in name for name in tensors):
        return Source(path, MOTION_LORA, "a motion LoRA of AnimateDiff", checkpoint)
    if all(re.match(r"(down_blocks|mid_block|up_blocks)\..*\.processor\.", n) for n in tensors):
        return Source(path, ADAPTER, "AnimateDiff's domain adapter (v3_sd15_adapter)", checkpoint)
    kind = ("LyCORIS" if any(map(LYCORIS.search, tensors)) else
            "kohya / A1111" if has(tensors, "lora_") else
            "PEFT" if any(".lora_A." in name for name in tensors) else "diffusers")
    return Source(path, LORA, f"a LoRA ({kind})", checkpoint)


def refuse_width(path: Path, shape: tuple[int, ...], what: str = "") -> None:
    """Raises InputError where a projection of the text embeddings is of another family's width."""
    for width in shape[1:2]:
        if width in TEXT_WIDTHS:
            raise InputError(f"{path}: {what}{TEXT_WIDTHS[width]} (text embeddings of {width}, "
                             "Stable Diffusion 1.5 has 768), which cannot be used here")


def motion_module(path: Path, checkpoint: Checkpoint) -> Source:
    """AnimateDiff's motion modules, alone or inside a training checkpoint's whole UNet."""
    tensors = checkpoint.tensors
    modules, dropped, length = with_positions(path, tensors)
    conv_in = tensors.get(modules.get("conv_in.weight", ""))
    if conv_in is not None and conv_in.shape[1:2] == (9,):
        raise InputError(f"{path}: PIA, whose UNet takes 9 channels; it cannot be used here")
    for ours in [ours for ours in modules if ".motion_modules." not in ours]:
        dropped[modules.pop(ours)] = (
            "the UNet around the motion modules, which --base gives" if OURS.match(ours) else
            f"of {ours.partition('.')[0]}, {FOREIGN_PART}")
    first = "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"
    if first in modules and count(modules, "down_blocks") == 3 and \
            tensors[modules[first]].shape[:1] == (SD15_WIDTH,):
        raise InputError(f"{path}: a motion module for Stable Diffusion XL, which cannot be used "
                         "here")
    converted = not any(".temporal_transformer." in name for name in tensors)
    version = motion_version(path, modules, length, converted)
    kind = f", {distilled(path)}" if distilled(path) else ""
    return Source(path, MOTION, f"an AnimateDiff motion module, {version}{kind}", checkpoint,
                  {"motion": modules}, dropped, version,
                  24 if version == "v1" else length or 32)


FOREIGN_PART = "another method's part, without which the motion may differ"


def distilled(path: Path) -> str:
    """The settings, of FEW_STEPS, that a motion module is distilled for, or "". Its tensors are as
    others are: nothing but the name of the file, or of its folder, tells."""
    said = "/".join(path.absolute().parts[-2:]).lower()
    steps = re.search(r"lightning.*?([248])step", said)
    return f"lightning-{steps[1]}" if steps else "animatelcm" if "animatelcm" in said else ""


def motion_version(path: Path, modules: dict[str, str], length: int, converted: bool) -> str:
    """v2 has a module in the middle; of the others v1 knows 24 positions, v3 more.

    Converters to MotionAdapter write 32 positions whatever there were, and some files have none;
    then the path tells v1 from v3. Raises InputError where it does not.
    """
    if any(name.startswith("mid_block.") for name in modules):
        return "v2"
    if length and (length == V1_FRAMES or not converted):
        return "v1" if length == V1_FRAMES else "v3"
    said = "/".join(path.absolute().parts[-2:]).lower()
    if re.search(r"v3|v1-5-3", said):
        return "v3"
    if re.search(r"v1(?!\d)|v14|v15", said):
        return "v1"
    if length:
        return "v3"
    raise InputError(f"{path}: a motion module without encodings of positions: v1 or v3 cannot be "
                     "told apart; rename it so that v1 or v3 is in its name")


def networks(path: Path, checkpoint: Checkpoint) -> Source:
    """UNet, VAE and text encoder, together under prefixes or one by itself."""
    tensors = checkpoint.tensors
    whole = any(has(tensors, prefix) for prefixes in PREFIXES.values() for prefix in prefixes)
    alone = "" if whole else next((part for part, name in LANDMARKS.items()
                                   if any(n.removeprefix("text_model.") == name for n in tensors)),
                                  None)
    if alone is None:
        some = ", ".join(sorted(tensors)[:2])
        words = len(tensors) == 1 or not any("." in name for name in tensors)
        if words and all(t.shape[-1:] in ((768,), (1024,), (1280,)) and len(t.shape) < 3
                         for t in tensors.values()):
            raise InputError(f"{path}: a textual inversion embedding ({some}), which cannot be "
                             "used here")
        raise InputError(f"{path}: {len(tensors)} tensors ({some}, ...) of a kind that is not "
                         "known; python convert_weights.py --help lists what is")
    theirs: dict[str, dict[str, str]] = {}
    dropped: dict[str, str] = {}
    for name in tensors:
        why = next((why for pattern, why in DROPPED if re.search(pattern, name)), None)
        part, rest = split(name) if whole else (alone, name)
        if why is not None:
            dropped[name] = why
        elif not part:
            dropped[name] = "outside of UNet, VAE and text encoder"
        else:
            theirs.setdefault(part, {})[rest] = name
    motion = motion_of_pipeline(path, theirs.get("unet", {}), checkpoint)
    parts = {part: ours(path, part, found) for part, found in theirs.items()}
    if motion is not None:
        parts |= motion.parts
        dropped |= {theirs: why for theirs, why in motion.dropped.items()}
    source = Source(path, BASE if "unet" in parts else VAE if "vae" in parts else TEXT, "",
                    checkpoint, parts, dropped)
    if motion is not None:
        source = replace(source, version=motion.version, motion_max_seq_length=motion.motion_max_seq_length)
    if "unet" in parts:
        check_unet(path, source.shapes("unet"))
        check_prediction(path, checkpoint)
    for part in (*(part for part in parts if part != "motion"), "scheduler"):
        check_config(path, part, source.config(part))
    return replace(source, title=title(source))


def motion_of_pipeline(path: Path, unet: dict[str, str], checkpoint: Checkpoint
                       ) -> Source | None:
    """The motion modules inside a UNet of AnimateDiffPipeline, which are taken out of `unet`."""
    inside = {rest: name for rest, name in unet.items() if ".motion_modules." in rest}
    if not inside:
        return None
    found = motion_module(path, replace(checkpoint, tensors={
        rest: checkpoint.tensors[name] for rest, name in inside.items()}))
    for rest in inside:
        del unet[rest]
    return replace(found, parts={"motion": {
        ours: inside[rest] for ours, rest in found.parts["motion"].items()}},
        dropped={inside[rest]: why for rest, why in found.dropped.items()})


def check_prediction(path: Path, checkpoint: Checkpoint) -> None:
    """Raises InputError for a model that says, in whatever way, that it predicts v, not noise."""
    signs = [*(V_PREDICTION & {*checkpoint.tensors, *checkpoint.non_tensors}),
             *(f"{key}: {checkpoint.metadata[key]}" for key in V_METADATA if str(
                 checkpoint.metadata.get(key, "")).lower().startswith("v"))]
    if signs:
        raise InputError(f"{path}: a v-prediction model ({sorted(signs)[0]}), which cannot be used "
                         "here: AnimateDiff's motion modules are made for noise prediction")


def title(source: Source) -> str:
    names = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder",
             "motion": "motion modules"}
    held = ", ".join(what for part, what in names.items() if part in source.parts)
    if source.slot != BASE:
        return f"a {held} of Stable Diffusion 1.5"
    kind = ("single file" if has(source.checkpoint.tensors, UNET_LDM) else
            "diffusers folder" if source.path.is_dir() else "diffusers file")
    return f"Stable Diffusion 1.5, {kind} ({held})"


def split(name: str) -> tuple[str, str]:
    """("unet", the rest of the name) of a name with a part's prefix, ("", name) of others."""
    for part, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                return part, name[len(prefix):]
    return "", name


def ours(path: Path, part: str, theirs: dict[str, str]) -> dict[str, str]:
    """{our name: its name} of one network, whose names without prefix are the keys of `theirs`."""
    result: dict[str, str] = {}
    strided = [int(m[1]) for m in map(re.compile(r"input_blocks\.(\d\d?)\.0\.op\.").match, theirs)
               if m]
    layers = min(strided, default=3) - 1
    ldm = any(name.startswith("input_blocks.") for name in theirs)
    levels = count(theirs, "decoder.up")
    for rest, name in theirs.items():
        new = (rename.vae_name(rest, levels) if part == "vae" else
               rename.text_name(rest) if part == "text_encoder" else
               rename.unet_from_ldm(rest, layers) if ldm else rest)
        put(path, result, new, name)
    return result


def put(path: Path, names: dict[str, str], new: str, name: str) -> None:
    if new in names:
        raise InputError(f"{path}: {name} and {names[new]} are the same tensor, {new}")
    names[new] = name


def check_unet(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises InputError, by its name, for a UNet of another family."""
    for taken in shapes.get("conv_in.weight", ())[1:2]:
        if taken in CHANNELS:
            raise InputError(f"{path}: {CHANNELS[taken]} (its UNet takes {taken} channels), "
                             "which cannot be used here")
    for name, shape in shapes.items():
        if name.endswith("attn2.to_k.weight"):
            refuse_width(path, shape)
