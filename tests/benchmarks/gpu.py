"""Measure steps, clips and agreement with the CPU on a GPU, in at most ten minutes.

    python tests/benchmarks/gpu.py --out gpu.json

Prints rows of Markdown tables and writes all numbers to one file. Each measurement runs in a
process of its own, and the file is written after each, so that a failure loses nothing else.
Weights are random, because the cost does not depend on them. Only the clone of the built-in model,
which is compared with the CPU's, has real ones. `--published FOLDER` measures the published code as
well, if its packages are installed. `--device cpu` measures a CPU.
"""
import ctypes
import dataclasses
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

if not __package__:     # run as a file
    sys.path.insert(0, str(Path(__file__).parents[2]))

import mcl
from mcl.checkpoints.model_file import build_on_meta
from mcl.cli.process import run_main
from mcl.device import DTYPES, disable_malloc_trimming, resolve_device
from mcl.files import write_record
from mcl.networks.unet import UNet3D
from mcl.sampler import Sampler
from tests.networks import other_steps
from weights.training.clip_metrics import psnr
from weights.training.options import option, run_with_options
from weights.training.train import TINY

CONFIGS = {"tiny": TINY, "sd15": mcl.ModelConfig()}
Steps = dict[str, Callable[[], object]]
Result = dict[str, Any]
REFERENCE = Path(__file__).parents[2] / "examples" / "figure_eight.mp4"
# PyTorch's own table of products and convolutions has no fused attention of CPUs.
FLOP_FORMULAS = {**flop_registry, **{
    getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}"): flop_registry[
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{suffix}")]
    for suffix in ("", "_backward")}}


@dataclasses.dataclass
class Options:
    """Measure steps, clips and agreement with the CPU on a GPU."""

    out: Path = option(Path("gpu.json"), "file of the results")
    device: str = option("cuda", "auto, cpu, cuda or mps")
    model: str = option("sd15", "sizes of the model", choices=CONFIGS)
    frames: int = option(16, "length of the clips")
    sizes: tuple[int, ...] = option((512, 256), "sides of the square frames, in pixels")
    dtypes: tuple[str, ...] = option(("float16", "bfloat16", "float32"), "types", choices=DTYPES)
    steps: int = option(100, "steps of the whole clip")
    published: Path | None = option(None, "folder of the published code")
    repeat: int = option(3, "number of steps for the median time")
    minutes: float = option(10.0, "measurements that would run later are left out")
    only: str = option("", "print one measurement as JSON")

    def settings(self, size: int) -> mcl.SampleConfig:
        """Return the settings of clips of a size."""
        return dataclasses.replace(CONFIGS[self.model].sample, num_frames=self.frames, height=size,
                                   width=size, cfg_start_fraction=0.0)


def measurements(o: Options) -> dict[str, Callable[[], Result]]:
    """Return the function of each measurement by its name."""
    size, dtype = o.sizes[0], o.dtypes[0]
    others = ({"published": partial(other_steps.published_steps, o.published)} if o.published
              else {}) | {"diffusers": other_steps.diffusers_steps, "compiled": compiled}
    return {**{f"{size}, {dtype}, {memory} memory": partial(measure, o, size, dtype, memory)
               for size in o.sizes for dtype in o.dtypes for memory in ("high", "low")},
            **{f"built-in model, {dtype}": partial(agreement, o, dtype) for dtype in o.dtypes},
            f"clip, {dtype}": partial(whole_clip, o, dtype),
            **{f"{size}, TFLOP": partial(count_tflops, o, o.settings(size)) for size in o.sizes},
            **{f"{size}, {dtype}, {name}": partial(measure, o, size, dtype, change=change)
               for name, change in others.items()}}


def measure(o: Options, size: int, dtype: str, memory: str = "high",
            change: Callable[[mcl.Model, mcl.SampleConfig, Steps], Steps] = lambda *args: args[-1]
            ) -> Result:
    """Return the median seconds of each kind of step, and its peak beside the weights in GB."""
    device, settings = resolve_device(o.device), o.settings(size)
    model = random_model(CONFIGS[o.model], device, DTYPES[dtype])
    steps = change(model, settings, benchmark_steps(model, settings, memory == "low"))
    if memory == "high":
        disable_malloc_trimming()
    peaks = {f"{kind}, GB": peak_memory(step, device) / 1e9 for kind, step in steps.items()}
    # In turns, because a machine's speed may change from minute to minute.
    seconds = [{k: time_call(s, device) for k, s in steps.items()} for _ in range(o.repeat)]
    return {f"{kind}, s": statistics.median(s[kind] for s in seconds) for kind in steps} | peaks


def compiled(model: mcl.Model, settings: mcl.SampleConfig, steps: Steps) -> Steps:
    """Return the unguided step, of a UNet that is compiled when it first runs."""
    model.unet.compile()
    return {"unguided step": steps["unguided step"]}


