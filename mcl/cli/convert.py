"""The command convert_weights.py: one model file from community checkpoints."""
import argparse
import functools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from ..checkpoints import convert, detect
from ..checkpoints.detect import LORAS, OPTIONS, DetectedCheckpoint
from ..checkpoints.lora import IGNORE_ALPHA_HELP, open_lora, parse_scaled
from ..checkpoints.model_file import file_metadata
from ..device import DTYPE_ALIASES, DTYPES
from ..errors import InputError
from ..files import stream_safetensors
from ..ownership import OutputFile, check_io_conflicts, check_writable, file_state, sha256_of
from .hub import fetch, read_presets
from .process import OneLineErrorParser, exit_code_of, print_line, run_main

NETWORK_HELP = {
    "--base": "Stable Diffusion 1.5: .safetensors, .ckpt, or a diffusers folder",
    "--vae": "VAE in place of the base's", "--text-encoder": "text encoder in place of the base's",
    "--motion-module": "AnimateDiff's motion module, v1, v2 or v3, or a diffusers MotionAdapter",
    "--sparsectrl": "AnimateDiff's SparseCtrl, rgb or scribble, for --image of sample.py"}
LORA_HELP = ("AnimateDiff's domain adapter", "LoRA of kohya, A1111, diffusers, PEFT or LyCORIS",
             "AnimateDiff's motion LoRA")
EXAMPLE = """FILE can be hf:OWNER/REPO/FILE[@REVISION] on huggingface.co. example:
  python convert_weights.py --base v1-5-pruned-emaonly.safetensors --motion-module v3_sd15_mm.ckpt
      --out weights/sd15-v3.safetensors"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return exit_code_of(lambda: convert_files(parse_args(argv)))


def command() -> NoReturn:
    """Run the command as this process."""
    run_main(main)


def build_parser() -> OneLineErrorParser:
    """Return the parser of convert_weights.py."""
    p = OneLineErrorParser(prog="convert_weights.py", epilog=EXAMPLE,
                           description="Convert community checkpoints to one model file.",
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, text in NETWORK_HELP.items():
        p.add_argument(option, dest=option, type=Path, metavar="FILE", help=text)
    for option, text in zip(LORAS, LORA_HELP, strict=True):
        p.add_argument(option, dest=option, type=parse_scaled, nargs="+", action="extend",
                       default=[], metavar="FILE[:SCALE]", help=text)
    p.add_argument("--ignore-alpha", action="store_true", help=IGNORE_ALPHA_HELP)
    p.add_argument("--ema", action="store_true", help="use the base's moving averages")
    p.add_argument("--out", type=Path, metavar="FILE", help="the file to write, a .safetensors")
    p.add_argument("--dtype", choices=DTYPE_ALIASES, default="fp16", help="data type [fp16]")
    p.add_argument("--name", help="name of the model [name of the file]")
    p.add_argument("--check", type=Path, nargs="+", action="extend", metavar="FILE",
                   help="say what each file is, and stop")
    presets = read_presets()
    p.add_argument("--preset", choices=presets, help="download and convert a set of files")
    p.add_argument("--list", action="version", version="\n\n".join(presets.values()),
                   help="print the files of each preset with their sizes, and stop")
    return p


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, with those of --preset. Raises InputError for wrong usage."""
    words, parser = sys.argv[1:] if argv is None else list(argv), build_parser()
    if preset := parser.parse_args(words).preset:
        words += [w for w in read_presets()[preset].split() if w.startswith(("--", "hf:"))]
    return parser.parse_args(words)


def open_networks(args: argparse.Namespace, files: Mapping[Path, Path]
                  ) -> dict[str, DetectedCheckpoint]:
    """Return the checkpoint of each network that a command line gives, by part.

    `files` has the file of each path, as `fetch` returns it.

    Raises:
        InputError: If a file is not what its option takes; the message names the right option.
    """
    networks: dict[str, DetectedCheckpoint] = {}
    detect_file = functools.cache(detect.detect_file)   # two options may name the same file
    for part, option in OPTIONS.items():
        if (path := vars(args)[option]) is not None:
            networks[part] = detect_file(files[path])
            if part not in networks[part].key_maps:
                raise detect.wrong_option_error(networks[part], option)
    return networks


