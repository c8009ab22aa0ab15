"""Measures of motion in finished pictures, without any network."""
import torch
import torch.nn.functional as F
from torch import Tensor

from ..motion import Motion
from .tracking import tracklets

AT_REST = 0.01                  # half widths from frame to frame, below which a point stands still
LEVELS = (16, 8, 4, 2, 1)       # coarse to fine: the picture is made this many times smaller
ITERATIONS = 8                  # at each of them, if the fit has not settled before
SETTLED = 1e-4                  # half widths, or radians, by which it still moves


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
        y, x = torch.meshgrid(centers(h) * h / w, centers(w), indexing="ij")
        for _ in range(ITERATIONS):
            grid = similarity_grid(motion, x, y, h / w)
            inside = grid.abs().amax(dim=-1)[0] < 1
            if not inside.any():        # led astray: nothing of the picture is left to fit
                return start, float("inf")
            warped = F.grid_sample(a, grid, align_corners=False, padding_mode="border")
            slope_y, slope_x = torch.gradient(warped[0], dim=(1, 2))
            slope_y, slope_x = slope_y * w / 2, slope_x * w / 2     # per half width
            jacobian = torch.stack([slope_x, slope_y, -(slope_x * x + slope_y * y),
                                    slope_y * x - slope_x * y]) * inside
            rest, count = (b - warped)[0] * inside, 3 * int(inside.sum())
            jacobian = jacobian.flatten(1)
            normal = jacobian @ jacobian.T + 1e-4 * count * torch.eye(4)
            step = torch.linalg.solve(normal, jacobian @ rest.flatten())
            motion = motion + step
            if step.abs().max() < SETTLED:
                break
        error = float(rest.square().sum()) / count
    return motion, error


def centers(n: int) -> Tensor:
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


def motion_fidelity(reference: Tensor, result: Tensor) -> tuple[float, float]:
    """How alike the points of two clips (f, 3, H, W) move: (raw, corrected for chance).

    raw        each tracklet's likeness to the most alike one of the other clip, averaged over both
               clips (arXiv 2311.17009, section 5), in [-1, 1]
    corrected  0 for what the same tracklets give when turned by a quarter, 1 for perfect. What
               both share by standing still is in both, and cancels.

    Two tracklets are alike by the mean cosine of their displacements, where both stand still 1,
    where one does 0. A clip in which no point could be followed is alike to none: (0, 0).
    """
    return fidelity(tracklets(reference), tracklets(result))


def fidelity(a: Tensor, b: Tensor) -> tuple[float, float]:
    """`motion_fidelity` of tracklets (n, f, 2) and (m, f, 2)."""
    if not len(a) or not len(b):
        return 0.0, 0.0
    raw = symmetric(likeness(a, b))
    quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    chance = sum(symmetric(likeness(a, b @ turn)) for turn in (quarter, -quarter)) / 2
    return raw, 0.0 if chance > 1 - 1e-6 else (raw - chance) / (1 - chance)


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) of tracklets (n, f, 2) and (m, f, 2)."""
    a, b = a.diff(dim=1)[:, None], b.diff(dim=1)[None]
    rest_a, rest_b = a.norm(dim=-1) < AT_REST, b.norm(dim=-1) < AT_REST
    cosine = torch.cosine_similarity(a, b, dim=-1, eps=1e-9)
    return torch.where(rest_a | rest_b, (rest_a & rest_b).float(), cosine).mean(dim=-1)


def symmetric(alike: Tensor) -> float:
    return float(alike.amax(dim=0).mean() + alike.amax(dim=1).mean()) / 2


def trajectory_distance(reference: Tensor, result: Tensor) -> float:
    """Mean distance, in half widths, of each tracklet's way from its start to the nearest such way
    of the other clip, over both clips; infinite where one has no tracklets."""
    return distance(tracklets(reference), tracklets(result))


def distance(a: Tensor, b: Tensor) -> float:
    """`trajectory_distance` of tracklets (n, f, 2) and (m, f, 2)."""
    if not len(a) or not len(b):
        return float("inf")
    a, b = (x - x[:, :1] for x in (a, b))
    return -symmetric(-(a[:, None] - b[None]).norm(dim=-1).mean(dim=-1))


def change_centroids(frames: Tensor) -> Tensor:
    """Where neighbouring frames (f, 3, H, W) differ: the centre (f - 1, 2), (x, y) in half widths,
    of the squares of their differences. What moves before a ground at rest is there, however plain
    it is; of a moving camera it tells nothing."""
    squares = frames.diff(dim=0).square().sum(dim=1)
    h, w = squares.shape[-2:]
    weight = squares.sum(dim=(1, 2)).clamp(min=1e-6)
    return torch.stack([(squares * centers(w)).sum(dim=(1, 2)) / weight,
                        (squares * centers(h)[:, None]).sum(dim=(1, 2)) / weight * h / w], dim=-1)


def flicker(frames: Tensor) -> float:
    """Mean absolute difference of neighbouring frames (f, 3, H, W), as a share of the range."""
    return float(frames.diff(dim=0).abs().mean() / 2) if len(frames) > 1 else 0.0


def top1_agreement(a: Motion, b: Motion) -> float:
    """Share of the rows of all temporal maps whose strongest attention is at the same frame."""
    same = [(a.indices[name][..., 0] == b.indices[name][..., 0]).flatten() for name in a.indices]
    return float(torch.cat(same).float().mean())
