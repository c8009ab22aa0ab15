"""The options of sample.py: what they say, and everything that can be wrong with them."""
import argparse
import dataclasses
import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.model_file import DEFAULT_WEIGHTS, build_on_meta, read_model_config
from ..config import DISTILLED_PRESETS, SOLVERS, SPACINGS, SampleConfig
from ..checkpoints.detect import LORAS
from ..checkpoints.lora import IGNORE_ALPHA, parse_scaled
from ..errors import InputError
from ..files import check_readable, check_writable
from ..device import DTYPES, MEMORY, check_memory, resolve_device, resolve_dtype
from ..motion import Motion
from ..sampler import check_settings
from ..semantic import require_single_window, subject_tokens
from ..networks.temporal import AttentionRequest
from ..video.read import FITS
from ..context_windows import make_context_windows
from ..video.write import check_output_path
from . import OneLineErrorParser
from .outputs import clips_of, reads

DESCRIPTION = "Clones the motion of a reference video into a new video of a prompt."
# The published settings (arXiv 2406.05338), of its later versions and of the first three.
INVERSION = {"spacing": "linspace", "warmup": 10, "cooldown": 0, "inversion_steps": 1000,
             "blocks": ("up_blocks.1", "up_blocks.2"), "block_weights": (1.0, 833 / 1667),
             "motion_weight": 1667.0, "semantic_scale": 42.0, "semantic_blocks": ("up_blocks.1",)}
PRESETS: dict[str, dict[str, Any]] = {
    "camera": {"steps": 100, "guidance_steps": 50, "guidance_span": 0.3},
    "object": {"steps": 300, "guidance_steps": 180, "guidance_span": 0.4},
    "inversion-300": {"steps": 300, "guidance_steps": 200, **INVERSION},
    "inversion-500": {"steps": 500, "guidance_steps": 300, **INVERSION},
    **DISTILLED_PRESETS}
FAST = "fast"                           # two thirds of the weights' own steps, in all that counts
# Of the weight of the semantic loss to that of the motion loss, in the inversion variant.
PUBLISHED_SEMANTIC_SHARE = 42 / 1667
LEAST_WEIGHT = 100                      # the part of the usual weight below which nothing shows
METHODS = ("single-step", "inversion")
SEEDS = 1 << 64
# What other programs take for commands in a prompt, and not for words.
SYNTAX = re.compile("|".join((
    r"\([^()]*(?:[^()\d]:\s*[\d.]+|:\s*\d*\.\d+)\s*\)",     # (word:1.2), but not (16:9)
    r"\({2,}[^()]+\){2,}|\[[^\[\]]+\]",                     # ((word)) and [word]
    r"<\w+:[^<>]+>|\bBREAK\b|\bembedding:\S+")))            # <lora:name:0.8>
