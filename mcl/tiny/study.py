"""The claims of the paper in numbers: variants of the method on the same held-out clips.

    python -m mcl.tiny.study --out study.jsonl [--clips 18] [--camera-clips 12] [--seeds 3]

Hours on two cores. Every clip's figures are added to the file as they are measured, and those
that it has are not measured again; the table is printed at the end, or at once with --table.
--sheet draws the default's best and worst clips from the strips that --save has kept.
"""
import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from einops import rearrange, reduce
from tqdm import tqdm

from ..checkpoint import load_model
from ..command import Parser, answer, carry_out
from ..command.options import PUBLISHED_SEMANTIC_SHARE
from ..config import SampleConfig, from_dict, to_dict
from ..errors import InputError
from ..files import atomic, check_target, read_lines, write_lines
from ..machine import DTYPES
from .evaluate import clone, measure, save_strip
from .held_out import CAMERAS, PATHS, Case, held_out_cases
from .scenes import render

FIRST_SEED = 200                        # the settings were chosen on clips of other seeds
COLUMNS = ("direction", "position error", "camera", "prompt", "flicker", "seconds")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Settings other than the model's own, and the weights of the losses relative to its own."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    weight: float = 1.0
    semantic: bool = False
    guided: bool = True

    def of(self, default: SampleConfig) -> SampleConfig:
        scale = self.weight * default.motion_weight
        return from_dict(SampleConfig, to_dict(default) | self.settings | {
            "motion_weight": scale,
            "semantic_scale": PUBLISHED_SEMANTIC_SHARE * scale if self.semantic else 0.0})


