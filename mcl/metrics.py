"""Measures of motion in finished pictures, without any network."""
import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = (16, 8, 4, 2, 1)       # coarse to fine: the picture is made this many times smaller


def camera_curves(frames: Tensor) -> Tensor:
    """How the camera moved: (f, 4) of pan x, pan y, log zoom and roll since the first frame.

    frames (f, 3, H, W) in [-1, 1]. Pans are in half widths of the picture, roll in radians.
    Between neighbouring frames a similarity is fitted to all pixels by Gauss-Newton, from coarse
    to fine (Lucas and Kanade 1981); the fits are added up.
    """
    steps = [torch.zeros(4)]
    for before, after in zip(frames[:-1], frames[1:]):
        # A camera goes on as it went: that tells a texture's cells apart when it moves fast.
        # A fine texture is flat, or false, when made small: then the finer levels do better alone.
        fits = [fit_similarity(before, after, start, levels)
                for start in (torch.zeros(4), steps[-1]) for levels in (LEVELS, LEVELS[2:])]
        steps.append(min(fits, key=lambda fit: fit[1])[0])
    return torch.stack(steps).cumsum(dim=0)


def fit_similarity(before: Tensor, after: Tensor, start: Tensor, levels: tuple[int, ...]
                   ) -> tuple[Tensor, float]:
    """The (4,) motion that takes one picture (3, H, W) to the next, and its remaining error."""
    motion, error = start.clone(), float("inf")
    for level in levels:
        if min(before.shape[-2:]) // level < 8:
            continue
        a, b = (F.avg_pool2d(x[None].float(), level) for x in (before, after))
        h, w = a.shape[-2:]
        y, x = torch.meshgrid(centres(h) * h / w, centres(w), indexing="ij")
        for _ in range(8):
            warped = F.grid_sample(a, similarity_grid(motion, x, y, h / w), align_corners=False,
                                   padding_mode="border")
            inside = similarity_grid(motion, x, y, h / w).abs().amax(dim=-1)[0] < 1
            slope_y, slope_x = torch.gradient(warped[0], dim=(1, 2))
            slope_y, slope_x = slope_y * w / 2, slope_x * w / 2     # per half width
            jacobian = torch.stack([slope_x, slope_y, -(slope_x * x + slope_y * y),
                                    slope_y * x - slope_x * y], dim=-1)[:, inside]
            rest = (b - warped)[0][:, inside]
            jacobian, rest = jacobian.flatten(0, 1), rest.flatten()
            normal = jacobian.T @ jacobian + 1e-4 * len(rest) * torch.eye(4)
            motion = motion + torch.linalg.solve(normal, jacobian.T @ rest)
        error = float((b - warped)[0][:, inside].square().mean()) if inside.any() else float("inf")
    return motion, error


def centres(n: int) -> Tensor:
    """The middles of n pixels that span [-1, 1]."""
    return (torch.arange(n) + 0.5) / n * 2 - 1


def similarity_grid(motion: Tensor, x: Tensor, y: Tensor, aspect: float) -> Tensor:
    """Where each point (x, y) of the next picture was in the one before: (1, h, w, 2)."""
    pan_x, pan_y, log_zoom, roll = motion
    cos, sin = roll.cos() / log_zoom.exp(), roll.sin() / log_zoom.exp()
    return torch.stack([cos * x - sin * y + pan_x, (sin * x + cos * y + pan_y) / aspect],
                       dim=-1)[None]


def curve_correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two sets of curves (f, n), each about its own mean."""
    a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-8))
