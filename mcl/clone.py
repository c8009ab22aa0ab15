"""The whole method as one function: reference video and prompt in, clip out."""
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import device, inversion, semantic
from .checkpoints.model_file import load_model
from .config import ModelConfig, SampleConfig, short_repr
from .context_windows import make_context_windows
from .errors import InputError
from .guidance import Guidance, resolve_guidance
from .inversion import InvertedReference, invert_reference
from .model import Model
from .motion import Motion, extract_motion, reference_noise
from .networks.sparsectrl import sparsectrl_condition
from .presets import build_config
from .sampler import Progress, SamplerStep, initial_noise, no_progress, sample
from .video.read import read_image, read_video, resize_frames
from .video.write import write_video


class Reference(NamedTuple):
    """A reference that was read once, for one or more clips.

    Attributes:
        motion: Its motion, or its inverted latents.
        frames: Frames (f, 3, H, W) in [-1, 1]; None if only the motion is known.
        latents: Scaled latents (1, c, f, h, w) of the frames.
    """

    motion: Motion | InvertedReference
    frames: Tensor | None = None
    latents: Tensor | None = None


class Clip(NamedTuple):
    """A generated clip.

    Attributes:
        frames: Frames (f, 3, H, W) in [-1, 1], float32 on the CPU.
        latents: Scaled latents (1, c, f, h, w), float32.
        fps: Frames per second.
        motion: The reference's motion, or its inverted latents.
        steps: One SamplerStep for each step, without its latents.
    """

    frames: Tensor
    latents: Tensor
    fps: float
    motion: Motion | InvertedReference
    steps: list[SamplerStep]

    def save(self, path: str | Path) -> None:
        """Write the clip to an .mp4, .gif or .webp file, or a folder of PNG images."""
        write_video(path, self.frames, self.fps)


Source = str | Path | Tensor | Motion | Reference


def clone(reference: Source, prompt: str, *, model: Model | str | Path | None = None,
          seed: int = 0, preset: str | None = None, guidance: Sequence[Guidance] = (),
          control: Mapping[int, Any] | None = None, embeddings: Mapping[str, Any] | None = None,
          start: float = 0.0, duration: float | None = None, progress: Progress = no_progress,
          callback: Callable[[SamplerStep], Any] | None = None, **settings: Any) -> Clip:
    """Generate a clip of a prompt that moves like a reference (MotionClone, arXiv 2406.05338).

    Args:
        reference: Path of a video; frames (f, 3, H, W) in [-1, 1] of any size and length; a Motion;
            or a Reference from `read_reference`.
        prompt: What the clip shows.
        model: A Model, the path of a converted model, or None for the built-in demo model.
        seed: Seed of the initial noise, 0 to 2**64 - 1.
        preset: Name of published settings (`mcl.presets`).
        guidance: More guidance beside the motion.
        control: SparseCtrl images by frame index, each a path or a tensor (3, H, W) in [-1, 1].
        embeddings: Files of textual inversion by the words that the prompts use for them, such as
            {"bad-hands": "bad-hands-5.pt"}.
        start: Start of the part of the video that is used, in seconds. Only for a path.
        duration: Length of that part in seconds; None for all the rest. Only for a path.
        callback: Function that is called with every SamplerStep.
        progress: Function that wraps an iterable in a progress bar, such as `tqdm`.
        **settings: Fields of SampleConfig in place of the model's own, such as steps=50.

    Raises:
        InputError: If an argument is wrong; the message says what is possible.
        NumericalError: If the result is not finite.
    """
    model = model if isinstance(model, Model) else load_model(model)
    config = build_config(model.config.sample, preset, **settings)
    if embeddings:              # imported here, so that `import mcl` does not import the converter
        from .checkpoints.embeddings import add_embeddings
        model = add_embeddings(model, [(word, Path(file)) for word, file in embeddings.items()])
    guidance = resolve_guidance(guidance, None, model, config)
    condition = control_condition(model, read_control_images(control or {}, config), config)
    generator = make_generator(seed)
    noise = initial_noise(model, config, generator)

    # 1. The motion of the reference (eqs. 4 to 6), and what else guides the clip.
    reference = read_reference(model, reference, config, control=control, start=start,
                               duration=duration, progress=progress)
    motion = reference.motion if isinstance(reference.motion, Motion) else None
    if config.motion_weight and config.semantic_scale:
        guidance = [semantic.semantic_guidance(
            model, prompt, noise, config, subject_masks(model, prompt, reference, config),
            progress=progress), *guidance]
    if config.motion_weight and isinstance(reference.motion, InvertedReference):
        guidance = [inversion.inversion_guidance(reference.motion, config), *guidance]

    # 2. Guided sampling (eqs. 1 and 3).
    states = sample(model, prompt, motion, config, guidance=guidance, latents=noise,
                    generator=generator, control=condition,
                    gradient_checkpointing=needs_checkpointing(model, config))
    steps = []
    with device.offload_to_cpu(model.vae, model.text_encoder):
        for state in progress(states, desc=f"seed {seed}", total=config.steps):
            steps.append(state._replace(latents=noise.new_empty(0)))
            if callback is not None:
                callback(state)

    # 3. Latents of the last step to frames.
    frames = model.vae.decode(state.latents).float().cpu()
    return Clip(frames, state.latents, model.config.fps, reference.motion, steps)


