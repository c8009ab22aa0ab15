"""References that the trainer never draws, each with a prompt for its clone.

They follow other kinds of path, before other photographs, and differ from the prompts in subject,
colour and ground; of a camera's motion, the ground's texture is of the same kind, if no other is
asked for.
"""
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from .clips import an, caption, tone
from .photos import photo_ground, shake
from .scenes import COLORS, GROUNDS, SHAPES, TEXTURES, Scene
from .vocabulary import EMOJI, emoji

PATHS = ("figure eight", "square", "spiral", "zigzag", "circle", "hops")
CAMERAS = ("pan", "zoom", "roll")
STILL = ("still",)


@dataclass(frozen=True)
class Case:
    """A reference and what is asked of its clone."""
    kind: str                           # what the summary puts together
    motion: str                         # one of PATHS, CAMERAS or STILL
    scene: Scene
    reference_prompt: str               # what the reference shows, for inversion
    prompt: str
    shape: str
    color: str
    ground: str
    seed: int


def held_out_path(kind: str, frames: int, reach: float) -> Tensor:
    """A path (f, 2) in half widths, of a kind that clips.path never draws."""
    t = torch.linspace(0, 1, frames)
    turn = 2 * math.pi * t
    if kind == "figure eight":
        xy = torch.stack([turn.sin(), 0.6 * (2 * turn).sin()], dim=-1)
    elif kind == "square":
        corners = torch.tensor([[-.8, -.8], [.8, -.8], [.8, .8], [-.8, .8], [-.8, -.8]])
        leg = (t * 4).clamp(max=3.999)
        part = (leg - leg.floor())[:, None]
        xy = corners[leg.long()] * (1 - part) + corners[leg.long() + 1] * part
    elif kind == "spiral":
        xy = (0.2 + 0.8 * t)[:, None] * torch.stack([(1.5 * turn).cos(), (1.5 * turn).sin()], -1)
    elif kind == "zigzag":
        xy = torch.stack([2 * t - 1, 0.7 * (2 * (3 * t % 2 - 1).abs() - 1)], dim=-1)
    elif kind == "circle":
        xy = 0.85 * torch.stack([turn.cos(), turn.sin()], dim=-1)
    else:                                                   # hops
        xy = torch.stack([2 * t - 1, 0.8 - 1.5 * (2 * math.pi * t).sin().abs()], dim=-1)
    return xy * reach


def held_out_cases(kinds: tuple[str, ...], number: int, frames: int, seed: int,
                   other_textures: bool = False, photos: Sequence[Path] = (),
                   by_hand: bool = False) -> list[Case]:
    """`number` references that move in these kinds of ways, in turn, each with its prompt.

    Over a photograph, if any are given, a moving camera sees no subject; `by_hand` shakes it.
    """
    return [held_out_case(kinds[i % len(kinds)], frames, seed + i, other_textures, photos, by_hand)
            for i in range(number)]


def word_cases(number: int, frames: int, seed: int, photos: Sequence[Path] = ()) -> list[Case]:
    """`number` references with a moving shape, each with a prompt for an emoji, all in turn.

    Before a photograph, if any are given, the reference's subject is an emoji as well. Raises
    InputError where their font is not there.
    """
    cases, words = [], list(EMOJI)
    for i, case in enumerate(held_out_cases(PATHS, number, frames, seed, photos=photos)):
        word, seen = (words[(seed + i + far) % len(words)] for far in (0, len(words) // 2))
        scene = dataclasses.replace(case.scene, radius=0.2 + case.scene.radius / 2,
                                    center=0.7 * case.scene.center)
        skin = emoji(seen)          # of plain grounds too: what measures the clones draws emoji
        if photos:
            scene = dataclasses.replace(scene, shape=seen, skin=skin)
        cases.append(dataclasses.replace(
            case, kind=case.kind.replace("object", "emoji"), shape=word, color="", scene=scene,
            prompt=f"{an(word)} on {an(case.ground)} background"))
    return cases


def held_out_case(motion: str, frames: int, seed: int, other_textures: bool = False,
                  photos: Sequence[Path] = (), by_hand: bool = False) -> Case:
    """The case of a seed: a reference of so many frames, and what is asked of its clone."""
    rng = np.random.default_rng([9, seed])
    radius = rng.uniform(.2, .4)
    colors, grounds = rng.permutation(list(COLORS)), rng.permutation(list(GROUNDS))
    shapes, textures = rng.permutation(SHAPES), rng.permutation(TEXTURES[1:])
    still, t = torch.zeros(frames), torch.linspace(0, 1, frames)
    camera = motion in CAMERAS
    center, pan, zoom, roll = torch.zeros(frames, 2), torch.zeros(frames, 2), still, still
    if motion == "pan":
        heading = torch.tensor(rng.uniform(0, 2 * math.pi))
        along = 0.8 * (t - 0.5) + 0.1 * (3 * math.pi * t).sin()
        pan = along[:, None] * torch.stack([heading.cos(), heading.sin()])
    elif motion == "zoom":
        zoom = float(rng.choice([-1, 1])) * 0.3 * (math.pi * t).cos()
    elif motion == "roll":
        roll = float(rng.choice([-1, 1])) * 0.8 * (t + 0.08 * (3 * math.pi * t).sin())
    elif motion not in STILL:
        center = held_out_path(motion, frames, 1 - 0.9 * radius)
        center = center.flip(-1) if rng.random() < 0.5 else center
    reference_ground = GROUNDS[str(grounds[0])]
    scene = Scene(
        shape=str(shapes[0]), color=COLORS[str(colors[0])],
        texture=str(textures[0]) if camera else "plain", ground=reference_ground,
        second=tone(reference_ground), cell=0.5, texture_angle=0.0, center=center,
        radius=still + radius, angle=still, pan=pan, zoom=zoom.exp(), roll=roll)
    prompts = []
    for i in range(2):
        texture = textures[i if other_textures else 0]
        ground = f"{texture} {grounds[i]}" if camera else str(grounds[i])
        prompts.append(f"{an(str(colors[i]))} {shapes[i]} on {an(ground)} background")
    kind = "camera" if camera else "still" if motion in STILL else "object"
    kind += ", another texture" if camera and other_textures else ""
    if photos:
        rng = np.random.default_rng([11, seed])
        scene = dataclasses.replace(scene, shape="" if camera else scene.shape, texture="plain",
                                    photo=photo_ground(rng, photos))
        prompts[0] = caption(scene, rng)
        kind += " over photographs"
    if by_hand:
        more_pan, more_zoom, more_roll = shake(rng, frames)
        scene = dataclasses.replace(scene, pan=scene.pan + more_pan, zoom=scene.zoom * more_zoom,
                                    roll=scene.roll + more_roll)
        kind += ", by hand"
    return Case(kind, motion, scene, prompts[0], prompts[1], str(shapes[1]), str(colors[1]),
                str(grounds[1]), seed)
