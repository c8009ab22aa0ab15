"""The figures of one clone, in its finished pictures, against how its reference was rendered.

Positions are in half widths. An emoji counts as its word says ("shape") if no other's picture, and
no shape's in any colour, is nearer to what is drawn; "steady" is the share of frames that agree on
a subject, whichever it is.
"""
import functools
import itertools
import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mcl.evaluation.metrics import camera_curves, curve_correlation, flicker
from .clips import tone
from .held_out import CAMERAS, Case
from .scenes import COLORS, GROUNDS, SHAPES, Scene, render, projected_center
from .vocabulary import EMOJI, emoji

K = TypeVar("K")
Rgb = tuple[float, float, float]
FOUND_AREA = 0.004                      # of the picture: the least that counts as a subject


def subject_mask(frames: Tensor, color: str, ground: str) -> Tensor:
    """Where a clip (f, 3, H, W) in [-1, 1] is nearer to the subject's colour: (f, H, W) bool."""
    to_fore, to_back = ((frames / 2 + 0.5 - torch.tensor(c)[:, None, None]).square().sum(dim=1)
                        for c in (COLORS[color], GROUNDS[ground]))
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


def commonest(colors: Tensor, named: dict[K, Rgb]) -> K:
    """The name that is nearest to most of the colours (n, 3)."""
    which = torch.cdist(colors, torch.tensor(list(named.values()))).argmin(dim=1)
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
def portrait(subject: str, color: Rgb, ground: Rgb) -> Tensor:
    """A shape, or an emoji, on a plain ground: (1, 3, 192, 192) in [-1, 1]."""
    one, origin = torch.ones(1), torch.zeros(1, 2)
    skin = emoji(subject) if subject in EMOJI else None
    return render(Scene(subject, color, "plain", ground, ground, 1.0, 0.0, origin, one * 0.8,
                        one * 0, origin, one, one * 0, skin=skin), 192)


def unlike_ground(frames: Tensor, ground: str) -> Tensor:
    """Where a clip (f, 3, H, W) in [-1, 1] shows anything but a plain ground: (f, H, W) bool."""
    away = (frames + 1) / 2 - rearrange(torch.tensor(GROUNDS[ground]), "c -> c 1 1")
    return away.abs().amax(dim=1) > 0.12


def best_subject(frame: Tensor, mask: Tensor, ground: str) -> str:
    """The emoji, or "red star", that looks on this ground most like what a mask (H, W) spans."""
    cut, aspect = spanned(frame, mask, 16)
    scores = {}
    for color, subject in (*itertools.product(COLORS, SHAPES), *(("", word) for word in EMOJI)):
        drawn = portrait(subject, COLORS.get(color, (0., 0., 0.)), GROUNDS[ground])
        template, its_aspect = spanned(drawn[0], unlike_ground(drawn, ground)[0], 16)
        scores[f"{color} {subject}".strip()] = (
            float((cut - template).square().mean()) + 0.1 * abs(math.log(aspect / its_aspect)))
    return min(scores, key=lambda name: scores[name])


def measure(frames: Tensor, case: Case) -> dict[str, float]:
    """All figures of one clip (f, 3, H, W) in [-1, 1] against its case."""
    truth = projected_center(case.scene)
    mask = (subject_mask(frames, case.color, case.ground) if case.color else
            unlike_ground(frames, case.ground))
    center, found = track(mask)
    picture = (frames + 1) / 2
    textured = case.motion in CAMERAS
    figures = {
        "direction": direction_agreement(center, truth),
        "position error": float((center - truth).norm(dim=-1).mean()),
        "found": float(found.float().mean()),
        "flicker": flicker(frames),
        "colour": 0.0, "ground": 0.0}
    subjects = []
    # A texture has two tones of its colour, and either may cover more of the picture.
    grounds = {(name, i): color for name, plain in GROUNDS.items()
               for i, color in enumerate((plain, tone(plain)) if textured else (plain,))}
    for i in range(len(frames)):
        around = rearrange(picture[i], "c h w -> (h w) c")[~mask[i].flatten()]
        if len(around):
            figures["ground"] += (commonest(around, grounds)[0] == case.ground)
        if found[i] and not case.color:
            subjects.append(best_subject(frames[i], mask[i], case.ground))
        elif found[i]:
            inside = picture[i][:, mask[i]].median(dim=1).values
            figures["colour"] += (commonest(inside[None], COLORS) == case.color)
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
    return figures if case.color else {k: v for k, v in figures.items() if k != "colour"}


def psnr(frames: Tensor, truth: Tensor) -> float:
    """Mean over frames (f, 3, H, W) in [-1, 1], in dB: what an autoencoder keeps of them."""
    errors = ((frames - truth) / 2).square().mean(dim=(1, 2, 3))
    return float(-10 * errors.log10().mean())
