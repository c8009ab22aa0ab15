"""The command sample.py: clone one video, or many."""
import argparse
import dataclasses
import itertools
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.lora import Lora, merge_loras, open_lora
from ..checkpoints import model_file
from ..checkpoints.model_file import DEFAULT_WEIGHTS, read_model_config
from ..clone import Clip, Reference, clone, control_condition, needs_checkpointing, read_reference
from ..config import SampleConfig
from ..device import disable_malloc_trimming
from ..errors import InputError
from ..evaluation.html_report import write_html_report
from ..evaluation.report import format_table, measure_clips, sample_unguided, warn_if_unsuitable
from ..files import write_json
from ..model import Model
from ..motion import Motion
from ..sampler import SamplerStep
from ..video.decode import has_audio
from ..video.read import read_image, read_video
from ..video.write import write_video
from . import jobs as job_files
from .arguments import local_rank_device
from .outputs import OutputClip, output_clips, scaled_loras
from .process import exit_code_of, format_error, is_expected, run_main

PREVIEW_STEPS = 8               # steps of the unguided clip of --maps without --report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return exit_code_of(lambda: run_jobs(job_files.parse_jobs(sys.argv[1:] if argv is None else argv)))


def command() -> NoReturn:
    """Run the command as this process."""
    run_main(main)


def run_jobs(jobs: Sequence[argparse.Namespace]) -> int:
    """Validate all jobs, then run those that are not up to date; return 1 if any failed."""
    if jobs[0].list_words:
        print(" ".join(read_model_config(jobs[0].weights or DEFAULT_WEIGHTS).training_vocabulary))
        return 0
    with job_files.distributed_workers() as workers:
        try:
            configs = job_files.validate_jobs(jobs)
        except InputError:
            if workers.rank:            # the first process reports it
                return 2
            raise
        if workers.rank == 0 and any(args.weights is None for args in jobs):
            print("Using the built-in demo model (shapes and emoji on plain or textured "
                  "backgrounds). Pass --weights to use Stable Diffusion.", file=sys.stderr)
        clips = [(clip, config) for args, config in zip(jobs, configs)
                 for clip in output_clips(args)]
        pending = [(clip, config) for clip, config in clips if clip.args.jobs is None
                   or not job_files.is_up_to_date(clip, config)]
        workers.all_gather([])          # all processes have seen what is pending
        failures = workers.all_gather(run_pending(workers.shard(pending)))
        if workers.rank == 0 and jobs[0].jobs is not None:
            num_done = len(clips) - len(pending)
            print("\n".join([f"{jobs[0].jobs}: {len(clips)} clips" + (
                f", {num_done} of them up to date" if num_done else "") + (
                f"; {len(failures)} failed:" if failures else ""), *failures]), file=sys.stderr)
    return 1 if failures else 0


def run_pending(clips: Sequence[tuple[OutputClip, SampleConfig]]) -> list[str]:
    """Run the clips job by job; return the failures of a file of jobs, or raise without one."""
    cache, failures = ModelCache(), []
    for source, group in itertools.groupby(clips, lambda item: item[0].args.source):
        job_clips, configs = zip(*group)
        try:
            run_job(job_clips, cache, configs[0])
        except Exception as error:
            if not source or not is_expected(error):
                raise
            failures.append(f"{source}: {format_error(error)[1]}")
            tqdm.write(failures[-1], file=sys.stderr)
    return failures


class ModelCache:
    """Keeps the last model for the next job, if that needs the same one."""

    def __init__(self) -> None:
        """Create an empty cache."""
        self.key: tuple[Any, ...] = ()
        self.model: Model | None = None

    def load(self, args: argparse.Namespace, loras: Sequence[Lora]) -> Model:
        """Return the model of a job, with its LoRAs merged."""
        key = (args.weights, args.device, args.dtype, args.ignore_alpha, *scaled_loras(args))
        if self.model is None or key != self.key:
            self.model = None           # frees the memory before the next model is loaded
            transform = merge_loras(loras, model_file.read_shapes(args.weights or DEFAULT_WEIGHTS)) if (
                loras) else None
            self.model = model_file.load_model(args.weights, local_rank_device(args.device), args.dtype,
                                    transform)
            self.key = key
        return self.model


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


