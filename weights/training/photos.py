"""Scenes over photographs: a camera moves over a photo, or a subject moves in front of one.

The photographs are those of Debian's wallpaper packages (PHOTO_INSTALL); none is stored here. One
in eight, selected by its name, is never used for training but for the evaluation.
"""
import functools
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from mcl.errors import InputError

from .clips import Rng, camera_path, curve_path, path, random_scene, still_camera
from .scenes import EMOJI, Scene, emoji_sprite

PHOTO_FOLDERS = (Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers"))
PHOTO_INSTALL = ("apt-get install gnome-backgrounds plasma-workspace-wallpapers mate-backgrounds "
                 "lomiri-wallpapers ukui-wallpapers")
SHORT_SIDE = 768            # largest number of pixels of a photo's shorter side
BACKGROUND_SIZE = 256       # pixels of a background, which spans four half widths of the picture
SCENE_PROBS = {"shapes": .45, "camera": .25, "still": .19, "by hand": .11}
P_EMOJI = 0.4               # probability that a subject is an emoji
P_PROCEDURAL = 0.4          # probability that a background is not a photo


def find_photos(folders: Sequence[Path], held_out: bool) -> list[Path]:
    """Return the photos in some folders that are held out of training, or all others.

    Files that differ only in size or shade have a common name; the largest of them is taken.

    Raises:
        InputError: If there are none.
    """
    largest: dict[str, Path] = {}
    for file in sorted(file for folder in folders for file in folder.rglob("*")):
        if file.suffix.lower() in (".jpg", ".png", ".webp") and not file.is_symlink():
            # KDE's photos are NAME/contents/images/WIDTHxHEIGHT, beside a small one.
            is_nested = "contents" in file.parts
            name = file.parts[file.parts.index("contents") - 1] if is_nested else file.stem
            name = re.split("[-_]", name)[0].lower()
            largest[name] = max(largest.get(name, file), file, key=lambda f: f.stat().st_size)
    photos = [file for name, file in largest.items()
              if (zlib.crc32(name.encode()) % 8 == 0) == held_out]
    if not photos:
        raise InputError(f"{', '.join(map(str, folders))}: no photographs. Run: {PHOTO_INSTALL}")
    return photos


@functools.cache
def read_photo(file: Path) -> Tensor:
    """Return a photo (3, H, W) uint8 whose shorter side has at most SHORT_SIDE pixels."""
    with Image.open(file) as image:
        image.draft("RGB", (SHORT_SIDE, SHORT_SIDE))        # decodes a JPEG at a reduced size
        w, h = (round(min(1, SHORT_SIDE / min(image.size)) * n) for n in image.size)
        pixels = np.array(image.convert("RGB").resize((w, h), Image.Resampling.BOX))
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w")


def photo_background(rng: Rng, photos: Sequence[Path], min_side: int = BACKGROUND_SIZE) -> Tensor:
    """Return a random crop of a photo, (3, BACKGROUND_SIZE, BACKGROUND_SIZE) in [0, 1].

    Of two crops, each of at least `min_side` pixels, the one with more detail is taken, because the
    motion of a camera cannot be seen over a clear sky.
    """
    crops = [random_crop(rng, read_photo(photos[int(rng.integers(len(photos)))]), min_side)
             for _ in range(2)]
    return max(crops, key=lambda crop: float(crop.diff(dim=-1).abs().mean()))


def random_crop(rng: Rng, photo: Tensor, min_side: int) -> Tensor:
    """Return a square crop of a photo, mirrored at random."""
    short = min(photo.shape[1:])
    side = int(rng.integers(min(min_side, short), short + 1))
    top, left = (int(rng.integers(length - side + 1)) for length in photo.shape[1:])
    crop = photo[None, :, top:top + side, left:left + side].float() / 255
    crop = F.interpolate(crop, (BACKGROUND_SIZE,) * 2, mode="bilinear", antialias=True)[0]
    return crop.flip(-1) if rng.random() < 0.5 else crop


def add_camera_shake(scene: Scene, rng: Rng) -> Scene:
    """Return a scene whose camera is held by hand."""
    size, time = rng.uniform(.02, .12), np.linspace(0, 1, len(scene.zoom))
    pan, turn = (torch.tensor(size * c / np.abs(c).max(), dtype=torch.float32)
                 for c in (curve_path(rng, time, 4.0) for _ in range(2)))
    zoom, roll = scene.zoom * (0.3 * turn[:, 0]).exp(), scene.roll + 0.3 * turn[:, 1]
    return replace(scene, pan=scene.pan + pan, zoom=zoom, roll=roll)


def random_background(rng: Rng, photos: Sequence[Path]) -> Tensor:
    """Return a photo's crop of any size, rotated by quarters, or a procedural background."""
    if rng.random() < P_PROCEDURAL:
        return procedural_background(rng)
    return photo_background(rng, photos, 96).rot90(int(rng.integers(4)), (1, 2))


def procedural_background(rng: Rng) -> Tensor:
    """Return overlapping shapes, smooth noise, or a sum of waves, as `photo_background` does."""
    n = BACKGROUND_SIZE
    kind, detail = rng.choice(["leaves", "noise", "waves"]), float(np.exp(rng.uniform(1.6, 3.9)))
    if kind == "leaves":
        image = Image.new("RGB", (n, n))
        for size in rng.uniform(0.3, 1.7, int(4 * detail ** 2) + 60) * n / detail:
            x, y = rng.uniform(-20, n + 20, 2)
            ImageDraw.Draw(image).regular_polygon(
                (x, y, max(2, size)), int(rng.choice([3, 4, 5, 20])), int(rng.integers(360)),
                tuple(int(c) for c in rng.integers(256, size=3)))
        background = rearrange(torch.from_numpy(np.array(image)) / 255, "h w c -> c h w")
    elif kind == "noise":
        noise = torch.tensor(rng.random((1, 3, round(detail), round(detail))), dtype=torch.float32)
        background = F.interpolate(noise, (n, n), mode="bicubic")[0].clamp(0, 1)
    else:
        y, x = torch.meshgrid(*2 * [torch.linspace(0, 2 * math.pi, n)], indexing="ij")
        rates = rng.normal(0, detail / 6, (6, 3)).tolist()
        waves = torch.stack([(a * x + b * y + phase).sin() for a, b, phase in rates])
        mix = torch.tensor(rng.normal(0, .16, (3, 6)), dtype=torch.float32)
        background = (0.5 + torch.einsum("c k, k h w -> c h w", mix, waves)).clamp(0, 1)
    return background.lerp(background.mean(dim=0), rng.random())        # random saturation


def random_photo_scene(rng: Rng, num_frames: int, photos: Sequence[Path]) -> Scene:
    """Return a scene of one of the kinds of SCENE_PROBS.

    "shapes" is a `random_scene`. In the others the background is a photo or a procedural one. The
    camera moves over it without a subject ("camera"), also along a background that leans away; or a
    subject moves in front of it, under a still camera ("still") or under one that is held by hand.
    Some subjects are emoji, and some are cut out of another background.
    """
    scene = random_scene(rng, num_frames)
    kind = rng.choice(list(SCENE_PROBS), p=list(SCENE_PROBS.values()))
    is_camera, is_emoji = kind == "camera", bool(rng.random() < P_EMOJI) and kind != "camera"
    if is_emoji:
        shape = str(rng.choice(list(EMOJI)))
        scene = replace(scene, shape=shape, sprite=emoji_sprite(shape))
    if kind == "shapes":
        return scene
    pan, zoom, roll = camera_path(rng, num_frames) if is_camera else still_camera(num_frames)
    scene = replace(scene, texture="plain", pan=pan, zoom=zoom, roll=roll)
    if kind == "by hand" or (is_camera and rng.random() < 0.3):
        scene = add_camera_shake(scene, rng)
    if is_camera and rng.random() < 0.4:                    # a pan along the tilt is a dolly
        direction, slope = rng.uniform(0, 2 * math.pi), rng.uniform(.1, .35)
        scene = replace(scene, tilt=(slope * math.cos(direction), slope * math.sin(direction)))
    if not is_camera and not is_emoji and rng.random() < 0.25:
        # A subject covers about a quarter of the picture's width.
        scene = replace(scene, sprite=F.avg_pool2d(random_background(rng, photos), 4))
    center = path(rng, num_frames, 1 - 0.8 * float(scene.radius.max()), max_frequency=2.5)
    return replace(scene, shape="" if is_camera else scene.shape, center=center,
                   photo=random_background(rng, photos))
