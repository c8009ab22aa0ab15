"""Measures cloning on held-out clips, against the exact truth of how they were rendered.

    python -m mcl.tiny.evaluate [--weights F] [--clips 12] [--camera-clips 6] [--still-clips 3]
                                [--photo-clips 0] [--word-clips 0]

Everything is measured in the finished pictures; positions are in half widths of the picture. An
emoji counts as its word says ("shape") if no other's picture, and no shape's in any colour, is
nearer to what is drawn; "steady" is the share of frames that agree on a subject, whichever it is.
"""
import argparse
import dataclasses
import functools
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from ..checkpoint import load_model
from ..command import Parser, answer, carry_out
from ..config import ModelConfig, SampleConfig, from_dict, to_dict
from ..files import atomic, check_target
from ..inversion import inversion_guide, invert_motion
from ..measure.door import denoising_error, movement
from ..measure.metrics import camera_curves, curve_correlation, flicker
from ..model import Model
from ..motion import extract_motion
from ..sampler import sample, starting_noise
from ..semantic import semantic_guide, subject_of
from .clips import tone
from .held_out import CAMERAS, PATHS, STILL, Case, held_out_cases, word_cases
from .photos import FOLDERS, find_photos
from .scenes import COLOURS, GROUNDS, SHAPES, Scene, render, seen_centre
from .words import EMOJI, emoji

K = TypeVar("K")
Rgb = tuple[float, float, float]
FOUND_AREA = 0.004                      # of the picture: the least that counts as a subject
FOLLOWED = 0.7                          # of a direction, or of a camera's curves, at the least


def subject_mask(frames: Tensor, colour: str, ground: str) -> Tensor:
    """Where a clip (f, 3, H, W) in [-1, 1] is nearer to the subject's colour: (f, H, W) bool."""
    to_fore, to_back = ((frames / 2 + 0.5 - torch.tensor(c)[:, None, None]).square().sum(dim=1)
                        for c in (COLOURS[colour], GROUNDS[ground]))
    return (to_fore < to_back) & (to_fore < 0.15)


