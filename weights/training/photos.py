"""The world of photographs: a camera moves over one, or a thing moves before one.

Photographs are those of wallpaper packages, which INSTALL brings; none of them is kept here. One in
eight is held out of training, by its name, for the evaluation.
"""
import dataclasses
import functools
import math
import re
import zlib
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from mcl.errors import InputError
from .clips import Rng, curve, moving_camera, path, random_scene
from .scenes import Scene
from .vocabulary import EMOJI, emoji

FOLDERS = (Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers"))
INSTALL = ("apt-get install gnome-backgrounds plasma-workspace-wallpapers mate-backgrounds "
           "lomiri-wallpapers ukui-wallpapers")
DTYPE_ALIASES = 768                             # pixels of a photograph's shorter side, once it is read
GROUND = 256                            # of a ground: four half widths, at the clips' own scale
KINDS = (.45, .25, .19, .11)            # shares of plain and textured grounds, cameras, ...
WORDS = 0.4                             # share of the subjects that are emoji
DRAWN = 0.4                             # share of the grounds that are no photographs


def find_photos(folders: Sequence[Path], held_out: bool) -> list[Path]:
    """The photographs in some folders that are held out of training, or those that are not.

    Sizes and shades of one picture share its name: of them the largest file is taken. Raises
    InputError, with the command that installs them, where there are none.
    """
    largest: dict[str, Path] = {}
    for file in sorted(file for folder in folders for file in folder.rglob("*")):
        if file.suffix.lower() in (".jpg", ".png", ".webp") and not file.is_symlink():
            # KDE's lie in NAME/contents/images, named by their size, beside a small one.
            inside = "contents" in file.parts
            name = file.parts[file.parts.index("contents") - 1] if inside else file.stem
            name = re.split("[-_]", name)[0].lower()
            if name not in largest or file.stat().st_size > largest[name].stat().st_size:
                largest[name] = file
    chosen = [file for name, file in largest.items()
              if (zlib.crc32(name.encode()) % 8 == 0) == held_out]
    if not chosen:
        raise InputError(f"{', '.join(map(str, folders))}: no photographs there; run {INSTALL}")
    return chosen


@functools.cache
def read_photo(file: Path) -> Tensor:
    """A photograph (3, H, W) uint8, its shorter side SHORT pixels at most."""
    with Image.open(file) as image:
        image.draft("RGB", (DTYPE_ALIASES, DTYPE_ALIASES))                  # a JPEG is read at a part of its size
        scale = min(1, DTYPE_ALIASES / min(image.size))
        size = (round(scale * image.width), round(scale * image.height))
        pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.BOX))
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w")


def photo_ground(rng: Rng, photos: Sequence[Path], least: int = GROUND) -> Tensor:
    """A square cut of one of the photographs, mirrored or not: (3, GROUND, GROUND) in [0, 1].

    Its side is `least` pixels or more. Of two cuts the busier is taken, as no camera's motion is
    seen over a clear sky.
    """
    cuts = [square_cut(rng, read_photo(photos[int(rng.integers(len(photos)))]), least)
            for _ in range(2)]
    return max(cuts, key=lambda cut: float(cut.diff(dim=-1).abs().mean()))


def square_cut(rng: Rng, photo: Tensor, least: int) -> Tensor:
    short = min(photo.shape[1:])
    side = int(rng.integers(min(least, short), short + 1))
    top, left = (int(rng.integers(whole - side + 1)) for whole in photo.shape[1:])
    cut = photo[None, :, top:top + side, left:left + side].float() / 255
    cut = F.interpolate(cut, (GROUND, GROUND), mode="bilinear", antialias=True)[0]
    return cut.flip(-1) if rng.random() < 0.5 else cut


