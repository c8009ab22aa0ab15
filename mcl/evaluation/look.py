"""What --report measures and --maps shows of a clip, beside the reference and an unguided one."""
import argparse
import dataclasses

import torch

from ..cli.arguments import make_generator
from ..cli.reference import progress, read_once, reference_noise
from ..config import SampleConfig
from ..inversion import InvertedReference
from ..model import Model
from ..motion import Motion, extract_motion
from ..sampler import sample
from .html_report import Shown
from .report import measure

GLANCE = 8                              # steps of an unguided clip that is only looked at


def unguided(args: argparse.Namespace, model: Model, config: SampleConfig, seed: int,
             condition: torch.Tensor | None) -> torch.Tensor:
    """Latents of a clip of the same noise that nothing guides: in all steps where it is measured,
    in few where it is only looked at."""
    if not args.report:
        config = dataclasses.replace(config, steps=min(GLANCE, config.steps), guidance_steps=0)
    *_, last = progress("unguided", config.steps)(
        sample(model, args.prompt, None, config, condition=condition, generator=make_generator(seed)))
    return last.latents


def measured(model: Model, config: SampleConfig, reference: torch.Tensor,
             made: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Figures of clips, by the names of their latents."""
    top_k_motion = dataclasses.replace(config, top_k=1)

    def motion(latents: torch.Tensor) -> Motion:
        return extract_motion(model, latents, top_k_motion, noise=reference_noise(latents))

    shown = motion(model.vae.encode(reference))
    return {name: measure(reference, model.vae.decode(z).float().cpu(), shown, motion(z))
            for name, z in made.items()}


def shown_reference(args: argparse.Namespace, model: Model, every: SampleConfig,
                    read: Motion | InvertedReference, reference: torch.Tensor | None,
                    latents: torch.Tensor | None) -> Shown:
    """The reference, with every value of its attention that is known; `every` asks for all."""
    t = every.extraction_timestep
    if isinstance(read, InvertedReference):
        note, motion = f"inverted to timestep {t}, under its own prompt", read.motion(t, every)
    elif reference is None or latents is None:
        note, motion = "not at hand: of its rows, only what was kept is known", read
    else:
        note = f"noised once to timestep {t}, without a prompt"
        motion = read_once(args, model, reference, latents, every)
    return Shown("reference", note, reference, motion)


def shown_clips(args: argparse.Namespace, model: Model, every: SampleConfig,
                condition: torch.Tensor | None, made: dict[str, torch.Tensor]) -> list[Shown]:
    """What was made, by its latents, with every value of its attention."""
    steps = every.steps if args.report else min(GLANCE, every.steps)
    alike = f"finished, then noised once to timestep {every.extraction_timestep}, without a prompt"
    said = {"unguided": ("unguided", f"of the same noise, in {steps} steps; {alike}"),
            "result": ("clone", alike)}
    return [Shown(*words, model.vae.decode(made[name]).float().cpu(), extract_motion(
        model, made[name], every, noise=reference_noise(made[name]), condition=condition))
            for name, words in said.items()]
