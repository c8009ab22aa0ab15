"""Measures cloning on held-out clips, by the model's settings or by others.

    python -m weights.training.evaluate [--clips 12] [--camera-clips 6] [--still-clips 3]
                                [--photo-clips 0] [--word-clips 0] [--out FILE]

A quarter of a minute a clip on one core. Every clip's figures are added to --out as they are
measured, and those that it has are not measured again; the table of all in it, of these settings
and of others, is printed at the end.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from mcl.checkpoints.model_file import load_model
from mcl.cli import OneLineErrorParser, exit_code_of, run_main
from mcl.config import ModelConfig, SampleConfig, from_dict, to_dict
from mcl.errors import InputError
from mcl.files import atomic_write, check_writable, nonfinite_to_none, read_jsonl, write_jsonl
from mcl.inversion import inversion_guidance, invert_reference
from mcl.device import DTYPES
from mcl.evaluation.report import denoising_error, motion_magnitude
from tests.benchmarks.paper_table import interval
from mcl.model import Model
from mcl.motion import extract_motion
from mcl.sampler import sample, initial_noise
from mcl.semantic import semantic_guidance, make_subject_masks
from .clip_metrics import measure, psnr
from .held_out import CAMERAS, PATHS, STILL, Case, held_out_cases, word_cases
from .photos import FOLDERS, find_photos
from .scenes import render

COLUMNS = ("direction", "position error", "camera", "prompt", "shape", "steady", "flicker", "PSNR",
           "seconds")
FOLLOWED = 0.7                          # of a direction, or of a camera's curves, at the least


def clone(model: Model, case: Case, config: SampleConfig, guided: bool = True, seed: int = 0
          ) -> Tensor:
    """Frames (f, 3, H, W) of the case's prompt, guided by its reference or not.

    The reference is inverted where the settings have inversion_steps, and semantic guidance given
    where they have a semantic_scale. Other seeds start from other noise.
    """
    start = initial_noise(model, config, torch.Generator().manual_seed(case.seed + 1000 * seed))
    motion, guides = None, []
    if guided:
        latents = model.vae.encode(render(case.scene, config.height))
        if config.inversion_steps:
            inversion = invert_reference(model, latents, case.reference_prompt, config)
            guides.append(inversion_guidance(inversion, config))
            if config.semantic_scale:
                subject = make_subject_masks(model, case.prompt, case.shape, case.reference_prompt,
                                     case.scene.shape, inversion.attend, config)
                guides.append(semantic_guidance(model, case.prompt, start, config, subject))
        else:
            motion = extract_motion(model, latents, config,
                                    generator=torch.Generator().manual_seed(case.seed + 1))
    *_, state = sample(model, case.prompt, motion, config, guides=guides, latents=start)
    return model.vae.decode(state.latents).float().cpu()


def main(argv: list[str] | None = None) -> int:
    p = OneLineErrorParser(prog="-m weights.training.evaluate", description="Measures cloning on held-out clips.")
    p.add_argument("--weights", type=Path, help="the embedded model's without it")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--clips", type=int, default=12, help="references with a moving object")
    p.add_argument("--camera-clips", type=int, default=6, help="references with a moving camera")
    p.add_argument("--still-clips", type=int, default=3, help="references without any motion")
    p.add_argument("--photo-clips", type=int, default=0,
                   help="objects before photographs, the same with a shaken camera, cameras over "
                        "photographs, and emoji before them: so many of each")
    p.add_argument("--word-clips", type=int, default=0,
                   help="references with a moving object whose prompts ask for emoji")
    p.add_argument("--photos", type=Path, nargs="+", default=FOLDERS,
                   help="folders of the photographs")
    p.add_argument("--other-textures", action="store_true",
                   help="ask for another texture than a moving camera's reference has")
    p.add_argument("--seed", type=int, default=0,
                   help="of the first clip; the study's is 200, the settings were chosen on others")
    p.add_argument("--seeds", type=int, default=1,
                   help="noises that each clip is made of; with 0 nothing is measured")
    p.add_argument("--guided-only", action="store_true", help="leave out the unguided samples")
    p.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=JSON",
                   help="settings other than the model's own, e.g. steps=50")
    p.add_argument("--out", type=Path, help="file of the figures, gone on from")
    p.add_argument("--save", type=Path,
                   help="folder for the clips, as PNG strips, and sheet.png, the best and worst")
    return exit_code_of(lambda: run(p.parse_args(argv)))


def setting(text: str) -> tuple[str, Any]:
    """"steps=50" -> ("steps", 50)."""
    name, _, value = text.partition("=")
    return name, json.loads(value)


def run(args: argparse.Namespace) -> None:
    for path, folder in ((args.out, False), (args.save, True)):
        if path and not (folder and path.is_dir()):
            check_writable(path, folder)
    photos = find_photos(args.photos, held_out=True) if args.photo_clips else []
    model = load_model(args.weights, dtype=args.dtype)
    config = from_dict(SampleConfig, to_dict(model.config.sample) | dict(args.set))
    own = ", ".join(f"{name} = {json.dumps(value)}" for name, value in args.set) or "default"
    of = {"model": model.sha256, "dtype": args.dtype}
    records = measured(args.out, of) if args.out else []
    done = {(r["row"], r["clip"], r["seed"]) for r in records}
    cases = asked_for(args, config.num_frames, photos)
    # In any order, so that all kinds have had their share whenever it is stopped.
    order = np.random.default_rng(0).permutation(len(cases))
    runs = [(seed, cases[i], row) for seed in range(args.seeds) for i in order
            for row in (own, f"{own}, unguided")[:1 if args.guided_only else 2]
            if (row, clip_name(cases[i]), seed) not in done]
    for seed, case, row in tqdm(runs, file=sys.stderr):
        began = time.perf_counter()
        frames = clone(model, case, config, row == own, seed)
        record = of | {"row": row, "clip": clip_name(case), "seed": seed, "kind": case.kind,
                       "seconds": time.perf_counter() - began} | nonfinite_to_none(measure(frames, case))
        reference = render(case.scene, config.height)
        if row == own:
            latents = model.vae.encode(reference)
            record |= {"movement": motion_magnitude(latents),
                       "denoising error": denoising_error(model, latents),
                       "PSNR": psnr(model.vae.decode(latents), reference)}
        records.append(record)
        if args.out:
            write_jsonl(args.out, records)
        if args.save:
            save_strip(args.save / strip_name(record), [reference, frames])
    print(table(records))
    ours = [r for r in records if r["row"] == own and r["kind"] not in STILL]
    print(door(ours, model.config))
    shown = [r for r in ours if args.save and (args.save / strip_name(r)).exists()]
    if shown:
        sheet(shown, args.save)


def asked_for(args: argparse.Namespace, frames: int, photos: list[Path]) -> list[Case]:
    cases = [case for kinds, number in ((PATHS, args.clips), (CAMERAS, args.camera_clips),
                                        (STILL, args.still_clips))
             for case in held_out_cases(kinds, number, frames, args.seed, args.other_textures)]
    cases += word_cases(args.word_clips, frames, args.seed)
    for kinds, by_hand in ((PATHS, False), (PATHS, True), (CAMERAS, False)):
        cases += held_out_cases(kinds, args.photo_clips, frames, args.seed, photos=photos,
                                by_hand=by_hand)
    return cases + word_cases(args.photo_clips, frames, args.seed, photos)


def clip_name(case: Case) -> str:
    return f"{case.kind}, {case.motion} {case.seed}"


def strip_name(record: dict[str, Any]) -> str:
    return "{row}, {clip}, {seed}.png".format(**record)


def measured(path: Path, of: dict[str, Any]) -> list[dict[str, Any]]:
    """What a file has `of` a model; a last line that was cut off is left out.

    Raises InputError for a file of another, and for one that has no such figures.
    """
    records = read_jsonl(path, "an evaluation", lambda record: isinstance(record, dict) and (
        {*of, "row", "clip", "seed", "kind"} <= set(record)))
    if any(record[name] != value for record in records for name, value in of.items()):
        raise InputError(f"{path}: has figures of another model or dtype; give another file")
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: means over the clips, of each of which its seeds' mean is taken first, with half of
    the 95 % confidence interval by Student's t. A row has what moves on plain and textured grounds;
    other kinds have rows of their own."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for r in records:
        plain = r["kind"] in ("object", "camera")
        rows.setdefault(r["row"] + ("" if plain else f": {r['kind']}"), []).append(r)
    lines = ["| | " + " | ".join((*COLUMNS, "clips x seeds")) + " |",
             "|---" * (len(COLUMNS) + 2) + "|"]
    for name, some in rows.items():
        clips = [[r for r in some if r["clip"] == clip] for clip in {r["clip"]: 0 for r in some}]
        cells = [interval(list(filter(None, ([x for r in clip for x in figure(r, column)]
                                             for clip in clips))), 3) for column in COLUMNS]
        cells.append(f"{len(clips)} x {len(some) / len(clips):.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(record: dict[str, Any], column: str) -> list[float]:
    """A record's figure, or none where it says nothing of its kind."""
    if column == "prompt":
        return [statistics.fmean(record[n] for n in ("colour", "ground", "shape") if n in record)]
    place = column in ("direction", "position error")
    value = record.get(column)
    return [] if value is None or (place and "camera" in record) else [value]