# The reference is noised alike whatever the seed, so that a motion is the same in every sample and
# in a file. As torch reads 32 bits of it, the clip of seed 0 starts from that noise, and no other.
REFERENCE_SEED = 1 << 32


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = OneLineErrorParser(prog="sample.py", description=DESCRIPTION, allow_abbrev=False)
    add = p.add_argument
    add("--ref", type=Path, help="reference video, gif or folder of images")
    add("--prompt", required=True, help="what the new video shows; may be empty")
    add("--negative-prompt", help="what it should not show")
    add("--weights", type=Path, help="model file; the embedded one without it")
    add("--out", type=Path, default=Path("out.mp4"),
        help=".mp4, .gif, .webp, or a folder of PNGs (default: %(default)s)")
    add("--compare", action="store_true", help="also write reference and result side by side")
    add("--seed", type=int, default=0, help="of the noise that the clip starts from, 64 bits")
    add("--num-samples", type=int, default=1, help="this many, with seeds counted up")
    add("--jobs", type=Path, metavar="FILE", help="many clips with one model: a line of JSON for "
        'each, its options as in {"ref": "a.mp4", "prompt": "a star", "out": "b.mp4"}; what stands '
        "on the command line is for all")
    add("--report", action="store_true", help="also measure how well the clip follows, and an "
        "unguided one of the same noise beside it")
    add("--maps", type=Path, metavar="DIR", help="also write a page, index.html, to look at: the "
        "clips in step, their temporal attention at any place, where the motion points, the loss")

    group = p.add_argument_group("method; the defaults are kept with the weights")
    add = group.add_argument
    add("--preset", choices=(*PRESETS, FAST), help="published steps for camera or object motion; "
        "published settings of --method inversion, in 300 or 500 steps; those of distilled motion "
        "modules; fast: two thirds of the weights' own steps, 1.5 times the speed; cameras suffer")
    add("--steps", type=int, help="from noise to the clip")
    add("--guidance-steps", type=int, help="how many of them, the first, are guided")
    add("--guidance-every", type=int, metavar="N", help="take the gradient in every N-th guided "
        "step only, and use it in the others too")
    add("--guidance-repeats", type=int, metavar="N", help="take each guided step N times, from its "
        "noise on: of few steps (8, of them 4 guided) 3 times keep the motion")
    add("--guidance-span", type=float, help="share of the noise range that these cover")
    add("--spacing", choices=SPACINGS, help="of the timesteps: uneven has the guided ones in their "
        "span, linspace all evenly, leading as AnimateDiff, trailing and lcm if distilled")
    add("--solver", choices=SOLVERS, help="of the steps: DDIM, or LCM of consistency models, which "
        "puts back fresh noise")
    add("--warmup", type=int, metavar="N", help="guided steps over which the guidance rises")
    add("--cooldown", type=int, metavar="N", help="guided steps over which it falls at the end")
    add("--cfg-scale", type=float, help="classifier-free guidance, uncond + s (cond - uncond)")
    add("--cfg-share", type=float, help="share of the steps, the first, that have it; the others "
        "need half the time")
    add("--motion-weight", type=float, help="weight of the motion guidance (default: the weights' "
        f"own, {SampleConfig.motion_weight:g} of Stable Diffusion's); 0 turns it off")
    add("--top-k", type=top_k, metavar="K", help="values kept of each row of an attention map, "
        "or all")
    add("--blocks", type=names,
        help="UNet blocks whose temporal attention is cloned, with commas between")
    add("--block-weights", type=numbers,
        help="of each of the blocks in the loss, with commas between")
    add("--method", choices=METHODS, help="how the reference is read: noised once, or inverted by "
        "DDIM (default: single-step, but for the presets of the other)")
    add("--inversion-steps", type=int, help="of --method inversion (default: 100)")
    add("--inversion-dir", type=Path, metavar="DIR", help="keep the inverted latents here, go on "
        "with those of an interrupted run, use those of a finished one")
    add("--ref-prompt", default="", help="what the reference shows, for inversion and --subject")
    add("--subject", nargs="+", action="extend", default=[], metavar="WORD",
        help="semantic guidance where two words show: the first in the reference, as its prompt "
             "has it, the second in the new clip")
    add("--semantic-scale", type=float, help="weight of semantic guidance; without --subject it "
        "compares whole frames")
    add("--mask-threshold", type=float, metavar="X", help="of the attention to the subject's word, "
        "0 to 1, above which a place belongs to it")

    group = p.add_argument_group("reference and video")
    add = group.add_argument
    add("--frames", type=int, help="of the clip; more than the weights' motion modules know are "
        "sampled in windows that overlap, each at the cost of a clip of its own")
    add("--window", type=int, metavar="N", help="frames of a window (default: all that they know)")
    add("--overlap", type=float, metavar="X", help="share of a window that the next one sees too")
    add("--loop", action="store_true", default=None, help="the last window runs into the first: of "
        "a reference that ends where it begins, a clip that can be played round and round")
    add("--size", type=parse_size, metavar="WIDTHxHEIGHT", help="in pixels")
    add("--start", type=float, default=0.0, help="seconds into the reference")
    window = group.add_mutually_exclusive_group()
    window.add_argument("--duration", type=float, help="seconds of the reference, over which its "
                        "frames are spread; all the rest without it")
    window.add_argument("--stride", type=int, metavar="N", help="take every N-th of its frames")
    add("--fit", choices=FITS, default="crop", help="how the reference is brought to size")
    add("--fps", type=float, help="of the video written")
    add("--image", type=parse_image, nargs="+", action="extend", default=[], metavar="F[@FRAME]",
        help="picture that a frame is to show, the first without @FRAME; or a sketch of it: "
             "as the model's SparseCtrl takes them")
    add("--save-motion", type=Path, metavar="FILE", help="keep the reference's motion")
    add("--motion", type=Path, metavar="FILE", help="use a kept motion in place of --ref")

    group = p.add_argument_group("LoRAs, merged into the weights as these are read")
    for option, what in zip(LORAS, ("AnimateDiff's domain adapter", "of Stable Diffusion 1.5",
                                    "of AnimateDiff's motion modules")):
        group.add_argument(option, type=parse_scaled, nargs="+", action="extend", default=[],
                           metavar="F[:SCALE]", help=what)

    group.add_argument("--ignore-alpha", action="store_true", help=IGNORE_ALPHA)

    group = p.add_argument_group("machine")
    add = group.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=("auto", *DTYPES))
    add("--memory", default="auto", choices=MEMORY, help="low computes activations a second time "
        "for the gradient rather than keep them, high never does, auto if they would not fit")
    args = p.parse_args(argv)
    args.where = ""                     # the line of a file of jobs
    args.asked = [args.device, args.dtype]      # which all processes have in common
    args.device = local_rank_device(args.device)
    inverted = "inversion_steps" in PRESETS.get(args.preset, {})
    args.method = args.method or ("inversion" if inverted else "single-step")
    if inverted and args.method != "inversion":
        raise InputError(f"--preset {args.preset} belongs to --method inversion")
    return args


