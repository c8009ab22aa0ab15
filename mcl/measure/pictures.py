"""Pictures of what was read from the reference and of what the guidance did."""
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor

from ..files import atomic
from ..motion import Motion
from ..semantic import Masks
from ..windows import blend

SHADE = 0.25                            # what is left of the reference where nothing is shown


def draw(folder: Path, reference: Tensor | None, frames: Tensor, motion: Motion,
         masks: Masks | None, losses: Sequence[float], grads: Sequence[float]) -> None:
    """Writes PNGs into a folder; the frames of a clip stand side by side.

    sheet.png   the reference above the result, (f, 3, H, W) in [-1, 1] both
    motion.png  the motion over the reference (figure 3 of arXiv 2406.05338): how strong the
                strongest attention is at each place, and below it how far away, in frames, the
                frame is that it points at
    masks.png   where semantic guidance found the reference's subject: in front, and behind
    loss.png    motion loss and gradient over the guided steps, where matplotlib is there

    Raises InputError where the folder cannot be written.
    """
    size = (frames.shape[-2], frames.shape[-1])
    below = frames.new_full(frames.shape, -1.0) if reference is None else reference
    rows = {"sheet": [below, frames]}
    strength, distance = motion_pictures(motion, size)
    rows["motion"] = [overlay(below, share) for share in (strength, distance)]
    if masks is not None:
        rows["masks"] = [overlay(below, enlarge(weight, size)) for weight in masks]
    with atomic(folder, folder=True) as temporary:
        for name, clips in rows.items():
            save(temporary / f"{name}.png", clips)
        plot(temporary / "loss.png", losses, grads)


def motion_pictures(motion: Motion, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(f, H, W) in [0, 1] each: the top value, and the distance of the frame it is at, as means
    over heads and layers."""
    known, windows = (motion.info["height"], motion.info["width"]), motion.windows
    here = torch.arange(windows.length)[:, None]
    strengths: list[Tensor] = []
    distances: list[Tensor] = []
    for name, values in motion.values.items():
        far = (motion.indices[name].cpu() - here).abs().float() / max(windows.length - 1, 1)
        places = values.shape[0] // len(windows.starts)
        rows = round((places * known[0] / known[1]) ** 0.5)
        for each, found in ((strengths, values.cpu().float()), (distances, far)):
            parts = found.chunk(len(windows.starts))
            means = [reduce(part[..., :1], "(h w) heads f 1 -> 1 1 f h w", "mean", h=rows)
                     for part in parts]
            each.append(enlarge(blend(means, windows)[0, 0], size))
    return stretched(torch.stack(strengths).mean(dim=0)), torch.stack(distances).mean(dim=0)


def enlarge(weight: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(weight[None].cpu().float(), size, mode="nearest")[0]


def stretched(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min()).clamp(min=1e-9)


def overlay(clip: Tensor, share: Tensor) -> Tensor:
    """A clip (f, 3, H, W) in [-1, 1] in grey, and in yellow to white where the share is."""
    grey = reduce(clip.cpu().float(), "f c h w -> f 1 h w", "mean") / 2 + 0.5
    heat = torch.stack([(2 * share).clamp(0, 1), share ** 0.7, (2 * share - 1).clamp(0, 1)], dim=1)
    return (SHADE * grey + (1 - SHADE) * heat) * 2 - 1


def save(path: Path, clips: Sequence[Tensor]) -> None:
    sheet = torch.cat([rearrange(clip, "f c h w -> h (f w) c") for clip in clips])
    pixels = ((sheet.cpu().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def plot(path: Path, losses: Sequence[float], grads: Sequence[float]) -> None:
    """Does nothing without matplotlib, which is an extra, or without guided steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not losses:
        return
    figure = Figure(figsize=(8, 3), layout="constrained")
    steps = np.arange(1, len(losses) + 1)
    for axes, values, name in zip(figure.subplots(1, 2), (losses, grads),
                                  ("motion loss", "norm of the weighted gradient")):
        axes.plot(steps, values, marker=".")
        axes.set(title=name, xlabel="guided step", ylim=(0, None))
    figure.savefig(path)
