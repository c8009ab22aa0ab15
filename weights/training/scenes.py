"""The world of the built-in demo model: a subject in front of a background, seen by a camera.

The picture spans [-1, 1] in both directions, x to the right and y down, so lengths are in units of
half the picture's width. The world of a scene is fixed. The subject moves in it. The camera maps a
point p of the picture to the world point R(roll) p / zoom / (1 + tilt p) + pan.
"""
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mcl.errors import InputError
from mcl.evaluation.metrics import pixel_centers

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
COLORS = {"red": (.90, .15, .15), "green": (.15, .75, .25), "blue": (.20, .35, .95),
          "yellow": (.95, .85, .15), "purple": (.60, .20, .80), "orange": (1.0, .55, .10),
          "white": (.97, .97, .97), "cyan": (.20, .85, .90)}
BACKGROUNDS = {"black": (.05, .05, .05), "gray": (.50, .50, .50), "navy": (.08, .10, .35),
               "brown": (.40, .25, .12), "pink": (.98, .75, .80), "teal": (.10, .40, .40)}
TEXTURES = ("plain", "checkered", "striped", "dotted")
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
_PAIRS = """
    apple 🍎 banana 🍌 lemon 🍋 pineapple 🍍 strawberry 🍓 watermelon 🍉 carrot 🥕 eggplant 🍆
    mushroom 🍄 burger 🍔 donut 🍩 pizza 🍕 cheese 🧀 cat 🐱 dog 🐶 fox 🦊 panda 🐼 pig 🐷 frog 🐸
    rabbit 🐰 chick 🐤 penguin 🐧 bird 🐦 fish 🐟 dolphin 🐬 octopus 🐙 crab 🦀 ladybug 🐞 tree 🌳
    cactus 🌵 flower 🌸 tulip 🌷 sun ☀️ moon 🌙 earth 🌍 cloud ☁️ rainbow 🌈 fire 🔥 lightning ⚡
    drop 💧 bus 🚌 rocket 🚀 boat ⛵ umbrella ☂️ basketball 🏀 bell 🔔 key 🔑 lock 🔒 lamp 💡
    gift 🎁 gem 💎 magnet 🧲 book 📕 flag 🚩 crown 👑 cap 🧢 shirt 👕 dress 👗 skull 💀 face 😀
    ghost 👻 alien 👽 hand ✋
""".split()
EMOJI = dict(zip(_PAIRS[::2], _PAIRS[1::2], strict=True))
Rgb = tuple[float, float, float]                # sRGB in [0, 1]


@dataclass(frozen=True)
class Scene:
    """A clip of f frames before it is rendered.

    Lengths are in units of half the picture's width, angles in radians.

    Attributes:
        shape: One of SHAPES or EMOJI; "" for a scene without a subject.
        color: Color of the subject.
        texture: One of TEXTURES.
        background: Color of the background.
        second_color: Second color of the texture.
        cell_size: Size of the texture's cells.
        texture_angle: Rotation of the texture.
        center: Center of the subject in the world, (f, 2).
        radius: Radius of the subject, (f,).
        angle: Rotation of the subject, (f,).
        pan: Center of the camera in the world, (f, 2).
        zoom: Magnification of the camera, (f,).
        roll: Rotation of the camera, (f,).
        photo: Picture (3, n, n) in [0, 1] in place of the background. It spans [-2, 2] in both
            directions and is mirrored beyond.
        sprite: Picture in place of the subject's color, in units of its radius. With three channels
            it fills the shape; with four (color times alpha, and alpha) it has an outline of its
            own.
        tilt: Slope of a background that leans away, for scenes without a subject.
    """

    shape: str
    color: Rgb
    texture: str
    background: Rgb
    second_color: Rgb
    cell_size: float
    texture_angle: float
    center: Tensor
    radius: Tensor
    angle: Tensor
    pan: Tensor
    zoom: Tensor
    roll: Tensor
    photo: Tensor | None = None
    sprite: Tensor | None = None
    tilt: tuple[float, float] = (0., 0.)


def projected_center(scene: Scene) -> Tensor:
    """Return the position of the subject in the picture, (f, 2)."""
    return rotate(scene.center - scene.pan, -scene.roll) * scene.zoom[:, None]


def rotate(points: Tensor, angle: Tensor) -> Tensor:
    """Return points (..., 2) rotated by angles (...)."""
    x, y = points.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)


def render(scene: Scene, size: int) -> Tensor:
    """Return frames (f, 3, size, size) in [-1, 1] of a scene, with edges one pixel wide."""
    line = pixel_centers(size)
    picture = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)[None]
    zoom, roll = (rearrange(v, "f -> f 1 1") for v in (scene.zoom, scene.roll))
    depth_zoom = zoom * (1 + picture @ torch.tensor(scene.tilt))
    pan, center = (rearrange(v, "f two -> f 1 1 two") for v in (scene.pan, scene.center))
    world = rotate(picture, roll) / depth_zoom[..., None] + pan
    pixels = zoom * (size / 2)                              # pixels per unit of the world

    background = torch.tensor(scene.background)
    image = background if scene.photo is None else sample_photo(scene.photo, world)
    if scene.texture != "plain":
        cover = texture_cover(scene, world, pixels)[..., None]
        image = background + cover * (torch.tensor(scene.second_color) - background)
    if not scene.shape:
        return rearrange(image, "f h w c -> f c h w") * 2 - 1
    radius, angle = (rearrange(v, "f -> f 1 1") for v in (scene.radius, scene.angle))
    local = rotate(world - center, -angle) / radius[..., None]
    paint = (torch.tensor(scene.color) if scene.sprite is None else
             sample_photo(scene.sprite, local.clamp(-2, 2)))
    if paint.shape[-1] == 4:
        cover, paint = paint[..., 3:], paint[..., :3]
    else:
        distance = signed_distance(scene.shape, local) * radius
        cover = (0.5 - distance * pixels).clamp(0, 1)[..., None]
        paint = cover * paint
    return rearrange((1 - cover) * image + paint, "f h w c -> f c h w") * 2 - 1