def track(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid (f, 2) in half widths of each frame's mask, and whether there is one (f,)."""
    size = mask.shape[-1]
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    weight = mask.float()
    area = weight.sum(dim=(1, 2)).clamp(min=1)
    x = (weight * line).sum(dim=(1, 2)) / area
    y = (weight * line[:, None]).sum(dim=(1, 2)) / area
    return torch.stack([x, y], dim=-1), weight.mean(dim=(1, 2)) > FOUND_AREA


def direction_agreement(found: Tensor, truth: Tensor, still: float = 0.02) -> float:
    """Mean cosine of frame-to-frame displacements, where the truth moves. Tracks (f, 2)."""
    step, true_step = found.diff(dim=0), truth.diff(dim=0)
    moves = true_step.norm(dim=-1) > still
    cosine = torch.cosine_similarity(step, true_step, dim=-1, eps=1e-6)
    return float(cosine[moves].mean())


def commonest(colours: Tensor, named: dict[K, Rgb]) -> K:
    """The name that is nearest to most of the colours (n, 3)."""
    which = torch.cdist(colours, torch.tensor(list(named.values()))).argmin(dim=1)
    return list(named)[int(which.mode().values)]


def best_shape(mask: Tensor) -> str:
    """The shape whose rendered template overlaps a mask (H, W) best, at the mask's own size."""
    cut, aspect = spanned(mask[None].float(), mask)
    scores = {}
    for shape in SHAPES:
        drawn = portrait(shape, (1., 1., 1.), (0., 0., 0.))[0, 0] > 0
        template, its_aspect = spanned(drawn[None].float(), drawn)
        overlap = torch.minimum(cut, template).sum() / torch.maximum(cut, template).sum()
        scores[shape] = float(overlap) - 0.3 * abs(math.log(aspect / its_aspect))
    return max(scores, key=lambda shape: scores[shape])


def spanned(picture: Tensor, mask: Tensor, grid: int = 48) -> tuple[Tensor, float]:
    """What the box around a mask (H, W) shows of a picture (c, H, W), stretched to (c, grid, grid),
    and the box's height / width."""
    rows, columns = (torch.nonzero(mask.any(dim=d)).flatten() for d in (1, 0))
    cut = picture[:, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    aspect = float(cut.shape[1] / cut.shape[2])
    return F.interpolate(cut[None], (grid, grid), mode="area")[0], aspect


@functools.cache
def portrait(subject: str, colour: Rgb, ground: Rgb) -> Tensor:
    """A shape, or an emoji, on a plain ground: (1, 3, 192, 192) in [-1, 1]."""
    one, origin = torch.ones(1), torch.zeros(1, 2)
    skin = emoji(subject) if subject in EMOJI else None
    return render(Scene(subject, colour, "plain", ground, ground, 1.0, 0.0, origin, one * 0.8,
                        one * 0, origin, one, one * 0, skin=skin), 192)


def unlike_ground(frames: Tensor, ground: str) -> Tensor:
    """Where a clip (f, 3, H, W) in [-1, 1] shows anything but a plain ground: (f, H, W) bool."""
    away = (frames + 1) / 2 - rearrange(torch.tensor(GROUNDS[ground]), "c -> c 1 1")
    return away.abs().amax(dim=1) > 0.12


def best_subject(frame: Tensor, mask: Tensor, ground: str) -> str:
    """The emoji, or "red star", that looks on this ground most like what a mask (H, W) spans."""
    cut, aspect = spanned(frame, mask, 16)
    scores = {}
    for colour, subject in (*itertools.product(COLOURS, SHAPES), *(("", word) for word in EMOJI)):
        drawn = portrait(subject, COLOURS.get(colour, (0., 0., 0.)), GROUNDS[ground])
        template, its_aspect = spanned(drawn[0], unlike_ground(drawn, ground)[0], 16)
        scores[f"{colour} {subject}".strip()] = (
            float((cut - template).square().mean()) + 0.1 * abs(math.log(aspect / its_aspect)))
    return min(scores, key=lambda name: scores[name])


def measure(frames: Tensor, case: Case) -> dict[str, float]:
    """All figures of one clip (f, 3, H, W) in [-1, 1] against its case."""
    truth = seen_centre(case.scene)
    mask = (subject_mask(frames, case.colour, case.ground) if case.colour else
            unlike_ground(frames, case.ground))
    centre, found = track(mask)
    picture = (frames + 1) / 2
    textured = case.motion in CAMERAS
    figures = {
        "direction": direction_agreement(centre, truth),
        "position error": float((centre - truth).norm(dim=-1).mean()),
        "found": float(found.float().mean()),
        "flicker": flicker(frames),
        "colour": 0.0, "ground": 0.0}
    subjects = []
    # A texture has two tones of its colour, and either may cover more of the picture.
    grounds = {(name, i): colour for name, plain in GROUNDS.items()
               for i, colour in enumerate((plain, tone(plain)) if textured else (plain,))}
    for i in range(len(frames)):
        around = rearrange(picture[i], "c h w -> (h w) c")[~mask[i].flatten()]
        if len(around):
            figures["ground"] += (commonest(around, grounds)[0] == case.ground)
        if found[i] and not case.colour:
            subjects.append(best_subject(frames[i], mask[i], case.ground))
        elif found[i]:
            inside = picture[i][:, mask[i]].median(dim=1).values
            figures["colour"] += (commonest(inside[None], COLOURS) == case.colour)
            subjects.append(best_shape(mask[i]))
    figures["shape"] = subjects.count(case.shape)
    figures["steady"] = max(map(subjects.count, subjects), default=0)
    for name in ("colour", "ground", "shape", "steady"):
        figures[name] /= len(frames)
    if textured:
        curves = {"pan": slice(0, 2), "zoom": slice(2, 3), "roll": slice(3, 4)}[case.motion]
        true_curves = torch.cat([case.scene.pan, case.scene.zoom.log()[:, None],
                                 case.scene.roll[:, None]], dim=-1)
        figures["camera"] = curve_correlation(camera_curves(frames)[:, curves],
                                              true_curves[:, curves])
    return figures if case.colour else {k: v for k, v in figures.items() if k != "colour"}


def psnr(frames: Tensor, truth: Tensor) -> float:
    """Mean over frames (f, 3, H, W) in [-1, 1], in dB: what an autoencoder keeps of them."""
    errors = ((frames - truth) / 2).square().mean(dim=(1, 2, 3))
    return float(-10 * errors.log10().mean())


def clone(model: Model, case: Case, config: SampleConfig, guided: bool = True, seed: int = 0
          ) -> Tensor:
    """Frames (f, 3, H, W) of the case's prompt, guided by its reference or not.

    The reference is inverted where the settings have inversion_steps, and semantic guidance given
    where they have a semantic_scale. Other seeds start from other noise.
    """
    start = starting_noise(model, config, torch.Generator().manual_seed(case.seed + 1000 * seed))
    motion, guides = None, []
    if guided:
        latents = model.vae.encode(render(case.scene, config.height))
        if config.inversion_steps:
            inversion = invert_motion(model, latents, case.reference_prompt, config)
            guides.append(inversion_guide(inversion, config))
            if config.semantic_scale:
                subject = subject_of(model, case.prompt, case.shape, case.reference_prompt,
                                     case.scene.shape, inversion.attend, config)
                guides.append(semantic_guide(model, case.prompt, start, config, subject))
        else:
            motion = extract_motion(model, latents, config,
                                    generator=torch.Generator().manual_seed(case.seed + 1))
    *_, state = sample(model, case.prompt, motion, config, guides=guides, latents=start)
    return model.vae.decode(state.latents).float().cpu()


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="-m mcl.tiny.evaluate", description="Measures cloning on held-out clips.")
    p.add_argument("--weights", type=Path, help="the embedded model's without it")
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
    p.add_argument("--seed", type=int, default=0, help="of the first clip")
    p.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=JSON",
                   help="settings other than the model's own, e.g. steps=50")
    p.add_argument("--guided-only", action="store_true", help="leave out the unguided samples")
    p.add_argument("--save", type=Path, help="folder for the clips, as PNG strips")
    p.add_argument("--json", type=Path, help="write every clip's figures here")
    return answer(lambda: run(p.parse_args(argv)))


