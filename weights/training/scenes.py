"""The embedded model's world: one subject on a ground, seen by a moving camera.

Positions and sizes are in units of half the picture's width: the picture spans [-1, 1] in both
directions, x to the right and y down. A scene's world is fixed; the subject moves in it, and the
camera maps a point p of the picture to the world point  R(roll) p / zoom / (1 + slant p) + pan.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
COLORS = {
    "red": (.90, .15, .15), "green": (.15, .75, .25), "blue": (.20, .35, .95),
    "yellow": (.95, .85, .15), "purple": (.60, .20, .80), "orange": (1.0, .55, .10),
    "white": (.97, .97, .97), "cyan": (.20, .85, .90)}
GROUNDS = {
    "black": (.05, .05, .05), "gray": (.50, .50, .50), "navy": (.08, .10, .35),
    "brown": (.40, .25, .12), "pink": (.98, .75, .80), "teal": (.10, .40, .40)}
TEXTURES = ("plain", "checkered", "striped", "dotted")


@dataclass(frozen=True)
class Scene:
    """What is drawn, in f frames. Colours are sRGB in [0, 1]; angles are in radians.

    Photographs (3, n, n) are sRGB in [0, 1], go from -2 to 2 both ways, and are mirrored beyond.
    A skin of four channels, colours times alpha and alpha, is a subject with its own outline.
    """
    shape: str                           # or a word of EMOJI, or "" where there is no subject
    color: tuple[float, float, float]
    texture: str
    ground: tuple[float, float, float]
    second: tuple[float, float, float]   # the texture's other colour
    cell: float                          # size of the texture's cells, in half widths
    texture_angle: float
    center: Tensor                       # (f, 2) the subject's centre, in the world
    radius: Tensor                       # (f,) of the subject, in half widths
    angle: Tensor                        # (f,) of the subject
    pan: Tensor                          # (f, 2) the camera's centre, in the world
    zoom: Tensor                         # (f,) 2 shows everything twice as large
    roll: Tensor                         # (f,) of the camera
    photo: Tensor | None = None          # in the place of the texture, in half widths
    skin: Tensor | None = None           # in the place of the subject's colour, in its radii
    slant: tuple[float, float] = (0., 0.)   # of a ground that leans away, where no subject is


def projected_center(scene: Scene) -> Tensor:
    """Where the subject is in the picture: (f, 2), in half widths from the middle."""
    return rotate(scene.center - scene.pan, -scene.roll) * scene.zoom[:, None]


def rotate(points: Tensor, angle: Tensor) -> Tensor:
    """Points (..., 2) turned by angles (...)."""
    x, y = points.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)


def render(scene: Scene, size: int) -> Tensor:
    """Frames (f, 3, size, size) in [-1, 1] of a scene, with edges smooth over one pixel."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    picture = rearrange(torch.stack([x, y], dim=-1), "h w two -> 1 h w two")
    zoom, roll = (rearrange(v, "f -> f 1 1") for v in (scene.zoom, scene.roll))
    nearness = zoom * (1 + picture @ torch.tensor(scene.slant))
    world = rotate(picture, roll) / nearness[..., None] + rearrange(scene.pan, "f two -> f 1 1 two")
    pixels = zoom * (size / 2)                              # per unit of the world

    first = torch.tensor(scene.ground)
    image = first if scene.photo is None else photo_at(scene.photo, world)
    if scene.texture != "plain":
        cover = texture_cover(scene, world, pixels)[..., None]
        image = first + cover * (torch.tensor(scene.second) - first)

    if not scene.shape:
        return rearrange(image, "f h w c -> f c h w") * 2 - 1
    radius, angle = (rearrange(v, "f -> f 1 1") for v in (scene.radius, scene.angle))
    local = rotate(world - rearrange(scene.center, "f two -> f 1 1 two"), -angle)
    local = local / radius[..., None]
    paint = torch.tensor(scene.color)
    if scene.skin is not None:
        paint = photo_at(scene.skin, local.clamp(-2, 2))
    if paint.shape[-1] == 4:
        cover, paint = paint[..., 3:], paint[..., :3]
    else:
        distance = signed_distance(scene.shape, local) * radius
        cover = (0.5 - distance * pixels).clamp(0, 1)[..., None]
        paint = cover * paint
    image = (1 - cover) * image + paint
    return rearrange(image, "f h w c -> f c h w") * 2 - 1


