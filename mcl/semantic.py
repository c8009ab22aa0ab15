"""The paper's first form: location-aware semantic guidance (arXiv 2406.05338, versions 1 to 3).

Cross-attention to the subject's word locates the subject. The features of the guided clip inside
the reference's foreground are guided towards those of an unguided clip, of the same noise and
prompt, inside its own foreground; likewise for the background.
"""
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from .config import SampleConfig
from .context_windows import ContextWindows
from .errors import InputError
from .guidance import Guidance
from .model import Model
from .networks.attention import AttentionMaps, AttentionRequest
from .sampler import Progress, Sampler, no_progress

SUBJECT_REQUEST = AttentionRequest(cross=("up_blocks.1",))  # attention that locates the subject
GAUSSIAN_SIGMA = 5 / 16                     # of the softened masks, in sides of the grid


KeyMeans = dict[str, list[Tensor]]              # mean keys by layer, for each mask


class Masks(NamedTuple):
    """Weights (f, h, w) of the positions of each frame, 0 to 1."""

    foreground: Tensor
    background: Tensor


def subject_tokens(model: Model, prompt: str, word: str) -> list[int]:
    """Return the positions of a word's tokens in the encoded prompt, at every occurrence.

    Raises:
        InputError: If the word is not in the prompt, or is beyond the 75 tokens that are read.
    """
    end = model.config.text_encoder.max_position_embeddings - 1
    pieces, sought = model.tokenizer.split(prompt), model.tokenizer.split(word)
    starts = list(accumulate((len(ids) for _, ids in pieces), initial=1))
    positions = [position for i in range(len(pieces)) if pieces[i:i + len(sought)] == sought
                 for position in range(starts[i], starts[i + len(sought)])]
    if not positions:
        words = ", ".join(text for text, _ in pieces if text.isalnum()) or "it has none"
        raise InputError(f"{word!r} is not in the prompt {prompt!r}: name a word of it ({words})")
    if positions[0] >= end:
        raise InputError(f"{word!r} is not among the first {end - 1} tokens: move it to the front")
    return [position for position in positions if position < end]


def subject_mask(attention: AttentionMaps, tokens: Sequence[int], threshold: float) -> Tensor:
    """Return where the subject is, (f, h, w) bool, from cross-attention to its tokens.

    The mean over layers, heads and tokens is normalized to 0 to 1 in each frame. The mask is where
    it is above the threshold.

    Args:
        attention: Cross-attention maps of one block.
        tokens: Positions of the subject's tokens.
        threshold: 0 to 1.
    """
    mean = torch.stack([reduce(probs[..., list(tokens)], "f heads n m -> f n", "mean")
                        for probs in attention.cross.values()]).mean(dim=0)
    low, high = mean.amin(dim=1, keepdim=True), mean.amax(dim=1, keepdim=True)
    normalized = (mean - low) / (high - low).clamp(min=torch.finfo(mean.dtype).tiny)
    h, _ = attention.grids[next(iter(attention.cross))]
    return rearrange(normalized > threshold, "f (h w) -> f h w", h=h)


def gaussian_masks(mask: Tensor) -> Masks:
    """Return a mask M (f, h, w) softened by a Gaussian G at its centroid: G*M and (1-G)*(1-M)."""
    inside, (h, w) = mask.float(), mask.shape[1:]
    y, x = torch.arange(h, device=mask.device)[:, None], torch.arange(w, device=mask.device)
    area = inside.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    center_y, center_x = ((inside * axis).sum(dim=(1, 2), keepdim=True) / area for axis in (y, x))
    squared_distance = (y - center_y) ** 2 + (x - center_x) ** 2
    gaussian = torch.exp(-squared_distance / (2 * GAUSSIAN_SIGMA ** 2 * h * w))
    return Masks(gaussian * inside, (1 - gaussian) * (1 - inside))


def binary_masks(mask: Tensor) -> Masks:
    """Return a mask (f, h, w) and its complement as weights."""
    return Masks(mask.float(), 1 - mask.float())


def masked_mean(keys: Tensor, grid: tuple[int, int], weight: Tensor) -> Tensor:
    """Return the weighted mean (f, c) of keys (h*w, f, c) over the positions of each frame.

    Args:
        keys: Temporal keys.
        grid: Rows and columns (h, w) of the keys' positions.
        weight: Weights (f, h', w'), resized to the grid. Frames without weight give zeros.
    """
    weight = rearrange(F.interpolate(weight[None], grid, mode="nearest")[0], "f h w -> (h w) f 1")
    return (weight * keys).sum(dim=0) / weight.sum(dim=0).clamp(min=1e-6)


def masked_key_means(attention: AttentionMaps, masks: Masks | None, dim: tuple[int, ...] = (0, 1)
                     ) -> KeyMeans:
    """Return the mean temporal keys of a clip inside and outside of its subject.

    Args:
        attention: Temporal keys (h*w, f, c) of the clip.
        masks: Masks of the subject, or None for the mean over whole frames.
        dim: Dimensions of the mean without masks: positions and frames, or only positions.

    Returns:
        Mean keys by layer: foreground and background (f, c); without masks one (c,), or (f, c).
    """
    return {name: [masked_mean(key.float(), attention.grids[name], weight) for weight in masks]
            if masks else [key.float().mean(dim)] for name, key in attention.temporal_keys.items()}


