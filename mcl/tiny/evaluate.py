"""Measures cloning on held-out clips, against the exact truth of how they were rendered.

    python -m mcl.tiny.evaluate [--weights F] [--clips 12] [--seeds 1]

The references follow kinds of path that the trainer never draws, and differ from the prompts in
subject, colour and ground. Everything is measured in the finished pictures.
"""
import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from ..checkpoint import load_model
from ..config import SampleConfig
from ..model import Model
from ..motion import extract_motion
from ..sampler import final, sample
from .clips import an
from .scenes import COLOURS, GROUNDS, SHAPES, Scene, render, seen_centre

PATHS = ("figure eight", "square", "spiral", "zigzag", "circle", "hops")
FOUND_AREA = 0.004                      # of the picture: the least that counts as a subject


@dataclass(frozen=True)
class Case:
    """A reference and what is asked of its clone."""
    path: str
    scene: Scene
    prompt: str
    shape: str
    colour: str
    ground: str
    seed: int


def held_out_path(kind: str, frames: int, reach: float) -> Tensor:
    """A path (f, 2) in half widths, of a kind that clips.path never draws."""
    t = torch.linspace(0, 1, frames)
    turn = 2 * math.pi * t
    if kind == "figure eight":
        xy = torch.stack([turn.sin(), 0.6 * (2 * turn).sin()], dim=-1)
    elif kind == "square":
        corners = torch.tensor([[-.8, -.8], [.8, -.8], [.8, .8], [-.8, .8], [-.8, -.8]])
        leg = (t * 4).clamp(max=3.999)
        part = (leg - leg.floor())[:, None]
        xy = corners[leg.long()] * (1 - part) + corners[leg.long() + 1] * part
    elif kind == "spiral":
        xy = (0.2 + 0.8 * t)[:, None] * torch.stack([(1.5 * turn).cos(), (1.5 * turn).sin()], -1)
    elif kind == "zigzag":
        xy = torch.stack([2 * t - 1, 0.7 * (2 * (3 * t % 2 - 1).abs() - 1)], dim=-1)
    elif kind == "circle":
        xy = 0.85 * torch.stack([turn.cos(), turn.sin()], dim=-1)
    else:                                                   # hops
        xy = torch.stack([2 * t - 1, 0.8 - 1.5 * (2 * math.pi * t).sin().abs()], dim=-1)
    return xy * reach


def held_out_cases(number: int, frames: int) -> list[Case]:
    cases = []
    for i in range(number):
        rng = np.random.default_rng([9, i])
        kind = PATHS[i % len(PATHS)]
        radius = rng.uniform(.2, .4)
        colours, grounds = rng.permutation(list(COLOURS)), rng.permutation(list(GROUNDS))
        shapes = rng.permutation(SHAPES)
        still = torch.zeros(frames)
        centre = held_out_path(kind, frames, 1 - 0.9 * radius)
        if rng.random() < 0.5:
            centre = centre.flip(-1)
        scene = Scene(
            shape=str(shapes[0]), colour=COLOURS[colours[0]], texture="plain",
            ground=GROUNDS[grounds[0]], second=GROUNDS[grounds[0]], cell=1.0, texture_angle=0.0,
            centre=centre, radius=still + radius, angle=still, pan=torch.zeros(frames, 2),
            zoom=still + 1, roll=still)
        shape, colour, ground = str(shapes[1]), str(colours[1]), str(grounds[1])
        cases.append(Case(kind, scene, f"{an(colour)} {shape} on {an(ground)} background",
                          shape, colour, ground, i))
    return cases


# ------------------------------------------------------------------------- reading the pictures

def subject_mask(frames: Tensor, colour: str, ground: str) -> Tensor:
    """Where a clip (f, 3, H, W) in [-1, 1] is nearer to the subject's colour: (f, H, W) bool."""
    fore, back = (rearrange(torch.tensor(c), "c -> c 1 1") for c in
                  (COLOURS[colour], GROUNDS[ground]))
    picture = (frames + 1) / 2
    to_fore = (picture - fore).square().sum(dim=1)
    to_back = (picture - back).square().sum(dim=1)
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


