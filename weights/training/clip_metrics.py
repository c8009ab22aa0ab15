"""Metrics of one clone, in its finished frames, against the scene of its reference.

Positions are in half widths of the picture.
"""
import functools
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mcl.evaluation.metrics import camera_curves, curve_correlation, flicker, pixel_centers

from . import scenes
from .clips import shade
from .held_out import CAMERAS, EvalCase
from .scenes import BACKGROUNDS, COLORS, EMOJI, SHAPES, Rgb, Scene, emoji_sprite, render

MIN_AREA = 0.004                # fraction of the picture below which a mask is no subject
MIN_STEP = 0.02                 # motion per frame, in half widths, below which a subject rests


def measure(frames: Tensor, case: EvalCase) -> dict[str, float]:
    """Return the metrics of a clip.

    Args:
        frames: Frames (f, 3, H, W) in [-1, 1].
        case: The case that the clip was made for.

    Returns:
        By name: "direction" (mean cosine of the subject's steps), "position error", "flicker",
        "camera" (correlation of the camera's curves, for moving cameras with a texture); and as
        fractions of the frames: "found" (there is a subject), "colour" (not for emoji), "ground"
        and "shape" (right), "steady" (the most frequent subject, right or not).
    """
    target = scenes.projected_center(case.scene)
    mask = (subject_mask(frames, case.color, case.background) if case.color else
            foreground_mask(frames, case.background))
    center, is_subject = track(mask)
    # A texture has two shades of its color, and each may cover more of the picture than the other.
    backgrounds = {(name, i): rgb for name, color in BACKGROUNDS.items() for i, rgb in enumerate(
        (color, shade(color)) if case.motion in CAMERAS else (color,))}
    pictures = rearrange((frames + 1) / 2, "f c h w -> f h w c")
    grounds = [most_common_color(picture[~m], backgrounds)[0]
               for picture, m in zip(pictures, mask, strict=True) if not m.all()]
    colors = [most_common_color(picture[m].median(dim=0).values[None], COLORS)
              for picture, m in zip(pictures[is_subject], mask[is_subject], strict=True)]
    shapes = [best_shape(m) if case.color else best_subject(frame, m, case.background)
              for frame, m in zip(frames[is_subject], mask[is_subject], strict=True)]
    hits = {"colour": colors.count(case.color), "ground": grounds.count(case.background),
            "shape": shapes.count(case.shape), "steady": max(map(shapes.count, shapes), default=0)}
    values = {"direction": direction_agreement(center, target),
              "position error": float((center - target).norm(dim=-1).mean()),
              "found": float(is_subject.float().mean()), "flicker": flicker(frames)}
    values |= {k: n / len(frames) for k, n in hits.items() if k != "colour" or case.color}
    return values | ({"camera": camera_agreement(frames, case)} if case.motion in CAMERAS else {})


def camera_agreement(frames: Tensor, case: EvalCase) -> float:
    """Return the correlation of the camera's curves with those of the case's scene."""
    curves = {"pan": slice(0, 2), "zoom": slice(2, 3), "roll": slice(3, 4)}[case.motion]
    target = torch.column_stack([case.scene.pan, case.scene.zoom.log(), case.scene.roll])
    return curve_correlation(camera_curves(frames)[:, curves], target[:, curves])


def subject_mask(frames: Tensor, color: str, background: str) -> Tensor:
    """Return masks (f, H, W) of where frames (f, 3, H, W) are nearer to the subject's color."""
    to_subject, to_background = (
        (frames / 2 + 0.5 - torch.tensor(c)[:, None, None]).square().sum(dim=1)
        for c in (COLORS[color], BACKGROUNDS[background]))
    return (to_subject < to_background) & (to_subject < 0.15)


def foreground_mask(frames: Tensor, background: str) -> Tensor:
    """Return masks (f, H, W) of where frames (f, 3, H, W) differ from a plain background."""
    difference = (frames + 1) / 2 - rearrange(torch.tensor(BACKGROUNDS[background]), "c -> c 1 1")
    return difference.abs().amax(dim=1) > 0.12


