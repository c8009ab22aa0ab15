"""Subjects that have a word of their own: pictures of an emoji font, which INSTALL brings."""
import functools
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mcl.errors import InputError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
INSTALL = "apt-get install fonts-noto-color-emoji"
_PAIRS = """
    apple 🍎 banana 🍌 lemon 🍋 pineapple 🍍 strawberry 🍓 watermelon 🍉 carrot 🥕 eggplant 🍆
    mushroom 🍄 burger 🍔 donut 🍩 pizza 🍕 cheese 🧀 cat 🐱 dog 🐶 fox 🦊 panda 🐼 pig 🐷 frog 🐸 rabbit 🐰
    chick 🐤 penguin 🐧 bird 🐦 fish 🐟 dolphin 🐬 octopus 🐙 crab 🦀 ladybug 🐞 tree 🌳 cactus 🌵
    flower 🌸 tulip 🌷 sun ☀️ moon 🌙 earth 🌍 cloud ☁️ rainbow 🌈 fire 🔥 lightning ⚡ drop 💧 bus 🚌
    rocket 🚀 boat ⛵ umbrella ☂️ basketball 🏀 bell 🔔 key 🔑 lock 🔒 lamp 💡 gift 🎁 gem 💎 magnet 🧲
    book 📕 flag 🚩 crown 👑 cap 🧢 shirt 👕 dress 👗 skull 💀 face 😀 ghost 👻 alien 👽 hand ✋
""".split()
EMOJI = dict(zip(_PAIRS[::2], _PAIRS[1::2]))


@functools.cache
def emoji(word: str) -> Tensor:
    """A word's picture as Scene.skin wants it: (4, 96, 96), colours times alpha, and alpha.

    It is 2.4 radii long in its longer direction, a little more than the shapes are: it has more to
    show. Raises InputError, with the command that installs it, where the font is not there.
    """
    if not FONT.exists():
        raise InputError(f"{FONT}: no such font; run {INSTALL}")
    image = Image.new("RGBA", (200, 200))
    font = ImageFont.truetype(FONT, 109)                    # the only size that its bitmaps have
    ImageDraw.Draw(image).text((20, 20), EMOJI[word], font=font, embedded_color=True)
    left, top, right, bottom = image.getbbox() or (0, 0, 200, 200)
    x, y, half = (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 1.2
    cut = image.convert("RGBa").transform(
        (96, 96), Image.Transform.EXTENT, (x - half, y - half, x + half, y + half),
        Image.Resampling.BILINEAR)
    return rearrange(torch.from_numpy(np.array(cut)) / 255, "h w c -> c h w")