def read_reference(model: Model, source: Source, config: SampleConfig, *, start: float = 0.0,
                   duration: float | None = None, control: Mapping[int, Any] | None = None,
                   cache_dir: Path | None = None, progress: Progress = no_progress) -> Reference:
    """Read a reference and its motion by config.method.

    Args:
        model: The model that the clip will be sampled with.
        source: As `reference` of `clone`. A Reference is returned unchanged.
        config: Settings of the clip.
        start: As for `clone`.
        duration: As for `clone`.
        control: The clip's control images by frame index. The reference is then read with its own
            frames at their indices as control.
        cache_dir: Folder for inverted latents.
        progress: As for `clone`.

    Raises:
        InputError: If `source` cannot be read, or not in the way that the settings ask for.
    """
    if (start or duration is not None) and isinstance(source, (Tensor, Motion, Reference)):
        raise InputError("start and duration need the path of a video: leave them out")
    if isinstance(source, Motion) and (config.method == "inversion" or config.subject):
        raise InputError("a Motion has no frames, which inversion and a subject need")
    if isinstance(source, (Motion, Reference)):
        return Reference(source) if isinstance(source, Motion) else source
    size = (config.height, config.width)
    frames = resize_frames(source, config.num_frames, size) if isinstance(source, Tensor) else (
        read_video(source, config.num_frames, size, start, duration, model_fps=model.config.fps))
    latents = model.vae.encode(frames)
    if config.method == "inversion":
        motion = invert_reference(model, latents, config.ref_prompt, config, progress, cache_dir)
        return Reference(motion, frames, latents)
    condition = control_condition(model, {i: frames[i, None] for i in control or {}}, config)
    return Reference(extract_motion(model, latents, config, control=condition), frames, latents)


def subject_masks(model: Model, prompt: str, reference: Reference, config: SampleConfig
                  ) -> semantic.SubjectMasks | None:
    """Return the masks of the subject for semantic guidance, or None without a subject."""
    if not config.subject or reference.latents is None:
        return None
    attention = reference.motion.attention if isinstance(reference.motion, InvertedReference) else (
        semantic.noised_reference_attention(model, reference.latents, config.ref_prompt, config,
                                            reference_noise(reference.latents)))
    return semantic.make_subject_masks(model, prompt, config.subject[1], config.ref_prompt,
                                       config.subject[0], attention, config)


def read_control_images(control: Mapping[int, Any], config: SampleConfig) -> dict[int, Tensor]:
    """Return control images (1, 3, H, W) in [-1, 1] by frame index, at the clip's size."""
    if control and (config.method == "inversion" or config.semantic_scale):
        raise InputError("control images need method single-step, without semantic guidance")
    size = (config.height, config.width)
    return {i: resize_frames(x.reshape(-1, *x.shape[-3:]), 1, size) if isinstance(x, Tensor) else
            read_image(x, size) for i, x in control.items()}


def control_condition(model: Model, images: Mapping[int, Tensor], config: SampleConfig
                      ) -> Tensor | None:
    """Return SparseCtrl's condition for images (1, 3, H, W) by frame index, or None without any."""
    if not images:
        return None
    pixels = torch.cat(list(images.values()))
    is_rgb = model.config.sparsectrl.kind == "rgb"      # latents (n, c, h, w), or sketches
    inputs = model.vae.encode(pixels)[0].transpose(0, 1) if is_rgb else (pixels + 1) / 2
    return sparsectrl_condition(inputs, list(images), config.num_frames)


def make_generator(seed: int) -> torch.Generator:
    """Return a CPU generator for a seed of up to 64 bits.

    PyTorch's CPU generator uses 32 bits of its seed. Longer seeds are hashed to 32 bits.

    Raises:
        InputError: If the seed is out of range.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 64:
        raise InputError(f"seed = {short_repr(seed)} is out of range: 0 to {(1 << 64) - 1}")
    digest = int.from_bytes(hashlib.sha256(seed.to_bytes(8, "big")).digest()[:4], "big")
    return torch.Generator().manual_seed(seed if seed < 1 << 32 else digest)


def needs_checkpointing(model: Model, config: SampleConfig) -> bool:
    """Return whether guided steps must recompute activations to fit into memory."""
    size = device.GUIDED_STEP_FEATURES * feature_bytes(model.config, config, model.dtype)
    free = device.free_memory(model.device)
    return config.memory == "low" or (config.memory == "auto" and free is not None and size > free)


def feature_bytes(model: ModelConfig, config: SampleConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one feature map at the UNet's highest resolution."""
    f, (h, w) = make_context_windows(config, model).length, model.latent_shape(config)[3:]
    return f * h * w * model.unet.block_out_channels[0] * dtype.itemsize


def check_memory(model: ModelConfig, config: SampleConfig, place: torch.device,
                 dtype: torch.dtype) -> None:
    """Raise MemoryError for a clip that cannot fit, by a lower bound of what it needs."""
    pixels = config.height * config.width
    decoded_frame = 2 * model.vae.block_out_channels[0] * pixels * dtype.itemsize
    step = device.MIN_STEP_FEATURES * feature_bytes(model, config, dtype)
    for where, needed in ((torch.device("cpu"), 3 * 4 * config.num_frames * pixels),
                          (place, max(decoded_frame, step))):
        free = device.free_memory(where)
        if free is not None and needed > free:
            raise MemoryError(f"{config.num_frames} frames of {config.width}x{config.height} need "
                              f"more than {needed / 1e9:.0f} GB of the {free / 1e9:.0f} GB free")
