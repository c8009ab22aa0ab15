"""Command line of sample.py: options, generated from `SampleConfig`, and their validation."""
import argparse
import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import AttentionRequest, InputError, Model, ModelConfig, Motion, SampleConfig, semantic
from ..checkpoints.embeddings import add_embeddings, parse_embedding
from ..checkpoints.lora import IGNORE_ALPHA_HELP, parse_scaled
from ..checkpoints.model_file import DEFAULT_WEIGHTS, build_on_meta, read_model_config
from ..clone import check_memory
from ..context_windows import make_context_windows
from ..device import DTYPES, resolve_device, resolve_dtype
from ..ownership import check_readable
from ..presets import PRESETS, build_config
from ..video.read import FITS
from ..video.write import check_frame_rate, check_output_path
from .outputs import input_files, scaled_loras
from .process import OneLineErrorParser

USAGE = "sample.py --ref VIDEO --prompt TEXT [options]"
DESCRIPTION = "Clone the motion of a reference video into a new video of a prompt."
EXAMPLES = """examples:
  python sample.py --ref examples/figure_eight.mp4 --prompt "a red star on a navy background"
  python sample.py --ref v.mp4 --start 3 --duration 2 --prompt "a fox on a teal background"
  python sample.py --weights weights/sd15.safetensors --preset camera --ref v.mp4 --prompt "a beach"
Defaults in [] are the demo model's. --help-all lists every option."""
# A motion weight that is smaller than the model's own by MIN_WEIGHT_RATIO has no effect.
MIN_WEIGHT_RATIO, MAX_SEED, MAX_CLIPS = 100, (1 << 64) - 1, 10_000
# Syntax that other programs interpret in a prompt. Here it is plain text.
PROMPT_SYNTAX = re.compile("|".join((
    r"\([^()]*(?:[^()\d]:\s*[\d.]+|:\s*\d*\.\d+)\s*\)",     # (word:1.2), but not (16:9)
    r"\({2,}[^()]+\){2,}|\[[^\[\]]+\]",                     # ((word)) and [word]
    r"<\w+:[^<>]+>|\bBREAK\b|\bembedding:\S+")))            # <lora:name:0.8>
COMMON_SETTINGS = ("steps", "guidance_steps", "cfg_scale", "negative_prompt", "method",
                   "motion_weight", "ref_prompt", "subject", "num_frames", "closed_loop", "memory")


def parse_size(text: str) -> tuple[int, int]:
    """Return (width, height) of "512x320"."""
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 512x512")
    return int(width), int(height)


def parse_image(text: str) -> tuple[Path, int]:
    """Return (a.png, 15) of "a.png@15"; frame 0 without a number."""
    match = re.fullmatch(r"(.+)@(-?\d+)", text)
    return (Path(match[1]), int(match[2])) if match else (Path(text), 0)


cached_model = functools.cache(lambda weights: build_on_meta(read_model_config(weights)))
FLAG: dict[str, Any] = {"action": "store_true"}
FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
NUMBER: dict[str, Any] = {"type": int, "metavar": "N"}
SECONDS: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
FILES: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
LORA = FILES | {"type": parse_scaled, "metavar": "FILE[:SCALE]"}
# Options beside the settings of the method: name, help text, arguments of `add_argument`.
COMMON_OPTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("--ref", "reference: a video, gif or folder of images", FILE | {"metavar": "VIDEO"}),
    ("--prompt", "what the new video shows", {"metavar": "TEXT"}),
    ("--out", "file .mp4, .gif, .webp, or a folder [out.mp4]", FILE | {"default": Path("out.mp4")}),
    ("--weights", "converted model [the demo model]", FILE | {"default": DEFAULT_WEIGHTS}),
    ("--preset", "as published: " + ", ".join(PRESETS), {"choices": PRESETS, "metavar": "NAME"}),
    ("--seed", "seed of the initial noise [0]", NUMBER | {"default": 0}),
    ("--num-samples", "number of clips, with seeds counted up [1]", NUMBER | {"default": 1}),
    ("--size", "size of the clip [{width}x{height}]", {"type": parse_size, "metavar": "WxH"}),
    ("--start", "start of the reference's part [0]", SECONDS),
    ("--duration", "length of the reference's part [the rest]", SECONDS),
    ("--compare", "also write reference and clip side by side", FLAG),
    ("--report", "also measure how well the clip follows", FLAG),
    ("--maps", "also write a page with the attention maps", FILE | {"metavar": "DIR"}),
    ("--jobs", "many clips: one JSON object of options per line", FILE),
    ("--lora", "LoRA of Stable Diffusion 1.5", LORA),
    ("--embedding", "textual inversion; prompts use its word [the file's stem]",
     FILES | {"type": parse_embedding, "metavar": "FILE[:WORD]"}),
    ("--device", "auto, cpu, cuda, cuda:1 or mps [auto]", {"default": "auto", "metavar": "DEVICE"}),
    ("--dtype", "precision of the model [auto]", {"default": "auto", "choices": ("auto", *DTYPES)}))
