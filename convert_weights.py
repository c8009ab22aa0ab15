"""Makes one file of weights for sample.py out of community checkpoints.

    python convert_weights.py --base v1-5-pruned-emaonly.safetensors --motion-module v3_sd15_mm.ckpt
                              --out weights/sd15-v3.safetensors
"""
import os
import signal

if __name__ == "__main__":              # before all that takes time to import
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:      # nohup's
            signal.signal(number, lambda number, _: (
                os.write(2, b"interrupted; nothing was begun\n"),
                os._exit(130 if number == signal.SIGINT else 143)))

import argparse
import functools
import hashlib
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable

from tqdm import tqdm

from mcl import InputError
from mcl.command import Once, Parser, answer, carry_out
from mcl.convert import assemble
from mcl.convert.formats import (BASE, FOREIGN_PART, LORAS, MOTION, SPARSECTRL, TEXT, VAE, WEIGHTS,
                                 Source, read_source)
from mcl.convert.lora import IGNORE_ALPHA, Lora, open_lora, parse_scaled
from mcl.errors import printable
from mcl.files import Write, check_plan, check_target
from mcl.machine import DTYPES, SHORT

NETWORKS = {BASE: "unet", VAE: "vae", TEXT: "text_encoder", MOTION: "motion",
            SPARSECTRL: "sparsectrl"}
