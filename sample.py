"""Clones the motion of a reference video into a new video of a prompt.

    python sample.py --ref examples/figure_eight.mp4 --prompt "a red star on a navy background"
"""
import argparse
import dataclasses
import functools
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from tqdm import tqdm

from mcl import (InputError, Model, Motion, SampleConfig, extract_motion, load_model, read_picture,
                 read_video, sample, sparse_condition, write_video)
from mcl.checkpoint import DTYPES, read_header
from mcl.command import FORESEEN, Parser, explain
from mcl.convert.formats import LORAS
from mcl.convert.lora import IGNORE_ALPHA, Lora, open_lora, parse_scaled
from mcl.files import atomic, check_file
from mcl.inversion import Inversion, inversion_path, invert_motion
from mcl.semantic import Semantics, semantics_of
from mcl.unet import UNet3D
from mcl.video import FITS, check_writable

EMBEDDED = Path(__file__).parent / "weights" / "tiny.safetensors"
# The published settings (arXiv 2406.05338): steps, guided steps, their share of the noise range.
PRESETS = {"camera": (100, 50, 0.3), "object": (300, 180, 0.4)}
# Of the weight of the semantic loss to that of the motion loss, in the inversion variant.
PUBLISHED_SEMANTIC_SHARE = 42 / 1667
METHODS = ("single-step", "inversion")
# The reference is noised alike whatever the seed, so that a motion is the same in every sample and
# in a file; with a number beyond all seeds, so that no clip starts from that noise.
REFERENCE_SEED = 1 << 32


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(prog="sample.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = p.add_argument
    add("--ref", type=Path, help="reference video, gif or folder of images")
    add("--prompt", required=True, help="what the new video shows; may be empty")
    add("--negative-prompt", help="what it should not show")
    add("--weights", type=Path, help="model file; the embedded one without it")
    add("--out", type=Path, default=Path("out.mp4"),
        help=".mp4, .gif, .webp, or a folder of PNGs (default: %(default)s)")
    add("--compare", action="store_true", help="also write reference and result side by side")
    add("--seed", type=int, default=0)
    add("--num-samples", type=int, default=1, help="this many, with seeds counted up")

    group = p.add_argument_group("method; the defaults are kept with the weights")
    add = group.add_argument
    add("--preset", choices=PRESETS, help="published steps for camera or object motion")
    add("--steps", type=int, help="of DDIM")
    add("--guidance-steps", type=int, help="how many of them, the first, are guided")
    add("--guidance-span", type=float, help="share of the noise range that these cover")
    add("--cfg-scale", type=float, help="classifier-free guidance, uncond + s (cond - uncond)")
    add("--motion-scale", type=float, help="weight of the motion guidance; 0 turns it off")
    add("--top-k", type=top_k, metavar="K", help="values kept of each row of an attention map, "
        "or all")
    add("--blocks", type=lambda text: tuple(text.split(",")),
        help="UNet blocks whose temporal attention is cloned, with commas between")
    add("--block-weights", type=lambda text: tuple(map(float, text.split(","))),
        help="of each of the blocks in the loss, with commas between")
    add("--method", choices=METHODS, default="single-step",
        help="how the reference is read: noised once, or inverted by DDIM (default: %(default)s)")
    add("--inversion-steps", type=int, help="of --method inversion (default: 100)")
    add("--ref-prompt", default="", help="what the reference shows, for inversion and --subject")
    add("--subject", nargs=2, metavar=("REF_WORD", "NEW_WORD"),
        help="semantic guidance where these words of the two prompts show")
    add("--semantic-scale", type=float, help="weight of semantic guidance; without --subject it "
        "compares whole frames")

    group = p.add_argument_group("reference and video")
    add = group.add_argument
    add("--frames", type=int)
    add("--size", type=parse_size, metavar="WIDTHxHEIGHT", help="in pixels")
    add("--start", type=float, default=0.0, help="seconds into the reference")
    add("--duration", type=float, help="seconds of the reference; all the rest without it")
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
    return p.parse_args(argv)


def parse_size(text: str) -> tuple[int, int]:
    """"512x320" -> (width, height)."""
    width, x, height = text.partition("x")
    if not (x and width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 512x512")
    return int(width), int(height)


def top_k(text: str) -> int | str:
    """The number, or "all"."""
    return text if text == "all" else int(text)


def parse_image(text: str) -> tuple[Path, int]:
    """"a.png@15" -> (a.png, 15); frame 0 where none is given."""
    path, at, frame = text.rpartition("@")
    if at and frame.removeprefix("-").isdigit():
        return Path(path), int(frame)
    return Path(text), 0


def settings(args: argparse.Namespace, default: SampleConfig) -> SampleConfig:
    """The settings that suit the weights, with the preset's and then the options' over them."""
    given: dict[str, Any] = {}
    if args.preset:
        names = ("steps", "guidance_steps", "guidance_span")
        given.update(zip(names, PRESETS[args.preset]))
    for field in dataclasses.fields(SampleConfig):
        value = getattr(args, field.name, None)
        if value is not None:
            given[field.name] = value
    if args.top_k == "all":
        given["top_k"] = args.frames or default.frames
    if args.method == "inversion":
        given.setdefault("inversion_steps", 100)
    elif args.inversion_steps:
        raise InputError("--inversion-steps belongs to --method inversion")
    elif args.ref_prompt and not args.subject:
        raise InputError("--ref-prompt belongs to --method inversion or --subject")
    if args.subject:
        given.setdefault("semantic_scale", PUBLISHED_SEMANTIC_SHARE
                         * given.get("motion_scale", default.motion_scale))
    if args.size:
        given["width"], given["height"] = args.size
    return dataclasses.replace(default, **given)


def check(args: argparse.Namespace) -> tuple[SampleConfig, float]:
    """Everything that can be wrong and can be known before weights are read."""
    if args.weights is None:
        args.weights = EMBEDDED
        print("no --weights: the embedded model runs, which knows coloured shapes on grounds",
              file=sys.stderr)
    if (args.ref is None) == (args.motion is None):
        raise InputError("give the reference with --ref, or its kept motion with --motion")
    if not 0 <= args.seed < REFERENCE_SEED:
        raise InputError(f"--seed {args.seed} is not possible: 0 to {REFERENCE_SEED - 1}")
    if args.num_samples < 1:
        raise InputError(f"--num-samples {args.num_samples} is not possible: 1 or more")
    if args.method == "inversion" and (args.ref is None or args.save_motion):
        raise InputError("--method inversion reads the reference at every step: give it with "
                         "--ref, and leave out --motion and --save-motion")
    if args.image and (args.method == "inversion" or args.subject or args.semantic_scale):
        raise InputError("--image goes with --method single-step, without semantic guidance")
    if args.subject and args.ref is None:
        raise InputError("--subject looks for its word in the reference: give it with --ref")
    if args.compare and args.ref is None:
        raise InputError("--compare shows the reference: give it with --ref")
    model_config = read_header(args.weights)
    config = settings(args, model_config.sample)
    step = model_config.vae.downsampling
    if config.height % step or config.width % step:
        raise InputError(f"--size {config.width}x{config.height} is not possible: "
                         f"width and height must be multiples of {step}")
    if config.frames > model_config.unet.max_frames:
        raise InputError(f"--frames {config.frames}: this model's motion modules know up to "
                         f"{model_config.unet.max_frames}")
    with torch.device("meta"):
        UNet3D(model_config.unet).temporal_layers(config.blocks)
    fps = model_config.fps if args.fps is None else args.fps
    if not 0.1 <= fps <= 100:
        raise InputError(f"--fps {fps} is not possible: 0.1 to 100")
    for image, frame in args.image:
        if not model_config.sparsectrl.kind:
            raise InputError(f"--image {image}: these weights have no SparseCtrl; "
                             "convert_weights.py --sparsectrl makes some that have")
        if not -config.frames <= frame < config.frames:
            raise InputError(f"--image {image}@{frame}: the clip has frames 0 to "
                             f"{config.frames - 1}")
    for path in outputs(args):
        check_writable(path)
    for path in (args.save_motion, args.out.with_suffix(".json")):
        if path is not None:
            check_file(path)
    return config, fps


def open_loras(args: argparse.Namespace) -> list[Lora]:
    return [open_lora(option, path, scale, args.ignore_alpha) for option in LORAS
            for path, scale in getattr(args, option[2:].replace("-", "_"))]


def outputs(args: argparse.Namespace) -> list[Path]:
    """Where each sample goes: out.mp4, or out-0.mp4, out-1.mp4, ... by their seeds."""
    if args.num_samples == 1:
        return [args.out]
    return [args.out.with_stem(f"{args.out.stem}-{args.seed + i}")
            for i in range(args.num_samples)]


def run(args: argparse.Namespace) -> None:
    config, fps = check(args)
    loras = open_loras(args)
    timing: dict[str, float] = {}
    clock = time.perf_counter

    began = clock()
    reference = None
    if args.ref is not None:
        reference = read_video(args.ref, config.frames, (config.height, config.width),
                               start=args.start, duration=args.duration, fit=args.fit)
    size = (config.height, config.width)
    pictures = [read_picture(path, size, args.fit) for path, _ in args.image]
    timing["read"] = clock() - began

    began = clock()
    model = load_model(args.weights, args.device, args.dtype, loras)
    timing["load"] = clock() - began
    warn_unknown(model, args.prompt)

    began = clock()
    latents = (None if reference is None
               else model.vae.encode(reference.to(model.device, model.dtype)))
    motion = (Motion.load(args.motion) if reference is None or latents is None
              else read_motion(args, model, reference, latents, config))
    semantics = read_semantics(args, model, motion, latents, config)
    timing["extract"] = clock() - began

    condition = given_frames(model, pictures, args, config)
    for i, out in enumerate(outputs(args)):
        seed = args.seed + i
        began = clock()
        generator = torch.Generator().manual_seed(seed)
        bar = tqdm(sample(model, args.prompt, motion, config=config, generator=generator,
                          condition=condition, semantics=semantics),
                   total=config.steps, desc=f"seed {seed}", unit="step", file=sys.stderr)
        losses = []
        for state in bar:
            if state.loss is not None:
                losses.append(state.loss)
                bar.set_postfix(loss=f"{state.loss:.2e}")
        timing["sample"] = clock() - began

        began = clock()
        frames = model.vae.decode(state.latents.to(model.dtype)).float().cpu()
        timing["decode"] = clock() - began
        write_video(out, frames, fps)
        if reference is not None and args.compare:
            beside = out.with_stem(out.stem + "-compare")
            write_video(beside, torch.cat([reference, frames], dim=-1), fps)
            print(beside)
        write_sidecar(out.with_suffix(".json"), {
            "prompt": args.prompt, "method": args.method, "reference_prompt": args.ref_prompt,
            "subject": args.subject, "reference": str(args.ref or args.motion), "seed": seed,
            "settings": dataclasses.asdict(config), "start": args.start,
            "duration": args.duration, "fit": args.fit, "fps": fps,
            "weights": str(args.weights), "weights_sha256": model.sha256,
            "images": [(str(path), frame) for path, frame in args.image],
            "loras": [(str(lora.source.path), lora.scale) for lora in loras],
            "ignore_alpha": args.ignore_alpha,
            "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch."),
            "torch": torch.__version__, "motion_loss": losses,
            "seconds": {name: round(s, 3) for name, s in timing.items()}})
        print(out)


def read_motion(args: argparse.Namespace, model: Model, reference: torch.Tensor,
                latents: torch.Tensor, config: SampleConfig) -> Motion | Inversion:
    if args.method == "inversion":
        bar = functools.partial(tqdm, total=len(inversion_path(model.schedule, config)),
                                desc="inversion", unit="step", file=sys.stderr)
        return invert_motion(model, latents, args.ref_prompt, config, bar)
    # Read under its own frames: the new clip's are not of this motion.
    own = [reference[frame, None] for _, frame in args.image]
    condition = given_frames(model, own, args, config)
    motion = extract_motion(model, latents, t=config.extract_t, k=config.top_k,
                            blocks=config.blocks,
                            noise=reference_noise(latents), condition=condition)
    if args.save_motion is not None:
        dataclasses.replace(motion, info=motion.info | {"source": args.ref.name}).save(
            args.save_motion)
    return motion


def reference_noise(latents: torch.Tensor) -> torch.Tensor:
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(REFERENCE_SEED))


