"""Measure cloning on held-out references, with a model's own settings or with others.

    python -m weights.training.evaluate --clips 12 --camera-clips 6 --out FILE.jsonl

A clip takes about 15 seconds on one core. Its metrics are added to --out when they are measured,
and clips that the file already has are not measured again. At the end the command prints a table of
all records in the file, including those of other settings.
"""
import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mcl import InputError, Model, ModelConfig, clone, load_model, write_video
from mcl.cli.process import OneLineErrorParser, exit_code_of, run_main
from mcl.device import DTYPES
from mcl.evaluation.report import denoising_error, motion_magnitude
from mcl.files import check_writable, nonfinite_to_none
from mcl.presets import build_config

from .clip_metrics import measure, psnr
from .held_out import CAMERAS, PATHS, STATIC, EvalCase, emoji_cases, held_out_cases
from .intervals import mean_ci95
from .photos import PHOTO_FOLDERS, find_photos
from .records import read_jsonl, write_jsonl
from .scenes import render

Record = dict[str, Any]
COLUMNS = ("direction", "position error", "camera", "prompt", "shape", "steady", "flicker", "PSNR",
           "seconds")
FOLLOW_THRESHOLD = 0.7          # direction, or correlation of a camera's curves, of a good clone


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


def parse_setting(text: str) -> tuple[str, Any]:
    """Return ("steps", 50) for "steps=50"."""
    name, _, value = text.partition("=")
    return name, json.loads(value)


def select_cases(args: argparse.Namespace, num_frames: int) -> list[EvalCase]:
    """Return the cases that the options ask for."""
    photos = find_photos(args.photos, held_out=True) if args.photo_clips else []
    cases = emoji_cases(args.emoji_clips, num_frames, args.seed)
    for kinds, count in ((PATHS, args.clips), (CAMERAS, args.camera_clips),
                         (STATIC, args.still_clips)):
        cases += held_out_cases(kinds, count, num_frames, args.seed, args.other_textures)
    for kinds, is_shaken in ((PATHS, False), (PATHS, True), (CAMERAS, False)):
        cases += held_out_cases(kinds, args.photo_clips, num_frames, args.seed, photos=photos,
                                has_camera_shake=is_shaken)
    return cases + emoji_cases(args.photo_clips, num_frames, args.seed, photos)


def clip_name(case: EvalCase) -> str:
    """Return the name of a case in the records."""
    return f"{case.kind}, {case.motion} {case.seed}"


def measure_case(model: Model, case: EvalCase, settings: dict[str, Any], is_guided: bool, seed: int,
                 save: Path | None) -> Record:
    """Return the record of one clip; `save` is the folder for its video."""
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
    if save:
        name = f"{clip_name(case)}, {seed}{'' if is_guided else ', unguided'}.mp4"
        write_video(save / name, torch.cat([reference, frames], dim=-1), model.config.fps)
    return record


def run(args: argparse.Namespace) -> None:
    """Measure all cases and print the table."""
    for path in (args.out, args.save and args.save / "clip.mp4"):
        if path:
            check_writable(path)
    model, settings = load_model(args.weights, dtype=args.dtype), dict(args.set)
    row = ", ".join(f"{name} = {json.dumps(value)}" for name, value in args.set) or "default"
    rows = {row: True} if args.guided_only else {row: True, f"{row}, unguided": False}
    source = {"model": model.sha256, "dtype": args.dtype}
    records = read_jsonl(args.out, {*source, "row", "clip", "seed", "kind"}) if args.out else []
    if any(source.items() - {(name, r[name]) for name in source} for r in records):
        raise InputError(f"{args.out}: has records of another model or dtype. Give another file")
    finished = {(r["row"], r["clip"], r["seed"]) for r in records}
    cases = select_cases(args, build_config(model.config.sample, **settings).num_frames)
    # In random order, so that all kinds of cases have their share whenever the command is stopped.
    order = np.random.default_rng(0).permutation(len(cases))
    runs = [(seed, cases[i], name) for seed in range(args.seeds) for i in order for name in rows
            if (name, clip_name(cases[i]), seed) not in finished]
    for seed, case, name in tqdm(runs, file=sys.stderr):
        records.append({**source, "row": name, **measure_case(model, case, settings, rows[name],
                                                              seed, args.save)})
        if args.out:
            write_jsonl(args.out, records)
    print(format_table(records))
    print(suitability_summary([r for r in records if r["row"] == row and r["kind"] not in STATIC],
                              model.config))


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
        groups = {column: [[x for r in clip for x in metric_values(r, column)]
                           for clip in clips.values()] for column in COLUMNS}
        cells = [mean_ci95([group for group in groups[column] if group], 3) for column in COLUMNS]
        seeds = sum(map(len, clips.values())) / len(clips)
        lines.append(f"| {name} | {' | '.join(cells)} | {len(clips)} x {seeds:.1f} |")
    return "\n".join(lines)


def metric_values(record: Record, column: str) -> list[float]:
    """Return a record's value in a column of the table, or an empty list without one."""
    if column == "prompt":
        return [statistics.fmean(record[n] for n in ("colour", "ground", "shape") if n in record)]
    has_no_path = column in ("direction", "position error") and "camera" in record
    return [] if has_no_path or record.get(column) is None else [record[column]]


def suitability_summary(records: Sequence[Record], config: ModelConfig) -> str:
    """Return one line: how many references pass the model's limits, and how many are followed."""
    follows: dict[bool, list[bool]] = {True: [], False: []}
    for r in records:
        passes = (r["movement"] >= config.min_reference_motion
                  and r["denoising error"] <= config.max_denoising_error)
        follows[passes].append((r.get("camera", r["direction"]) or 0) >= FOLLOW_THRESHOLD)
    return (f"{len(follows[True])} of {len(records)} references pass without a warning, "
            f"{sum(follows[True])} of them are followed; of the others {sum(follows[False])} are")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = OneLineErrorParser(prog="-m weights.training.evaluate",
                           description="Measure cloning on held-out references.")
    p.add_argument("--weights", type=Path, help="model file (default: the built-in demo model)")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    for name, count, kind in (
            ("--clips", 12, "with a moving object"), ("--camera-clips", 6, "with a moving camera"),
            ("--still-clips", 3, "without motion"), ("--emoji-clips", 0, "whose clone is an emoji"),
            ("--photo-clips", 0, "over photographs, for each of four kinds")):
        p.add_argument(name, type=int, default=count, help=f"number of references {kind}")
    p.add_argument("--photos", type=Path, nargs="+", default=PHOTO_FOLDERS,
                   help="folders of photographs")
    p.add_argument("--other-textures", action="store_true",
                   help="ask for another texture than the reference of a moving camera has")
    p.add_argument("--seed", type=int, default=0, help="seed of the first case")
    p.add_argument("--seeds", type=int, default=1,
                   help="clips of each case, from different noise; 0 only prints the table")
    p.add_argument("--guided-only", action="store_true", help="leave out the unguided clips")
    p.add_argument("--set", type=parse_setting, nargs="*", default=[], metavar="NAME=JSON",
                   help="settings in place of the model's own, such as steps=50")
    p.add_argument("--out", type=Path, help="file of the records; an existing one is continued")
    p.add_argument("--save", type=Path, help="existing folder for clips beside their references")
    return exit_code_of(lambda: run(p.parse_args(argv)))


if __name__ == "__main__":
    run_main(main)
