"""Location-aware semantic guidance (arXiv 2406.05338, versions 1 to 3).

Where the subject is, the attention to its word tells. The guided clip's features inside the
reference's foreground are drawn to those that an unguided clip of the same noise and prompt has
inside its own, and likewise for the background.
"""
import math
from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from .config import SampleConfig
from .errors import InputError
from .inversion import Inversion
from .model import Model
from .sampler import Steps, cfg_scale, noise
from .schedule import ddim_step

SUBJECT = "up_blocks.1.attentions"      # whose attention to the text tells where the subject is
THRESHOLD = 0.3                         # of the attention to the subject's word, min-max normalised
SIGMA = 5 / 16                          # of the Gaussian around its centre, in sides of the grid


class Masks(NamedTuple):
    """Weights (f, h, w) of the positions of each frame."""
    foreground: Tensor
    background: Tensor


def subject_tokens(model: Model, prompt: str, word: str) -> list[int]:
    """Positions in the encoded prompt of a word's tokens, wherever it stands.

    Raises InputError, with the prompt's words, for a word that is not in it.
    """
    pieces, wanted = model.tokenizer.split(prompt), model.tokenizer.split(word)
    positions: list[int] = []
    at = 1
    for i, (_, ids) in enumerate(pieces):
        if wanted and pieces[i:i + len(wanted)] == wanted:
            positions += range(at, at + sum(len(ids) for _, ids in wanted))
        at += len(ids)
    positions = [p for p in positions if p < model.config.text.max_length - 1]
    if not positions:
        words = ", ".join(text for text, _ in pieces if text.isalnum())
        raise InputError(f"the word {word!r} is not in the prompt {prompt!r}: it has {words}")
    return positions


def subject_mask(maps: Sequence[Tensor], tokens: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """Where the subject is, (f, h, w) bool, by maps (f, heads, h*w, m) of the attention to text.

    The mean over layers, heads and tokens, min-max normalised in each frame, above THRESHOLD.
    """
    each = [reduce(probs[..., list(tokens)], "f heads n m -> f n", "mean") for probs in maps]
    mean = torch.stack(each).mean(dim=0)
    low, high = mean.amin(dim=1, keepdim=True), mean.amax(dim=1, keepdim=True)
    share = (mean - low) / (high - low).clamp(min=torch.finfo(mean.dtype).tiny)
    return rearrange(share > THRESHOLD, "f (h w) -> f h w", h=grid[0])


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


def semantic_loss(keys: dict[str, Tensor], masks: Masks | None, own_keys: dict[str, Tensor],
                  own_masks: Masks | None) -> Tensor:
    """How far the keys (h*w, f, c) of the guided clip are from the unguided clip's own.

    With masks: of the reference's and the clip's own subject, the mean square difference of the
    means in front and of those behind. Without: of each frame's mean to the mean of all frames.
    Summed over the layers: a float32 scalar.
    """
    losses = []
    for name, guided in keys.items():
        guided, own = guided.float(), own_keys[name].float()
        if masks is None or own_masks is None:
            losses.append((guided.mean(dim=0) - own.mean(dim=(0, 1))).square().mean())
            continue
        for weight, own_weight in zip(masks, own_masks):
            difference = masked_mean(guided, weight) - masked_mean(own, own_weight)
            # A frame in which either has nothing there says nothing.
            there = (weight.flatten(1).any(dim=1) & own_weight.flatten(1).any(dim=1))
            losses.append((difference * there[:, None]).square().mean())
    return torch.stack(losses).sum()


class Features(NamedTuple):
    """What an unguided clip looks like at one step."""
    keys: dict[str, Tensor]
    masks: Masks | None


@dataclass(frozen=True)
class Semantics:
    """The subject of reference and prompt, and the blocks whose keys are compared.

    `reference_masks` gives the reference's at timestep t; it and `tokens`, those of the new
    prompt's subject, are None for the form without a subject.
    """
    model: Model
    blocks: tuple[str, ...]
    tokens: list[int] | None = None
    reference_masks: Callable[[int], Masks] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(f"{layer}.to_k" for layer in self.model.unet.temporal_layers(self.blocks))

    def loss(self, maps: dict[str, Tensor], own: Features, t: int) -> Tensor:
        """Of a guided clip's keys, among its maps, against an unguided one's features."""
        masks = None if self.reference_masks is None else self.reference_masks(t)
        return semantic_loss({name: maps[name] for name in self.keys}, masks, own.keys, own.masks)

    @torch.no_grad()
    def unguided(self, z: Tensor, text: Tensor, null: Tensor, steps: Steps, config: SampleConfig
                 ) -> Iterator[Features]:
        """Samples by classifier-free guidance alone; yields what is seen before each step."""
        model, grid = self.model, z.shape[-2:]
        cross = () if self.tokens is None else (SUBJECT,)
        for i, (t, t_prev) in enumerate(steps):
            eps, maps = model.unet(z.to(model.dtype), t, text, maps_of=(*self.keys, *cross))
            keys = {name: maps[name] for name in self.keys}
            yield Features(keys, None if self.tokens is None else
                           plain(mask_of(maps, self.tokens, grid)))
            assert eps is not None
            eps = eps.float()
            scale = cfg_scale(i, config)
            if scale != 1:
                eps_null = noise(model, z, t, null)
                eps = eps_null + scale * (eps - eps_null)
            z = ddim_step(z, eps, eps, model.schedule.abar(t), model.schedule.abar(t_prev))


def mask_of(maps: dict[str, Tensor], tokens: Sequence[int], grid: tuple[int, ...]) -> Tensor:
    """The subject mask by the maps of SUBJECT, for latents of `grid` rows and columns."""
    found = [probs for name, probs in maps.items() if name.startswith(SUBJECT)]
    return subject_mask(found, tokens, grid_of(found[0].shape[2], grid[0] / grid[1]))


def reference_masks(model: Model, latents: Tensor, prompt: str, word: str, t: int) -> Masks:
    """Of the word's subject in noised latents (1, c, f, h, w) at timestep t, softened."""
    with torch.no_grad():
        _, maps = model.unet(latents.to(model.device, model.dtype), t, model.encode_text([prompt]),
                             maps_of=(SUBJECT,), need_eps=False)
    return softened(mask_of(maps, subject_tokens(model, prompt, word), latents.shape[-2:]))


def semantics_of(model: Model, blocks: tuple[str, ...], prompt: str, word: str, ref_prompt: str,
                 ref_word: str, reference: Inversion | Tensor, t: int) -> Semantics:
    """With a subject: `ref_word` of the reference's prompt, `word` of the new one.

    reference   its inversion, read at every step; or its latents noised to t, read once
    """
    tokens = subject_tokens(model, prompt, word)
    if isinstance(reference, Tensor):
        once = reference_masks(model, reference, ref_prompt, ref_word, t)
        return Semantics(model, blocks, tokens, lambda _: once)
    latents = reference.latents
    return Semantics(model, blocks, tokens, lambda t: reference_masks(
        model, latents[t], ref_prompt, ref_word, t))
