"""Motion metrics on finished frames, without any network."""
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

STATIC_THRESHOLD = 0.01         # half widths per frame below which a point stands still
LEVELS = (16, 8, 4, 2, 1)       # downsampling factors of the pyramid, coarse to fine
ITERATIONS = 8                  # most Gauss-Newton iterations at each level
CONVERGENCE_TOL = 1e-4          # half widths, or radians: a smaller step ends the iterations


def camera_curves(frames: Tensor) -> Tensor:
    """Return the camera motion of a clip since its first frame.

    A similarity transform between neighboring frames is fitted to all pixels by Gauss-Newton, from
    coarse to fine (Lucas and Kanade 1981). The transforms are summed up.

    Args:
        frames: Frames (f, 3, H, W) in [-1, 1].

    Returns:
        (f, 4): pan x and pan y in half widths of the picture, log zoom, and roll in radians.
    """
    steps = [torch.zeros(4)]
    for before, after in pairwise(frames):
        # The last step is also a start, because a fast camera shifts a texture by whole periods.
        # Fine textures vanish at the coarse levels, so the fine levels are also tried alone.
        fits = [fit_similarity(before, after, start, levels)
                for start in (torch.zeros(4), steps[-1]) for levels in (LEVELS, LEVELS[2:])]
        steps.append(min(fits, key=lambda fit: fit[1])[0])
    return torch.stack(steps).cumsum(dim=0)