def track(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centroids (f, 2) of masks (f, H, W), and whether each mask is a subject, (f,)."""
    size, weight = mask.shape[-1], mask.float()
    line, area = pixel_centers(size), weight.sum(dim=(1, 2)).clamp(min=1)
    x, y = ((weight * v).sum(dim=(1, 2)) / area for v in (line, line[:, None]))
    return torch.stack([x, y], dim=-1), weight.mean(dim=(1, 2)) > MIN_AREA


def direction_agreement(predicted: Tensor, target: Tensor) -> float:
    """Return the mean cosine of the steps of two tracks (f, 2), where the target moves."""
    step, target_step = predicted.diff(dim=0), target.diff(dim=0)
    cosine = torch.cosine_similarity(step, target_step, dim=-1, eps=1e-6)
    return float(cosine[target_step.norm(dim=-1) > MIN_STEP].mean())


def most_common_color(pixels: Tensor, colors: dict[Any, Rgb]) -> Any:
    """Return the key of the color that most pixels (n, 3) are nearest to."""
    nearest = torch.cdist(pixels, torch.tensor(list(colors.values()))).argmin(dim=1)
    return list(colors)[int(nearest.mode().values)]


def best_shape(mask: Tensor) -> str:
    """Return the shape whose template overlaps a mask (H, W) best, at the mask's size."""
    crop, aspect = crop_resize(mask[None].float(), mask)

    def score(shape: str) -> float:
        ideal = render_template(shape, (1., 1., 1.), (0., 0., 0.))[0, 0] > 0
        template, template_aspect = crop_resize(ideal[None].float(), ideal)
        overlap = torch.minimum(crop, template).sum() / torch.maximum(crop, template).sum()
        return float(overlap) - 0.3 * abs(math.log(aspect / template_aspect))

    return max(SHAPES, key=score)


def best_subject(frame: Tensor, mask: Tensor, background: str) -> str:
    """Return the emoji, or "red star", that looks most like the box around a mask (H, W)."""
    crop, aspect = crop_resize(frame, mask, 16)
    scores = {}
    for color, subject in (*itertools.product(COLORS, SHAPES), *(("", word) for word in EMOJI)):
        image = render_template(subject, COLORS.get(color, (0., 0., 0.)), BACKGROUNDS[background])
        template, template_aspect = crop_resize(image[0], foreground_mask(image, background)[0], 16)
        scores[f"{color} {subject}".strip()] = (float((crop - template).square().mean())
                                                + 0.1 * abs(math.log(aspect / template_aspect)))
    return min(scores, key=lambda name: scores[name])


def crop_resize(picture: Tensor, mask: Tensor, size: int = 48) -> tuple[Tensor, float]:
    """Return the box around a mask (H, W), as (c, size, size) of a picture, and its aspect."""
    rows, columns = (torch.nonzero(mask.any(dim=d)).flatten() for d in (1, 0))
    crop = picture[:, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    return F.interpolate(crop[None], (size, size), mode="area")[0], crop.shape[1] / crop.shape[2]


@functools.cache
def render_template(subject: str, color: Rgb, background: Rgb) -> Tensor:
    """Return a shape or an emoji on a plain background: (1, 3, 192, 192) in [-1, 1]."""
    ones, origin = torch.ones(1), torch.zeros(1, 2)
    sprite = emoji_sprite(subject) if subject in EMOJI else None
    return render(Scene(subject, color, "plain", background, background, 1.0, 0.0, origin,
                        ones * 0.8, ones * 0, origin, ones, ones * 0, sprite=sprite), 192)


def psnr(frames: Tensor, target: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, the mean over frames (f, 3, H, W) in [-1, 1]."""
    return float(-10 * ((frames - target) / 2).square().mean(dim=(1, 2, 3)).log10().mean())
