"""Random scenes and their captions, for training the built-in demo model."""
import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .scenes import BACKGROUNDS, COLORS, EMOJI, SHAPES, TEXTURES, Rgb, Scene

Rng = np.random.Generator
OTHER_WORDS = ("grey photo shape background ground backdrop a an that is in on over against front "
               "of with and").split()
VOCABULARY = tuple(sorted({*SHAPES, *COLORS, *BACKGROUNDS, *EMOJI, *TEXTURES[1:], *OTHER_WORDS}))


def random_scene(rng: Rng, num_frames: int) -> Scene:
    """Return a random scene: the subject moves, or the camera, or both, or neither.

    Textured backgrounds are more frequent if the camera moves, because its motion cannot be seen on
    a plain one.
    """
    moving = rng.choice(["object", "camera", "both", "nothing"], p=[.5, .3, .1, .1])
    camera = moving in ("camera", "both")
    texture = str(rng.choice(TEXTURES, p=[.2, .3, .25, .25] if camera else [.75, .1, .08, .07]))
    background = str(rng.choice(list(BACKGROUNDS)))
    radius = ease(rng, num_frames, *np.exp(rng.uniform(math.log(.28), math.log(.5), 2)))
    if moving != "object" or rng.random() < 0.75:
        radius = radius.mean().expand(num_frames)
    angle = torch.full((num_frames,), rng.normal(0, .08))
    if rng.random() < 0.08:
        angle = angle + ease(rng, num_frames, 0, rng.uniform(-3, 3))

    pan, zoom, roll = camera_path(rng, num_frames) if camera else still_camera(num_frames)
    reach = 1 - 0.8 * float(radius.max())
    spread = 0.35 if camera else reach                      # of subjects that do not move
    center = (path(rng, num_frames, reach) if moving in ("object", "both") else
              torch.tensor(rng.uniform(-spread, spread, 2)).float().expand(num_frames, 2))
    return Scene(
        shape=str(rng.choice(SHAPES)), color=COLORS[str(rng.choice(list(COLORS)))],
        texture=texture, background=BACKGROUNDS[background],
        second_color=(BACKGROUNDS[str(rng.choice([n for n in BACKGROUNDS if n != background]))]
                      if rng.random() < 0.4 else shade(BACKGROUNDS[background])),
        cell_size=rng.uniform(.4, .65), texture_angle=rng.uniform(-.6, .6) * (rng.random() < 0.3),
        center=center, radius=radius.float(), angle=angle.float(), pan=pan, zoom=zoom, roll=roll)


