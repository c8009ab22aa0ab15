"""Random clips of the embedded model's world, and captions for them: what it is trained on."""
import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from .scenes import COLORS, GROUNDS, SHAPES, TEXTURES, Scene
from .vocabulary import EMOJI

Rng = np.random.Generator


def random_scene(rng: Rng, frames: int) -> Scene:
    """A subject on a ground; the subject moves, or the camera, or both, or neither.

    Textured grounds are drawn oftener where the camera moves: on a plain one it cannot be seen.
    """
    moving = rng.choice(["object", "camera", "both", "nothing"], p=[.5, .3, .1, .1])
    camera = moving in ("camera", "both")
    texture = str(rng.choice(TEXTURES, p=[.2, .3, .25, .25] if camera else [.75, .1, .08, .07]))
    ground = str(rng.choice(list(GROUNDS)))
    radius = eased(rng, frames, *np.exp(rng.uniform(math.log(.28), math.log(.5), 2)))
    if moving != "object" or rng.random() < 0.75:
        radius = radius.mean().expand(frames)
    angle = torch.full((frames,), rng.normal(0, .08))
    if rng.random() < 0.08:
        angle = angle + eased(rng, frames, 0, rng.uniform(-3, 3))

    still = torch.zeros(frames)
    pan, zoom, roll = torch.zeros(frames, 2), still.exp(), still
    if camera:
        pan, zoom, roll = moving_camera(rng, frames)
    if moving in ("object", "both"):
        center = path(rng, frames, reach=1 - 0.8 * float(radius.max()))
    else:
        reach = 0.35 if camera else 1 - 0.8 * float(radius.max())
        center = torch.tensor(rng.uniform(-reach, reach, 2), dtype=torch.float32).expand(frames, 2)
    return Scene(
        shape=str(rng.choice(SHAPES)), color=COLORS[str(rng.choice(list(COLORS)))],
        texture=texture, ground=GROUNDS[ground], second=second_colour(rng, ground),
        cell=rng.uniform(.4, .65), texture_angle=rng.uniform(-.6, .6) * (rng.random() < 0.3),
        center=center, radius=radius.float(), angle=angle.float(),
        pan=pan, zoom=zoom, roll=roll)


