"""The command sample.py: clone one video, or many."""
import argparse
import dataclasses
import itertools
import sys
import warnings
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from .. import Clip, InputError, Model, Motion, Reference, SamplerStep, clone, read_reference
from ..checkpoints import embeddings, lora, model_file
from ..clone import control_condition, needs_checkpointing
from ..device import disable_malloc_trimming, share_cores
from ..evaluation import html_report, report
from ..ownership import sha256_of
from ..video.decode import has_audio
from ..video.read import read_image, read_video
from . import arguments, jobs
from .outputs import OutputClip, scaled_loras
from .process import exit_code_of, format_error, print_line, run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return exit_code_of(lambda: run_jobs(arguments.parse_args(argv)))


def command() -> NoReturn:
    """Run the command as this process."""
    share_cores()
    run_main(main)


def run_jobs(args: argparse.Namespace) -> int:
    """Check all jobs, then run those that are not up to date; return 1 if any failed."""
    if args.list_words:
        for word in model_file.read_model_config(args.weights).training_vocabulary:
            print_line(word)
        return 0
    rank, num_workers = jobs.join_workers()
    try:
        clips = jobs.read_jobs(args)
    except InputError:
        if rank == 0:               # the other processes have the same error
            raise
        return 2
    if rank == 0 and any(clip.args.weights == model_file.DEFAULT_WEIGHTS for clip in clips):
        print_line("Using the built-in demo model (shapes and emoji on plain or textured "
                   "backgrounds). Pass --weights to use Stable Diffusion.", sys.stderr)
    pending = [clip for clip in clips if args.jobs is None or not jobs.is_up_to_date(clip)]
    jobs.all_gather([], num_workers)        # all processes have seen what is pending
    failures = jobs.all_gather(run_pending(pending[rank::num_workers]), num_workers)
    if rank == 0 and args.jobs is not None:
        summary = (f"{args.jobs}: {len(clips)} clips; {len(clips) - len(pending)} were up to "
                   f"date, {len(failures)} failed")
        for line in (summary, *failures):
            print_line(line, sys.stderr)
    return 1 if failures else 0


def run_pending(clips: Sequence[OutputClip]) -> list[str]:
    """Run the clips job by job; return the failures of a file of jobs, or raise without one."""
    failures, cache = list[str](), dict[tuple, Model]()
    for source, job_clips in itertools.groupby(clips, lambda clip: clip.args.source):
        try:
            run_job(list(job_clips), cache)
        except Exception as error:
            if not source:
                raise
            failures.append(f"{source}: {format_error(error)[1]}")
            print_line(failures[-1], sys.stderr)
    return failures


def load_job_model(args: argparse.Namespace, inputs: dict[str, str], cache: dict[tuple, Model]
                   ) -> Model:
    """Return the model of a job with its LoRAs merged; the cache keeps it for the next job."""
    loras = scaled_loras(args)
    files = [args.weights, *(path for _, path, _ in loras)]
    key = (args.device, args.dtype, args.ignore_alpha, *loras, *(inputs[str(f)] for f in files))
    if key not in cache:
        cache.clear()                   # frees the memory before the next model is loaded
        files = [lora.open_lora(*scaled, args.ignore_alpha) for scaled in loras]
        transform = lora.merge_loras(files, model_file.read_shapes(args.weights)) if files else None
        device = arguments.local_rank_device(args.device)
        cache[key] = model_file.load_model(args.weights, device, args.dtype, transform)
    return cache[key]


class ProgressBars:
    """Progress bars on stderr; the bar of the sampling shows the loss."""

    def __call__(self, iterable: Iterable, desc: str = "", total: int | None = None) -> tqdm:
        """Return the iterable with a bar."""
        self.bar = tqdm(iterable, desc=desc, total=total, unit="step", file=sys.stderr)
        return self.bar

    def show_loss(self, step: SamplerStep) -> None:
        """Show the loss of a step."""
        if step.loss is not None:
            self.bar.set_postfix(loss=f"{step.loss:.2e}")


