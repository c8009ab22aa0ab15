"""Location-aware semantic guidance (arXiv 2406.05338, versions 1 to 3).

Where the subject is, the attention to its word tells. The guided clip's features inside the
reference's foreground are drawn to those that an unguided clip of the same noise and prompt has
inside its own, and likewise for the background.
"""
import math
from dataclasses import dataclass
from typing import Callable, Iterable, Mapping, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from .config import SampleConfig
from .errors import InputError
from .model import Model
from .motion import Guide
from .sampler import Trajectory, embeddings
from .networks.temporal import Attended, Wanted
from .context_windows import Windows

SUBJECT = "up_blocks.1"                 # whose attention to the text tells where the subject is
SIGMA = 5 / 16                          # of the Gaussian around its centre, in sides of the grid


class Masks(NamedTuple):
    """Weights (f, h, w) of the positions of each frame."""
    foreground: Tensor
    background: Tensor


def subject_tokens(model: Model, prompt: str, word: str) -> list[int]:
    """Positions in the encoded prompt of a word's tokens, wherever it stands.

    Raises InputError, with the prompt's words, for a word that is not in what is read of it.
    """
    length = model.config.text.max_length
    pieces, wanted = model.tokenizer.split(prompt), model.tokenizer.split(word)
    positions: list[int] = []
    at = 1
    for i, (_, ids) in enumerate(pieces):
        if wanted and pieces[i:i + len(wanted)] == wanted:
            positions += range(at, at + sum(len(ids) for _, ids in wanted))
        at += len(ids)
    if not positions:
        words = ", ".join(text for text, _ in pieces if text.isalnum())
        raise InputError(f"the word {word!r} is not in the prompt {prompt!r}: it has {words}")
    if min(positions) >= length - 1:
        raise InputError(f"the word {word!r} stands behind the {length - 2} tokens of the prompt "
                         "that are read: name it sooner")
    return [p for p in positions if p < length - 1]


def subject_mask(maps: Sequence[Tensor], tokens: Sequence[int], grid: tuple[int, int],
                 threshold: float) -> Tensor:
    """Where the subject is, (f, h, w) bool, by maps (f, heads, h*w, m) of the attention to text.

    The mean over layers, heads and tokens, min-max normalised in each frame, above the threshold.
    """
    each = [reduce(probs[..., list(tokens)], "f heads n m -> f n", "mean") for probs in maps]
    mean = torch.stack(each).mean(dim=0)
    low, high = mean.amin(dim=1, keepdim=True), mean.amax(dim=1, keepdim=True)
    share = (mean - low) / (high - low).clamp(min=torch.finfo(mean.dtype).tiny)
    return rearrange(share > threshold, "f (h w) -> f h w", h=grid[0])


def softened(mask: Tensor) -> Masks:
    """A mask (f, h, w) under a Gaussian at its centre: G M in front, (1 - G)(1 - M) behind."""
    _, h, w = mask.shape
    inside = mask.float()
    y, x = (torch.arange(n, device=mask.device, dtype=torch.float32) for n in (h, w))
    area = reduce(inside, "f h w -> f", "sum").clamp(min=1)
    cy = (reduce(inside, "f h w -> f h", "sum") * y).sum(dim=1) / area
    cx = (reduce(inside, "f h w -> f w", "sum") * x).sum(dim=1) / area
    far = (rearrange(y - rearrange(cy, "f -> f 1"), "f h -> f h 1") ** 2
           + rearrange(x - rearrange(cx, "f -> f 1"), "f w -> f 1 w") ** 2)
    gauss = torch.exp(-far / (2 * SIGMA ** 2 * h * w))
    return Masks(gauss * inside, (1 - gauss) * (1 - inside))


def plain(mask: Tensor) -> Masks:
    return Masks(mask.float(), 1 - mask.float())


def masked_mean(keys: Tensor, weight: Tensor) -> Tensor:
    """Mean (f, c) of keys (h*w, f, c) over the positions, by weights (f, h', w') of any grid of
    the same aspect; zeros in frames without any weight."""
    size = grid_of(keys.shape[0], weight.shape[1] / weight.shape[2])
    weight = F.interpolate(weight[None], size, mode="nearest")[0]
    weight = rearrange(weight, "f h w -> (h w) f 1")
    return (weight * keys).sum(dim=0) / weight.sum(dim=0).clamp(min=1e-6)