def shake(rng: Rng, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a hand adds to a camera: a pan (f, 2), a factor of its zoom (f,), a roll (f,)."""
    size, time = rng.uniform(.02, .12), np.linspace(0, 1, frames)
    pan, more = (torch.tensor(size * c / np.abs(c).max(), dtype=torch.float32)
                 for c in (curve(rng, time, 4.0), curve(rng, time, 4.0)))
    return pan, (0.3 * more[:, 0]).exp(), 0.3 * more[:, 1]


def any_ground(rng: Rng, photos: Sequence[Path]) -> Tensor:
    """A photo_ground, turned by quarters and of any size, or a ground that is drawn."""
    if rng.random() < DRAWN:
        return drawn_ground(rng)
    return photo_ground(rng, photos, 96).rot90(int(rng.integers(4)), (1, 2))


def drawn_ground(rng: Rng) -> Tensor:
    """Shapes one over another, smooth noise, or a sum of waves: (3, GROUND, GROUND) in [0, 1]."""
    kind, rough = rng.choice(["leaves", "noise", "waves"]), float(np.exp(rng.uniform(1.6, 3.9)))
    if kind == "leaves":
        image = Image.new("RGB", (GROUND, GROUND))
        for size in rng.uniform(0.3, 1.7, int(4 * rough ** 2) + 60) * GROUND / rough:
            x, y = rng.uniform(-20, GROUND + 20, 2)
            ImageDraw.Draw(image).regular_polygon(
                (x, y, max(2, size)), int(rng.choice([3, 4, 5, 20])), int(rng.integers(360)),
                tuple(int(c) for c in rng.integers(256, size=3)))
        ground = rearrange(torch.from_numpy(np.array(image)) / 255, "h w c -> c h w")
    elif kind == "noise":
        small = torch.tensor(rng.random((1, 3, round(rough), round(rough))), dtype=torch.float32)
        ground = F.interpolate(small, (GROUND, GROUND), mode="bicubic")[0].clamp(0, 1)
    else:
        y, x = torch.meshgrid(*2 * [torch.linspace(0, 2 * math.pi, GROUND)], indexing="ij")
        rates = rng.normal(0, rough / 6, (6, 3)).tolist()
        waves = [(a * x + b * y + phase).sin() for a, b, phase in rates]
        mix = torch.tensor(rng.normal(0, .16, (3, 6)), dtype=torch.float32)
        ground = (0.5 + torch.einsum("c k, k h w -> c h w", mix, torch.stack(waves))).clamp(0, 1)
    return ground.lerp(ground.mean(dim=0), rng.random())    # more or less colourful


def mixed_scene(rng: Rng, frames: int, photos: Sequence[Path]) -> Scene:
    """A scene of random_scene's, or one of these photographs or of grounds as rich.

    Over a fifth of all the camera moves, also along one that leans away, and there is no subject;
    before other grounds of that kind one moves, in the most of them under a still camera, else
    under one that is held by hand.
    Two fifths of the subjects are emoji; before photographs some others are cut out of one.
    """
    scene = random_scene(rng, frames)
    kind = rng.choice(["shapes", "camera", "still", "by hand"], p=KINDS)
    word = bool(rng.random() < WORDS) and kind != "camera"
    if word:
        shape = str(rng.choice(list(EMOJI)))
        scene = dataclasses.replace(scene, shape=shape, skin=emoji(shape))
    if kind == "shapes":
        return scene
    pan, zoom, roll = torch.zeros(frames, 2), torch.ones(frames), torch.zeros(frames)
    if kind == "camera":
        pan, zoom, roll = moving_camera(rng, frames)
    if kind == "by hand" or (kind == "camera" and rng.random() < 0.3):
        more_pan, more_zoom, more_roll = shake(rng, frames)
        pan, zoom, roll = pan + more_pan, zoom * more_zoom, roll + more_roll
    slant = (0., 0.)
    if kind == "camera" and rng.random() < 0.4:             # a pan along it is a dolly
        turn, lean = rng.uniform(0, 2 * math.pi), rng.uniform(.1, .35)
        slant = (lean * math.cos(turn), lean * math.sin(turn))
    skin = scene.skin
    if kind != "camera" and not word and rng.random() < 0.25:
        skin = F.avg_pool2d(any_ground(rng, photos), 4)     # a subject is a quarter of the picture
    center = path(rng, frames, 1 - 0.8 * float(scene.radius.max()), fastest=2.5)
    return dataclasses.replace(
        scene, shape="" if kind == "camera" else scene.shape, texture="plain",
        photo=any_ground(rng, photos), skin=skin, center=center, pan=pan, zoom=zoom, roll=roll,
        slant=slant)
