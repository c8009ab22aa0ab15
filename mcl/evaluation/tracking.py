"""Points followed through a clip, by Lucas and Kanade's method (1981) from coarse to fine.

Classical on purpose: what is measured with it rests on no network's training.
"""
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

SIDE = 128              # the shorter side is brought to this many pixels: sizes do not matter
WINDOW = 4              # pixels to each side of a point that are matched
LEVELS = (8, 4, 2, 1)   # coarse to fine: the picture is made this many times smaller
ITERATIONS = 8
QUALITY = 0.02          # of the best corner's strength, that a point must have
APART = 6               # pixels between points
LOST = 2.0              # pixels by which the way back may miss, and a point still counts


def tracklets(frames: Tensor, most: int = 64) -> Tensor:
    """Tracks (n, f, 2), (x, y) in half widths, of up to `most` corners of the first frame.

    frames (f, 3, H, W) in [-1, 1]. A point that is lost on the way, so that the way back from the
    end does not lead to it, is left out; n may be 0.
    """
    scale = SIDE / min(frames.shape[-2:])
    clip = F.interpolate(frames.float().cpu(), scale_factor=scale, mode="bilinear", antialias=True)
    start = corners(clip[0], most)
    forward = [start]
    for before, after in zip(clip[:-1], clip[1:]):
        forward.append(follow(before, after, forward[-1]))
    backward = forward[-1]
    for before, after in zip(clip.flip(0)[:-1], clip.flip(0)[1:]):
        backward = follow(before, after, backward)
    h, w = clip.shape[-2:]
    tracks = torch.stack(forward, dim=1)
    kept = (backward - start).norm(dim=-1) < LOST
    middle = torch.tensor([(w - 1) / 2, (h - 1) / 2])
    return (tracks[kept] - middle) / (w / 2)


def slopes(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Of a picture (c, h, w), along x and along y, each (c, h, w)."""
    padded = F.pad(picture[None], (1, 1, 1, 1), mode="replicate")[0]
    return ((padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2,
            (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2)


def corners(picture: Tensor, most: int) -> Tensor:
    """Points (n, 2), (x, y) in pixels, where a picture differs in both directions (Shi and Tomasi
    1994), strongest first and apart from one another."""
    dx, dy = slopes(picture)
    size = 2 * WINDOW + 1
    xx, xy, yy = (F.avg_pool2d(p.sum(dim=0)[None, None], size, 1, WINDOW)[0, 0]
                  for p in (dx * dx, dx * dy, dy * dy))
    least = (xx + yy) / 2 - (((xx - yy) / 2) ** 2 + xy ** 2).sqrt()
    peak = F.max_pool2d(least[None, None], 2 * APART + 1, 1, APART)[0, 0] == least
    peak[:WINDOW], peak[-WINDOW:], peak[:, :WINDOW], peak[:, -WINDOW:] = (False,) * 4
    y, x = torch.nonzero(peak & (least > QUALITY * least.max()) & (least > 1e-6), as_tuple=True)
    order = least[y, x].argsort(descending=True)[:most]
    return torch.stack([x, y], dim=-1)[order].float()


def follow(before: Tensor, after: Tensor, points: Tensor) -> Tensor:
    """Where points (n, 2) of one picture (c, h, w) are in the next, in pixels."""
    if not len(points):
        return points
    offsets = torch.stack(torch.meshgrid(
        torch.arange(-WINDOW, WINDOW + 1), torch.arange(-WINDOW, WINDOW + 1), indexing="xy"),
        dim=-1).float()
    moved = torch.zeros_like(points)
    for level in LEVELS:
        a, b = (F.avg_pool2d(x[None], level)[0] for x in (before, after))
        here = (points + 0.5) / level - 0.5
        template = sampled(torch.cat([a, *slopes(a)]), here, offsets)
        patch, dx, dy = template.chunk(3, dim=1)
        normal = torch.stack([einsum(p, q, "n c i j, n c i j -> n") for p in (dx, dy)
                              for q in (dx, dy)], dim=-1)
        normal = rearrange(normal, "n (p q) -> n p q", p=2)
        # Where a window is flat in some direction it does not move that way.
        weak = 1e-3 * normal.diagonal(dim1=1, dim2=2).sum(dim=-1) + 1e-6
        inverse = torch.linalg.inv(normal + weak[:, None, None] * torch.eye(2))
        for _ in range(ITERATIONS):
            rest = patch - sampled(b, here + moved / level, offsets)
            pull = torch.stack([(rest * d).sum(dim=(1, 2, 3)) for d in (dx, dy)], dim=-1)
            moved = moved + level * einsum(inverse, pull, "n p q, n q -> n p").clamp(-2, 2)
    return points + moved


def sampled(picture: Tensor, points: Tensor, offsets: Tensor) -> Tensor:
    """Windows (n, c, i, j) of a picture (c, h, w) around points (n, 2) in pixels."""
    h, w = picture.shape[-2:]
    places = rearrange(points, "n two -> n 1 1 two") + offsets
    grid = (places + 0.5) * 2 / torch.tensor([w, h]) - 1
    flat = rearrange(grid, "n i j two -> 1 n (i j) two")
    found = F.grid_sample(picture[None], flat, align_corners=False, padding_mode="border")
    return rearrange(found, "1 c n (i j) -> n c i j", i=offsets.shape[0])