def setting(text: str) -> tuple[str, Any]:
    """"steps=50" -> ("steps", 50)."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; write it like steps=50"
                                         ) from error


def run(args: argparse.Namespace) -> None:
    if args.json is not None:
        check_target(args.json)
    model = load_model(args.weights)
    config = from_dict(SampleConfig, to_dict(model.config.sample) | dict(args.set))
    cases = (held_out_cases(PATHS, args.clips, config.frames, args.seed)
             + held_out_cases(CAMERAS, args.camera_clips, config.frames, args.seed,
                              args.other_textures)
             + held_out_cases(STILL, args.still_clips, config.frames, args.seed)
             + word_cases(args.word_clips, config.frames, args.seed))
    if args.photo_clips:
        photos = find_photos(args.photos, held_out=True)
        for kinds, by_hand in ((PATHS, False), (PATHS, True), (CAMERAS, False)):
            cases += held_out_cases(kinds, args.photo_clips, config.frames, args.seed,
                                    photos=photos, by_hand=by_hand)
        cases += word_cases(args.photo_clips, config.frames, args.seed, photos)
    records = []
    for case in tqdm(cases, file=sys.stderr):
        reference = render(case.scene, config.height)
        latents = model.vae.encode(reference)
        seen = {"movement": movement(latents),
                "denoising error": denoising_error(model, latents),
                "PSNR": psnr(model.vae.decode(latents), reference)}
        for guided in (True,) if args.guided_only else (True, False):
            began = time.perf_counter()
            frames = clone(model, case, config, guided)
            figures = measure(frames, case) | {"seconds": time.perf_counter() - began} | seen
            records.append({"kind": case.kind, "motion": case.motion,
                            "prompt": case.prompt, "guided": guided} | figures)
            if args.save:
                save_strip(args.save / f"{len(records):03d}.png", [reference, frames])
    print(dataclasses.asdict(config))
    for kind in dict.fromkeys(case.kind for case in cases):
        for guided in (True, False):
            some = [r for r in records if r["kind"] == kind and r["guided"] == guided]
            if some:
                print(summary(some, f"{kind} clips, {'guided' if guided else 'unguided'}"))
    print(door(records, model.config))
    if args.json:
        with atomic(args.json) as temporary:
            temporary.write_text(json.dumps(records, indent=1), encoding="utf-8")


def door(records: list[dict], wanted: ModelConfig) -> str:
    """One line: how many references are as the model wants them, and how many are followed. Those
    without any motion count for neither."""
    some = [(r["movement"] >= wanted.moves_from and r["denoising error"] <= wanted.error_to,
             r.get("camera", r["direction"]) >= FOLLOWED)
            for r in records if r["guided"] and r["motion"] not in STILL]
    passed = [follows for passes, follows in some if passes]
    return (f"not warned of: {len(passed)} of {len(some)} references, of which "
            f"{sum(passed)} are followed; of the others {sum(f for p, f in some if not p)} are")


def summary(records: list[dict], title: str) -> str:
    """One line: the mean of every figure, with its standard error over the clips."""
    names = [n for n, v in records[0].items() if isinstance(v, float)]
    columns = []
    for name in names:
        values = np.array([r[name] for r in records if not math.isnan(r[name])])
        if not len(values):
            continue
        error = f" ±{values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
        columns.append(f"{name} {values.mean():.3f}{error}")
    return f"{title} ({len(records)}): " + ", ".join(columns)


def save_strip(path: Path, clips: list[Tensor]) -> None:
    """The frames of each clip side by side, one clip below the other, as a PNG."""
    rows = torch.cat([rearrange(clip, "f c H W -> c H (f W)") for clip in clips], dim=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rearrange(((rows + 1) * 127.5).round().byte(), "c H W -> H W c").numpy()
    with atomic(path) as temporary:
        imageio.imwrite(temporary, pixels, extension=".png")


if __name__ == "__main__":
    carry_out(main)
