"""Clones the motion of a reference video into a new video of a prompt.

    python sample.py --ref examples/figure_eight.mp4 --prompt "a red star on a navy background"
"""
import os
import signal

if __name__ == "__main__":              # before all that takes time to import
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:      # nohup's
            signal.signal(number, lambda number, _: (
                os.write(2, b"interrupted; nothing was begun\n"),
                os._exit(130 if number == signal.SIGINT else 143)))

import argparse
import dataclasses
import itertools
import sys
import time
import warnings
from typing import Any, Sequence

import torch

from mcl import (Guidance, Model, Motion, SampleConfig, load_model, read_image, read_video, sample,
                 write_video)
from mcl.checkpoints.model_file import DEFAULT_WEIGHTS, read_model_config, read_shapes
from mcl.cli import exit_code_of, run_main, one_line_warning
from mcl.cli.jobs import (assembled, check_all, digests, failure, is_made, parse_jobs,
                              requested)
from mcl.cli.arguments import make_generator
from mcl.cli.outputs import Clip, clips_of
from mcl.cli.reference import given_frames, progress, read_reference, read_subject
from mcl.checkpoints.detect import LORAS
from mcl.checkpoints.lora import Lora, merge, open_lora
from mcl.video.decode import has_audio
from mcl.errors import InputError
from mcl.files import write_json
from mcl.inversion import InvertedReference, inversion_guidance
from mcl.device import disable_malloc_trimming, offload_to_cpu, use_checkpointing
from mcl.evaluation.suitability import warn_if_unsuitable
from mcl.evaluation.look import measured, shown_clips, shown_reference, unguided
from mcl.evaluation.html_report import write_page
from mcl.evaluation.report import table
from mcl.sampler import initial_noise
from mcl.semantic import SubjectMasks, semantic_guidance


def open_loras(args: argparse.Namespace) -> list[Lora]:
    return [open_lora(option, path, scale, args.ignore_alpha) for option in LORAS
            for path, scale in getattr(args, option[2:].replace("-", "_"))]