RARE_OPTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("--stride", "take every n-th frame of the reference, without --duration", NUMBER),
    ("--fit", "how the reference is brought to size [crop]", {"choices": FITS}),
    ("--fps", "frame rate of the written video [the model's]", {"type": float, "metavar": "X"}),
    ("--image", "SparseCtrl images", FILES | {"type": parse_image, "metavar": "FILE[@FRAME]"}),
    ("--save-motion", "write the reference's motion", FILE),
    ("--motion", "use a saved motion instead of --ref", FILE),
    ("--inversion-dir", "folder that keeps inverted latents", FILE | {"metavar": "DIR"}),
    ("--adapter", "domain adapter of AnimateDiff", LORA),
    ("--motion-lora", "LoRA of AnimateDiff's motion modules", LORA),
    ("--ignore-alpha", IGNORE_ALPHA_HELP, FLAG),
    ("--list-words", "print the words that the model was trained on", FLAG))
FIELD_ARGUMENTS: dict[Any, dict[str, Any]] = {
    bool: FLAG | {"default": None}, int: NUMBER, float: {"type": float, "metavar": "X"},
    str: {"metavar": "TEXT"}, tuple[str, ...]: FILES | {"default": None, "metavar": "NAME"},
    tuple[float, ...]: FILES | {"default": None, "metavar": "X", "type": float}}


@functools.cache
def build_parser(show_all: bool = False) -> OneLineErrorParser:
    """Return the parser of sample.py; without `show_all` its help lists the common options."""
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
    p = OneLineErrorParser(prog="sample.py", usage=USAGE, description=DESCRIPTION, epilog=EXAMPLES,
                           formatter_class=formatter)
    p.add_argument("--help-all", action="store_true", help="list every option")
    default = vars(read_model_config(DEFAULT_WEIGHTS).sample)
    for option, text, arguments in (*COMMON_OPTIONS, *RARE_OPTIONS):
        is_shown = show_all or (option, text, arguments) in COMMON_OPTIONS
        p.add_argument(option, help=text.format(**default) if is_shown else argparse.SUPPRESS,
                       **arguments)
    group = p.add_argument_group("settings of the method")
    for field in dataclasses.fields(SampleConfig):
        if field.name not in ("height", "width"):
            value, choices = default[field.name], field.metadata["choices"]
            arguments = {"choices": choices} if choices else FIELD_ARGUMENTS[field.type]
            values = value if isinstance(value, tuple) else (value,)
            text = " ".join(str(element) for element in values if element is not False)
            text = field.metadata["help"] + f" [{text}]" * bool(text)
            is_shown = show_all or field.name in COMMON_SETTINGS
            group.add_argument("--" + field.name.replace("_", "-"), **arguments,
                               help=text if is_shown else argparse.SUPPRESS)
    return p


def parse_args(argv: Sequence[str] | None, common: dict | None = None) -> argparse.Namespace:
    """Parse one command line, over the options common to a file of jobs.

    Raises:
        InputError: If an option is not known, has a wrong value, or is given twice.
    """
    start = argparse.Namespace(**{"source": "", **(common or {})})
    args = build_parser().parse_args(argv, start)
    if args.help_all:
        build_parser(show_all=True).print_help()
        raise SystemExit(0)
    return args


def local_rank_device(device: str) -> str:
    """Return a GPU of its own for each process of torchrun, for "auto" on a machine with GPUs."""
    if device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device


def validate_args(args: argparse.Namespace) -> SampleConfig:
    """Return the settings of a job after checking everything that needs no weights.

    Raises:
        InputError: If an option is out of range, has no effect, or does not fit another one.
        MemoryError: If the clip cannot fit into memory.
    """
    model = cached_model(args.weights)
    for _, path in input_files(args):
        check_readable(path)
    options = vars(args) | dict(zip(("width", "height"), args.size or (), strict=False))
    settings = {name: value for name, value in options.items() if value is not None
                and name in SampleConfig.__dataclass_fields__}
    config = build_config(model.config.sample, args.preset, **settings)
    check_usage(args, config, model.config)
    model = add_embeddings(model, args.embedding)
    check_model(args, config, model)
    check_output_path(args.out)
    check_frame_rate(args.out, model.config.fps if args.fps is None else args.fps)
    prompts = (args.prompt, config.negative_prompt, config.ref_prompt)
    for word in model.tokenizer.new_words.keys() - dict(model.tokenizer.split(" ".join(prompts))):
        warnings.warn(f"{word} is in no prompt: its embedding has no effect", stacklevel=2)
    syntax = [match[0] for prompt in prompts for match in PROMPT_SYNTAX.finditer(prompt)]
    if syntax:
        warnings.warn(f"{' '.join(syntax)} is read as plain text: prompts have no weights or "
                      "commands. Use --lora FILE:SCALE and --embedding FILE", stacklevel=2)
    return config