def door(records: list[dict[str, Any]], wanted: ModelConfig) -> str:
    """One line: how many references are as the model wants them, and how many are followed."""
    some = [(r["movement"] >= wanted.min_reference_motion and r["denoising error"] <= wanted.max_denoising_error,
             (r.get("camera", r["direction"]) or 0) >= FOLLOWED) for r in records]
    passed = [follows for passes, follows in some if passes]
    return (f"not warned of: {len(passed)} of {len(some)} references, of which "
            f"{sum(passed)} are followed; of the others {sum(f for p, f in some if not p)} are")


def save_strip(path: Path, clips: list[Tensor]) -> None:
    """The frames of each clip side by side, one clip below the other, as a PNG."""
    rows = torch.cat([rearrange(clip, "f c H W -> H (f W) c") for clip in clips])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, ((rows + 1) * 127.5).round().byte().numpy())


def sheet(records: list[dict[str, Any]], strips: Path, number: int = 5) -> None:
    """One PNG of every second frame, at half size, of clips and their references above them: the
    `number` that follow best on the left, those that follow worst on the right."""
    def small(record: dict[str, Any]) -> np.ndarray:
        strip = imageio.imread(strips / strip_name(record))[::2, ::2]
        frames = rearrange(strip, "h (f w) c -> f h w c", w=len(strip) // 2)[::2]
        return np.pad(np.hstack(list(frames)), ((4, 4), (4, 4), (0, 0)), constant_values=255)

    ranked = sorted(records, key=lambda r: -(r.get("camera", r["direction"]) or 0))
    write_png(strips / "sheet.png", np.hstack([np.vstack([small(r) for r in some]) for some in (
        ranked[:number], ranked[-number:])]))


def write_png(path: Path, pixels: np.ndarray) -> None:
    with atomic_write(path) as temporary:
        imageio.imwrite(temporary, pixels, extension=".png")


if __name__ == "__main__":
    run_main(main)
