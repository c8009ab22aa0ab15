"""Command line of sample.py: options, generated from `SampleConfig`, and their validation."""
import argparse
import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from ..checkpoints.detect import LORAS
from ..checkpoints.lora import IGNORE_ALPHA_HELP, parse_scaled
from ..checkpoints.model_file import DEFAULT_WEIGHTS, build_on_meta, read_model_config
from ..clone import check_memory
from ..config import SampleConfig
from ..context_windows import make_context_windows
from ..device import DTYPES, resolve_device, resolve_dtype
from ..errors import InputError
from ..files import check_readable, check_writable
from ..model import Model
from ..motion import Motion
from ..networks.attention import AttentionRequest
from ..presets import PRESET_NAMES, build_config
from ..semantic import require_single_window, subject_tokens
from ..video.read import FITS
from ..video.write import check_output_path
from .outputs import input_files, output_clips
from .process import OneLineErrorParser

DESCRIPTION = "Clone the motion of a reference video into a new video of a prompt."
EXAMPLES = """examples:
  python sample.py --ref examples/figure_eight.mp4 --prompt "a red star on a navy background"
  python sample.py --ref v.mp4 --start 3 --duration 2 --prompt "a fox on a teal background"
  python sample.py --weights weights/sd15.safetensors --preset camera --ref v.mp4 --prompt "a beach"
Defaults in [] are the demo model's. --help-all lists every option."""
MIN_WEIGHT_RATIO = 100          # a motion weight smaller than the model's by this has no effect
MAX_SEED, MAX_SAMPLES = (1 << 64) - 1, 10_000
# Syntax that other programs interpret in a prompt. Here it is plain text.
PROMPT_SYNTAX = re.compile("|".join((
    r"\([^()]*(?:[^()\d]:\s*[\d.]+|:\s*\d*\.\d+)\s*\)",     # (word:1.2), but not (16:9)
    r"\({2,}[^()]+\){2,}|\[[^\[\]]+\]",                     # ((word)) and [word]
    r"<\w+:[^<>]+>|\bBREAK\b|\bembedding:\S+")))            # <lora:name:0.8>
COMMON_SETTINGS = ("steps", "guidance_steps", "cfg_scale", "negative_prompt", "method",
                   "motion_weight", "ref_prompt", "subject", "num_frames", "closed_loop", "memory")
LORA_HELP = ("domain adapter of AnimateDiff", "LoRA of Stable Diffusion 1.5",
             "LoRA of AnimateDiff's motion modules")