class Models:
    """Reads models; the last one is kept for the next job, if that wants the same."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.model: Model | None = None

    def read(self, args: argparse.Namespace, loras: list[Lora]) -> Model:
        key = (args.weights, args.device, args.dtype, args.ignore_alpha,
               *((lora.source.path, lora.scale) for lora in loras))
        if self.model is None or key != self.key:
            self.model = None           # not two at a time
            edit = merge(loras, read_shapes(args.weights or DEFAULT_WEIGHTS)) if loras else None
            self.model, self.key = load_model(args.weights, args.device, args.dtype, edit), key
        return self.model


def run(clips: Sequence[Clip], models: Models, config: SampleConfig, fps: float) -> None:
    """Makes clips of one job, which differ in their seeds."""
    args = clips[0].args
    loras = open_loras(args)
    timing: dict[str, float] = {}
    clock = time.perf_counter

    began = clock()
    reference = None
    if args.ref is not None:
        reference = read_video(args.ref, config.num_frames, (config.height, config.width), args.start,
                               args.duration, args.fit, stride=args.stride,
                               known_fps=read_model_config(args.weights or DEFAULT_WEIGHTS).fps)
        if has_audio(args.ref):
            warnings.warn(f"{args.ref}: its sound is left out")
    size = (config.height, config.width)
    pictures = [read_image(path, size, args.fit) for path, _ in args.image]
    timing["read"] = clock() - began

    began = clock()
    model = models.read(args, loras)
    timing["load"] = clock() - began
    warn_unknown(model, args.prompt)

    began = clock()
    latents = None if reference is None else model.vae.encode(reference)
    seen = {} if latents is None else warn_if_unsuitable(model, args.ref, latents)
    read = (Motion.load(args.motion) if reference is None or latents is None
            else read_reference(args, model, reference, latents, config))
    subject = read_subject(args, model, read, latents, config)
    timing["extract"] = clock() - began

    condition = given_frames(model, pictures, args, config)
    gradient_checkpointing = use_checkpointing(args.memory, model, config)
    if not gradient_checkpointing:
        disable_malloc_trimming()
    for clip in clips:
        began = clock()
        generator = make_generator(clip.seed)
        start = initial_noise(model, config, generator)
        guides = guides_of(args, model, read, subject, start, config)
        states = sample(model, args.prompt, read if isinstance(read, Motion) else None, config,
                        guides=guides, latents=start, generator=generator, condition=condition,
                        gradient_checkpointing=gradient_checkpointing)
        steps = []
        with offload_to_cpu(model.vae, model.text_encoder):
            bar = progress(f"seed {clip.seed}", config.steps)(states)
            for state in bar:
                steps.append((state.t, state.loss, state.weight))
                if state.loss is not None:
                    bar.set_postfix(loss=f"{state.loss:.2e}")
        timing["sample"] = clock() - began

        began = clock()
        frames = model.vae.decode(state.latents).float().cpu()
        timing["decode"] = clock() - began
        write_video(clip.out, frames, fps)
        if reference is not None and clip.compared is not None:
            write_video(clip.compared, torch.cat([reference, frames], dim=-1), fps)
            print(clip.compared)
        made = {"result": state.latents}
        if args.report or clip.maps is not None:
            made["unguided"] = unguided(args, model, config, clip.seed, condition)
        figures = {}
        if args.report and reference is not None:
            figures = measured(model, config, reference, made)
            print(table(figures))
        if clip.maps is not None:
            t = min(read.latents) if isinstance(read, InvertedReference) else config.extraction_timestep
            kept = read if isinstance(read, Motion) else read.motion(t, config)
            every = dataclasses.replace(config, extraction_timestep=t, top_k=kept.windows.length)
            write_page(clip.maps, [shown_reference(args, model, every, read, reference, latents),
                                   *shown_clips(args, model, every, condition, made)],
                       kept, None if subject is None else subject.masks(t), steps,
                       {**requested(clip, config, fps), "report": figures})
        write_json(clip.record, {
            **requested(clip, config, fps), "weights_sha256": model.sha256,
            "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch."),
            "recompute": gradient_checkpointing, "torch": torch.__version__,
            "loss": [g for _, g, _ in steps if g is not None], "report": figures,
            **seen,
            "seconds": {name: round(s, 3) for name, s in timing.items()},
            "written": digests(clip.made())})
        print(clip.out)


def guides_of(args: argparse.Namespace, model: Model, read: Motion | InvertedReference,
              subject: SubjectMasks | None, start: torch.Tensor, config: SampleConfig) -> list[Guidance]:
    """What steers beside a `Motion`, from this starting noise."""
    guides = []
    if config.motion_weight and isinstance(read, InvertedReference):
        guides.append(inversion_guidance(read, config))
    if config.motion_weight and config.semantic_scale:
        guides.append(semantic_guidance(model, args.prompt, start, config, subject,
                                     progress=progress("unguided look", config.guidance_steps)))
    return guides


def warn_unknown(model: Model, prompt: str) -> None:
    unknown = model.out_of_vocabulary(prompt)
    if unknown:
        warnings.warn(f"this model was not trained on: {', '.join(unknown)}; it knows "
                      f"{', '.join(model.config.vocabulary)}")


def main(argv: list[str] | None = None) -> int:
    """0 done, 1 failed, 2 bad input, 130 or 143 interrupted; what went wrong is one line."""
    warnings.showwarning = one_line_warning
    return exit_code_of(lambda: run_all(parse_jobs(sys.argv[1:] if argv is None else argv)))


def run_all(jobs: list[argparse.Namespace]) -> int:
    """Checks all before the first is begun; 1 if any failed.

    A job of a file stops no other by its failure, and is not done again where its clip is there,
    made of the same: the file is run again for what failed, and the same would give the same bytes.
    """
    with assembled() as crew:
        try:
            checked = check_all(jobs)
        except InputError:
            if crew.rank:               # which the first of them says
                return 2
            raise
        if crew.rank == 0 and any(args.weights is None for args in jobs):
            print("no --weights: the embedded model runs, which knows shapes and emoji on grounds",
                  file=sys.stderr)
        work = [(clip, *settled) for args, settled in zip(jobs, checked) for clip in clips_of(args)]
        left = [one for one in work if one[0].args.jobs is None
                or not is_made(one[0].record, requested(*one), one[0].made())]
        crew.gather([])                 # before anybody writes, all have seen what is left
        failed = crew.gather(run_each(crew.share(left)))
        if crew.rank == 0 and jobs[0].jobs is not None:
            there = len(work) - len(left)
            print("\n".join([f"{jobs[0].jobs}: {len(work)} clips" + (
                f", {there} of them made of the same before" if there else "") + (
                f"; {len(failed)} failed:" if failed else ""), *failed]), file=sys.stderr)
    return 1 if failed else 0


def run_each(work: Sequence[tuple[Clip, SampleConfig, float]]) -> list[str]:
    """What failed of a file of jobs, and where it stands; raises it where there is no file."""
    models, failed = Models(), []
    for where, part in itertools.groupby(work, lambda one: one[0].args.where):
        clips, configs, rates = zip(*part)
        try:
            run(clips, models, configs[0], rates[0])
        except Exception as error:
            failed.append(failure(where, error))
    return failed


if __name__ == "__main__":
    run_main(main)