def read_semantics(args: argparse.Namespace, model: Model, motion: Motion | Inversion,
                   latents: torch.Tensor | None, config: SampleConfig) -> Semantics | None:
    if not config.semantic_scale or not config.motion_scale:
        return None
    if not args.subject or latents is None:
        return Semantics(model, config.blocks)
    ref_word, word = args.subject
    reference: Inversion | torch.Tensor
    if isinstance(motion, Inversion):
        reference = motion
    else:
        noise = reference_noise(latents).to(latents.device)
        reference = model.schedule.add_noise(latents.float(), noise, config.extract_t)
    return semantics_of(model, config.blocks, args.prompt, word, args.ref_prompt, ref_word,
                        reference, config.extract_t)


def given_frames(model: Model, pictures: list[torch.Tensor], args: argparse.Namespace,
                 config: SampleConfig) -> torch.Tensor | None:
    """SparseCtrl's condition: these pictures (1, 3, H, W), at the frames that --image names."""
    if not pictures:
        return None
    given = torch.cat(pictures).to(model.device, model.dtype)
    if model.config.sparsectrl.kind == "rgb":
        given = rearrange(model.vae.encode(given), "1 c n h w -> n c h w")
    else:
        given = (given + 1) / 2
    return sparse_condition(given, [frame for _, frame in args.image], config.frames)


def warn_unknown(model: Model, prompt: str) -> None:
    unknown = model.unknown_words(prompt)
    if unknown:
        warnings.warn(f"this model was not trained on: {', '.join(unknown)}; it knows "
                      f"{', '.join(model.config.vocabulary)}")


def write_sidecar(path: Path, record: dict[str, Any]) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """0 done, 1 failed, 2 bad usage or input, 130 interrupted; what went wrong is one line."""
    warnings.showwarning = one_line_warning
    try:
        run(parse(argv))
    except FORESEEN as error:
        code, line = explain(error)
        print(line, file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
