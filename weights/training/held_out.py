"""Evaluation cases that training never draws: references with a prompt for each clone.

The references follow other kinds of paths than `clips.path`, in front of other photographs. The
prompt differs from the reference in subject, color and background. For a moving camera the texture
of the background stays the same kind, unless another one is requested.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .clips import Rng, caption, shade, still_camera, with_article
from .photos import add_camera_shake, photo_background
from .scenes import BACKGROUNDS, COLORS, EMOJI, SHAPES, TEXTURES, Scene, emoji_sprite

PATHS = ("figure eight", "square", "spiral", "zigzag", "circle", "hops")
CAMERAS = ("pan", "zoom", "roll")
STATIC = ("still",)


@dataclass(frozen=True)
class EvalCase:
    """A reference and the prompt of its clone.

    Attributes:
        kind: Group in the table, such as "camera over photographs".
        motion: One of PATHS, CAMERAS or STATIC.
        scene: The reference.
        ref_prompt: What the reference shows.
        prompt: Prompt of the clone.
        shape: Subject in the prompt.
        color: Its color; "" for an emoji.
        background: Background in the prompt.
        seed: Seed of the case.
    """

    kind: str
    motion: str
    scene: Scene
    ref_prompt: str
    prompt: str
    shape: str
    color: str
    background: str
    seed: int


def held_out_path(kind: str, num_frames: int, reach: float) -> Tensor:
    """Return a path (f, 2) of one of PATHS, within [-reach, reach]."""
    t = torch.linspace(0, 1, num_frames)
    turn, spiral, leg = 2 * math.pi * t, 0.2 + 0.8 * t, (t * 4).clamp(max=3.999)
    corners = torch.tensor([[-.8, -.8], [.8, -.8], [.8, .8], [-.8, .8], [-.8, -.8]])
    start, end, progress = corners[leg.long()], corners[leg.long() + 1], leg.frac()[:, None]
    curves = {"figure eight": (turn.sin(), 0.6 * (2 * turn).sin()),
              "square": (start * (1 - progress) + end * progress).unbind(-1),
              "spiral": (spiral * (1.5 * turn).cos(), spiral * (1.5 * turn).sin()),
              "zigzag": (2 * t - 1, 0.7 * (2 * (3 * t % 2 - 1).abs() - 1)),
              "circle": (0.85 * turn.cos(), 0.85 * turn.sin()),
              "hops": (2 * t - 1, 0.8 - 1.5 * turn.sin().abs())}
    return torch.stack(curves[kind], dim=-1) * reach


def held_out_camera(kind: str, rng: Rng, num_frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pan (f, 2), zoom (f,) and roll (f,) of a camera that does one of CAMERAS."""
    t = torch.linspace(0, 1, num_frames)
    pan, zoom, roll = still_camera(num_frames)
    if kind == "pan":
        heading = torch.tensor(rng.uniform(0, 2 * math.pi))
        distance = 0.8 * (t - 0.5) + 0.1 * (3 * math.pi * t).sin()
        pan = distance[:, None] * torch.stack([heading.cos(), heading.sin()])
    elif kind == "zoom":
        zoom = (float(rng.choice([-1, 1])) * 0.3 * (math.pi * t).cos()).exp()
    elif kind == "roll":
        roll = float(rng.choice([-1, 1])) * 0.8 * (t + 0.08 * (3 * math.pi * t).sin())
    return pan, zoom, roll


def held_out_cases(kinds: Sequence[str], count: int, num_frames: int, seed: int,
                   other_textures: bool = False, photos: Sequence[Path] = (),
                   has_camera_shake: bool = False) -> list[EvalCase]:
    """Return `count` cases, one seed after the other, that take the kinds of motion in turn.

    Args:
        kinds: Some of PATHS, CAMERAS and STATIC.
        count: Number of cases.
        num_frames: Length of the references.
        seed: Seed of the first case.
        other_textures: Whether prompts ask for another texture than the reference of a camera has.
        photos: Photographs for the backgrounds; a moving camera then sees no subject.
        has_camera_shake: Whether the camera is held by hand.
    """
    return [held_out_case(kinds[i % len(kinds)], num_frames, seed + i, other_textures, photos,
                          has_camera_shake) for i in range(count)]


def emoji_cases(count: int, num_frames: int, seed: int, photos: Sequence[Path] = ()
                ) -> list[EvalCase]:
    """Return cases with a moving shape and a prompt for an emoji; all emoji are taken in turn.

    In front of photographs the subject of the reference is an emoji as well.

    Raises:
        InputError: If the emoji font is not installed.
    """
    cases, words = [], list(EMOJI)
    for i, case in enumerate(held_out_cases(PATHS, count, num_frames, seed, photos=photos)):
        word, ref_word = (words[(seed + i + shift) % len(words)] for shift in (0, len(words) // 2))
        scene, sprite = case.scene, emoji_sprite(ref_word)      # the metrics need the font too
        scene = replace(scene, radius=0.2 + scene.radius / 2, center=0.7 * scene.center)
        scene = replace(scene, shape=ref_word, sprite=sprite) if photos else scene
        prompt = f"{with_article(word)} on {with_article(case.background)} background"
        cases.append(replace(case, kind=case.kind.replace("object", "emoji"), shape=word, color="",
                             scene=scene, prompt=prompt))
    return cases


def held_out_case(motion: str, num_frames: int, seed: int, other_textures: bool = False,
                  photos: Sequence[Path] = (), has_camera_shake: bool = False) -> EvalCase:
    """Return the case of one seed; the arguments are those of `held_out_cases`."""
    rng = np.random.default_rng([9, seed])
    radius = rng.uniform(.2, .4)
    colors, backgrounds = rng.permutation(list(COLORS)), rng.permutation(list(BACKGROUNDS))
    shapes, textures = rng.permutation(SHAPES), rng.permutation(TEXTURES[1:])
    is_camera, center = motion in CAMERAS, torch.zeros(num_frames, 2)
    pan, zoom, roll = held_out_camera(motion, rng, num_frames)
    if motion in PATHS:
        center = held_out_path(motion, num_frames, 1 - 0.9 * radius)
        center = center.flip(-1) if rng.random() < 0.5 else center
    background, still = BACKGROUNDS[str(backgrounds[0])], torch.zeros(num_frames)
    scene = Scene(
        shape=str(shapes[0]), color=COLORS[str(colors[0])],
        texture=str(textures[0]) if is_camera else "plain", background=background,
        second_color=shade(background), cell_size=0.5, texture_angle=0.0, center=center,
        radius=still + radius, angle=still, pan=pan, zoom=zoom, roll=roll)
    words = [f"{textures[i]} " if is_camera else "" for i in (0, int(other_textures))]
    prompts = [f"{with_article(f'{colors[i]} {shapes[i]}')} on "
               f"{with_article(word + backgrounds[i])} background" for i, word in enumerate(words)]
    kind = "camera" if is_camera else "still" if motion in STATIC else "object"
    kind += ", another texture" if is_camera and other_textures else ""
    if photos:
        rng = np.random.default_rng([11, seed])
        scene = replace(scene, shape="" if is_camera else scene.shape, texture="plain",
                        photo=photo_background(rng, photos))
        prompts[0] = caption(scene, rng)
        kind += " over photographs"
    if has_camera_shake:
        scene, kind = add_camera_shake(scene, rng), kind + ", by hand"
    return EvalCase(kind, motion, scene, prompts[0], prompts[1], str(shapes[1]), str(colors[1]),
                    str(backgrounds[1]), seed)