def agreement(o: Options, dtype: str) -> Result:
    """Return the PSNR of the built-in model's clone, in dB, against the CPU's in float32."""
    steps = min(o.steps, TINY.sample.steps)
    clips = [mcl.clone(REFERENCE, "a red star on a navy background", steps=steps,
                       guidance_steps=steps // 2, model=mcl.load_model(None, *place)).frames
             for place in (("cpu", "float32"), (o.device, dtype))]
    return {"PSNR, dB": psnr(*clips)}


def whole_clip(o: Options, dtype: str) -> Result:
    """Return the seconds of a clip from the reference to its frames."""
    with torch.device(device := resolve_device(o.device)):
        model = mcl.Model(CONFIGS[o.model]).to(DTYPES[dtype]).requires_grad_(False).eval()
    return {f"{o.steps} steps, s": time_call(lambda: mcl.clone(
        REFERENCE, "a red star", model=model, num_frames=o.frames, steps=o.steps,
        height=o.sizes[0], width=o.sizes[0], guidance_steps=o.steps // 2), device)}


def random_model(config: mcl.ModelConfig, device: torch.device, dtype: torch.dtype) -> mcl.Model:
    """Return a model whose UNet has random weights; the other networks have none."""
    model = build_on_meta(config)
    with torch.device(device):
        model.unet = UNet3D(config.unet).to(dtype)
    model.unet.to(memory_format=torch.channels_last)
    return model.requires_grad_(False).eval()


def benchmark_steps(model: mcl.Model, config: mcl.SampleConfig, use_low_memory: bool) -> Steps:
    """Return functions that take one step each, by the kind of the step."""
    z = torch.randn(model.config.latent_shape(config), device=model.device)
    embeds = torch.randn(2, other_steps.NUM_TOKENS, model.config.unet.cross_attention_dim)
    sampler = Sampler(model, embeds, config, gradient_checkpointing=use_low_memory)
    text, null_text = sampler.text, sampler.negative_embeds
    maps = model.unet.forward_to_attention(z.to(model.dtype), other_steps.TIMESTEP, null_text,
                                           mcl.AttentionRequest(temporal=config.guidance_blocks))
    top = {name: probs.topk(1) for name, probs in maps.temporal.items()}
    values, indices = ({name: pair[i] for name, pair in top.items()} for i in (0, 1))
    sampler.guidance = [mcl.motion_guidance(mcl.Motion(values, indices))]
    guided = partial(sampler.predict_noise_and_gradient, z, other_steps.TIMESTEP)
    return {"forward pass": partial(sampler.predict_noise, z, other_steps.TIMESTEP, text),
            "unguided step": partial(sampler.classifier_free_guidance, 0, z),
            "guided step": lambda: sampler.classifier_free_guidance(0, z, guided()[0])}


class FlopCounter(TorchDispatchMode):
    """Counts floating-point operations. PyTorch's FlopCounterMode does not allow autograd.grad."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, formula = func(*args, **(kwargs or {})), FLOP_FORMULAS.get(func.overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


def count_tflops(o: Options, settings: mcl.SampleConfig) -> Result:
    """Return the arithmetic of each kind of step in TFLOP, counted on tensors without data."""
    with FakeTensorMode():
        model, tflops = build_on_meta(CONFIGS[o.model]), {}
        model.unet = UNet3D(model.config.unet).requires_grad_(False).eval()
        for kind, step in benchmark_steps(model, settings, False).items():
            with FlopCounter() as counter:
                step()
            tflops[kind] = counter.total / 1e12
    return tflops


def time_call(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that an action takes on a device."""
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def peak_memory(action: Callable[[], object], device: torch.device) -> float:
    """Return the bytes that an action allocates at its peak, or nan if they are not known."""
    clear_refs, before, peak = Path("/proc/self/clear_refs"), 0, lambda: math.nan
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated
    elif device.type == "cpu" and clear_refs.exists():
        ctypes.CDLL(None).malloc_trim(0)    # return freed memory, so that it counts when reused
        clear_refs.write_text("5", "ascii")                                 # resets the peak
        before, peak = peak_rss(), peak_rss
    action()
    return peak() - before


def peak_rss() -> int:
    """Return the largest resident size of the process, in bytes, since it was reset."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def run_alone(name: str, argv: list[str], seconds: float) -> Result:
    """Return the result of a measurement in a process of its own, or its error."""
    command = [sys.executable, __file__, *argv, "--only", name]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1))
        return json.loads(process.stdout)
    except subprocess.TimeoutExpired:
        return {"error": "no time was left"}
    except ValueError:      # no JSON
        return {"error": process.stderr.strip().rpartition("\n")[2][:200] or process.returncode}


def run(o: Options, argv: list[str]) -> None:
    """Print one measurement, or run all of them and write the file of their results."""
    if o.only:
        return print(json.dumps(measurements(o)[o.only]()))
    device = resolve_device(o.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.platform()
    record: dict[str, Any] = {"machine": f"{machine}, torch {torch.__version__}", "options": argv,
                              "results": {}}
    write_record(o.out, record)         # fails at once if it cannot be written
    end, columns = time.monotonic() + 60 * o.minutes, ()
    for name in tqdm(measurements(o), file=sys.stderr):
        result = record["results"][name] = run_alone(name, argv, end - time.monotonic())
        write_record(o.out, record)
        if columns != (columns := tuple(result)):
            print(f"\n| | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
        cells = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in result.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run_with_options("tests/benchmarks/gpu.py", Options, lambda o: run(o, argv), argv)


if __name__ == "__main__":
    run_main(main)
