"""ComfyUI node: clone the motion of a batch of frames into a new clip.

Install this package into ComfyUI's Python (`pip install .`), and copy this file to the folder
`custom_nodes` of ComfyUI.
"""
from functools import lru_cache

import torch
from einops import rearrange

import mcl
from mcl.presets import build_config

try:
    from comfy.utils import ProgressBar
except ImportError:             # outside ComfyUI
    ProgressBar = None


@lru_cache(maxsize=1)
def load_model(path: str) -> mcl.Model:
    """Return the model of a file, or the demo model for an empty path; keeps the last one."""
    return mcl.load_model(path or None)


class MotionCloneNode:
    """Node with a reference clip and a prompt as inputs, and the generated clip as output."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "clone"
    CATEGORY = "video/MotionClone"

    @classmethod
    def INPUT_TYPES(cls) -> dict:       # noqa: N802, ComfyUI's name
        """Return the types and ranges of the inputs."""
        return {"required": {
            "reference": ("IMAGE",),
            "prompt": ("STRING", {"default": "a red star on a navy background", "multiline": True}),
            "seed": ("INT", {"default": 0, "min": 0, "max": 2 ** 64 - 1}),
            "steps": ("INT", {"default": 0, "min": 0, "max": 1000,
                              "tooltip": "sampling steps; 0 for the model's own number"}),
            "motion_weight": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 1e6, "step": 100.0,
                                        "tooltip": "weight of the motion; 0 disables it, -1 is the "
                                                   "model's own weight"}),
            "weights": ("STRING", {"default": "", "tooltip": "file that convert_weights.py wrote; "
                                                             "empty for the demo model"})}}

    @torch.inference_mode(False)        # ComfyUI's inference mode forbids the gradient
    def clone(self, reference: torch.Tensor, prompt: str, seed: int, steps: int,
              motion_weight: float, weights: str) -> tuple[torch.Tensor]:
        """Return a clip (f, H, W, 3) in [0, 1] that moves like the reference (n, h, w, 3)."""
        model = load_model(weights.strip())
        defaults = model.config.sample
        settings: dict = {} if motion_weight < 0 else {"motion_weight": motion_weight}
        if steps:       # the guided steps keep their share of all steps
            settings |= {name: -(-getattr(defaults, name) * steps // defaults.steps) for name in (
                "steps", "guidance_steps", "guidance_warmup_steps", "guidance_cooldown_steps")}
        bar = ProgressBar(build_config(defaults, **settings).steps) if ProgressBar else None
        frames = rearrange(reference.clamp(0, 1) * 2 - 1, "f h w c -> f c h w")
        clip = mcl.clone(frames, prompt, model=model, seed=seed, **settings,
                         callback=lambda step: bar.update(1) if bar else None)
        return (rearrange(clip.frames.clamp(-1, 1) / 2 + 0.5, "f c h w -> f h w c"),)


NODE_CLASS_MAPPINGS = {"MotionCloneNode": MotionCloneNode}
NODE_DISPLAY_NAME_MAPPINGS = {"MotionCloneNode": "MotionClone"}