def nearest(colour: Tensor, named: dict[str, tuple[float, float, float]]) -> str:
    return min(named, key=lambda name: float((colour - torch.tensor(named[name])).norm()))


def best_shape(mask: Tensor, grid: int = 48) -> str:
    """The shape whose rendered template overlaps a mask (H, W) best, at the mask's own size."""
    rows, columns = (torch.nonzero(mask.any(dim=d)).flatten() for d in (1, 0))
    cut = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].float()
    cut = torch.nn.functional.interpolate(cut[None, None], (grid, grid), mode="area")[0, 0]
    aspect = float((rows[-1] - rows[0] + 1) / (columns[-1] - columns[0] + 1))
    scores = {}
    for shape in SHAPES:
        template, its_aspect = shape_template(shape, grid)
        overlap = torch.minimum(cut, template).sum() / torch.maximum(cut, template).sum()
        scores[shape] = float(overlap) - 0.3 * abs(math.log(aspect / its_aspect))
    return max(scores, key=lambda shape: scores[shape])


def shape_template(shape: str, grid: int) -> tuple[Tensor, float]:
    """A shape cut to its bounding box and stretched to (grid, grid), and its height / width."""
    one = torch.ones(1)
    scene = Scene(shape, (1., 1., 1.), "plain", (0., 0., 0.), (0., 0., 0.), 1.0, 0.0,
                  torch.zeros(1, 2), one * 0.9, one * 0, torch.zeros(1, 2), one, one * 0)
    mask = render(scene, 4 * grid)[0, 0] > 0
    rows, columns = (torch.nonzero(mask.any(dim=d)).flatten() for d in (1, 0))
    cut = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].float()
    cut = torch.nn.functional.interpolate(cut[None, None], (grid, grid), mode="area")[0, 0]
    return cut, float(len(rows) / len(columns))


def measure(frames: Tensor, case: Case) -> dict[str, float]:
    """All figures of one clip (f, 3, H, W) in [-1, 1] against its case."""
    truth = seen_centre(case.scene)
    mask = subject_mask(frames, case.colour, case.ground)
    centre, found = track(mask)
    picture = (frames + 1) / 2
    figures = {
        "direction": direction_agreement(centre, truth),
        "position error": float((centre - truth).norm(dim=-1).mean()),
        "found": float(found.float().mean()),
        "colour": 0.0, "ground": 0.0, "shape": 0.0}
    for i in range(len(frames)):
        around = rearrange(picture[i], "c h w -> (h w) c")[~mask[i].flatten()]
        if len(around):
            figures["ground"] += (nearest(around.median(dim=0).values, GROUNDS) == case.ground)
        if found[i]:
            inside = picture[i][:, mask[i]].median(dim=1).values
            figures["colour"] += (nearest(inside, COLOURS) == case.colour)
            figures["shape"] += (best_shape(mask[i]) == case.shape)
    for name in ("colour", "ground", "shape"):
        figures[name] /= len(frames)
    return figures


def clone(model: Model, case: Case, config: SampleConfig, guided: bool) -> Tensor:
    """Frames (f, 3, H, W) of the case's prompt, guided by its reference or not."""
    generator = torch.Generator().manual_seed(case.seed)
    motion = None
    if guided:
        reference = render(case.scene, config.height).to(model.device, model.dtype)
        motion = extract_motion(model, model.vae.encode(reference), t=config.extract_t,
                                generator=torch.Generator().manual_seed(case.seed + 1),
                                k=config.top_k, blocks=config.blocks)
    state = final(sample(model, case.prompt, motion, config=config, generator=generator))
    return model.vae.decode(state.latents.to(model.dtype)).float().cpu()