def photo_at(photo: Tensor, points: Tensor) -> Tensor:
    """The colours (f, h, w, c) of a photograph (c, n, n) at points (f, h, w, 2)."""
    photos = repeat(photo, "c h w -> f c h w", f=len(points))
    colors = F.grid_sample(photos, points / 2, padding_mode="reflection", align_corners=False)
    return rearrange(colors, "f c h w -> f h w c")


def texture_cover(scene: Scene, world: Tensor, pixels: Tensor) -> Tensor:
    """How much of the texture's second colour each point shows, in [0, 1]."""
    p = rotate(world, torch.tensor(scene.texture_angle)) / scene.cell
    if scene.texture == "dotted":
        center = p - p.round()
        distance = (center.norm(dim=-1) - 0.3) * scene.cell
        return (0.5 - distance * pixels).clamp(0, 1)
    # A square wave per axis, in [-1, 1], with edges one pixel wide.
    phase = (p % 2) - 1
    to_edge = torch.where(phase > 0, 1, -1) * (0.5 - (phase.abs() - 0.5).abs()) * scene.cell
    wave = (to_edge * pixels[..., None] * 2).clamp(-1, 1)
    value = wave[..., 0] if scene.texture == "striped" else wave[..., 0] * wave[..., 1]
    return (value + 1) / 2


def signed_distance(shape: str, p: Tensor) -> Tensor:
    """Distance to the outline of a shape of radius 1, negative inside. p (..., 2) -> (...)."""
    x, y = p.unbind(-1)
    if shape == "circle":
        return p.norm(dim=-1) - 0.9
    if shape == "ring":
        return (p.norm(dim=-1) - 0.7).abs() - 0.24
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.78
    if shape == "diamond":
        return (x.abs() / 0.72 + y.abs() - 1) * (1 / math.hypot(1 / 0.72, 1))
    if shape == "cross":
        a, b = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
        return torch.maximum(a - 0.92, b - 0.3)
    if shape == "triangle":
        return torch.maximum(y - 0.55, (x.abs() * math.sqrt(3) - y) / 2 - 0.5)
    if shape == "star":
        return star_distance(x, y)
    if shape == "heart":
        return heart_distance(x, y)
    raise ValueError(f"unknown shape {shape!r}: there are {', '.join(SHAPES)}")


def star_distance(x: Tensor, y: Tensor, points: int = 5, inner: float = 0.42) -> Tensor:
    """A star with its tips at radius 1: the plane is folded onto half of one of its rays."""
    r, half = torch.hypot(x, y), math.pi / points
    a = ((torch.atan2(x, -y) + half) % (2 * half) - half).abs()
    fx, fy = r * a.sin(), r * a.cos()                       # tip at (0, 1)
    ex, ey = inner * math.sin(half), inner * math.cos(half) - 1
    return (fx * -ey + (fy - 1) * ex) / math.hypot(ex, ey)


def heart_distance(x: Tensor, y: Tensor) -> Tensor:
    """Two discs, each joined by its tangents to one corner below."""
    x = x.abs()
    cx, cy, disc, tip = 0.42, -0.35, 0.47, 0.9
    reach = math.hypot(cx, tip - cy)                        # from the corner to a disc's centre
    turn = math.atan2(cx, tip - cy) + math.asin(disc / reach)
    beyond_tangent = x * math.cos(turn) + (y - tip) * math.sin(turn)
    above_chord = disc ** 2 / reach - ((y - cy) * (tip - cy) - (x - cx) * cx) / reach
    lobe = torch.hypot(x - cx, y - cy) - disc
    return torch.minimum(lobe, torch.maximum(beyond_tangent, above_chord))