def moving_camera(rng: Rng, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """A camera's pan (f, 2), zoom (f,) and roll (f,); one of them moves, or two."""
    pan, zoom, roll = torch.zeros(frames, 2), torch.zeros(frames), torch.zeros(frames)
    kinds = rng.choice(["pan", "zoom", "roll"], 1 + (rng.random() < 0.25), replace=False,
                       p=[.3, .3, .4])
    if "pan" in kinds:
        pan = path(rng, frames, reach=1.0)
        pan = pan - pan.mean(dim=0)
    if "zoom" in kinds:
        zoom = eased(rng, frames, *rng.uniform(-.5, .5, 2))
    if "roll" in kinds:
        roll = eased(rng, frames, 0, rng.uniform(-1.5, 1.5))
    return pan, zoom.exp(), roll


def second_colour(rng: Rng, ground: str) -> tuple[float, float, float]:
    """A texture's other colour: another ground's, or a lighter or darker tone of the same one."""
    if rng.random() < 0.4:
        return GROUNDS[str(rng.choice([name for name in GROUNDS if name != ground]))]
    return tone(GROUNDS[ground])


def tone(color: tuple[float, float, float]) -> tuple[float, float, float]:
    r, g, b = (c + .35 * (1 - c) if sum(color) < 1.2 else c * .6 for c in color)
    return r, g, b


def eased(rng: Rng, frames: int, start: float, end: float) -> Tensor:
    """From start to end (f,): evenly, with a soft start and stop, or there and half way back."""
    t = torch.linspace(0, 1, frames)
    style = rng.random()
    if style > 0.4:
        t = t * t * (3 - 2 * t)
    if style > 0.8:
        t = (math.pi * 0.75 * torch.linspace(0, 1, frames)).sin()
    return start + (end - start) * t


def path(rng: Rng, frames: int, reach: float, fastest: float = 1.5) -> Tensor:
    """A path (f, 2) within [-reach, reach]: smooth curves, waypoints with stops, or bounces.

    Curves have waves of up to `fastest` periods in a clip.
    """
    time = np.linspace(0, 1, frames)
    kind = rng.choice(["curve", "waypoints", "bounce"], p=[.45, .3, .25])
    if kind == "curve":
        points = curve(rng, time, fastest)
    elif kind == "waypoints":
        points = waypoints(rng, time)
    else:
        points = bounces(rng, time)
    size = 2 * reach * rng.uniform(.25, 1)
    if kind == "bounce":                                    # its walls are the picture's
        return torch.tensor(points * reach, dtype=torch.float32)
    # Into a box of random size at a random place: some motions are small, some fill the picture.
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (size / np.maximum(high - low, 1e-6)).min()
    corner = rng.uniform(-reach, np.maximum(reach - (high - low) * scale, -reach + 1e-9))
    return torch.tensor(corner + (points - low) * scale, dtype=torch.float32)


def curve(rng: Rng, time: np.ndarray, fastest: float) -> np.ndarray:
    """Three sine waves in each direction, the slow ones the larger."""
    waves, phases = rng.uniform(.2, fastest, (3, 2, 1)), rng.uniform(0, 2 * np.pi, (3, 2, 1))
    heights = rng.normal(0, 1, (3, 2, 1)) / (.3 + waves)
    return (heights * np.sin(2 * np.pi * waves * time + phases)).sum(axis=0).T


def waypoints(rng: Rng, time: np.ndarray) -> np.ndarray:
    """Straight legs between two to four points, with a rest on each and mostly eased."""
    stops = rng.uniform(-1, 1, (rng.integers(2, 5), 2))
    when = np.sort(np.concatenate([[0, 1], rng.uniform(0, 1, len(stops) - 2)]))
    leg = np.clip(np.searchsorted(when, time, side="right") - 1, 0, len(stops) - 2)
    along = (time - when[leg]) / np.maximum(when[leg + 1] - when[leg], 1e-6)
    rest = rng.uniform(0, .4)                               # share of each leg spent standing
    along = np.clip((along - rest / 2) / (1 - rest), 0, 1)
    if rng.random() < 0.6:
        along = along * along * (3 - 2 * along)
    return stops[leg] + (stops[leg + 1] - stops[leg]) * along[:, None]


def bounces(rng: Rng, time: np.ndarray) -> np.ndarray:
    """One speed, mirrored at the walls of [-1, 1]."""
    speed, heading = rng.uniform(.6, 3), rng.uniform(0, 2 * np.pi)
    velocity = speed * np.array([np.cos(heading), np.sin(heading)])
    straight = rng.uniform(-1, 1, 2) + velocity * time[:, None]
    return 1 - np.abs((straight + 1) % 4 - 2)


def at(scene: Scene, frames: list[int]) -> Scene:
    """The same scene in only some of its frames."""
    tracks = ("centre", "radius", "angle", "pan", "zoom", "roll")
    return dataclasses.replace(scene, **{name: getattr(scene, name)[frames] for name in tracks})


def caption(scene: Scene, rng: Rng) -> str:
    """One of many phrasings of what is seen. Never says how it moves; may leave things out."""
    known = scene.shape in SHAPES
    if not scene.shape or (known and scene.skin is not None):
        return "a photo"
    color = next(name for name, value in COLORS.items() if value == scene.color)
    ground = next(name for name, value in GROUNDS.items() if value == scene.ground)
    ground = ground if scene.photo is None else "photo"
    if ground == "gray" and rng.random() < 0.25:
        ground = "grey"
    if scene.texture != "plain":
        seconds = [name for name, value in GROUNDS.items() if value == scene.second]
        ground = f"{ground} and {seconds[0]}" if seconds else ground
        parts = [scene.texture, ground] if rng.random() < .5 else [ground, scene.texture]
        ground = " ".join(parts)
    back = rng.choice(["background", "ground", "backdrop"], p=[.5, .4, .1])
    subject, said = f"{color} {scene.shape}", rng.random()
    if said < .06 or not known:
        subject = scene.shape
    elif said < .09:
        subject = f"{color} shape"
    if rng.random() < .1:
        return an(subject) if rng.random() < .6 else subject
    behind = f"{ground} {back}"
    phrases = [
        f"{an(subject)} on {an(behind)}", f"{an(subject)} on {an(behind)}",
        f"{subject}, {behind}", f"{subject} on {ground}", f"{subject} on {behind}",
        f"{an(subject)} {rng.choice(['over', 'against', 'in front of'])} {an(behind)}",
        f"{behind}, {subject}", f"{an(behind)} with {an(subject)}",
        f"{an(subject)}, {ground} {back}", f"{an(subject)} on {ground}"]
    if subject == f"{color} {scene.shape}":
        that = f"{an(scene.shape)} that is {color}"
        phrases += [f"{that}, {behind}", f"{that} on {an(behind)}", that,
                    f"{an(scene.shape)} in {color} on {an(behind)}"]
    return str(rng.choice(phrases))


def an(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


VOCABULARY = tuple(sorted({
    *SHAPES, *COLORS, *GROUNDS, *EMOJI, "grey", *TEXTURES[1:], "photo", "shape", "background",
    "ground", "backdrop", "a", "an", "that", "is", "in", "on", "over", "against", "front", "of",
    "with", "and"}))