def check_usage(args: argparse.Namespace, config: SampleConfig, model: ModelConfig) -> None:
    """Raise InputError for an option that is out of range or lacks what it needs."""
    max_seed, is_inversion = MAX_SEED + 1 - args.num_samples, config.method == "inversion"
    has_ref, n = args.ref is not None, config.num_frames
    for option, is_met, need in (
            ("sample.py", args.prompt is not None, "--prompt, what the new video shows"),
            ("sample.py", has_ref or args.motion, "--ref, a video with the motion"),
            ("--method inversion", has_ref or not is_inversion, "--ref"),
            ("--subject", config.ref_prompt or not config.subject,
             "--ref-prompt: the first word is looked up there"),
            ("--maps", config.guidance_steps or not (args.maps and is_inversion),
             "--guidance-steps 1")):
        if not is_met:
            raise InputError(f"{option} needs {need}")
    for names, is_met, need in (
            ("num_samples", 0 < args.num_samples <= MAX_CLIPS, f"to be 1 to {MAX_CLIPS}"),
            ("seed", 0 <= args.seed <= max_seed, f"to be 0 to {max_seed}, not {args.seed}"),
            ("motion", not has_ref, "--ref to be left out"),
            ("start duration stride compare report save_motion subject", has_ref, "--ref"),
            ("save_motion image", not is_inversion, "--method single-step"),
            ("inversion_steps inversion_dir", is_inversion, "--method inversion"),
            ("ref_prompt", is_inversion or config.subject, "--method inversion or --subject"),
            ("image", not config.semantic_scale, "--semantic-scale 0"),
            ("image", model.sparsectrl.kind, "a model with SparseCtrl"),
            ("image", all(-n <= frame < n for _, frame in args.image),
             f"a frame number from 0 to {n - 1}")):
        for option in () if is_met else given_options(args, names):
            raise InputError(f"{option} needs {need}")


def given_options(args: argparse.Namespace, names: str) -> list[str]:
    """Return the options among names, separated by blanks, that a command line gives."""
    return [f"--{name.replace('_', '-')}" for name in names.split()
            if repr(getattr(args, name)) not in ("None", "False", "[]")]    # 0 is a value


def check_model(args: argparse.Namespace, config: SampleConfig, model: Model) -> None:
    """Raise an error for settings and inputs that the model or the machine cannot take."""
    model.config.latent_shape(config)           # the size suits the model
    windows = make_context_windows(config, model.config)
    if config.semantic_scale:
        semantic.require_single_window(windows)
    warn_without_effect(args, config, len(windows.offsets))
    low_weight = model.config.sample.motion_weight / MIN_WEIGHT_RATIO
    if 0 < config.motion_weight < low_weight:
        warnings.warn(f"motion_weight has hardly any effect below {low_weight:g}", stacklevel=2)
    device = resolve_device(local_rank_device(args.device))
    check_memory(model.config, config, device, resolve_dtype(args.dtype, device))
    model.unet.resolve_layers(AttentionRequest(config.guidance_blocks, config.semantic_blocks))
    for prompt, word in zip((config.ref_prompt, args.prompt), config.subject, strict=False):
        semantic.subject_tokens(model, prompt, word)
    if args.motion is not None:
        Motion.load(args.motion).check_config(config, model.config)


def warn_without_effect(args: argparse.Namespace, config: SampleConfig, num_windows: int) -> None:
    """Warn of each option that was given and changes nothing beside the other settings."""
    is_guided, spacing = config.motion_weight > 0 < config.guidance_steps, config.timestep_spacing
    for names, has_effect, reason in (
            ("motion_weight guidance_noise_range", config.guidance_steps, "without guided steps"),
            ("guidance_warmup_steps guidance_cooldown_steps guidance_interval guidance_repeats "
             "guidance_block_weights semantic_scale", is_guided, "without guidance"),
            ("top_k guidance_blocks extraction_timestep",
             is_guided or args.save_motion or args.maps, "without guidance"),
            ("extraction_timestep", config.method == "single-step", "with --method inversion"),
            ("guidance_noise_range", spacing == "motionclone", f"with {spacing} timesteps"),
            ("negative_prompt cfg_start_fraction cfg_end_fraction", config.cfg_scale != 1,
             "with --cfg-scale 1"),
            ("negative_prompt cfg_scale", config.cfg_start_fraction < config.cfg_end_fraction,
             "without steps that use it"),
            ("context_overlap", num_windows > 1, "with one context window"),
            ("semantic_blocks mask_threshold", config.semantic_scale, "without --semantic-scale"),
            ("mask_threshold", config.subject or not config.semantic_scale, "without --subject"),
            ("ignore_alpha", scaled_loras(args), "without a LoRA"),
            ("fps", args.out.suffix, "for a folder of images"),
            ("fit", args.ref or args.image, "without --ref")):
        for option in () if has_effect else given_options(args, names):
            warnings.warn(f"{option} has no effect {reason}", stacklevel=2)