def parse_size(text: str) -> tuple[int, int]:
    """"512x320" -> (width, height)."""
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 512x512")
    return int(width), int(height)


def names(text: str) -> tuple[str, ...]:
    """"a,b" -> ("a", "b")."""
    return tuple(text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """"1,0.5" -> (1.0, 0.5)."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers with commas between, like "
                                         "1,0.5") from error


def top_k(text: str) -> int | str:
    """The number, or "all"."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor all")
    return text if text == "all" else int(text)


def parse_image(text: str) -> tuple[Path, int]:
    """"a.png@15" -> (a.png, 15); frame 0 where none is given."""
    path, at, frame = text.rpartition("@")
    if at and frame.removeprefix("-").isdecimal():
        return Path(path), int(frame)
    return Path(text), 0


def local_rank_device(wanted: str) -> str:
    """"auto" is a GPU of its own for each process that torchrun started, where there are any."""
    if wanted == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return wanted


def make_generator(seed: int) -> torch.Generator:
    """Of a seed of up to 64 bits, each with a noise of its own: torch's generator on the CPU reads
    the low 32 bits and no more, so that longer ones are brought to 32 by a hash."""
    digest = hashlib.sha256(seed.to_uint8(8, "big")).digest()
    return torch.Generator().manual_seed(seed if seed < 1 << 32 else
                                         int.from_bytes(digest[:4], "big"))