def run_job(clips: Sequence[OutputClip], cache: ModelCache, config: SampleConfig) -> None:
    """Make the clips of one job, which differ in their seeds."""
    args, bars, times = clips[0].args, ProgressBars(), [time.perf_counter()]
    loras = [open_lora(option, path, scale, args.ignore_alpha)
             for option, path, scale in scaled_loras(args)]
    frames = read_frames(args, config)
    size = (config.height, config.width)
    images = {frame: read_image(path, size, args.fit) for path, frame in args.image}
    times.append(time.perf_counter())
    model = cache.load(args, loras)
    warn_vocabulary(model, args.prompt)
    is_checkpointing = needs_checkpointing(model, config)
    settings = dataclasses.asdict(config) | {"memory": "low" if is_checkpointing else "high"}
    if not is_checkpointing:
        disable_malloc_trimming()
    times.append(time.perf_counter())
    reference = Reference(Motion.load(args.motion)) if frames is None else read_reference(
        model, frames, config, control=images, cache_dir=args.inversion_dir, progress=bars)
    notes: dict[str, Any] = {"gradient_checkpointing": is_checkpointing}
    if reference.latents is not None:
        notes |= warn_if_unsuitable(model, args.ref.name, reference.latents)
    if args.save_motion is not None and isinstance(reference.motion, Motion):
        metadata = reference.motion.metadata | {"source": args.ref.name}
        dataclasses.replace(reference.motion, metadata=metadata).save(args.save_motion)
    times.append(time.perf_counter())
    for clip in clips:
        result = clone(reference, args.prompt, model=model, seed=clip.seed, control=images,
                       callback=bars.show_loss, progress=bars, **settings)
        ends = [*times[1:], time.perf_counter()]
        notes["seconds"] = {name: round(end - start, 3) for name, start, end in zip(
            ("read", "load", "extract", "clone"), times, ends, strict=True)}
        write_outputs(clip, result, reference, model, config, images, notes)
        times[3] = time.perf_counter()


def read_frames(args: argparse.Namespace, config: SampleConfig) -> Tensor | None:
    """Return the reference's frames (f, 3, H, W) in [-1, 1], or None for a saved motion."""
    if args.ref is None:
        return None
    frames = read_video(args.ref, config.num_frames, (config.height, config.width), args.start,
                        args.duration, args.fit, stride=args.stride,
                        model_fps=read_model_config(args.weights or DEFAULT_WEIGHTS).fps)
    if has_audio(args.ref):
        print(f"note: the sound of {args.ref} is left out", file=sys.stderr)
    return frames


def warn_vocabulary(model: Model, prompt: str) -> None:
    """Warn of words that the model was not trained on."""
    unknown = model.out_of_vocabulary(prompt)
    if unknown:
        warnings.warn(f"The {model.config.name} model does not know: {', '.join(unknown)}. "
                      "Known words: python sample.py --list-words")


def write_outputs(clip: OutputClip, result: Clip, reference: Reference, model: Model,
                  config: SampleConfig, images: dict[int, Tensor], notes: dict[str, Any]) -> None:
    """Write the video of a clip, what was asked for besides, and last its record."""
    args, fps = clip.args, clip.args.fps or result.fps
    write_video(clip.out, result.frames, fps)
    if reference.frames is not None and clip.comparison_path is not None:
        write_video(clip.comparison_path, torch.cat([reference.frames, result.frames], dim=-1), fps)
        print(clip.comparison_path)
    report: dict[str, dict[str, float]] = {}
    if args.report or clip.maps is not None:
        control = control_condition(model, images, config)
        unguided = sample_unguided(model, args.prompt, config, clip.seed, control,
                                   None if args.report else PREVIEW_STEPS, ProgressBars())
        latents_by_name = {"unguided": unguided, "clone": result.latents}
        if args.report and reference.frames is not None:
            report = measure_clips(model, config, reference.frames, latents_by_name)
            print(format_table(report))
        if clip.maps is not None:
            write_html_report(clip.maps, model, args.prompt, config, reference, latents_by_name,
                              result.steps, {**job_files.job_fingerprint(clip, config), "fps": fps,
                                             "report": report}, control)
    write_json(clip.record_path, {
        **job_files.job_fingerprint(clip, config), **notes, "weights_sha256": model.sha256,
        "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "loss": [step.loss for step in result.steps if step.loss is not None], "report": report,
        "written": job_files.sha256_by_path(clip.output_paths())})
    print(clip.out)