def convert_files(args: argparse.Namespace) -> int:
    """Convert the files of the command line and print what was used of each, or check them."""
    if args.check:
        if args.out or given_files(args):
            raise InputError("--check converts nothing: leave out the other options")
        return check_files(args.check)
    if args.out is None:
        raise InputError("--out is missing: give the file to write, a .safetensors")
    if args.out.suffix.lower() != ".safetensors":
        raise InputError(f"{args.out}: its name must end in .safetensors")
    check_writable(args.out)
    files = fetch(path for _, path in given_files(args))
    reads = [(option, files[path]) for option, path in given_files(args)]
    states = {path: file_state(path) for _, path in reads}
    networks = open_networks(args, files)
    loras = [open_lora(option, files[path], scale, args.ignore_alpha)
             for option in LORAS for path, scale in vars(args)[option]]
    base = networks.get("unet")
    parts = dict.fromkeys(base.key_maps, base) | networks if base else networks
    plan = convert.plan_conversion(args.name or args.out.stem, parts, loras, args.ema)
    inputs = [(OPTIONS[part], checkpoint, "") for part, checkpoint in networks.items()] + [
        (lora.checkpoint.option, lora.checkpoint,
         f":{lora.scale:g}{' without alpha' * lora.ignore_alpha}") for lora in loras]
    paths = [path for _, checkpoint, _ in inputs for path in checkpoint.files]
    reads += [("this command", path) for path in paths]
    check_io_conflicts(reads, [OutputFile("--out", args.out)])
    for checkpoint in {checkpoint.path: checkpoint for _, checkpoint, _ in inputs}.values():
        print_line(usage_report(checkpoint, plan.ignored[checkpoint.path]), sys.stderr)
    sha256 = sha256_of_files(paths)
    sources = {f"{option} {path.relative_to(checkpoint.path.parent)}{scale}": sha256[path]
               for option, checkpoint, scale in inputs for path in checkpoint.files}
    dtype = DTYPES[DTYPE_ALIASES[args.dtype]]
    like = {n: torch.empty(s, dtype=dtype, device="meta") for n, s in plan.shapes.items()}

    def tensors() -> Iterator[torch.Tensor]:
        try:
            yield from tqdm(plan.tensors(dtype), args.out.name, len(like), unit="tensor")
        finally:                        # a change may also be the cause of an error
            for path, state in states.items():
                if file_state(path) != state:
                    raise InputError(f"{path}: was changed while it was read. Convert again")
    stream_safetensors(args.out, like, tensors(), file_metadata(plan.config, sources, dtype))
    print_line(f"{len(like)} tensors, {len(plan.deltas)} of them changed by LoRAs", sys.stderr)
    print_line(args.out)
    return 0


def given_files(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Return the option and the path of each file or folder of a command line."""
    networks = [(option, path) for option in OPTIONS.values() if (path := vars(args)[option])]
    return networks + [(option, path) for option in LORAS for path, _ in vars(args)[option]]


def usage_report(checkpoint: DetectedCheckpoint, ignored: Counter[str]) -> str:
    """Return one line: how many tensors of a file are used, and why the others are not."""
    reasons = "; ".join(f"{n} {reason}" for reason, n in ignored.items())
    num_used, num_others = len(checkpoint.tensors) - ignored.total(), len(checkpoint.non_tensors)
    return (f"{checkpoint.path}: {checkpoint.description}: {num_used} tensors used, "
            f"{ignored.total()} ignored{reasons and f' ({reasons})'}"
            + f"; {num_others} entries that are not tensors" * bool(num_others))


def sha256_of_files(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the sha256 of files, with a progress bar."""
    files = list(dict.fromkeys(paths))
    return {path: sha256_of(path) for path in tqdm(files, "sha256", unit="file", delay=1)}


def check_files(paths: Sequence[Path]) -> int:
    """Print what each file is; return 2 if there is one that cannot be used."""
    code = 0
    for path in paths:
        try:
            for line in describe_checkpoint(detect.detect_file(fetch([path])[path])):
                print_line(line)
        except InputError as error:
            print_line(error)
            code = 2
    return code


def describe_checkpoint(checkpoint: DetectedCheckpoint) -> list[str]:
    """Return lines that say what a checkpoint is and what it still needs."""
    counts = Counter(str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values())
    dtypes = ", ".join(f"{n} {dtype}" for dtype, n in counts.items())
    size = sum(file.stat().st_size for file in checkpoint.files) / 1e9
    missing = ", ".join(convert.missing_parts(checkpoint.key_maps))
    return [
        f"{checkpoint.path}: {checkpoint.description}",
        f"  {len(checkpoint.tensors)} tensors, {dtypes}, {size:.3f} GB",
        "  complete: python sample.py --weights" if checkpoint.option == "--weights" else
        f"  for {checkpoint.option}; a complete model also needs {missing}",
        *(f"  sha256 {s}  {f.name}" for f, s in sha256_of_files(checkpoint.files).items())]
