"""A model of weights that another program holds in memory."""
import warnings
from pathlib import Path
from typing import Any, Mapping

import torch
from torch import Tensor

from .model_file import build_on_meta, load_weights
from ..device import resolve_device, resolve_dtype
from ..model import Model
from .convert import plan
from .detect import FOREIGN_PART, Source, networks, detect
from .lazy import Checkpoint, LazyTensor


def model_from_state_dicts(
        *, base: Mapping[str, Tensor] | None = None, unet: Mapping[str, Tensor] | None = None,
        vae: Mapping[str, Tensor] | None = None, text_encoder: Mapping[str, Tensor] | None = None,
        motion: Mapping[str, Tensor] | None = None, sparsectrl: Mapping[str, Tensor] | None = None,
        configs: Mapping[str, Mapping[str, Any]] | None = None, name: str = "model",
        device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> Model:
    """A model of state dicts in the names of diffusers or LDM, copied; no file is read or written.

    base     UNet, VAE and text encoder in one, as a single-file checkpoint has them
    unet, vae, text_encoder, motion, sparsectrl
             each by itself, in place of the base's; a UNetMotionModel's `unet` holds the motion too
    configs  what diffusers' config.json says of a part, by its name: above all of a small model,
             {"unet": {"attention_head_dim": 4, "norm_num_groups": 8}}
    device, dtype   as `load_model` takes them

    Raises InputError where a part or a tensor is missing, extra, mis-shaped or not finite, and, by
    its name, for another family of models.
    """
    given = {"base": base, "unet": unet, "vae": vae, "text_encoder": text_encoder,
             "motion": motion, "sparsectrl": sparsectrl}
    said = {part: dict(config) for part, config in (configs or {}).items()}
    parts: dict[str, Source] = {}
    for role, state in given.items():
        if state is None:
            continue
        alone = role in ("unet", "vae", "text_encoder")
        checkpoint = Checkpoint({f"{role}.{key}" if alone else key: lazy(t)
                                 for key, t in state.items()}, (), configs=said)
        source = networks(Path(role), checkpoint) if alone else detect(Path(role), checkpoint)
        parts |= {part: source for part in source.parts}
        for why in {why for why in source.dropped.values() if why.endswith(FOREIGN_PART)}:
            warnings.warn(f"{role}: left out: what is {why}", stacklevel=2)
    chosen = plan(name, parts, [])
    where = resolve_device(device)
    weights = chosen.tensors(resolve_dtype(dtype, where))
    return load_weights(build_on_meta(chosen.config), ((key, weight.to(where))
                                            for key, weight in zip(chosen.shapes, weights)))


def lazy(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach())
