"""The paper's table: clones of many references, and unguided clips of the same noise beside them.

    python -m tests.benchmarks.paper_table --cases cases.jsonl --clip clip-vit-large-patch14 --preset camera

Cases are jobs as of sample.py --jobs, and all further options are for all of them. Each is measured
once: its figures are added to --out, and a run that was broken off is gone on with.
"""
import math
import statistics
from typing import Sequence

import numpy as np

from mcl.cli import run_main
from tests.benchmarks import cases
from tests.benchmarks.cases import FIGURES, Case, Record
from mcl.cli.arguments import make_generator
from mcl.cli.reference import progress, read_once
from mcl.files import nonfinite_to_none
from mcl.device import use_checkpointing
from mcl.model import Model
from mcl.sampler import sample
from mcl.video.read import read_video
from tests.benchmarks.clip_model import Clip, load_clip
from mcl.evaluation.look import measured, unguided
from mcl.evaluation.report import COLUMNS

PAPER = {"CLIP text alignment": 0.3187, "CLIP temporal consistency": 0.9621}    # arXiv 2406.05338


def measure(model: Model, clip: Clip, case: Case) -> Record:
    """Makes the two clips of a case: its request, and the figures of each."""
    args, config = case.args, case.config
    reference = read_video(args.ref, config.num_frames, (config.height, config.width), args.start,
                           args.duration, args.fit, stride=args.stride)
    motion = read_once(args, model, reference, model.vae.encode(reference), config)
    *_, last = progress(args.where, config.steps)(sample(
        model, args.prompt, motion, config, generator=make_generator(case.seed),
        gradient_checkpointing=use_checkpointing(args.memory, model, config)))
    made = dict(zip(FIGURES, (last.latents, unguided(args, model, config, case.seed, None))))
    figures = measured(model, config, reference, made)
    for name, latents in made.items():
        figures[name] |= zip(PAPER, clip.cosines(args.prompt, model.vae.decode(latents)))
    return {**case.request, **nonfinite_to_none(figures)}


def table(records: Sequence[Record]) -> str:
    """Markdown: means over references and prompts, of each of which its seeds' mean is taken first,
    with half of the 95 % confidence interval by Student's t."""
    lines = ["| | " + " | ".join((*FIGURES, "the paper's")) + " |", "|---|---|---|---|"]
    for column in (*PAPER, *COLUMNS):
        cells = [estimate(records, name, column) for name in FIGURES]
        lines.append(f"| {column} | {' | '.join(cells)} | {PAPER.get(column, '')} |")
    return "\n".join(lines)


def estimate(records: Sequence[Record], name: str, column: str) -> str:
    groups: dict[tuple[str, str], list[float]] = {}
    for r in records:
        known = [x for x in [r[name].get(column)] if x is not None]
        groups.setdefault((r["reference"], r["prompt"]), []).extend(known)
    known = [group for group in groups.values() if group]
    return interval(known, 4) + (f" (of {len(known)})" if len(known) < len(groups) else "")


def interval(groups: Sequence[Sequence[float]], digits: int) -> str:
    """The mean of the groups' means, with half of its 95 % confidence interval by Student's t."""
    means = [statistics.fmean(group) for group in groups]
    text = f"{statistics.fmean(means):.{digits}f}" if means else "-"
    if len(means) > 1:
        error = statistics.stdev(means) / math.sqrt(len(means))
        text += f" ± {student(len(means) - 1) * error:.{digits}f}"
    return text


def student(freedom: int) -> float:
    """What the size of Student's t stays below in 95 % of cases. It is sqrt(freedom) tan(a), for
    angles a whose density is as cos(a) ** (freedom - 1)."""
    angles = np.linspace(0, math.pi / 2, 1_000_001)
    mass = np.cumsum(np.cos(angles) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(angles[np.searchsorted(mass, 0.95 * mass[-1])])


def main(argv: list[str] | None = None) -> int:
    return cases.main(argv, __doc__.splitlines()[0], load_clip, measure, table)


if __name__ == "__main__":
    run_main(main)