def settings(args: argparse.Namespace, default: SampleConfig) -> SampleConfig:
    """The settings that suit the weights, with the preset's and then the options' over them."""
    given: dict[str, Any] = {}
    if args.preset == FAST:
        for name in ("steps", "guidance_steps", "warmup", "cooldown"):
            given[name] = -(-2 * getattr(default, name) // 3)
    elif args.preset:
        given |= PRESETS[args.preset]
    if args.blocks:
        given["block_weights"] = ()     # those that were given are of other blocks
    for field in dataclasses.fields(SampleConfig):
        value = getattr(args, field.name, None)
        if value is not None:
            given[field.name] = value
    if args.top_k == "all":
        given["top_k"] = args.frames or default.num_frames
    if args.method == "inversion":
        given.setdefault("inversion_steps", 100)
    elif args.inversion_steps or args.inversion_dir:
        raise InputError("--inversion-steps and --inversion-dir belong to --method inversion")
    elif args.ref_prompt and not args.subject:
        raise InputError("--ref-prompt belongs to --method inversion or --subject")
    if args.subject:
        given.setdefault("semantic_scale", PUBLISHED_SEMANTIC_SHARE
                         * given.get("motion_weight", default.motion_weight))
    if args.size:
        given["width"], given["height"] = args.size
    return dataclasses.replace(default, **given)


def warn_syntax(args: argparse.Namespace) -> None:
    """Of prompts for programs that take parts of them for commands."""
    found = [m[0] for prompt in (args.prompt, args.negative_prompt, args.ref_prompt)
             for m in SYNTAX.finditer(prompt or "")]
    if found:
        warnings.warn(f"{' '.join(found)} goes to the model as plain text: prompts have no weights "
                      "and commands here; --lora FILE:SCALE merges a LoRA, and an embedding cannot "
                      "be used")


def check(args: argparse.Namespace) -> tuple[SampleConfig, float]:
    """Everything that can be wrong and can be known before weights are read."""
    warn_syntax(args)
    if (args.ref is None) == (args.motion is None):
        raise InputError("give the reference with --ref, or its kept motion with --motion")
    for option, path in reads(args):
        if option not in ("--weights", "--image"):      # of which more is said below
            check_readable(path)
    if args.num_samples < 1:
        raise InputError(f"--num-samples {args.num_samples} is not possible: 1 or more")
    if not 0 <= args.seed <= SEEDS - args.num_samples:
        raise InputError(f"--seed {args.seed} is not possible: 0 to {SEEDS - args.num_samples}")
    if args.method == "inversion" and (args.ref is None or args.save_motion):
        raise InputError("--method inversion reads the reference at every step: give it with "
                         "--ref, and leave out --motion and --save-motion")
    if args.maps and args.method == "inversion" and args.guidance_steps == 0:
        raise InputError("--maps shows what was read at the guided steps: there are none with "
                         "--guidance-steps 0")
    if args.image and (args.method == "inversion" or args.subject or args.semantic_scale):
        raise InputError("--image goes with --method single-step, without semantic guidance")
    if len(args.subject) not in (0, 2):
        raise InputError(f"--subject is {len(args.subject)} words: give two, the reference's and "
                         "the new clip's")
    if args.subject and args.ref is None:
        raise InputError("--subject looks for its word in the reference: give it with --ref")
    for name in ("compare", "report"):
        if getattr(args, name) and args.ref is None:
            raise InputError(f"--{name} needs the reference itself: give it with --ref")
    model_config = read_model_config(args.weights or DEFAULT_WEIGHTS)
    config = settings(args, model_config.sample)
    step = model_config.vae.downsampling
    if config.height % step or config.width % step:
        raise InputError(f"--size {config.width}x{config.height} is not possible: "
                         f"width and height must be multiples of {step}")
    longest = model_config.unet.motion_max_seq_length
    windows = make_context_windows(config.num_frames, config, longest)
    if args.top_k == "all":
        config = dataclasses.replace(config, top_k=windows.length)
    if config.semantic_scale:
        require_single_window(windows)
    usual = model_config.sample.motion_weight
    if 0 < config.motion_weight < usual / LEAST_WEIGHT:
        warnings.warn(f"--motion-weight {config.motion_weight:g} does next to nothing: these "
                      f"weights' own is {usual:g}")
    device = resolve_device(args.device)
    check_memory(model_config, config, device, resolve_dtype(args.dtype, device))
    model = build_on_meta(model_config)
    model.unet.resolve(AttentionRequest(config.guidance_blocks, config.semantic_blocks))
    for text, word in zip((args.ref_prompt, args.prompt), args.subject):
        subject_tokens(model, text, word)
    if args.motion is not None:
        check_settings(Motion.load(args.motion), config,
                       (config.num_frames, config.height // step, config.width // step), longest)
    fps = model_config.fps if args.fps is None else args.fps
    if not 0.1 <= fps <= 100:
        raise InputError(f"--fps {fps} is not possible: 0.1 to 100")
    for image, frame in args.image:
        if not model_config.sparsectrl.kind:
            raise InputError(f"--image {image}: these weights have no SparseCtrl; "
                             "convert_weights.py --sparsectrl makes some that have")
        if not -config.num_frames <= frame < config.num_frames:
            raise InputError(f"--image {image}@{frame}: the clip has frames 0 to "
                             f"{config.num_frames - 1}")
        check_readable(image)
    for out in (args.out, *(clip.out for clip in clips_of(args))):
        check_output_path(out)
    kept = args.inversion_dir           # which is gone on with, if it is there
    if kept is not None and not kept.exists():
        check_writable(kept, folder=True)
    elif kept is not None and not (kept.is_dir() and os.access(kept, os.W_OK | os.X_OK)):
        raise InputError(f"{kept}: is not a folder that can be written to; choose another")
    return config, fps
