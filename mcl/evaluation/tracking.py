"""Point tracking by the pyramidal Lucas-Kanade method (Lucas and Kanade 1981).

The tracker is classical on purpose: no metric that uses it depends on the training of a network.
"""
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

SIDE = 128              # frames are resized to this shorter side: resolution does not matter
WINDOW = 4              # pixels on each side of a point that are matched
LEVELS = (8, 4, 2, 1)   # downsampling factors of the pyramid, coarse to fine
ITERATIONS = 8          # Lucas-Kanade iterations at each level
QUALITY = 0.02          # lowest corner strength, as a fraction of the strongest corner's
MIN_DISTANCE = 6        # pixels between points
MAX_ROUNDTRIP_ERROR = 2.0       # pixels between a point and where tracking it back leads to


def tracklets(frames: Tensor, max_points: int = 64) -> Tensor:
    """Return the tracks of corners of the first frame through the clip.

    Points are tracked to the last frame and back. Points that do not return to their start are
    left out.

    Args:
        frames: Frames (f, 3, H, W) in [-1, 1].
        max_points: Number of corners to track.

    Returns:
        (n, f, 2): (x, y) in half widths from the center of the picture; n may be 0.
    """
    scale = SIDE / min(frames.shape[-2:])
    clip = F.interpolate(frames.float().cpu(), scale_factor=scale, mode="bilinear", antialias=True)
    start = corners(clip[0], max_points)
    tracks = track_points(clip, start)
    roundtrip = track_points(clip.flip(0), tracks[:, -1])[:, -1] - start
    is_tracked = roundtrip.norm(dim=-1) < MAX_ROUNDTRIP_ERROR
    h, w = clip.shape[-2:]
    return (tracks[is_tracked] - torch.tensor([(w - 1) / 2, (h - 1) / 2])) / (w / 2)


def track_points(clip: Tensor, start: Tensor) -> Tensor:
    """Return the tracks (n, f, 2) of points (n, 2) through all frames (f, c, h, w), in pixels."""
    return torch.stack([*accumulate(pairwise(clip), track_lucas_kanade, initial=start)], dim=1)


def image_gradients(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of an image (c, h, w) along x and along y, each (c, h, w)."""
    dy, dx = torch.gradient(F.pad(image, (1, 1, 1, 1), mode="replicate"), dim=(1, 2))
    return dx[:, 1:-1, 1:-1], dy[:, 1:-1, 1:-1]


def corners(image: Tensor, max_points: int) -> Tensor:
    """Return the strongest corners (n, 2) of an image, (x, y) in pixels (Shi and Tomasi 1994)."""
    dx, dy = image_gradients(image)
    products = torch.stack([dx * dx, dx * dy, dy * dy]).sum(dim=1)
    xx, xy, yy = F.avg_pool2d(products, 2 * WINDOW + 1, 1, WINDOW)
    strength = (xx + yy) / 2 - (((xx - yy) / 2) ** 2 + xy ** 2).sqrt()  # the smaller eigenvalue
    is_peak = strength == F.max_pool2d(strength[None], 2 * MIN_DISTANCE + 1, 1, MIN_DISTANCE)[0]
    is_peak = F.pad(is_peak[WINDOW:-WINDOW, WINDOW:-WINDOW], [WINDOW] * 4)
    threshold = (QUALITY * strength.max()).clamp(min=1e-6)
    y, x = torch.nonzero(is_peak & (strength > threshold), as_tuple=True)
    order = strength[y, x].argsort(descending=True)[:max_points]
    return torch.stack([x, y], dim=-1)[order].float()


def track_lucas_kanade(points: Tensor, images: tuple[Tensor, Tensor]) -> Tensor:
    """Return where the points (n, 2) of one image (c, h, w) are in the next image, in pixels."""
    side = torch.arange(-WINDOW, WINDOW + 1.0)
    offsets = torch.cartesian_prod(side, side).flip(-1)           # (p, 2): x varies fastest
    flow = torch.zeros_like(points)
    for level in LEVELS:
        a, b = (F.avg_pool2d(image, level) for image in images)
        centers = (points + 0.5) / level - 0.5
        patch, dx, dy = (sample_patches(x, centers, offsets) for x in (a, *image_gradients(a)))
        gradient = torch.stack([dx, dy], dim=1)
        normal = einsum(gradient, gradient, "n a c p, n b c p -> n a b")
        # The damping keeps a point still in directions in which its window is flat.
        damping = 1e-3 * normal.diagonal(dim1=1, dim2=2).sum(dim=-1) + 1e-6
        inverse = torch.linalg.inv(normal + damping[:, None, None] * torch.eye(2))
        for _ in range(ITERATIONS):
            residual = patch - sample_patches(b, centers + flow / level, offsets)
            rhs = einsum(residual, gradient, "n c p, n a c p -> n a")
            flow = flow + level * einsum(inverse, rhs, "n a b, n b -> n a").clamp(-2, 2)
    return points + flow


def sample_patches(image: Tensor, points: Tensor, offsets: Tensor) -> Tensor:
    """Return the pixels (n, c, p) of an image (c, h, w) in patches around points (n, 2) in pixels.

    Args:
        image: The image.
        points: Centers of the patches.
        offsets: Positions (p, 2) of a patch's pixels, relative to its center.
    """
    h, w = image.shape[-2:]
    grid = (points[:, None] + offsets + 0.5) * 2 / torch.tensor([w, h]) - 1     # (n, p, 2)
    patches = F.grid_sample(image[None], grid[None], align_corners=False, padding_mode="border")
    return rearrange(patches, "1 c n p -> n c p")