def still_camera(num_frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pan (f, 2), zoom (f,) and roll (f,) of a camera that does not move."""
    return torch.zeros(num_frames, 2), torch.ones(num_frames), torch.zeros(num_frames)


def camera_path(rng: Rng, num_frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pan (f, 2), zoom (f,) and roll (f,) of a camera; one or two of them change."""
    pan, zoom, roll = still_camera(num_frames)
    kinds = rng.choice(["pan", "zoom", "roll"], 1 + (rng.random() < 0.25), replace=False,
                       p=[.3, .3, .4])
    if "pan" in kinds:
        pan = path(rng, num_frames, reach=1.0)
        pan = pan - pan.mean(dim=0)
    if "zoom" in kinds:
        zoom = ease(rng, num_frames, *rng.uniform(-.5, .5, 2)).exp()
    if "roll" in kinds:
        roll = ease(rng, num_frames, 0, rng.uniform(-1.5, 1.5))
    return pan, zoom, roll


def shade(color: Rgb) -> Rgb:
    """Return a lighter shade of a dark color, or a darker shade of a light one."""
    r, g, b = (c + .35 * (1 - c) if sum(color) < 1.2 else c * .6 for c in color)
    return r, g, b


def ease(rng: Rng, num_frames: int, start: float, end: float) -> Tensor:
    """Return values (f,) from start to end: evenly, with soft ends, or there and half way back."""
    t, style = torch.linspace(0, 1, num_frames), rng.random()
    if style > 0.4:
        t = (math.pi * 0.75 * t).sin() if style > 0.8 else t * t * (3 - 2 * t)
    return start + (end - start) * t


def path(rng: Rng, num_frames: int, reach: float, max_frequency: float = 1.5) -> Tensor:
    """Return a random path (f, 2) within [-reach, reach].

    Args:
        rng: Random numbers.
        num_frames: Length of the path.
        reach: Largest distance from the middle, along each axis.
        max_frequency: Largest number of periods in a clip, for the waves of smooth curves.
    """
    time = np.linspace(0, 1, num_frames)
    kind = rng.choice(["curve", "waypoints", "bounce"], p=[.45, .3, .25])
    points = (curve_path(rng, time, max_frequency) if kind == "curve" else
              waypoint_path(rng, time) if kind == "waypoints" else bounce_path(rng, time))
    size = 2 * reach * rng.uniform(.25, 1)
    if kind == "bounce":                                    # it bounces off the picture's edges
        return torch.tensor(points * reach, dtype=torch.float32)
    # Fit the path into a box of random size and place, for small and for large motions.
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (size / np.maximum(high - low, 1e-6)).min()
    corner = rng.uniform(-reach, np.maximum(reach - (high - low) * scale, -reach + 1e-9))
    return torch.tensor(corner + (points - low) * scale, dtype=torch.float32)


def curve_path(rng: Rng, time: np.ndarray, max_frequency: float) -> np.ndarray:
    """Return a path (f, 2) of three sine waves along each axis; slow waves are larger."""
    waves, phases = rng.uniform(.2, max_frequency, (3, 2, 1)), rng.uniform(0, 2 * np.pi, (3, 2, 1))
    heights = rng.normal(0, 1, (3, 2, 1)) / (.3 + waves)
    return (heights * np.sin(2 * np.pi * waves * time + phases)).sum(axis=0).T


def waypoint_path(rng: Rng, time: np.ndarray) -> np.ndarray:
    """Return a path (f, 2) of straight legs between two to four points, with a rest at each."""
    stops = rng.uniform(-1, 1, (rng.integers(2, 5), 2))
    arrival = np.sort(np.concatenate([[0, 1], rng.uniform(0, 1, len(stops) - 2)]))
    leg = np.clip(np.searchsorted(arrival, time, side="right") - 1, 0, len(stops) - 2)
    progress = (time - arrival[leg]) / np.maximum(arrival[leg + 1] - arrival[leg], 1e-6)
    rest = rng.uniform(0, .4)                               # fraction of each leg without motion
    progress = np.clip((progress - rest / 2) / (1 - rest), 0, 1)
    if rng.random() < 0.6:
        progress = progress * progress * (3 - 2 * progress)
    return stops[leg] + (stops[leg + 1] - stops[leg]) * progress[:, None]


def bounce_path(rng: Rng, time: np.ndarray) -> np.ndarray:
    """Return a path (f, 2) of constant speed, reflected at the edges of [-1, 1]."""
    speed, heading = rng.uniform(.6, 3), rng.uniform(0, 2 * np.pi)
    velocity = speed * np.array([np.cos(heading), np.sin(heading)])
    straight = rng.uniform(-1, 1, 2) + velocity * time[:, None]
    return 1 - np.abs((straight + 1) % 4 - 2)


def select_frames(scene: Scene, indices: list[int]) -> Scene:
    """Return a scene with only the frames at `indices`."""
    tracks = ("center", "radius", "angle", "pan", "zoom", "roll")
    return dataclasses.replace(scene, **{name: getattr(scene, name)[indices] for name in tracks})


def with_article(words: str) -> str:
    """Return words with the article "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(scene: Scene, rng: Rng) -> str:
    """Return a random description of a scene, without its motion, with or without details."""
    is_shape = scene.shape in SHAPES
    if not scene.shape or (is_shape and scene.sprite is not None):
        return "a photo"
    color, behind = name_of(scene.color, COLORS), describe_background(scene, rng)
    place = f"{behind} {rng.choice(['background', 'ground', 'backdrop'], p=[.5, .4, .1])}"
    color_and_shape, choice = f"{color} {scene.shape}", rng.random()
    subject = (scene.shape if choice < .06 or not is_shape else
               f"{color} shape" if choice < .09 else color_and_shape)
    if rng.random() < .1:
        return with_article(subject) if rng.random() < .6 else subject
    a_subject, a_place = with_article(subject), with_article(place)
    phrases = [
        f"{a_subject} on {a_place}", f"{a_subject} on {a_place}", f"{subject}, {place}",
        f"{subject} on {behind}", f"{subject} on {place}",
        f"{a_subject} {rng.choice(['over', 'against', 'in front of'])} {a_place}",
        f"{place}, {subject}", f"{a_place} with {a_subject}", f"{a_subject}, {place}",
        f"{a_subject} on {behind}"]
    if subject == color_and_shape:
        a_shape = with_article(scene.shape)
        that, in_color = f"{a_shape} that is {color}", f"{a_shape} in {color}"
        phrases += [f"{that}, {place}", f"{that} on {a_place}", that, f"{in_color} on {a_place}"]
    return str(rng.choice(phrases))


def describe_background(scene: Scene, rng: Rng) -> str:
    """Return the words for a background, such as "striped navy and pink"."""
    if scene.photo is not None:
        return "photo"
    name, second = name_of(scene.background, BACKGROUNDS), name_of(scene.second_color, BACKGROUNDS)
    if name == "gray" and rng.random() < 0.25:
        name = "grey"
    if scene.texture == "plain":
        return name
    words = [scene.texture, f"{name} and {second}" if second else name]
    return " ".join(words if rng.random() < .5 else words[::-1])


def name_of(color: Rgb, colors: Mapping[str, Rgb]) -> str:
    """Return the name of a color, or "" for a color without a name."""
    return {value: name for name, value in colors.items()}.get(color, "")
