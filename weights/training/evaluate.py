"""Measure cloning on held-out references, with a model's own settings or with others.

    python -m weights.training.evaluate --clips 12 --camera-clips 6 --out FILE.jsonl

A clip takes about 15 seconds on one core. Its metrics are added to --out when they are measured,
and clips that the file already has are not measured again. At the end the command prints a table of
all records in the file, including those of other settings.
"""
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from mcl import InputError, Model, ModelConfig, clone, load_model
from mcl.cli.process import run_main
from mcl.device import DTYPES
from mcl.evaluation.report import FOLLOW_THRESHOLD, denoising_error, motion_magnitude
from mcl.files import atomic_write, nonfinite_to_none
from mcl.ownership import check_writable
from mcl.presets import build_config

from .clip_metrics import measure, psnr
from .held_out import CAMERAS, PATHS, STATIC, EvalCase, emoji_cases, held_out_cases
from .options import option, run_with_options
from .photos import PHOTO_FOLDERS, find_photos
from .scenes import render

Record = dict[str, Any]
COLUMNS = ("direction", "position error", "camera", "prompt", "shape", "steady", "flicker", "PSNR",
           "seconds")


def parse_setting(text: str) -> tuple[str, Any]:
    """Return ("steps", 50) for "steps=50"."""
    name, _, value = text.partition("=")
    return name, json.loads(value)


@dataclasses.dataclass
class Options:
    """Measure cloning on held-out references."""

    weights: Path | None = option(None, "model file (default: the built-in demo model)")
    dtype: str = option("float32", "precision of the model", choices=DTYPES)
    clips: int = option(12, "number of references with a moving object")
    camera_clips: int = option(6, "number of references with a moving camera")
    still_clips: int = option(3, "number of references without motion")
    emoji_clips: int = option(0, "number of references whose clone is an emoji")
    photo_clips: int = option(0, "number of references over photographs, of each of four kinds")
    other_textures: bool = option(False, "ask for another texture than a camera's reference has")
    seed: int = option(0, "seed of the first case")
    seeds: int = option(1, "clips of each case, from different noise; 0 only prints the table")
    guided_only: bool = option(False, "leave out the unguided clips")
    set: tuple[tuple[str, Any], ...] = option((), "settings, as in steps=50", type=parse_setting)
    out: Path | None = option(None, "file of the records; an existing one is continued")


def clone_case(model: Model, case: EvalCase, reference: Tensor, settings: dict[str, Any],
               is_guided: bool = True, seed: int = 0) -> Tensor:
    """Return frames (f, 3, H, W) of a case's prompt, guided by its reference (f, 3, H, W) or not.

    Settings are fields of SampleConfig. The prompt and the subject of the reference are added.
    """
    settings = {"ref_prompt": case.ref_prompt, **settings}
    if settings.get("semantic_scale"):
        settings["subject"] = (case.scene.shape, case.shape)
    if not is_guided:
        settings |= {"motion_weight": 0.0, "method": "single-step"}
    return clone(reference, case.prompt, model=model, seed=case.seed + 1000 * seed,
                 **settings).frames


def select_cases(options: Options, num_frames: int) -> list[EvalCase]:
    """Return the cases that the options ask for."""
    count, seed = options.photo_clips, options.seed
    photos = find_photos(PHOTO_FOLDERS, held_out=True) if count else []
    cases = emoji_cases(options.emoji_clips, num_frames, seed)
    for kinds, num_clips in ((PATHS, options.clips), (CAMERAS, options.camera_clips),
                             (STATIC, options.still_clips)):
        cases += held_out_cases(kinds, num_clips, num_frames, seed, options.other_textures)
    for kinds, is_shaken in ((PATHS, False), (PATHS, True), (CAMERAS, False)):
        cases += held_out_cases(kinds, count, num_frames, seed, False, photos, is_shaken)
    return cases + emoji_cases(count, num_frames, seed, photos)


def clip_name(case: EvalCase) -> str:
    """Return the name of a case in the records."""
    return f"{case.kind}, {case.motion} {case.seed}"


def measure_case(model: Model, case: EvalCase, settings: dict[str, Any], is_guided: bool, seed: int
                 ) -> Record:
    """Return the record of one clip."""
    config = build_config(model.config.sample, **settings)
    reference, start = render(case.scene, config.height), time.perf_counter()
    frames = clone_case(model, case, reference, settings, is_guided, seed)
    record = {"clip": clip_name(case), "seed": seed, "kind": case.kind,
              "seconds": time.perf_counter() - start, **nonfinite_to_none(measure(frames, case))}
    if is_guided:
        latents = model.vae.encode(reference)
        record |= {"movement": motion_magnitude(latents),
                   "denoising error": denoising_error(model, latents),
                   "PSNR": psnr(model.vae.decode(latents), reference)}
    return record