def build_parser(show_all: bool = False) -> OneLineErrorParser:
    """Return the parser of sample.py; without `show_all` its help lists the common options."""
    p = OneLineErrorParser(prog="sample.py", description=DESCRIPTION, epilog=EXAMPLES,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    default = read_model_config(DEFAULT_WEIGHTS).sample

    def add(group: Any, option: str, help: str, is_common: bool = True, **kwargs: Any) -> None:
        group.add_argument(option, help=help if is_common or show_all else argparse.SUPPRESS,
                           **kwargs)

    files = p.add_argument_group("input and output")
    add(files, "--ref", "reference: a video, gif or folder of images", type=Path)
    add(files, "--prompt", "what the new video shows")
    add(files, "--out", "out.mp4, out.gif, out.webp, or a folder of PNGs [out.mp4]", type=Path,
        default=Path("out.mp4"))
    add(files, "--weights", "converted model; without it the built-in demo model runs", type=Path)
    add(files, "--preset", "published settings: " + ", ".join(PRESET_NAMES),
        choices=PRESET_NAMES, metavar="NAME")
    add(files, "--seed", "seed of the initial noise [0]", type=int, default=0)
    add(files, "--num-samples", "number of clips, with seeds counted up [1]", type=int, default=1)
    add(files, "--size", f"size of the clip [{default.width}x{default.height}]", type=parse_size,
        metavar="WIDTHxHEIGHT")
    add(files, "--start", "start of the reference's part, in seconds [0]", type=float, default=0.0)
    add(files, "--duration", "length of that part in seconds [the rest]", type=float)
    add(files, "--stride", "take every n-th frame instead", False, type=int, metavar="N")
    add(files, "--fit", "how the reference is brought to size: crop, pad or stretch [crop]", False,
        choices=FITS, default="crop", metavar="FIT")
    add(files, "--fps", "frame rate of the written video [the model's]", False, type=float)
    add(files, "--compare", "also write reference and clip side by side", action="store_true")
    add(files, "--report", "also measure how well the clip follows", action="store_true")
    add(files, "--maps", "also write a page with the attention maps", type=Path, metavar="DIR")
    add(files, "--jobs", "many clips, one JSON object of options per line: "
        '{"ref": "a.mp4", "prompt": "a star", "out": "b.mp4"}', type=Path, metavar="FILE")
    add(files, "--image", "SparseCtrl image of a frame, the first without @FRAME", False,
        type=parse_image, nargs="+", action="extend", default=[], metavar="FILE[@FRAME]")
    add(files, "--save-motion", "write the reference's motion", False, type=Path, metavar="FILE")
    add(files, "--motion", "use a saved motion instead of --ref", False, type=Path, metavar="FILE")
    add(files, "--inversion-dir", "keep inverted latents in a folder; continues an interrupted "
        "inversion and reuses a finished one", False, type=Path, metavar="DIR")
    for option, text in zip(LORAS, LORA_HELP):
        add(files, option, text, option == "--lora", type=parse_scaled, nargs="+",
            action="extend", default=[], metavar="FILE[:SCALE]")
    add(files, "--ignore-alpha", IGNORE_ALPHA_HELP, False, action="store_true")
    add(files, "--device", "auto, cpu, cuda, cuda:1 or mps [auto]", default="auto")
    add(files, "--dtype", "auto, float32, float16 or bfloat16 [auto]", default="auto",
        choices=("auto", *DTYPES), metavar="DTYPE")
    add(files, "--list-words", "print the words that the model was trained on", False,
        action="store_true")
    p.add_argument("--help-all", action="store_true", help="list every option")

    group = p.add_argument_group("settings of the method")
    for field in dataclasses.fields(SampleConfig):
        if field.name not in ("height", "width"):
            value = getattr(default, field.name)
            add(group, "--" + field.name.replace("_", "-"), f"{field.metadata['help']} "
                f"[{','.join(map(str, value)) if isinstance(value, tuple) else value}]".replace(
                    " []", "").replace("%", "%%"),
                field.name in COMMON_SETTINGS, **argument_kwargs(field))
    return p


def argument_kwargs(field: dataclasses.Field) -> dict[str, Any]:
    """Return the keyword arguments of `add_argument` for a field of SampleConfig."""
    if field.type is bool:
        return {"action": "store_true", "default": None}
    if field.name == "subject":
        return {"nargs": "+", "action": "extend", "metavar": "WORD"}
    if field.metadata["choices"]:
        return {"choices": field.metadata["choices"]}
    if element_type := get_args(field.type)[:1]:
        is_number = element_type[0] is float
        return {"type": parse_floats if is_number else parse_names, "action": "extend",
                "metavar": "X,X" if is_number else "NAME,NAME"}
    return {"type": field.type, "metavar": {int: "N", float: "X", str: "TEXT"}[field.type]}


def parse_args(argv: Sequence[str], common: argparse.Namespace | None = None
               ) -> argparse.Namespace:
    """Parse one command line, over the options common to a file of jobs.

    Raises:
        InputError: If an option is not known, has a wrong value, or is given twice.
    """
    if "--help-all" in argv:
        build_parser(show_all=True).print_help()
        raise SystemExit(0)
    namespace = argparse.Namespace() if common is None else argparse.Namespace(**{
        name: list(value) if isinstance(value, list) else value
        for name, value in vars(common).items() if name != "stored_options"})
    args = parser().parse_args(argv, namespace)
    args.source = ""                    # line of a file of jobs
    args.requested_device_dtype = [args.device, args.dtype]
    return args


@functools.cache
def parser() -> OneLineErrorParser:
    """Return the parser of sample.py, which is built once."""
    return build_parser()


def parse_size(text: str) -> tuple[int, int]:
    """Return (width, height) of "512x320"."""
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 512x512")
    return int(width), int(height)


def parse_names(text: str) -> list[str]:
    """Return ["a", "b"] of "a,b"."""
    return text.split(",")


def parse_floats(text: str) -> list[float]:
    """Return [1.0, 0.5] of "1,0.5"."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers; write it like 1,0.5"
                                         ) from error


def parse_image(text: str) -> tuple[Path, int]:
    """Return (a.png, 15) of "a.png@15"; frame 0 without a number."""
    path, at, frame = text.rpartition("@")
    if at and frame.removeprefix("-").isdecimal():
        return Path(path), int(frame)
    return Path(text), 0


def local_rank_device(device: str) -> str:
    """Return a GPU of its own for each process of torchrun, for "auto" on a machine with GPUs."""
    if device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device


@functools.cache
def model_on_meta(weights: Path) -> Model:
    """Return the model of a file without its weights."""
    return build_on_meta(read_model_config(weights))


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the method that were given as options."""
    settings = {field.name: getattr(args, field.name, None)
                for field in dataclasses.fields(SampleConfig)}
    if args.size:
        settings["width"], settings["height"] = args.size
    return {name: value for name, value in settings.items() if value is not None}


def validate_args(args: argparse.Namespace) -> SampleConfig:
    """Return the settings of a job after checking everything that needs no weights.

    Raises:
        InputError: If an option is out of range, has no effect, or does not fit another one.
        MemoryError: If the clip cannot fit into memory.
    """
    warn_prompt_syntax(args)
    check_usage(args)
    for option, path in input_files(args):
        if option != "--weights":       # read_model_config says more
            check_readable(path)
    model = model_on_meta(args.weights or DEFAULT_WEIGHTS)
    config = build_config(model.config.sample, args.preset, **settings_of(args))
    check_method(args, config)
    check_model(args, config, model)
    for path in (args.out, *(clip.out for clip in output_clips(args))):
        check_output_path(path)
    cache_dir = args.inversion_dir
    if cache_dir is not None and not cache_dir.exists():
        check_writable(cache_dir, is_folder=True)
    elif cache_dir is not None and not (
            cache_dir.is_dir() and os.access(cache_dir, os.W_OK | os.X_OK)):
        raise InputError(f"{cache_dir}: not a folder that can be written to. Choose another")
    return config


def refuse_first(problems: Iterable[tuple[bool, str]]) -> None:
    """Raise InputError with the message of the first problem that is present."""
    for is_present, message in problems:
        if is_present:
            raise InputError(message)


def check_usage(args: argparse.Namespace) -> None:
    """Raise InputError for options that are missing, out of range, or exclude each other."""
    max_seed = MAX_SEED + 1 - args.num_samples
    refuse_first((
        (args.prompt is None, "--prompt is missing: say what the new video shows"),
        ((args.ref is None) == (args.motion is None),
         "give the reference with --ref, or its saved motion with --motion"),
        (not 1 <= args.num_samples <= MAX_SAMPLES,
         f"--num-samples {args.num_samples} is out of range: it must be 1 to {MAX_SAMPLES}"),
        (not 0 <= args.seed <= max_seed,
         f"--seed {args.seed} is out of range: it must be between 0 and {max_seed}"),
        (args.stride is not None and args.duration is not None,
         "--stride and --duration exclude each other: give one of them"),
        (args.fps is not None and not 0.1 <= args.fps <= 100,
         f"--fps {args.fps} is out of range: it must be between 0.1 and 100"),
        *((getattr(args, name) and args.ref is None,
           f"--{name} needs the reference itself: give it with --ref")
          for name in ("compare", "report", "subject"))))


def check_method(args: argparse.Namespace, config: SampleConfig) -> None:
    """Raise InputError for options that do not fit the method."""
    is_inversion = config.method == "inversion"
    refuse_first((
        (is_inversion and bool(args.ref is None or args.save_motion),
         "--method inversion needs --ref, without --motion and --save-motion"),
        (not is_inversion and bool(args.inversion_steps or args.inversion_dir),
         "--inversion-steps and --inversion-dir need --method inversion"),
        (bool(args.ref_prompt) and not is_inversion and not config.subject,
         "--ref-prompt has no effect without --method inversion or --subject"),
        (bool(config.subject) and not config.ref_prompt,
         "--subject needs --ref-prompt: the first word is looked up there"),
        (args.maps is not None and is_inversion and config.guidance_steps == 0,
         "--maps shows the attention of guided steps: give --guidance-steps 1 or more"),
        (bool(args.image) and (is_inversion or config.semantic_scale > 0),
         "--image needs --method single-step, without semantic guidance")))


def check_model(args: argparse.Namespace, config: SampleConfig, model: Model) -> None:
    """Raise an error for settings and inputs that the model or the machine cannot take."""
    model.config.latent_shape(config)
    windows = make_context_windows(config, model.config)
    if config.semantic_scale:
        require_single_window(windows)
    usual_weight = model.config.sample.motion_weight
    if 0 < config.motion_weight < usual_weight / MIN_WEIGHT_RATIO:
        warnings.warn(f"motion_weight = {config.motion_weight:g} has hardly any effect: this "
                      f"model's own is {usual_weight:g}", stacklevel=2)
    device = resolve_device(local_rank_device(args.device))
    check_memory(model.config, config, device, resolve_dtype(args.dtype, device))
    model.unet.resolve_layers(AttentionRequest(config.guidance_blocks, config.semantic_blocks))
    for prompt, word in zip((config.ref_prompt, args.prompt), config.subject, strict=False):
        subject_tokens(model, prompt, word)
    if args.motion is not None:
        Motion.load(args.motion).check_config(config, model.config)
    for image, frame in args.image:
        refuse_first((
            (not model.config.sparsectrl.kind, f"--image {image}: this model has no SparseCtrl. "
             "Convert one with convert_weights.py --sparsectrl"),
            (not -config.num_frames <= frame < config.num_frames, f"--image {image}@{frame} is out "
             f"of range: the clip has frames 0 to {config.num_frames - 1}")))


def warn_prompt_syntax(args: argparse.Namespace) -> None:
    """Warn of prompt syntax that other programs interpret."""
    matches = [match[0] for prompt in (args.prompt, args.negative_prompt, args.ref_prompt)
               for match in PROMPT_SYNTAX.finditer(prompt or "")]
    if matches:
        warnings.warn(f"{' '.join(matches)} is read as plain text: prompts have no weights or "
                      "commands. Use --lora FILE:SCALE to merge a LoRA", stacklevel=2)