CHUNK = 1 << 24


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(prog="convert_weights.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = p.add_argument
    add("--base", type=Path, action=Once, metavar="B",
        help="Stable Diffusion 1.5: .safetensors, .ckpt, or a folder of diffusers")
    add("--motion-module", type=Path, action=Once, metavar="M",
        help="of AnimateDiff, v1, v2 or v3, or a MotionAdapter of diffusers")
    add("--sparsectrl", type=Path, action=Once, metavar="S",
        help="of AnimateDiff, rgb or scribble: then sample.py takes pictures or sketches")
    add("--vae", type=Path, action=Once, metavar="V", help="in place of the base's")
    add("--text-encoder", type=Path, action=Once, metavar="T", help="in place of the base's")
    for option, what in zip(LORAS, ("AnimateDiff's domain adapter", "of kohya, A1111, diffusers "
                                    "or PEFT", "of AnimateDiff, for its motion modules")):
        add(option, type=parse_scaled, nargs="+", action="extend", default=[],
            metavar="F[:SCALE]", help=what)
    add("--ignore-alpha", action="store_true", help=IGNORE_ALPHA)
    add("--ema", action="store_true", help="take the base's moving averages")
    add("--out", type=Path, metavar="F", help="the file to write, a .safetensors")
    add("--dtype", choices=SHORT, default="fp16", help="of what is written (default: %(default)s)")
    add("--name", help="of the model (default: the name of the file)")
    add("--check", type=Path, nargs="+", action="extend", metavar="FILE",
        help="say what each file is, and stop")
    return p.parse_args(argv)


@dataclass
class Given:
    """The files by the options that they were given with."""
    networks: dict[str, Source] = field(default_factory=dict)
    loras: list[Lora] = field(default_factory=list)


def open_all(args: argparse.Namespace) -> Given:
    """Opens all files; raises InputError, with the right command, for one in a wrong place."""
    given = Given()
    read = functools.cache(read_source)         # one file may stand in two places
    for option, part in NETWORKS.items():
        path = getattr(args, option[2:].replace("-", "_"))
        if path is None:
            continue
        source = read(path)
        if part not in source.parts:
            raise misplaced(source, option, args)
        given.networks[option] = source
    for option in LORAS:
        for path, scale in getattr(args, option[2:].replace("-", "_")):
            source = read(path)
            if source.slot != option:
                raise misplaced(source, option, args)
            given.loras.append(open_lora(option, path, scale, args.ignore_alpha))
    return given


def misplaced(source: Source, option: str, args: argparse.Namespace) -> InputError:
    """Says what the file is, and the command with every file in its own place."""
    if not source.slot or source.slot == WEIGHTS:
        fit = f"python sample.py --weights {source.path} runs it" if source.slot else ""
        return InputError(f"{source.path}: {source.title}" + (f"; {fit}" if fit else ""))
    if source.slot == BASE and option in (VAE, TEXT):
        return InputError(f"{source.path}: {source.title}: it holds nothing for {option}; "
                          "give another file, or leave the option out")
    words = []
    for name in (*NETWORKS, *LORAS):
        value = getattr(args, name[2:].replace("-", "_"))
        for path, scale in value if name in LORAS else [(value, 1.0)] if value else []:
            slot = read_source(path).slot or name
            words += [slot, f"{path}:{scale:g}" if scale != 1 else str(path)]
    words += ["--ema"] if args.ema else []
    words += ["--ignore-alpha"] if args.ignore_alpha else []
    words += ["--name", args.name] if args.name else []
    words += ["--dtype", args.dtype, "--out", str(args.out)]
    return InputError(f"{source.path}: {source.title}, which is not for {option}; "
                      f"python convert_weights.py {shlex.join(words)}")


def parts_of(networks: dict[str, Source]) -> dict[str, Source]:
    """Each part from the file given for it, else from the base."""
    base = networks.get(BASE)
    parts = {part: base for part in ("unet", "vae", "text_encoder", "motion")
             if base is not None and part in base.parts}
    return parts | {part: networks[option] for option, part in NETWORKS.items()
                    if option in networks}


def digest(paths: Iterable[Path]) -> dict[Path, str]:
    """sha256 of the files, with a bar."""
    paths = list(dict.fromkeys(paths))
    result = {}
    with tqdm(total=sum(p.stat().st_size for p in paths), desc="sha256", unit="B",
              unit_scale=True, file=sys.stderr, delay=1) as bar:
        for path in paths:
            sha256 = hashlib.sha256()
            try:
                with open(path, "rb") as file:
                    while chunk := file.read(CHUNK):
                        sha256.update(chunk)
                        bar.update(len(chunk))
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from error
            result[path] = sha256.hexdigest()
    return result


def convert(args: argparse.Namespace) -> None:
    if args.out is None:
        raise InputError("give the file to write with --out, e.g. --out weights/sd15.safetensors")
    check_target(args.out)
    given = open_all(args)
    plan = assemble.plan(args.name or args.out.stem, parts_of(given.networks), given.loras,
                         args.ema)
    sources = [*given.networks.values(), *(lora.source for lora in given.loras)]
    check_plan([("this command", file) for source in sources for file in source.checkpoint.files],
               [Write("--out", args.out)])
    for source in {s.path: s for s in sources}.values():
        print(account(source, plan), file=sys.stderr)
    sha256 = digest(file for source in sources for file in source.checkpoint.files)
    record = {f"{option} {file.relative_to(source.path.parent)}{scale}": sha256[file]
              for option, source, scale in (
                  *((option, source, "") for option, source in given.networks.items()),
                  *((o.source.slot, o.source, f":{o.scale:g}{' without alpha' * o.ignore_alpha}")
                    for o in given.loras))
              for file in source.checkpoint.files}
    dtype = DTYPES[SHORT[args.dtype]]
    bar = tqdm(plan.tensors(dtype), total=len(plan.shapes), desc=args.out.name, unit="tensor",
               file=sys.stderr)
    assemble.write(plan, args.out, dtype, bar, record)
    print(f"{len(plan.shapes)} tensors filled, each once; {len(plan.changes)} of them changed by "
          f"{len(given.loras)} LoRAs", file=sys.stderr)
    print(args.out)


def account(source: Source, plan: assemble.Plan) -> str:
    dropped = plan.dropped[source.path]
    why = "; ".join(f"{n} {reason}" for reason, n in dropped.items())
    strays = len(source.checkpoint.non_tensors)
    line = (f"{source.path}: {source.title}: {plan.used[source.path]} tensors used, "
            f"{dropped.total()} dropped" + (f" ({why})" if why else "")
            + (f"; {strays} entries that are not tensors" if strays else ""))
    left_out = [reason for reason in dropped if reason.endswith(FOREIGN_PART)]
    return "\n".join(map(printable, [line, *(
        f"warning: {source.path}: left out: what is {reason}" for reason in left_out)]))


def check(paths: list[Path]) -> int:
    """Says what each file is; 2 if there is one that cannot be used."""
    code = 0
    for path in paths:
        try:
            print(describe(read_source(path)))
        except InputError as error:
            print(error)
            code = 2
    return code


def describe(source: Source) -> str:
    tensors, files = source.checkpoint.tensors.values(), source.checkpoint.files
    precision = Counter(str(t.dtype).removeprefix("torch.") for t in tensors)
    size = sum(file.stat().st_size for file in files) / 1e9
    held = {part: source for part in source.parts}
    lines = [f"{source.path}: {source.title}",
             f"  {len(tensors)} tensors, {', '.join(f'{n} {d}' for d, n in precision.items())}, "
             f"{size:.3f} GB"]
    if source.slot == WEIGHTS:
        lines.append("  complete: python sample.py --weights")
    elif source.slot:
        lines.append(f"  for {source.slot}; a complete model still needs "
                     + ", ".join(assemble.missing(held)))
    lines += [f"  sha256 {sha256}  {file.name}" for file, sha256 in digest(files).items()]
    return "\n".join(map(printable, lines))


def run(args: argparse.Namespace) -> int:
    if args.check:
        return check(args.check)
    convert(args)
    return 0


def main(argv: list[str] | None = None) -> int:
    """0 done, 1 failed, 2 bad input, 130 or 143 interrupted; what went wrong is one line."""
    return answer(lambda: run(parse(argv)))


if __name__ == "__main__":
    carry_out(main)