def sample_photo(photo: Tensor, points: Tensor) -> Tensor:
    """Return the colors (f, h, w, c) of a photo (c, n, n) at points (f, h, w, 2)."""
    photos = repeat(photo, "c h w -> f c h w", f=len(points))
    colors = F.grid_sample(photos, points / 2, padding_mode="reflection", align_corners=False)
    return rearrange(colors, "f c h w -> f h w c")


def texture_cover(scene: Scene, world: Tensor, pixels: Tensor) -> Tensor:
    """Return the share of the texture's second color at each point, in [0, 1]."""
    p = rotate(world, torch.tensor(scene.texture_angle)) / scene.cell_size
    if scene.texture == "dotted":
        distance = ((p - p.round()).norm(dim=-1) - 0.3) * scene.cell_size
        return (0.5 - distance * pixels).clamp(0, 1)
    # A square wave for each axis, in [-1, 1], with edges one pixel wide.
    phase = (p % 2) - 1
    to_edge = torch.where(phase > 0, 1, -1) * (0.5 - (phase.abs() - 0.5).abs()) * scene.cell_size
    wave = (to_edge * pixels[..., None] * 2).clamp(-1, 1)
    value = wave[..., 0] if scene.texture == "striped" else wave[..., 0] * wave[..., 1]
    return (value + 1) / 2


def signed_distance(shape: str, p: Tensor) -> Tensor:
    """Return the distance of points (..., 2) to a shape of radius 1, negative inside."""
    (x, y), r = p.unbind(-1), p.norm(dim=-1)
    longer, shorter = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return {"circle": lambda: r - 0.9, "ring": lambda: (r - 0.7).abs() - 0.24,
            "square": lambda: longer - 0.78,
            "diamond": lambda: (x.abs() / 0.72 + y.abs() - 1) * (1 / math.hypot(1 / 0.72, 1)),
            "cross": lambda: torch.maximum(longer - 0.92, shorter - 0.3),
            "triangle": lambda: torch.maximum(y - 0.55, (x.abs() * math.sqrt(3) - y) / 2 - 0.5),
            "star": lambda: star_distance(x, y), "heart": lambda: heart_distance(x, y)}[shape]()


def star_distance(x: Tensor, y: Tensor, points: int = 5, inner: float = 0.42) -> Tensor:
    """Return the distance to a star whose tips have radius 1.

    The plane is folded onto one half of one ray.
    """
    r, half = torch.hypot(x, y), math.pi / points
    a = ((torch.atan2(x, -y) + half) % (2 * half) - half).abs()
    fx, fy = r * a.sin(), r * a.cos()                       # the tip is at (0, 1)
    ex, ey = inner * math.sin(half), inner * math.cos(half) - 1
    return (fx * -ey + (fy - 1) * ex) / math.hypot(ex, ey)


def heart_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the distance to two discs, each joined by its tangents to one corner below."""
    x = x.abs()
    cx, cy, disc, tip = 0.42, -0.35, 0.47, 0.9
    reach = math.hypot(cx, tip - cy)                        # from the corner to a disc's center
    turn = math.atan2(cx, tip - cy) + math.asin(disc / reach)
    beyond_tangent = x * math.cos(turn) + (y - tip) * math.sin(turn)
    above_chord = disc ** 2 / reach - ((y - cy) * (tip - cy) - (x - cx) * cx) / reach
    lobe = torch.hypot(x - cx, y - cy) - disc
    return torch.minimum(lobe, torch.maximum(beyond_tangent, above_chord))


@functools.cache
def emoji_sprite(word: str) -> Tensor:
    """Return an emoji as a `Scene.sprite`: (4, 96, 96), color times alpha, and alpha.

    Its longer side is 2.4 radii, a little more than that of the shapes, because it has more detail.

    Raises:
        InputError: If the font is not installed.
    """
    if not FONT.exists():
        raise InputError(f"{FONT}: no such font. Run: apt-get install fonts-noto-color-emoji")
    image = Image.new("RGBA", (200, 200))
    font = ImageFont.truetype(FONT, 109)                    # the only size that its bitmaps have
    ImageDraw.Draw(image).text((20, 20), EMOJI[word], font=font, embedded_color=True)
    left, top, right, bottom = image.getbbox() or (0, 0, 200, 200)
    x, y, half = (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 1.2
    box = (x - half, y - half, x + half, y + half)
    pixels = image.convert("RGBa").transform((96, 96), Image.Transform.EXTENT, box,
                                             Image.Resampling.BILINEAR)
    return rearrange(torch.from_numpy(np.array(pixels)) / 255, "h w c -> c h w")