DEFAULT = "single-step, k = 1 (default)"
VARIANTS = {
    "unguided": Variant(guided=False),
    DEFAULT: Variant(),
    "single-step, k = all": Variant({"top_k": 16}),
    "inversion, k = 1": Variant({"inversion_steps": 100}),
    "inversion, k = 1, semantic": Variant({"inversion_steps": 100}, semantic=True),
    **{f"t = {t}": Variant({"extract_t": t}) for t in (400, 600, 800)},
    **{f"{block} alone": Variant({"blocks": [block], "block_weights": []}) for block in (
        "down_blocks.1", "down_blocks.2", "up_blocks.0", "up_blocks.1", "up_blocks.2")},
    "half the weight": Variant(weight=0.5),
    "double weight": Variant(weight=2.0),
    "8 frames": Variant({"frames": 8}),
    "64x64": Variant({"height": 64, "width": 64}),
    **{f"a gradient every {n} steps": Variant({"guidance_every": n}) for n in (2, 3)},
    **{f"CFG in {share:.0%} of the steps": Variant({"cfg_share": share}) for share in (.7, .4)},
    **{f"{steps} steps": Variant({"steps": steps, "guidance_steps": steps // 2,
                                  "warmup": steps // 7, "cooldown": steps // 7})
       for steps in (24, 16)},
}


def figures_of(records: list[dict[str, Any]], column: str) -> np.ndarray:
    """One value for each clip: the mean over its seeds."""
    clips: dict[str, list[float]] = {}
    for r in records:
        value = (np.mean([r["colour"], r["ground"], r["shape"]]) if column == "prompt"
                 else r.get(column, math.nan))
        if column in ("direction", "position error") and r["kind"] != "object":
            value = math.nan
        if not math.isnan(value):
            clips.setdefault(r["clip"], []).append(value)
    return np.array([np.mean(values) for values in clips.values()])


def study_table(records: list[dict[str, Any]]) -> str:
    """Markdown: the mean of each column over the clips, with its 95 % confidence interval; of the
    seconds, which other work disturbs, the median."""
    lines = ["| | " + " | ".join(COLUMNS) + " | clips x seeds |",
             "|---" * (len(COLUMNS) + 2) + "|"]
    for name in VARIANTS:
        some = [r for r in records if r["variant"] == name]
        if not some:
            continue
        cells = []
        for column in COLUMNS:
            values = figures_of(some, column)
            if len(values) < 2:
                cells.append("")
                continue
            interval = 1.96 * values.std(ddof=1) / len(values) ** 0.5
            cells.append(f"{np.median(values):.0f}" if column == "seconds" else
                         f"{values.mean():.3f} ± {interval:.3f}")
        clips = len({r["clip"] for r in some})
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {clips} x {len(some) / clips:.1f} |")
    return "\n".join(lines)


def sheet(records: list[dict[str, Any]], strips: Path, path: Path, number: int = 5) -> None:
    """One PNG of every second frame, at half size, of the default's clips and their references.

    The `number` that follow best are on the left, those that follow worst on the right.
    """
    def score(r: dict[str, Any]) -> float:
        return float(r["camera"] if r["kind"] == "camera" else r["direction"])

    ranked = sorted((r for r in records if r["variant"] == DEFAULT), key=score, reverse=True)
    columns = []
    for some in (ranked[:number], ranked[-number:]):
        rows = []
        for r in some:
            strip = torch.from_numpy(imageio.imread(strips / strip_name(r)))
            frames = rearrange(strip, "(two h) (f w) c -> two f h w c", two=2, w=len(strip) // 2)
            small = reduce(frames[:, ::2].float(), "two f (h 2) (w 2) c -> (two h) (f w) c", "mean")
            rows.append(torch.nn.functional.pad(small, (0, 0, 4, 4, 4, 4), value=255.0))
        columns.append(torch.cat(rows))
    with atomic(path) as temporary:
        imageio.imwrite(temporary, torch.cat(columns, dim=1).byte().numpy(), extension=".png")


def strip_name(record: dict[str, Any]) -> str:
    return "{variant}, {clip}, {seed}.png".format(**record)


def measured(path: Path, model: str) -> list[dict[str, Any]]:
    """What a file has of a model, by its sha256; a last line that was cut off is left out.

    Raises InputError for a file of another model, and for one that is not of a study.
    """
    records = read_lines(path, "a study", lambda record: isinstance(record, dict) and (
        {"model", "variant", "clip", "seed"} <= set(record)))
    if any(record["model"] != model for record in records):
        raise InputError(f"{path}: has figures of another model; give another file")
    return records


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="-m mcl.tiny.study",
               description="Compares variants of the method on held-out clips.")
    p.add_argument("--weights", type=Path, help="the embedded model's without it")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--out", type=Path, required=True, help="file of the figures, gone on from")
    p.add_argument("--clips", type=int, default=18, help="references with a moving object")
    p.add_argument("--camera-clips", type=int, default=12, help="references with a moving camera")
    p.add_argument("--other-textures", action="store_true",
                   help="ask for another texture than a moving camera's reference has")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    p.add_argument("--save", type=Path, help="folder for the clips, as PNG strips")
    p.add_argument("--sheet", type=Path, metavar="PNG", help="draw best and worst; needs --save")
    p.add_argument("--table", action="store_true", help="measure nothing")
    return answer(lambda: run(p.parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    if args.sheet and not args.save:
        raise InputError("--sheet needs --save, the folder of the strips")
    for path in (args.out, args.sheet):
        if path is not None:
            check_target(path)
    model = load_model(args.weights, dtype=args.dtype)
    records = measured(args.out, model.sha256)
    done = {(r["variant"], r["clip"], r["seed"]) for r in records}
    runs = []
    for kinds, number in ((PATHS, args.clips), (CAMERAS, args.camera_clips)):
        for name in args.variants:
            config = VARIANTS[name].of(model.config.sample)
            cases = held_out_cases(kinds, number, config.frames, FIRST_SEED,
                                   args.other_textures)
            runs += [(seed, i / number, name, config, case) for i, case in enumerate(cases)
                     for seed in range(args.seeds)
                     if (name, clip_name(case), seed) not in done]
    # Clip by clip, so that whenever it is stopped all variants have been given the same ones.
    runs.sort(key=lambda run: run[:2])
    for seed, _, name, config, case in tqdm([] if args.table else runs, file=sys.stderr):
        began = time.perf_counter()
        frames = clone(model, case, config, VARIANTS[name].guided, seed)
        record = {"model": model.sha256, "variant": name, "clip": clip_name(case), "seed": seed,
                  "kind": case.kind, "seconds": time.perf_counter() - began}
        records.append(record | measure(frames, case))
        write_lines(args.out, records)
        if args.save:
            save_strip(args.save / strip_name(record),
                       [render(case.scene, config.height), frames])
    print(study_table(records))
    if args.sheet:
        sheet(records, args.save, args.sheet)


def clip_name(case: Case) -> str:
    return f"{case.motion} {case.seed}"


if __name__ == "__main__":
    carry_out(main)