def run(options: Options) -> None:
    """Measure all cases and print the table."""
    if options.out:
        check_writable(options.out)
    model, settings = load_model(options.weights, dtype=options.dtype), dict(options.set)
    row = ", ".join(f"{name} = {json.dumps(value)}" for name, value in options.set) or "default"
    rows = {row: True} if options.guided_only else {row: True, f"{row}, unguided": False}
    source = {"model": model.sha256, "dtype": options.dtype}
    keys = {*source, "row", "clip", "seed", "kind"}
    records = read_records(options.out, keys) if options.out else []
    if any(r | source != r for r in records):
        raise InputError(f"{options.out}: has records of another model or dtype. Give another file")
    finished = {(r["row"], r["clip"], r["seed"]) for r in records}
    cases = select_cases(options, build_config(model.config.sample, **settings).num_frames)
    # In random order, so that all kinds of cases have their share whenever the command is stopped.
    order = np.random.default_rng(0).permutation(len(cases))
    runs = [(name, cases[i], seed) for seed in range(options.seeds) for i in order for name in rows
            if (name, clip_name(cases[i]), seed) not in finished]
    for name, case, seed in tqdm(runs, file=sys.stderr):
        record = measure_case(model, case, settings, rows[name], seed)
        records.append({**source, "row": name, **record})
        if options.out:
            with atomic_write(options.out) as temporary:
                temporary.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    print(format_table(records))
    print(suitability_summary([r for r in records if r["row"] == row and r["kind"] not in STATIC],
                              model.config))


def read_records(path: Path, keys: set[str]) -> list[Record]:
    """Return the records of a file with one JSON object in each line; none if it does not exist.

    Args:
        path: The file.
        keys: Keys that every record must have.

    Raises:
        InputError: If the file cannot be read, or a line is not such a record.
    """
    try:
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        records: list[Record] = [json.loads(line) for line in lines]
        if not all(isinstance(record, dict) and keys <= set(record) for record in records):
            raise ValueError(f"a record has no {', '.join(sorted(keys))}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Give another file") from error
    return records


def format_table(records: Sequence[Record]) -> str:
    """Return the table in Markdown: means over clips with 95 % confidence intervals.

    The seeds of a clip are averaged first. Objects and cameras on plain and textured backgrounds
    share a row; every other kind of case has its own.
    """
    rows: dict[str, dict[str, list[Record]]] = {}
    for r in records:
        kind = "" if r["kind"] in ("object", "camera") else f": {r['kind']}"
        rows.setdefault(r["row"] + kind, {}).setdefault(r["clip"], []).append(r)
    lines = [f"| | {' | '.join(COLUMNS)} | clips x seeds |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, clips in rows.items():
        groups = [[[x for r in clip for x in metric_values(r, column)] for clip in clips.values()]
                  for column in COLUMNS]
        cells = [mean_ci95([*filter(None, column)], 3) for column in groups]
        seeds = sum(map(len, clips.values())) / len(clips)
        lines.append(f"| {name} | {' | '.join(cells)} | {len(clips)} x {seeds:.1f} |")
    return "\n".join(lines)


def student_t_95(degrees_of_freedom: int) -> float:
    """Return the bound that the absolute value of Student's t stays below in 95 % of cases.

    With n degrees of freedom t is sqrt(n) * tan(a), where the density of the angle a is
    proportional to cos(a) ** (n - 1). The density is summed numerically.
    """
    angles = np.linspace(0, math.pi / 2, 1_000_001)
    mass = np.cumsum(np.cos(angles) ** (degrees_of_freedom - 1))
    angle = angles[np.searchsorted(mass, 0.95 * mass[-1])]
    return math.sqrt(degrees_of_freedom) * math.tan(angle)


def mean_ci95(groups: Sequence[Sequence[float]], digits: int) -> str:
    """Return the mean of the groups' means with its 95 % confidence interval: "0.98 ± 0.01".

    Args:
        groups: Values of each group, such as those of all seeds of a clip; no group is empty.
        digits: Decimal places.

    Returns:
        "-" without groups; the mean alone for one group.
    """
    means = [statistics.fmean(group) for group in groups]
    text = f"{statistics.fmean(means):.{digits}f}" if means else "-"
    if len(means) > 1:
        error = statistics.stdev(means) / math.sqrt(len(means))
        text += f" ± {student_t_95(len(means) - 1) * error:.{digits}f}"
    return text


def metric_values(record: Record, column: str) -> list[float]:
    """Return a record's value in a column of the table, or an empty list without one."""
    if column == "prompt":
        return [statistics.fmean(record[n] for n in ("colour", "ground", "shape") if n in record)]
    has_no_path = column in ("direction", "position error") and "camera" in record
    return [] if has_no_path or record.get(column) is None else [record[column]]


def suitability_summary(records: Sequence[Record], config: ModelConfig) -> str:
    """Return one line: how many references pass the model's limits, and how many are followed."""
    passes = [r["movement"] >= config.min_reference_motion
              and r["denoising error"] <= config.max_denoising_error for r in records]
    follows = [(r.get("camera", r["direction"]) or 0) >= FOLLOW_THRESHOLD for r in records]
    both = sum(map(min, passes, follows))
    return (f"{sum(passes)} of {len(records)} references pass without a warning, "
            f"{both} of them are followed; of the others {sum(follows) - both} are")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_with_options("-m weights.training.evaluate", Options, run, argv)


if __name__ == "__main__":
    run_main(main)
