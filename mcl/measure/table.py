"""The paper's table: clones of many references, unguided clips beside them, and what CLIP says.

    python -m mcl.measure.table --cases cases.jsonl --clip clip-vit-large-patch14 --preset camera

Cases are jobs as of sample.py --jobs, and all further options are for all of them. Each is measured
once: its figures are added to --out, and a run that was broken off is gone on with.
"""
import argparse
import functools
import math
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from ..checkpoint import load_model
from ..command import Once, Parser, answer, carry_out, one_line_warning
from ..command.cases import FIGURES, Case, read_cases, read_records
from ..command.jobs import assembled, is_of, measure_each
from ..command.options import seeded
from ..command.reference import progress, read_once
from ..errors import InputError
from ..files import finite
from ..machine import pick_recompute
from ..model import Model
from ..sampler import sample
from ..video import read_video
from .clip import Clip, load_clip
from .look import measured, unguided
from .report import COLUMNS

PAPER = {"CLIP text alignment": 0.3187, "CLIP temporal consistency": 0.9621}    # arXiv 2406.05338


def measure(model: Model, clip: Clip, case: Case) -> dict[str, Any]:
    """Makes both clips of a case, and measures them: its request, and the figures of each."""
    args, config = case.args, case.config
    reference = read_video(args.ref, config.frames, (config.height, config.width), args.start,
                           args.duration, args.fit, stride=args.stride)
    motion = read_once(args, model, reference, model.vae.encode(reference), config)
    *_, last = progress(args.where, config.steps)(sample(
        model, args.prompt, motion, config, generator=seeded(case.seed),
        recompute=pick_recompute(args.memory, model, config)))
    made = dict(zip(FIGURES, (last.latents, unguided(args, model, config, case.seed, None))))
    figures = measured(model, config, reference, made)
    for name, latents in made.items():
        figures[name] |= zip(PAPER, clip.cosines(args.prompt, model.vae.decode(latents)))
    return {**case.request, **finite(figures)}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over references and prompts, of each of which its seeds' mean is taken first,
    with half of the 95 % confidence interval by Student's t."""
    lines = ["| | " + " | ".join((*FIGURES, "the paper's")) + " |", "|---|---|---|---|"]
    for column in (*PAPER, *COLUMNS):
        cells = [estimate(records, name, column) for name in FIGURES]
        lines.append(f"| {column} | {' | '.join(cells)} | {PAPER.get(column, '')} |")
    return "\n".join(lines)


def estimate(records: Sequence[dict[str, Any]], name: str, column: str) -> str:
    groups: dict[tuple[str, str], list[float]] = {}
    for r in records:
        known = [x for x in [r[name].get(column)] if x is not None]
        groups.setdefault((r["reference"], r["prompt"]), []).extend(known)
    means = [statistics.fmean(group) for group in groups.values() if group]
    text = f"{statistics.fmean(means):.4f}" if means else "-"
    if len(means) > 1:
        error = statistics.stdev(means) / math.sqrt(len(means))
        text += f" ± {student(len(means) - 1) * error:.4f}"
    return text if len(means) == len(groups) else f"{text} (of {len(means)})"


def student(freedom: int) -> float:
    """What the size of Student's t stays below in 95 % of cases. It is sqrt(freedom) tan(a), for
    angles a whose density is as cos(a) ** (freedom - 1)."""
    angles = np.linspace(0, math.pi / 2, 1_000_001)
    mass = np.cumsum(np.cos(angles) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(angles[np.searchsorted(mass, 0.95 * mass[-1])])


def run(args: argparse.Namespace, common: list[str]) -> int:
    failed: list[str] = []
    with assembled() as crew:
        try:
            cases = read_cases(args.cases, common, args.clip, args.out)
            records, left = read_records(args.out, cases)
            clip = load_clip(args.clip) if left else None
        except InputError:
            if crew.rank:               # which the first of them says
                return 2
            raise
        crew.gather([])                 # before anybody writes, all have seen what is left
        if clip is not None:
            first = cases[0].args
            model = load_model(first.weights, first.device, first.dtype)
            measured_by = functools.partial(measure, model, clip.to(model.device))
            failed = measure_each(crew, [(case.args.where, case) for case in left], measured_by,
                                  args.out, records)
        if crew.rank == 0:
            print(f"{args.cases}: {len(cases)} cases, {len(cases) - len(left)} of them measured "
                  f"before; {len(failed)} failed", file=sys.stderr)
            print(table([r for r in records if any(is_of(r, case.request) for case in cases)]))
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """0 done, 1 some case failed, 2 bad input, 130 or 143 interrupted."""
    warnings.showwarning = one_line_warning
    p = Parser(prog="-m mcl.measure.table", description=__doc__.splitlines()[0],
               allow_abbrev=False, epilog="All other options are sample.py's, for all cases.")
    p.add_argument("--cases", type=Path, required=True, action=Once, metavar="FILE",
                   help='a line of JSON for each, {"ref": "a.mp4", "prompt": "a star", "seed": 1}')
    p.add_argument("--clip", type=Path, required=True, action=Once, metavar="FILE",
                   help="model.safetensors of openai/clip-vit-large-patch14 or -base-patch32")
    p.add_argument("--out", type=Path, default=Path("table.jsonl"), metavar="FILE",
                   help="the figures of each case, gone on with (default: %(default)s)")
    return answer(lambda: run(*p.parse_known_args(argv)))


if __name__ == "__main__":
    carry_out(main)
