"""What the command reads of the reference, and of the pictures that are given."""
import argparse
import dataclasses
import functools
import sys
from typing import Any

import torch
from einops import rearrange
from tqdm import tqdm

from ..config import SampleConfig
from ..inversion import InvertedReference, inversion_timesteps, invert_reference
from ..model import Model
from ..motion import Motion, extract_motion
from ..semantic import SubjectMasks, noised_reference_attention, make_subject_masks
from ..networks.sparsectrl import sparsectrl_condition
from .arguments import REFERENCE_SEED


def read_reference(args: argparse.Namespace, model: Model, reference: torch.Tensor,
                   latents: torch.Tensor, config: SampleConfig) -> Motion | InvertedReference:
    if args.method == "inversion":
        bar = progress("inversion", len(inversion_timesteps(model.schedule, config)))
        return invert_reference(model, latents, args.ref_prompt, config, bar, args.inversion_dir)
    motion = read_once(args, model, reference, latents, config)
    if args.save_motion is not None:
        dataclasses.replace(motion, info=motion.info | {"source": args.ref.name}).save(
            args.save_motion)
    return motion


def read_once(args: argparse.Namespace, model: Model, reference: torch.Tensor,
              latents: torch.Tensor, config: SampleConfig) -> Motion:
    # Read under its own frames: the new clip's are not of this motion.
    own = [reference[frame, None] for _, frame in args.image]
    return extract_motion(model, latents, config, noise=reference_noise(latents),
                          condition=given_frames(model, own, args, config))


def reference_noise(latents: torch.Tensor) -> torch.Tensor:
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(REFERENCE_SEED))


def read_subject(args: argparse.Namespace, model: Model, read: Motion | InvertedReference,
                 latents: torch.Tensor | None, config: SampleConfig) -> SubjectMasks | None:
    if not args.subject or latents is None:
        return None
    ref_word, word = args.subject
    attend = read.attend if isinstance(read, InvertedReference) else noised_reference_attention(
        model, latents, args.ref_prompt, config, reference_noise(latents))
    return make_subject_masks(model, args.prompt, word, args.ref_prompt, ref_word, attend, config)


def given_frames(model: Model, pictures: list[torch.Tensor], args: argparse.Namespace,
                 config: SampleConfig) -> torch.Tensor | None:
    """SparseCtrl's condition: these pictures (1, 3, H, W), at the frames that --image names."""
    if not pictures:
        return None
    given = torch.cat(pictures)
    if model.config.sparsectrl.kind == "rgb":
        given = rearrange(model.vae.encode(given), "1 c n h w -> n c h w")
    else:
        given = (given + 1) / 2
    return sparsectrl_condition(given, [frame for _, frame in args.image], config.num_frames)


def progress(title: str, steps: int) -> Any:
    """Wraps an iterator of so many steps in a bar."""
    return functools.partial(tqdm, total=steps, desc=title, unit="step", file=sys.stderr)