def semantic_loss(attention: AttentionMaps, masks: Masks | None, unguided: KeyMeans) -> Tensor:
    """Return the distance of the guided clip's mean keys from the unguided clip's.

    Args:
        attention: Temporal keys of the guided clip.
        masks: Masks of the reference's subject. Without them, each frame's mean over all positions
            is compared with the unguided clip's mean over all positions and frames.
        unguided: Mean keys of the unguided clip at the same step.

    Returns:
        Scalar float32: the mean squared differences, summed over layers and masks.
    """
    losses = []
    for name, means in masked_key_means(attention, masks, dim=(0,)).items():
        for mean, target in zip(means, unguided[name], strict=True):
            # The mean of a frame with an empty mask is 0. If either is 0, the frame does not count.
            is_valid = mean.any(dim=-1, keepdim=True) & target.any(dim=-1, keepdim=True)
            losses.append(((mean - target) * is_valid).square().mean())
    return torch.stack(losses).sum()


class SubjectMasks(NamedTuple):
    """The subject of the new clip and that of the reference.

    Attributes:
        tokens: Positions of the subject's tokens in the new prompt.
        masks: Function of a timestep that returns the masks of the reference's subject.
    """

    tokens: list[int]
    masks: Callable[[int], Masks]


def make_subject_masks(model: Model, prompt: str, word: str, ref_prompt: str, ref_word: str,
                       attention: Callable[[int, AttentionRequest], AttentionMaps],
                       config: SampleConfig) -> SubjectMasks:
    """Return the masks of a subject, named in both prompts.

    Args:
        model: The model.
        prompt: Prompt of the new clip.
        word: The subject in `prompt`.
        ref_prompt: What the reference shows.
        ref_word: The subject in `ref_prompt`.
        attention: Function that returns the reference's attention at a timestep, such as
            `InvertedReference.attention`.
        config: Settings with mask_threshold.

    Raises:
        InputError: If a word is not in its prompt.
    """
    tokens = subject_tokens(model, prompt, word)
    ref_tokens = subject_tokens(model, ref_prompt, ref_word)
    return SubjectMasks(tokens, lambda t: gaussian_masks(subject_mask(
        attention(t, SUBJECT_REQUEST), ref_tokens, config.mask_threshold)))


@torch.no_grad()
def noised_reference_attention(model: Model, latents: Tensor, prompt: str, config: SampleConfig,
                               noise: Tensor) -> Callable[[int, AttentionRequest], AttentionMaps]:
    """Return cross-attention of a reference that is noised once, for all timesteps.

    Args:
        model: The model.
        latents: Scaled latents (1, c, f, h, w) of the reference.
        prompt: What the reference shows.
        config: Settings with extraction_timestep.
        noise: Standard normal noise, like latents.
    """
    t, text, unet = config.extraction_timestep, model.encode_text([prompt]), model.unet
    z = model.schedule.add_noise(latents.float(), noise.to(latents.device), t)
    maps = unet.forward_to_attention(z.to(model.device, model.dtype), t, text, SUBJECT_REQUEST)
    return lambda t, request: maps


def require_single_window(windows: ContextWindows) -> None:
    """Raise InputError for several context windows: semantic guidance compares whole clips."""
    if len(windows.offsets) > 1:
        raise InputError(f"semantic guidance needs one context window of {windows.length} frames")


def semantic_guidance(model: Model, prompt: str, latents: Tensor, config: SampleConfig,
                      subject: SubjectMasks | None = None, control: Tensor | None = None,
                      progress: Progress = no_progress) -> Guidance:
    """Return guidance towards the appearance of the unguided clip.

    The unguided clip is sampled here for the guided steps, and its mean keys are stored.

    Args:
        model: The model.
        prompt: Prompt of the new clip.
        latents: Initial noise (1, c, f, h, w) of the new clip.
        config: Settings with semantic_scale and semantic_blocks.
        subject: Masks of the subject; None compares whole frames.
        control: Condition of SparseCtrl, as for `sample`.
        progress: Function that wraps an iterable in a progress bar, such as `tqdm`.

    Raises:
        InputError: If its weight is 0, or the clip has several context windows.
    """
    if not config.semantic_scale * config.motion_weight:
        raise InputError("semantic_scale and motion_weight must both be above 0")
    sampler = Sampler(model, prompt, config, control)
    require_single_window(sampler.windows)
    request = AttentionRequest(temporal_keys=config.semantic_blocks,
                               cross=SUBJECT_REQUEST.cross if subject else ())
    z, unguided = latents.detach().to(model.device, torch.float32), {}
    pairs = sampler.timestep_pairs[:config.guidance_steps]
    for i, (t, _) in progress(enumerate(pairs), desc="unguided clip", total=len(pairs)):
        eps, maps = sampler.predict_window(z, t, sampler.text, 0, request)
        masks = subject and binary_masks(subject_mask(maps, subject.tokens, config.mask_threshold))
        unguided[t] = masked_key_means(maps, masks)
        z = sampler.step(i, z, sampler.classifier_free_guidance(i, z, eps))

    return Guidance(
        lambda maps, t: semantic_loss(maps, subject and subject.masks(t), unguided[t]),
        config.semantic_blocks, "temporal_keys", config.semantic_scale / config.motion_weight)