def fit_similarity(before: Tensor, after: Tensor, start: Tensor, levels: tuple[int, ...]
                   ) -> tuple[Tensor, float]:
    """Return the transform (4,) from one image (3, H, W) to the next, and its squared error."""
    motion, error = start.clone(), float("inf")
    for level in (level for level in levels if min(before.shape[-2:]) // level >= 8):
        a, b = (F.avg_pool2d(x[None].float(), level) for x in (before, after))
        h, w = a.shape[-2:]
        y, x = torch.meshgrid(pixel_centers(h) * h / w, pixel_centers(w), indexing="ij")
        for _ in range(ITERATIONS):
            # The position of each pixel in the image before: (h, w, 2), each in [-1, 1].
            grid = transform_points(motion, x, y) / torch.tensor([1, h / w])
            inside = grid.abs().amax(dim=-1) < 1
            if not inside.any():        # the fit diverged: the images no longer overlap
                return start, float("inf")
            warped = F.grid_sample(a, grid[None], align_corners=False, padding_mode="border")
            grad_y, grad_x = torch.gradient(warped[0], spacing=2 / w, dim=(1, 2))
            jacobian = (torch.stack([grad_x, grad_y, -(grad_x * x + grad_y * y),
                                     grad_y * x - grad_x * y]) * inside).flatten(1)
            residual, count = (b - warped)[0] * inside, 3 * int(inside.sum())
            normal = jacobian @ jacobian.T + 1e-4 * count * torch.eye(4)
            step = torch.linalg.solve(normal, jacobian @ residual.flatten())
            motion = motion + step
            if step.abs().max() < CONVERGENCE_TOL:
                break
        error = float(residual.square().sum()) / count
    return motion, error


def transform_points(motion: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return where points (..., 2) are in the frame before, by the camera motion (4, ...) since."""
    pan_x, pan_y, log_zoom, roll = motion
    cos, sin = roll.cos() / log_zoom.exp(), roll.sin() / log_zoom.exp()
    return torch.stack([cos * x - sin * y + pan_x, sin * x + cos * y + pan_y], dim=-1)


def camera_inliers(curves: Tensor, tracks: Tensor) -> float:
    """Return the share of tracked points whose motion the camera explains, 0 to 1.

    The camera explains a point's motion if it predicts more than half of the length of the point's
    steps, in the median over frames. Points that stand still count as not explained: a still camera
    explains nothing, and the fit then follows the subject.

    Args:
        curves: Camera motion (f, 4) of a clip (`camera_curves`).
        tracks: Tracklets (n, f, 2) of the same clip.

    Returns:
        The share; nan without tracklets.
    """
    residual = transform_points(curves.diff(dim=0).T, *tracks[:, 1:].unbind(-1)) - tracks[:, :-1]
    unexplained, length = (x.norm(dim=-1).median(dim=1)[0] for x in (residual, tracks.diff(dim=1)))
    return float(((length > STATIC_THRESHOLD) & (unexplained < length / 2)).float().mean())


def pixel_centers(n: int) -> Tensor:
    """Return the centers (n,) of n pixels that span [-1, 1]."""
    return (torch.arange(n) + 0.5) / n * 2 - 1


def curve_correlation(a: Tensor, b: Tensor, max_ratio: float = math.inf) -> float:
    """Return Pearson's correlation of two sets of curves (f, n), each about its own mean.

    It is 0 if one set is more than `max_ratio` times as large as the other, about its mean.
    """
    a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    small, large = sorted((float(a.norm()), float(b.norm())))
    return float((a * b).sum()) / max(small * large, 1e-8) if large <= max_ratio * small else 0.0


def tracklet_fidelity(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the motion fidelity of two sets of tracklets (arXiv 2311.17009, section 5).

    Args:
        a: Tracklets (n, f, 2).
        b: Tracklets (m, f, 2).

    Returns:
        The fidelity, and the fidelity corrected for chance; nan without tracklets. The fidelity is
        the similarity of each tracklet to its best match, in [-1, 1]. The corrected fidelity is 0
        for chance, the mean fidelity to the tracklets turned by 90 degrees to either side, and 1
        for a perfect match. Points that stand still in both clips cancel out of it.
    """
    fidelity = symmetric_best_match(pairwise_similarity(a, b))
    quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    chance = sum(symmetric_best_match(pairwise_similarity(a, b @ turn))
                 for turn in (quarter, -quarter)) / 2
    return fidelity, 0.0 if chance > 1 - 1e-6 else (fidelity - chance) / (1 - chance)


def pairwise_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the similarity (n, m) of tracklets (n, f, 2) and (m, f, 2), in [-1, 1].

    It is the mean over frames of the cosine of their displacements. The cosine is replaced by 1
    where both points stand still, and by 0 where one does.
    """
    a, b = a.diff(dim=1)[:, None], b.diff(dim=1)[None]
    static_a, static_b = a.norm(dim=-1) < STATIC_THRESHOLD, b.norm(dim=-1) < STATIC_THRESHOLD
    cosine = torch.cosine_similarity(a, b, dim=-1, eps=1e-9)
    return torch.where(static_a | static_b, (static_a & static_b).float(), cosine).mean(dim=-1)


def symmetric_best_match(similarity: Tensor) -> float:
    """Return the mean of the best match of each row and each column of (n, m); nan if empty."""
    return (float(similarity.amax(dim=0).mean() + similarity.amax(dim=1).mean()) / 2
            if similarity.numel() else math.nan)


def change_centroids(frames: Tensor) -> tuple[Tensor, float]:
    """Return the centroids of the squared differences between neighboring frames, and their spread.

    They follow a subject that moves in front of a still background, however plain the subject is.
    They say nothing about camera motion, which the spread tells from the motion of a subject.

    Args:
        frames: Frames (f, 3, H, W) in [-1, 1].

    Returns:
        (f - 1, 2): (x, y) in half widths. And the standard deviation of the change about these
        centroids, relative to that of an equal change everywhere: low for a small subject, about 1
        for a moving camera, and nan for a still clip.
    """
    squares = frames.diff(dim=0).square().sum(dim=1)
    (h, w), total = squares.shape[-2:], squares.sum(dim=(1, 2))
    x, y = pixel_centers(w), pixel_centers(h) * h / w
    columns, rows = (squares.sum(dim=i) / total.clamp(min=1e-6)[:, None] for i in (1, 2))
    centroids = torch.stack([columns @ x, rows @ y], dim=-1)
    variance = columns @ x ** 2 + rows @ y ** 2 - centroids.square().sum(dim=-1)
    return centroids, float((variance @ total / total.sum() * 3 / (1 + (h / w) ** 2)).sqrt())


def flicker(frames: Tensor) -> float:
    """Return the mean absolute difference of neighboring frames (f, 3, H, W), 0 to 1."""
    return float(frames.diff(dim=0).abs().mean() / 2) if len(frames) > 1 else 0.0