def run_job(clips: Sequence[OutputClip], cache: dict[tuple, Model]) -> None:
    """Make the clips of one job, which differ in their seeds."""
    args, config, bars, times = clips[0].args, clips[0].config, ProgressBars(), [perf_counter()]
    inputs = jobs.hash_inputs(args)
    source = read_source(clips[0])
    images = {frame: read_image(path, (config.height, config.width), args.fit or "crop")
              for path, frame in args.image}
    times.append(perf_counter())
    model = embeddings.add_embeddings(load_job_model(args, inputs, cache), args.embedding)
    if unknown := dict.fromkeys(model.out_of_vocabulary(args.prompt)):
        warnings.warn(f"The {model.description} does not know: {', '.join(unknown)}. "
                      "Known words: python sample.py --list-words", stacklevel=2)
    is_checkpointing = needs_checkpointing(model, config)
    for path, _ in jobs.hash_inputs(args).items() - inputs.items():
        raise InputError(f"{path}: was changed while it was read. Run the command again")
    settings = dataclasses.asdict(config) | {"memory": "low" if is_checkpointing else "high"}
    if not is_checkpointing:
        disable_malloc_trimming()
    times.append(perf_counter())
    reference = read_reference(model, source, config, control=images, progress=bars,
                               cache_dir=args.inversion_dir)
    notes: dict[str, Any] = {"gradient_checkpointing": is_checkpointing}
    if reference.latents is not None:
        notes |= report.warn_if_unsuitable(model, args.ref.name, reference.latents)
    if args.save_motion is not None and isinstance(reference.motion, Motion):
        metadata = reference.motion.metadata | {"source": args.ref.name}
        dataclasses.replace(reference.motion, metadata=metadata).save(args.save_motion)
    for clip in clips:
        times[3:] = [perf_counter()]
        result = clone(reference, args.prompt, model=model, seed=clip.seed, control=images,
                       callback=bars.show_loss, progress=bars, **settings)
        ends = [*times[1:], perf_counter()]
        notes["seconds"] = {name: round(end - start, 3) for name, start, end in zip(
            ("read", "load", "extract", "clone"), times, ends, strict=True)}
        write_outputs(clip, result, reference, model, images, notes, inputs)


def read_source(clip: OutputClip) -> torch.Tensor | Motion:
    """Return the reference's frames (f, 3, H, W) in [-1, 1], or its saved motion."""
    args, size = clip.args, (clip.config.height, clip.config.width)
    if args.ref is None:
        return Motion.load(args.motion)
    fps = model_file.read_model_config(args.weights).fps
    frames = read_video(args.ref, clip.config.num_frames, size, args.start or 0.0, args.duration,
                        args.fit or "crop", stride=args.stride, model_fps=fps)
    if has_audio(args.ref):
        print_line(f"note: the sound of {args.ref} is left out", sys.stderr)
    return frames


def write_outputs(clip: OutputClip, result: Clip, reference: Reference, model: Model,
                  images: dict[int, torch.Tensor], notes: dict[str, Any], inputs: dict[str, str]
                  ) -> None:
    """Write the video of a clip, the other outputs, and last the record."""
    args, config, fps = clip.args, clip.config, clip.args.fps or result.fps
    record = jobs.job_fingerprint(clip, inputs)
    written = {clip.out: clip.write_video(clip.out, result.frames, fps)}
    if reference.frames is not None and clip.comparison is not None:
        written[clip.comparison] = clip.write_video(
            clip.comparison, torch.cat([reference.frames, result.frames], dim=-1), fps)
        print_line(clip.comparison)
    metrics: dict[str, dict[str, float]] = {}
    if args.report or clip.maps is not None:
        control = control_condition(model, images, config)
        unguided = report.sample_unguided(model, args.prompt, config, clip.seed, control,
                                          ProgressBars())
        latents = {"unguided": unguided, "clone": result.latents}
        if args.report and reference.frames is not None:
            metrics = report.measure_clips(model, reference.frames, latents)
            print(report.format_table(metrics))
        if clip.maps is not None:
            html_report.write_html_report(
                clip.maps, model, args.prompt, config, reference, latents, result.steps,
                {**record, "fps": fps, "report": metrics}, control)
    files = {path: sha256_of(path) for path in clip.output_paths()}
    if changed := [path for path in written if files[path] != written[path]]:
        raise InputError(f"{changed[0]}: another program replaced it. Run the command again")
    losses = [step.loss for step in result.steps if step.loss is not None]
    clip.write_record({
        **record, **notes, "weights_sha256": model.sha256, "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."), "torch": torch.__version__,
        "loss": losses, "report": metrics}, files)
    print_line(clip.out)
