"""Builds a model from weights that another program holds in memory."""
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import SampleConfig
from ..device import resolve_device, resolve_dtype
from ..model import Model
from .model_file import build_on_meta, load_weights


def model_from_state_dicts(
        *, base: Mapping[str, Tensor] | None = None, unet: Mapping[str, Tensor] | None = None,
        vae: Mapping[str, Tensor] | None = None, text_encoder: Mapping[str, Tensor] | None = None,
        motion: Mapping[str, Tensor] | None = None, sparsectrl: Mapping[str, Tensor] | None = None,
        configs: Mapping[str, Mapping[str, Any]] | None = None, motion_version: str | None = None,
        sample: SampleConfig | None = None, name: str = "model",
        device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> Model:
    """Return a model with copies of weights in memory. No file is read or written.

    The keys are those of diffusers or LDM.

    Args:
        base: UNet, VAE and text encoder together, as in a single-file checkpoint.
        unet: UNet in place of the base's. A UNetMotionModel brings its motion modules.
        vae: VAE in place of the base's.
        text_encoder: Text encoder in place of the base's.
        motion: Motion module of AnimateDiff, or a diffusers MotionAdapter.
        sparsectrl: SparseCtrl of AnimateDiff.
        configs: Content of diffusers' config.json by part. Networks of other sizes than Stable
            Diffusion's need it: {"unet": {"attention_head_dim": 4, "norm_num_groups": 8}}.
        motion_version: "v1", "v2" or "v3". Motion modules without positional encodings need it.
        sample: Settings of the model; by default those that suit its motion module.
        name: Name of the model.
        device: As for `load_model`.
        dtype: As for `load_model`.

    Raises:
        InputError: If a part or a tensor is missing, extra, misshapen or not finite, or belongs to
            another family of models.
    """
    # Imported here, so that `import mcl` does not import the converter.
    from .containers import Checkpoint, wrap_tensor
    from .convert import plan_conversion
    from .detect import DetectedCheckpoint, detect, detect_networks
    states = {"base": base, "unet": unet, "vae": vae, "text_encoder": text_encoder,
              "motion": motion, "sparsectrl": sparsectrl}
    parts: dict[str, DetectedCheckpoint] = {}
    for role, state in states.items():
        if state is None:
            continue
        prefix = f"{role}." if role in ("unet", "vae", "text_encoder") else ""
        checkpoint = Checkpoint(
            {prefix + key: wrap_tensor(tensor) for key, tensor in state.items()}, (),
            configs={part: dict(config) for part, config in (configs or {}).items()},
            version=motion_version or "", path=Path(role))
        detected = detect_networks(checkpoint) if prefix else detect(checkpoint)
        parts |= dict.fromkeys(detected.key_maps, detected)
    plan = plan_conversion(name, parts, [])
    config = dataclasses.replace(plan.config, sample=sample or plan.config.sample)
    resolved = resolve_device(device)
    weights = plan.tensors(resolve_dtype(dtype, resolved))
    return load_weights(build_on_meta(config), (
        (key, weight.to(resolved)) for key, weight in zip(plan.shapes, weights, strict=True)))