def grid_of(positions: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of so many positions, whose quotient is nearest to `aspect`."""
    rows = min((h for h in range(1, positions + 1) if positions % h == 0),
               key=lambda h: abs(math.log(h * h / positions / aspect)))
    return rows, positions // rows


class Appearance(NamedTuple):
    """What an unguided clip looks like at one step.

    means  layer -> the mean keys (f, c) in front and behind; without a subject one, (c,)
    there  whether a frame has any place in front, and behind: (f,) bool each
    """
    means: dict[str, tuple[Tensor, ...]]
    there: tuple[Tensor, ...] = ()


def appearance(keys: Mapping[str, Tensor], masks: Masks | None) -> Appearance:
    """Of keys {layer: (h*w, f, c)}, by where the clip's own subject is, if it has one."""
    if masks is None:
        return Appearance({name: (key.float().mean(dim=(0, 1)),) for name, key in keys.items()})
    return Appearance({name: tuple(masked_mean(key.float(), weight) for weight in masks)
                       for name, key in keys.items()}, tuple(map(anywhere, masks)))


def anywhere(weight: Tensor) -> Tensor:
    """(f,) bool of weights (f, h, w): the frames in which any is not 0."""
    return weight.flatten(1).any(dim=1)


def semantic_loss(keys: Mapping[str, Tensor], masks: Masks | None, unguided: Appearance) -> Tensor:
    """How far the keys {layer: (h*w, f, c)} of the guided clip are from the unguided clip's means.

    With masks, of the reference's subject: the mean square difference of the means in front and of
    those behind. Without: of each frame's mean to the mean of all frames. Summed over the layers:
    a float32 scalar.
    """
    losses = []
    for name, guided in keys.items():
        if masks is None:
            losses.append((guided.float().mean(dim=0) - unguided.means[name][0]).square().mean())
            continue
        for weight, mean, there in zip(masks, unguided.means[name], unguided.there):
            difference = masked_mean(guided.float(), weight) - mean
            # A frame in which either has nothing there says nothing.
            both = anywhere(weight) & there
            losses.append((difference * both[:, None]).square().mean())
    return torch.stack(losses).sum()


@dataclass(frozen=True)
class Subject:
    """What is compared with what: the subject of the new prompt, and that of the reference."""
    tokens: list[int]                   # of the word in the new prompt
    masks: Callable[[int], Masks]       # of the reference's subject, at a timestep


def subject_of(model: Model, prompt: str, word: str, ref_prompt: str, ref_word: str,
               attend: Callable[[int, Wanted], Attended], config: SampleConfig) -> Subject:
    """The subject that `word` names in the new prompt, and `ref_word` in the reference's.

    attend   gives the reference's attention at a timestep, as `Inversion.attend` does

    Raises InputError for a word that is not in its prompt.
    """
    tokens = subject_tokens(model, prompt, word)
    ref_tokens = subject_tokens(model, ref_prompt, ref_word)

    def masks(t: int) -> Masks:
        return softened(mask_of(attend(t, Wanted(text_maps=(SUBJECT,))), ref_tokens, config))
    return Subject(tokens, masks)


@torch.no_grad()
def noised(model: Model, latents: Tensor, prompt: str, config: SampleConfig, noise: Tensor
           ) -> Callable[[int, Wanted], Attended]:
    """The attention to its prompt of a reference (1, c, f, h, w) that is noised once, to extract_t,
    and then the same at every timestep."""
    z = model.schedule.add_noise(latents.float(), noise.to(latents.device), config.extract_t)
    seen = model.unet.attend(z.to(model.device, model.dtype), config.extract_t,
                             model.encode_text([prompt]), Wanted(text_maps=(SUBJECT,)))
    return lambda t, wanted: seen


def mask_of(seen: Attended, tokens: Sequence[int], config: SampleConfig) -> Tensor:
    """The subject mask by the attention to the text of SUBJECT."""
    maps = list(seen.text_maps.values())
    grid = grid_of(maps[0].shape[2], config.height / config.width)
    return subject_mask(maps, tokens, grid, config.mask_threshold)


def check_whole(windows: Windows) -> None:
    """Raises InputError for a clip in several windows: what is compared is of the whole."""
    if len(windows.starts) > 1:
        raise InputError("semantic guidance is not possible here: it compares whole clips of up to "
                         f"{windows.length} frames, without loop")


@torch.no_grad()
def semantic_guide(model: Model, prompt: str, latents: Tensor, config: SampleConfig,
                   subject: Subject | None = None, condition: Tensor | None = None,
                   progress: Callable[[Iterable], Iterable] = iter) -> Guide:
    """Towards the look of the unguided clip, inside the subject of the reference and around it.

    latents    the starting noise that is sampled from, whose unguided clip is sampled here as far
               as guidance goes; of each step its masked mean keys are kept
    subject    None for the form without one
    condition  as `sample` is given it
    progress   wraps the steps, of which there are config.guidance_steps, for a bar

    Raises InputError where its weight is 0, and for a clip that is sampled in windows.
    """
    if not config.semantic_scale * config.motion_weight:
        raise InputError("semantic_scale and motion_weight must both be above 0 for this guide")
    trajectory = Trajectory(model, *embeddings(model, prompt, config), config, condition)
    check_whole(trajectory.windows)
    wanted = Wanted(temporal_keys=config.semantic_blocks)
    z, unguided = latents.to(model.device, torch.float32), {}
    for i, (t, _) in progress(list(enumerate(trajectory.steps[:config.guidance_steps]))):
        eps, seen = trajectory.predict(z, t, trajectory.text, 0, wanted if subject is None else
                                       wanted._replace(text_maps=(SUBJECT,)))
        unguided[t] = appearance(seen.temporal_keys, None if subject is None else
                                 plain(mask_of(seen, subject.tokens, config)))
        z = trajectory.step(i, z, eps)
    share = config.semantic_scale / config.motion_weight

    def loss(seen: Attended, t: int) -> Tensor:
        masks = None if subject is None else subject.masks(t)
        return share * semantic_loss(seen.temporal_keys, masks, unguided[t])
    return Guide(wanted, loss)
